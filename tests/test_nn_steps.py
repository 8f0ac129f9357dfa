"""attnfast.nn: what a step allocates, how parameters begin, and how hard attention draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from attnfast.nn import (
    Attention,
    BahdanauAttention,
    ContentAttention,
    HardAttention,
    LocationAttention,
    LocationSensitiveAttention,
    LuongAttention,
)

Q, M, U, B, TOKENS = 48, 64, 32, 2, 60013  # all else together is smaller than a byte a token

# --- what a step allocates -------------------------------------------------------------------------------------------

STEPS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and how many weights a token of the memory has
    "attention": (lambda: Attention(Q, M, heads=4), 4),
    "attention-grouped": (lambda: Attention(Q, M, heads=4, kv_heads=2), 4),
    "attention-additive": (lambda: Attention(Q, M, heads=4, score="additive"), 4),
    "attention-cosine": (lambda: Attention(Q, M, heads=2, score="cosine"), 2),
    "bahdanau": (lambda: BahdanauAttention(Q, M, U), 1),
    "luong-dot": (lambda: LuongAttention(M, M, "dot"), 1),
    "luong-general": (lambda: LuongAttention(Q, M), 1),
    "luong-concat": (lambda: LuongAttention(Q, M, "concat"), 1),
    "luong-location": (lambda: LuongAttention(Q, M, "location", max_length=TOKENS), 1),
    "luong-general-m": (lambda: LuongAttention(Q, M, local="m", window=2), 1),
    "luong-concat-m": (lambda: LuongAttention(Q, M, "concat", local="m", window=2), 1),
    "luong-general-p": (lambda: LuongAttention(Q, M, local="p", window=2), 1),
    "location": (lambda: LocationAttention(Q, M, TOKENS), 1),
    "content": (lambda: ContentAttention(Q, M), 1),
}


def allocations(call: Callable[[], Any]) -> list[int]:
    """Bytes of every tensor that torch allocated during a call, those freed again included."""
    call()  # what the first call of a process sets up does not count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the profiler saw no memory at all"
    return [event.nbytes() for event in events if event.nbytes() > 0]


def prepared(module: Any, dtype: torch.dtype) -> tuple[Tensor, Any, Tensor]:
    module.to(dtype)
    memory = torch.randn(B, TOKENS, module.memory_size, dtype=dtype)
    return torch.randn(B, module.query_size, dtype=dtype), module.project_memory(memory), torch.tensor([TOKENS, 900])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", STEPS)
@torch.no_grad()
def test_a_step_allocates_its_outputs_and_nothing_else_that_grows(name: str, dtype: torch.dtype) -> None:
    make, heads = STEPS[name]
    module: Any = make()
    query, projected, lengths = prepared(module, dtype)
    extra = {"position": 7} if getattr(module, "local", None) == "m" else {}
    found = allocations(lambda: module.step(query, projected, lengths, **extra))
    assert [size for size in found if size >= TOKENS] == [B * heads * TOKENS * dtype.itemsize]
    found = allocations(lambda: module.step(query, projected, lengths, return_weights=False, **extra))
    assert sum(found) < TOKENS


@torch.no_grad()
def test_a_step_of_hard_attention_allocates_its_outputs_and_a_draw_the_running_sums() -> None:
    module = HardAttention(Q, M, U)
    query, projected, lengths = prepared(module, torch.float32)
    row = B * TOKENS * 4
    for training, wanted in ((False, [row]), (True, [row, row])):
        module.train(training)
        found = allocations(lambda: module.step(query, projected, lengths))
        assert [size for size in found if size >= TOKENS] == wanted


@torch.no_grad()
def test_a_step_of_location_sensitive_attention_allocates_what_its_notes_say() -> None:
    module = LocationSensitiveAttention(Q, M, U, filters=4, kernel_size=5)
    query, projected, lengths = prepared(module, torch.float32)
    row = B * TOKENS * 4
    first = allocations(lambda: module.step(query, projected, lengths))
    assert [size for size in first if size >= TOKENS] == [row]
    _, weights = module.step(query, projected, lengths)
    later = allocations(lambda: module.step(query, projected, lengths, previous=weights))
    # The weights, the keys, the features; the convolution of torch works on 16 filters at a time.
    assert sorted(size for size in later if size >= TOKENS)[:2] == [row, 4 * row]
    assert row * (1 + U + 4) <= sum(later) < row * (1 + U + 4 + 16) + 100_000


# --- how parameters begin --------------------------------------------------------------------------------------------


def assert_normal(x: Tensor, std: float) -> None:
    """Mean 0, this deviation, and the fourth moment of a Gaussian; six standard errors each."""
    x, count = x.detach().double(), x.numel()
    assert count >= 4000, "too few to tell"
    assert abs(x.mean()) < 6 * std / math.sqrt(count)
    assert abs(x.std() / std - 1) < 6 / math.sqrt(2 * count)
    assert abs((x / std).pow(4).mean() - 3) < 6 * math.sqrt(96 / count)  # uniform: 1.8


def assert_uniform(x: Tensor, bound: float) -> None:
    x, count = x.detach().double(), x.numel()
    assert count >= 4000, "too few to tell"
    assert 0.99 * bound < x.abs().max() <= bound * (1 + 1e-6)
    assert abs(x.mean()) < 6 * bound / math.sqrt(3 * count)
    assert abs(x.square().mean() / (bound**2 / 3) - 1) < 6 * math.sqrt(0.8 / count)


def test_bahdanau_begins_as_published() -> None:
    module = BahdanauAttention(100, 120, 80)
    assert_normal(module.query_weight, 0.001)
    assert_normal(module.memory_weight, 0.001)
    assert module.score_weight.eq(0).all() and module.bias.eq(0).all()
    _, weights = module(torch.randn(2, 100), torch.randn(2, 8, 120), torch.tensor([8, 4]))
    torch.testing.assert_close(weights, torch.tensor([[1 / 8] * 8, [1 / 4] * 4 + [0] * 4]))


def test_luong_begins_as_published() -> None:
    for module in (
        LuongAttention(70, 80, "general"),
        LuongAttention(4500, 4, "concat", local="p"),
        LuongAttention(70, 60, "location", max_length=70),
        LocationAttention(70, 60, 70),
    ):
        for parameter in module.parameters():
            assert_uniform(parameter, 0.1)


def test_location_sensitive_begins_as_in_the_authors_program() -> None:
    module = LocationSensitiveAttention(60, 60, 4000, filters=20)
    assert module.location_kernel.shape == (20, 1, 201)
    for name, parameter in module.named_parameters():
        if name == "bias":
            assert parameter.eq(0).all()
        else:
            assert_normal(parameter, 0.1)


def test_hard_attention_begins_as_in_the_authors_program() -> None:
    module = HardAttention(30, 30, 4000)
    for parameter in (module.query_weight, module.memory_weight, module.score_weight):
        assert_normal(parameter, 0.01)
    assert module.bias.eq(0).all()
    assert HardAttention(30, 30, 40, bias=False).bias is None


def test_attention_and_content_begin_after_glorot() -> None:
    module = Attention(96, 80, heads=48, head_size=100, kv_heads=4, score="additive")
    content = ContentAttention(70, 80)
    for layer in (module.query, module.key, module.value, module.output, content.key):
        assert_uniform(layer.weight, math.sqrt(6 / sum(layer.weight.shape)))
        assert layer.bias.eq(0).all()
    assert_uniform(module.score_weight, 0.1)  # 1 / sqrt(100)
    assert_uniform(ContentAttention(4000, 3).strength.weight, math.sqrt(6 / 4002))
    assert content.strength.bias.eq(0).all()


def test_drawing_anew() -> None:
    for module in (
        BahdanauAttention(5, 6, 7), LuongAttention(5, 6), LocationAttention(5, 6, 7), Attention(6, heads=2),
        ContentAttention(5, 6), LocationSensitiveAttention(5, 6, 7), HardAttention(5, 6, 7),
    ):  # fmt: skip
        before = [parameter.clone() for parameter in module.parameters()]
        module.reset_parameters()
        changed = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
        assert changed == [bool(x.ne(0).any()) for x in before]


# --- draws -----------------------------------------------------------------------------------------------------------


def with_scores(scores: Tensor, memory: Tensor) -> tuple[HardAttention, Tensor]:
    """A module and a memory whose additive scores are nearly these, for every query."""
    module = HardAttention(2, memory.shape[-1], 1, bias=False)
    with torch.no_grad():
        module.query_weight.zero_()
        module.memory_weight.zero_()[0, 0] = 1e-3
        module.score_weight.fill_(1e3)
    memory = memory.clone()
    memory[..., 0] = scores
    return module, memory


def test_draws_follow_the_weights() -> None:
    scores = torch.tensor([0.5, -30.0, 1.0, -1.0, 0.0, 2.0])
    module, memory = with_scores(scores, torch.randn(1, 6, 3))
    lengths, count = torch.tensor([5]), 200_000
    torch.manual_seed(3)
    got = module(torch.zeros(1, count, 2), memory, lengths)
    wanted = torch.cat([scores[:5].softmax(0), torch.zeros(1)])
    torch.testing.assert_close(got.weights[0, 0], wanted, rtol=1e-3, atol=1e-6)
    counts = torch.bincount(got.choice[0], minlength=6)
    assert counts[1] == 0 and counts[5] == 0
    spread = (count * wanted * (1 - wanted)).sqrt()
    assert ((counts - count * wanted).abs() <= 5 * spread + 1e-3).all()
    assert torch.equal(got.context[0], memory[0, got.choice[0]])
    torch.manual_seed(4)
    assert not torch.equal(module(torch.zeros(1, count, 2), memory, lengths).choice, got.choice)


def test_the_largest_draw_stays_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share just below one must not fall behind the last position that can be seen, nor zero before the first."""
    module, memory = with_scores(torch.tensor([-900.0, 0.3, 0.1, 0.2, -900.0, 0.0]), torch.randn(1, 6, 3))
    for share, place in ((1 - 2**-24, 3), (0.0, 1)):
        monkeypatch.setattr(torch, "rand_like", lambda x, share=share: torch.full_like(x, share))
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            got = module.to(dtype)(torch.zeros(1, 2, dtype=dtype), memory.to(dtype), torch.tensor([5]))
            assert got.choice.tolist() == [place]
    module, memory = with_scores(torch.zeros(9), torch.randn(1, 9, 3))  # in bfloat16 seven weights sum to 0.998
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 1 - 2**-24))
    got = module.bfloat16()(torch.zeros(1, 2, dtype=torch.bfloat16), memory.bfloat16(), torch.tensor([7]))
    assert got.choice.tolist() == [6]


@pytest.mark.parametrize("training", [False, True])
def test_hard_attention_without_memory_and_with_nan(training: bool) -> None:
    module = HardAttention(4, 3, 5).train(training)
    empty = module(torch.randn(2, 6, 4), torch.randn(2, 0, 3))
    assert empty.context.shape == (2, 6, 3) and empty.weights.shape == (2, 6, 0)
    assert empty.context.eq(0).all() and empty.log_prob.eq(0).all() and empty.choice.eq(-1).all()
    memory = torch.randn(2, 7, 3)
    memory[0, 2] = math.nan
    seen = module(torch.randn(2, 4), memory)
    assert seen.context[0].isnan().all() and seen.log_prob[0].isnan() and seen.choice[0] == -1
    assert seen.context[1].isfinite().all() and seen.log_prob[1].isfinite()
    hidden = module(torch.randn(2, 4), memory, torch.tensor([2, 7]))
    assert hidden.context.isfinite().all() and hidden.choice[0] in (0, 1)


def test_draws_under_vmap_follow_its_randomness() -> None:
    module, memory = with_scores(torch.zeros(9), torch.randn(1, 9, 3))
    queries = torch.zeros(40, 1, 2)
    call = lambda query: module(query, memory).choice  # noqa: E731
    same = torch.vmap(call, randomness="same")(queries)
    assert same.eq(same[0]).all()
    assert len(torch.vmap(call, randomness="different")(queries).unique()) > 5
    with pytest.raises(RuntimeError, match="random"):
        torch.vmap(call)(queries)
