"""attnfast.nn against the papers' formulas, written here once more in plain torch, one sample and query at a time."""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnfast
from attnfast.nn import (
    Attention,
    BahdanauAttention,
    ContentAttention,
    HardAttention,
    LocationAttention,
    LocationSensitiveAttention,
    LuongAttention,
    ProjectedMemory,
)

F64 = torch.float64
Q, M, U, B, TQ, TK = 4, 3, 5, 2, 3, 7
LENGTHS = [5, 7]


def rand(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def loud(module: nn.Module) -> Any:
    """In float64 with parameters of ordinary size, so that nothing hides behind a small initial value."""
    module = module.double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(rand(*parameter.shape, seed=100 + number) * 0.7)
    return module


# --- the papers -----------------------------------------------------------------------------------------------------

Scores = Callable[[Any, Tensor, Tensor, int], Tensor]


def bahdanau(module: Any, state: Tensor, notes: Tensor, step: int) -> Tensor:
    bias = 0 if module.bias is None else module.bias
    return torch.stack(
        [module.score_weight @ torch.tanh(module.query_weight @ state + module.memory_weight @ h + bias) for h in notes]
    )


def luong(module: Any, state: Tensor, notes: Tensor, step: int) -> Tensor:
    if module.score == "dot":
        return notes @ state
    if module.score == "general":
        return torch.stack([h @ module.query_weight @ state for h in notes])
    if module.score == "location":
        return (module.query_weight @ state)[: len(notes)]
    both = torch.cat([module.query_weight, module.memory_weight], 1)
    return torch.stack([module.score_weight @ torch.tanh(both @ torch.cat([state, h])) for h in notes])


def location(module: Any, state: Tensor, notes: Tensor, step: int) -> Tensor:
    return (module.query_weight @ state)[: len(notes)]


def content(module: Any, state: Tensor, notes: Tensor, step: int) -> Tensor:
    key = module.key.weight @ state + module.key.bias
    emitted = module.strength.weight @ state + module.strength.bias
    cosines = torch.stack([(key @ h) / (key.norm() * h.norm()) for h in notes])
    focus = (torch.log1p(emitted[0].exp()) * cosines).softmax(0)
    if module.sharpen:
        focus = focus ** (1 + torch.log1p(emitted[1].exp()))
        focus = focus / focus.sum()
    return focus.log()  # its softmax is the focus


def paper(scores: Scores, module: Any, query: Tensor, memory: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(contexts, weights) of ``[B, T_q, Q]`` and ``[B, T_k, M]``: scores of each sample's own notes, softmax, sum."""
    weights = torch.zeros(*query.shape[:2], memory.shape[1], dtype=F64)
    contexts = []
    for b, length in enumerate(lengths):
        notes = memory[b, :length]
        for t, state in enumerate(query[b]):
            if length == 0:
                contexts.append(torch.zeros(memory.shape[2], dtype=F64))
                continue
            energies = scores(module, state, notes, t)
            first, last, factor = 0, length, torch.ones(length, dtype=F64)
            if getattr(module, "local", None) == "m":
                first, last = max(0, t - module.window), max(0, min(length, t + module.window + 1))
            if getattr(module, "local", None) == "p":
                center = length * torch.sigmoid(module.position_score @ torch.tanh(module.position_weight @ state))
                first = max(0, math.ceil(center.item() - module.window))
                last = min(length, math.floor(center.item() + module.window) + 1)
                sigma = module.window / 2
                factor = torch.exp(-((torch.arange(length, dtype=F64) - center) ** 2) / (2 * sigma**2))
            weights[b, t, first:last] = energies[first:last].softmax(0) * factor[first:last]
            contexts.append(weights[b, t, :length] @ notes)
    return torch.stack(contexts).reshape(*query.shape[:2], -1), weights


MODULES: dict[str, tuple[Callable[[], nn.Module], Scores]] = {
    "bahdanau": (lambda: BahdanauAttention(Q, M, U), bahdanau),
    "bahdanau-plain": (lambda: BahdanauAttention(Q, M, U, bias=False), bahdanau),
    "luong-dot": (lambda: LuongAttention(M, M, "dot"), luong),
    "luong-general": (lambda: LuongAttention(Q, M), luong),
    "luong-concat": (lambda: LuongAttention(Q, M, "concat"), luong),
    "luong-location": (lambda: LuongAttention(Q, M, "location", max_length=9), luong),
    "luong-general-m": (lambda: LuongAttention(Q, M, local="m", window=2), luong),
    "luong-concat-m": (lambda: LuongAttention(Q, M, "concat", local="m", window=1), luong),
    "luong-location-m": (lambda: LuongAttention(Q, M, "location", local="m", window=1, max_length=8), luong),
    "luong-general-p": (lambda: LuongAttention(Q, M, local="p", window=2), luong),
    "luong-dot-p": (lambda: LuongAttention(M, M, "dot", local="p", window=1), luong),
    "luong-concat-p": (lambda: LuongAttention(Q, M, "concat", local="p", window=2), luong),
    "location": (lambda: LocationAttention(Q, M, 8), location),
    "content": (lambda: ContentAttention(Q, M), content),
    "content-blunt": (lambda: ContentAttention(Q, M, sharpen=False), content),
}


def problem(name: str) -> tuple[Any, Scores, Tensor, Tensor]:
    make, scores = MODULES[name]
    module = loud(make())
    return module, scores, rand(B, TQ, module.query_size, seed=1), rand(B, TK, M, seed=2)


@pytest.mark.parametrize("name", MODULES)
def test_follows_the_paper(name: str) -> None:
    module, scores, query, memory = problem(name)
    for lengths in (LENGTHS, [TK, TK], [0, 1]):
        context, weights = paper(scores, module, query, memory, lengths)
        given = None if lengths == [TK, TK] else torch.tensor(lengths)
        got, got_weights = module(query, memory, given)
        torch.testing.assert_close(got, context)
        torch.testing.assert_close(got_weights, weights)
        torch.testing.assert_close(module(query, memory, given, return_weights="column_sum")[1], weights.sum(1))
        torch.testing.assert_close(module(query, memory, given, return_weights="row_max")[1], weights.amax(-1))
        alone, nothing = module(query, memory, given, return_weights=False)
        torch.testing.assert_close(alone, context)
        assert nothing is None


@pytest.mark.parametrize("name", MODULES)
def test_steps_on_a_projected_memory_are_rows(name: str) -> None:
    module, _, query, memory = problem(name)
    lengths = torch.tensor(LENGTHS)
    projected = module.project_memory(memory)
    assert isinstance(projected, ProjectedMemory)
    context, weights = module(query, memory, lengths)
    torch.testing.assert_close(module(query, projected, lengths)[0], context)
    for t in range(TQ):
        extra = {"position": t} if getattr(module, "local", None) == "m" else {}
        one = module.step(query[:, t], projected, lengths, **extra)
        torch.testing.assert_close(one, (context[:, t], weights[:, t]))
        nothing = module.step(query[:, t], projected, lengths, return_weights=False, **extra)
        torch.testing.assert_close(nothing[0], context[:, t])
        assert nothing[1] is None
    if getattr(module, "local", None) != "m":
        single, row = module(query[:, 1], memory, lengths)
        torch.testing.assert_close((single, row), (context[:, 1], weights[:, 1]))
        assert module(query[:, 1], memory, lengths, return_weights="column_sum")[1].shape == (B, TK)
        assert module(query[:, 1], memory, lengths, return_weights="row_max")[1].shape == (B,)


@pytest.mark.parametrize("name", MODULES)
def test_masks(name: str) -> None:
    """A mask hides what lengths hide; for one step it has no T_q axis."""
    module, _, query, memory = problem(name)
    if getattr(module, "local", None) == "p":
        module.local = None  # its S comes from the lengths alone
    mask = torch.arange(TK) < torch.tensor(LENGTHS).unsqueeze(1)
    wanted = module(query, memory, torch.tensor(LENGTHS))
    torch.testing.assert_close(module(query, memory, mask=mask.unsqueeze(1)), wanted)
    if getattr(module, "local", None) != "m":
        single = module(query[:, 0], memory, mask=mask)
        torch.testing.assert_close(single, (wanted[0][:, 0], wanted[1][:, 0]))


@pytest.mark.parametrize("name", MODULES)
def test_gradients(name: str) -> None:
    module, _, query, memory = problem(name)
    query, memory = query[:, :2], memory[:, :4]
    names = [n for n, _ in module.named_parameters()]

    def run(query: Tensor, memory: Tensor, *parameters: Tensor) -> Any:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, given, (query, memory, torch.tensor([3, 4])))

    leaves = [x.detach().clone().requires_grad_() for x in (query, memory, *module.parameters())]
    assert torch.autograd.gradcheck(run, leaves)
    grads = torch.autograd.grad(run(*leaves)[0].square().sum(), leaves)
    assert all(g.abs().max() > 1e-6 for g in grads), "a parameter without influence"


def test_local_p_uses_each_samples_own_length_and_does_not_normalise_again() -> None:
    module = loud(LuongAttention(Q, M, local="p", window=2))
    with torch.no_grad():
        module.position_score.zero_()  # sigmoid(0): the middle of each sample
    _, weights = module(rand(2, 1, Q), rand(2, 20, M), torch.tensor([20, 8]))
    assert weights[0, 0].nonzero().flatten().tolist() == [8, 9, 10, 11, 12]
    assert weights[1, 0].nonzero().flatten().tolist() == [2, 3, 4, 5, 6]
    assert (weights.sum(-1) < 0.9).all()


def test_local_m_computes_only_the_window_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    module = loud(LuongAttention(Q, M, local="m", window=2))
    memory, seen = module.project_memory(rand(B, 50, M)), []
    real = attnfast.functional.attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        seen.append(key.shape[2])
        return real(query, key, value, **options)

    monkeypatch.setattr(attnfast.functional, "attention", spy)
    for position in (0, 20, 49, 51, 60):
        _, weights = module.step(rand(B, Q), memory, torch.tensor([50, 21]), position=position)
        inside = list(range(max(0, position - 2), min(50, position + 3)))
        assert weights[0].nonzero().flatten().tolist() == inside
        assert weights[1].nonzero().flatten().tolist() == [p for p in inside if p < 21]
    assert seen == [3, 5, 3, 1, 0]


# --- location-sensitive and hard attention --------------------------------------------------------------------------


def test_location_sensitive_attention_follows_the_paper() -> None:
    module = loud(LocationSensitiveAttention(Q, M, U, filters=2, kernel_size=5))
    memory, lengths = rand(B, TK, M, seed=2), torch.tensor(LENGTHS)
    projected = module.project_memory(memory)
    previous = None
    expected = [torch.zeros(TK, dtype=F64) for _ in range(B)]
    for t in range(3):
        query = rand(B, Q, seed=20 + t)
        context, weights = module.step(query, projected, lengths, previous=previous)
        other = module(query, memory, lengths, previous=previous)
        torch.testing.assert_close(other, (context, weights))
        for b, length in enumerate(LENGTHS):
            padded = torch.cat([torch.zeros(2, dtype=F64), expected[b], torch.zeros(2, dtype=F64)])
            energies = []
            for j in range(length):
                features = module.location_kernel[:, 0] @ padded[j : j + 5]
                hidden = module.query_weight @ query[b] + module.memory_weight @ memory[b, j]
                hidden = hidden + module.location_weight @ features + module.bias
                energies.append(module.score_weight @ torch.tanh(hidden))
            focus = torch.stack(energies).softmax(0)
            expected[b] = torch.cat([focus, torch.zeros(TK - length, dtype=F64)])
            torch.testing.assert_close(context[b], focus @ memory[b, :length])
        torch.testing.assert_close(weights, torch.stack(expected))
        previous = weights
    mask = torch.arange(TK) < lengths.unsqueeze(1)
    torch.testing.assert_close(module(query, memory, previous=previous, mask=mask),
                               module(query, memory, lengths, previous=previous))  # fmt: skip
    assert module(query, memory, return_weights=False)[1] is None


def test_location_sensitive_gradients_through_two_steps() -> None:
    module = loud(LocationSensitiveAttention(2, 2, 3, filters=2, kernel_size=3))
    names = [n for n, _ in module.named_parameters()]

    class TwoSteps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, query: Tensor, memory: Tensor) -> Tensor:
            projected = self.inner.project_memory(memory)
            _, weights = self.inner.step(query, projected)
            return self.inner.step(2 * query, projected, previous=weights)[0]

    whole = TwoSteps()

    def run(query: Tensor, memory: Tensor, *parameters: Tensor) -> Tensor:
        given = {f"inner.{n}": p for n, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(whole, given, (query, memory))

    leaves = [x.detach().clone().requires_grad_() for x in (rand(1, 2), rand(1, 4, 2), *module.parameters())]
    assert torch.autograd.gradcheck(run, leaves)
    assert all(g.abs().max() > 1e-6 for g in torch.autograd.grad(run(*leaves).square().sum(), leaves))


def test_hard_attention_chooses_one_annotation() -> None:
    module = loud(HardAttention(Q, M, U))
    query, memory, lengths = rand(B, 400, Q), rand(B, TK, M, seed=2), torch.tensor([5, 0])
    _, probabilities = paper(bahdanau, module, query[:, :5], memory, [5, 0])
    torch.manual_seed(8)
    got = module(query, memory, lengths)
    torch.manual_seed(8)
    assert torch.equal(module(query, module.project_memory(memory), lengths).choice, got.choice)
    torch.testing.assert_close(got.weights[:, :5], probabilities)
    assert got.choice[1].eq(-1).all() and got.context[1].eq(0).all() and got.log_prob[1].eq(0).all()
    rows, chosen = torch.arange(400), got.choice[0]
    torch.testing.assert_close(got.context[0], memory[0, chosen])
    torch.testing.assert_close(got.log_prob[0], got.weights[0, rows, chosen].log())
    counts = torch.stack([(chosen == j).sum() for j in range(5)])
    assert (counts - got.weights[0, :, :5].sum(0)).abs().max() < 60  # three standard deviations are at most 30
    module.eval()
    best = module(query, memory, lengths)
    assert torch.equal(best.choice[0], got.weights[0].argmax(-1))
    one = module.step(query[:, 3], module.project_memory(memory), lengths)
    for part, rows_of in zip(one, best, strict=True):
        torch.testing.assert_close(part, rows_of[:, 3])


def test_reinforce_reaches_every_parameter_and_the_context_only_the_memory() -> None:
    module = loud(HardAttention(Q, M, U))
    query, memory = rand(B, TQ, Q), rand(B, TK, M, seed=2).requires_grad_()
    got = module(query, memory)
    grads = torch.autograd.grad(got.log_prob.sum(), list(module.parameters()), retain_graph=True)
    assert all(g.abs().max() > 1e-6 for g in grads)
    (grad,) = torch.autograd.grad(got.context.sum(), memory, retain_graph=True)
    wanted = torch.zeros(B, TK, dtype=F64).scatter_add_(1, got.choice, torch.ones(B, TQ, dtype=F64))
    torch.testing.assert_close(grad, wanted.unsqueeze(-1).expand(-1, -1, M))
    through = torch.autograd.grad(got.context.sum(), list(module.parameters()), allow_unused=True)
    assert all(g is None or g.eq(0).all() for g in through)


# --- multi-head attention -------------------------------------------------------------------------------------------


def multihead(module: Attention, query: Tensor, memory: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Head by head, from slices of the projections' weights."""
    n, group = module.head_size, module.heads // module.kv_heads
    outputs, weights = [], []
    for h in range(module.heads):
        own, shared = slice(h * n, h * n + n), slice(h // group * n, h // group * n + n)
        q = query @ module.query.weight[own].t() + module.query.bias[own]
        k = memory @ module.key.weight[shared].t() + module.key.bias[shared]
        v = memory @ module.value.weight[shared].t() + module.value.bias[shared]
        pairs = q[:, :, None], k[:, None]
        if module.score == "additive":
            s = (module.score_weight[h] * torch.tanh(pairs[0] + pairs[1])).sum(-1)
        elif module.score == "l2":
            s = -(pairs[0] - pairs[1]).square().sum(-1)
        elif module.score == "cosine":
            s = nn.functional.cosine_similarity(*pairs, dim=-1)
        else:
            s = (pairs[0] * pairs[1]).sum(-1) / (math.sqrt(n) if module.score == "scaled_dot" else 1)
        hidden = torch.arange(memory.shape[1]) >= torch.tensor(lengths).view(-1, 1, 1)
        w = s.masked_fill(hidden, -math.inf).softmax(-1)
        weights.append(w)
        outputs.append(w @ v)
    return torch.cat(outputs, -1) @ module.output.weight.t() + module.output.bias, torch.stack(weights, 1)


@pytest.mark.parametrize("score", ["scaled_dot", "dot", "cosine", "l2", "additive"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_multi_head_attention(score: str, kv_heads: int) -> None:
    module = loud(Attention(8, M, heads=4, kv_heads=kv_heads, score=score))
    query, memory, lengths = rand(B, TQ, 8), rand(B, TK, M, seed=2), torch.tensor(LENGTHS)
    wanted = multihead(module, query, memory, LENGTHS)
    torch.testing.assert_close(module(query, memory, lengths, return_weights=True), wanted)
    projected = module.project_memory(memory)
    torch.testing.assert_close(module(query, projected, lengths)[0], wanted[0])
    for mode, truth in ((True, wanted[1]), ("column_sum", wanted[1].sum(-2)), ("row_max", wanted[1].amax(-1))):
        torch.testing.assert_close(module(query, memory, lengths, return_weights=mode)[1], truth)
        one, rows = module(query[:, 1], projected, lengths, return_weights=mode)
        torch.testing.assert_close(one, wanted[0][:, 1])
        torch.testing.assert_close(rows, wanted[1][:, :, 1].amax(-1) if mode == "row_max" else wanted[1][:, :, 1])
    step = module.step(query[:, 2], projected, lengths)
    torch.testing.assert_close(step, (wanted[0][:, 2], wanted[1][:, :, 2]))


def test_multi_head_options_reach_the_function() -> None:
    module = loud(Attention(6, heads=2, head_size=5, normalizer="sparsemax", dropout=1.0))
    x = rand(1, 6, 6)
    output, weights = module.eval()(x, x, causal="top_left", return_weights=True)
    assert weights.shape == (1, 2, 6, 6) and weights.triu(1).eq(0).all()
    assert weights.tril().eq(0).sum() > 30 + 2  # sparse below the diagonal as well
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 6, dtype=F64))
    dropped = module.train()(x, x)[0]
    torch.testing.assert_close(dropped, module.output.bias.expand(1, 6, 6))
    assert not torch.equal(dropped, output)


@pytest.mark.parametrize("score", ["scaled_dot", "additive"])
def test_multi_head_gradients(score: str) -> None:
    module = loud(Attention(4, heads=2, kv_heads=1, score=score))
    names = [n for n, _ in module.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, x))[0]

    assert torch.autograd.gradcheck(run, [rand(1, 3, 4).requires_grad_(), *module.parameters()])


# --- texts, errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (BahdanauAttention(4, 3, 5), "BahdanauAttention(query_size=4, memory_size=3, units=5, bias=True)"),
        (LuongAttention(4, 3), "LuongAttention(query_size=4, memory_size=3, score='general')"),
        (
            LuongAttention(4, 3, "location", "p", 2, 9),
            "LuongAttention(query_size=4, memory_size=3, score='location', local='p', window=2, max_length=9)",
        ),
        (LocationAttention(4, 3, 8), "LocationAttention(query_size=4, memory_size=3, max_length=8)"),
        (HardAttention(4, 3, 5, bias=False), "HardAttention(query_size=4, memory_size=3, units=5, bias=False)"),
    ],
)
def test_texts(module: nn.Module, text: str) -> None:
    assert repr(module) == text


def test_texts_of_modules_with_layers() -> None:
    head = "(heads=4, kv_heads=2, head_size=2, score='l2', normalizer='softmax', dropout=0.1)"
    shown = Attention(8, heads=4, kv_heads=2, score="l2", dropout=0.1).extra_repr()
    assert f"({shown})" == head
    assert ContentAttention(4, 3).extra_repr() == "query_size=4, memory_size=3, sharpen=True"
    shown = LocationSensitiveAttention(4, 3, 5, 2, 7).extra_repr()
    assert shown == "query_size=4, memory_size=3, units=5, filters=2, kernel_size=7, bias=True"


x2, x3 = torch.zeros(2, 4), torch.zeros(2, 6, 3)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "size": (lambda: BahdanauAttention(0, 3, 5), ValueError, "query_size: expected an integer > 0, got 0"),
    "size-type": (lambda: BahdanauAttention(4, 3, 5.0), TypeError, "units: expected an integer > 0, got 5.0"),
    "score": (lambda: LuongAttention(4, 3, "mlp"), ValueError, "score: expected one of 'dot'.*got 'mlp'"),
    "dot-sizes": (lambda: LuongAttention(4, 3, "dot"), ValueError, "memory_size: .*query_size = 4, got 3"),
    "local": (lambda: LuongAttention(4, 3, local="q"), ValueError, "local: expected None, 'm' or 'p', got 'q'"),
    "max-length": (lambda: LuongAttention(4, 3, "location"), ValueError, "max_length: .*got None"),
    "window": (lambda: LuongAttention(4, 3, local="m", window=0), ValueError, "window: expected an integer > 0, got 0"),
    "kernel": (lambda: LocationSensitiveAttention(4, 3, 5, 2, 4), ValueError, "kernel_size: expected an odd .*got 4"),
    "kv-heads": (lambda: Attention(8, heads=4, kv_heads=3), ValueError, "kv_heads: expected a divisor .*4, got 3"),
    "heads": (lambda: Attention(8, heads=3), ValueError, "heads: expected a divisor of query_size = 8.*got 3"),
    "dropout": (lambda: Attention(8, dropout=2.0), ValueError, r"dropout: expected a probability .*got 2\.0"),
    "attention-score": (lambda: Attention(8, score="general"), ValueError, "score: expected one of 'scaled_dot'"),
    "query": (
        lambda: LuongAttention(4, 3)(x3, x3),
        ValueError,
        r"query: expected \[B, T_q, 4\] or \[B, 4\], got \[2, 6, 3\]",
    ),
    "memory": (lambda: LuongAttention(4, 3)(x2, x2), ValueError, r"memory: expected \[B, T_k, 3\], got \[2, 4\]"),
    "batch": (lambda: LuongAttention(4, 3)(x2, x3[:1]), ValueError, r"memory: expected B = 2 \(query's\), got 1"),
    "too-long": (lambda: LocationAttention(4, 3, 5)(x2, x3), ValueError, "memory: .*max_length = 5 positions, got 6"),
    "step-memory": (lambda: LuongAttention(4, 3).step(x2, x3), TypeError, "memory: step takes what project_memory"),
    "step-query": (
        lambda: LuongAttention(4, 3).step(x2.unsqueeze(1), ProjectedMemory(x3, x3)),
        ValueError,
        r"query: step expects \[B, query_size\], got \[2, 1, 4\]",
    ),
    "local-m-one": (lambda: LuongAttention(4, 3, local="m")(x2, x3), ValueError, "query: local-m expects all steps"),
    "local-m-step": (
        lambda: LuongAttention(4, 3, local="m").step(x2, ProjectedMemory(x3, x3)),
        ValueError,
        "position: .*got None",
    ),
    "previous": (
        lambda: LocationSensitiveAttention(4, 3, 5)(x2, x3, previous=x2),
        ValueError,
        r"previous: expected \[B, T_k\] = \[2, 6\], got \[2, 4\]",
    ),
    "sensitive-rows": (
        lambda: LocationSensitiveAttention(4, 3, 5)(x2.unsqueeze(1), x3),
        ValueError,
        r"query: expected one step \[B, 4\], got \[2, 1, 4\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use(name: str) -> None:
    call, exception, pattern = WRONG[name]
    with pytest.raises(exception, match=pattern):
        call()


@pytest.mark.parametrize("name", sorted(m.name for m in pkgutil.iter_modules(attnfast.nn.__path__)))
def test_examples_run(name: str) -> None:
    module = importlib.import_module(f"attnfast.nn.{name}")
    assert doctest.testmod(module).failed == 0
    for part in vars(module).values():
        public = isinstance(part, type) and part.__module__ == module.__name__ and issubclass(part, nn.Module)
        assert not public or ">>>" in part.__doc__ or part.__name__ == "MemoryAttention", f"{part.__name__}: no example"


def test_state_dict_and_module_names_are_public() -> None:
    module = BahdanauAttention(Q, M, U)
    assert list(module.state_dict()) == ["query_weight", "memory_weight", "score_weight", "bias"]
    other = BahdanauAttention(Q, M, U)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.query_weight, module.query_weight)
