"""attnfast.nn.KeyValueMemory and NTMHead against the papers' equations, one sample and slot at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnfast.nn import KeyValueMemory, NTMHead
from attnfast.nn._ntm import circular_shift, sharpen

F64 = torch.float64
D, SIZE, B, N = 9, 4, 3, 6
LENGTHS = [6, 2, 4]


def loud(module: nn.Module, scale: float = 0.6) -> Any:
    module, generator = module.double(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=F64))
    return module


def rand(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def words(*shape: int, seed: int = 3) -> Tensor:
    return torch.randint(0, D, shape, generator=torch.Generator().manual_seed(seed))


def assert_gradients(module: nn.Module, call: Callable[..., Any], inputs: list[Tensor]) -> None:
    """gradcheck of inputs and parameters; every parameter has an influence."""
    names = [name for name, _ in module.named_parameters()]

    def run(*leaves: Tensor) -> Any:
        given = dict(zip(names, leaves[len(inputs) :], strict=True))
        return call(lambda *x, **k: torch.func.functional_call(module, given, x, k), *leaves[: len(inputs)])

    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, *module.parameters())]
    assert torch.autograd.gradcheck(run, leaves)
    gradients = torch.autograd.grad(sum(x.square().sum() for x in run(*leaves)), leaves)
    assert all(g.abs().max() > 1e-6 for g in gradients), "without influence"


# --- key-value memory ------------------------------------------------------------------------------------------------


def phi(x: Tensor) -> Tensor:
    """The feature map of one text: counts of its words but nil, or the features as they are."""
    if x.is_floating_point():
        return x
    counts = torch.zeros(D, dtype=F64)
    for word in x.tolist():
        if word:
            counts[word] += 1
    return counts


def read_by_hand(module: Any, x: Tensor, keys: Tensor, values: Tensor, answers: Tensor):
    """(state, weights, scores) of one sample, whose pairs are all valid."""
    A = module.embedding.t()
    B_ = A if module.answer_embedding is None else module.answer_embedding.t()
    q, found = A @ phi(x), []
    for j in range(module.hops):
        energies = torch.stack([q @ (A @ phi(key)) for key in keys])
        p = energies.exp() / energies.exp().sum()
        q = module.hop_weight[j] @ (q + sum(w * (A @ phi(value)) for w, value in zip(p, values, strict=True)))
        found.append(p)
    return q, torch.stack(found), torch.stack([q @ (B_ @ phi(y)) for y in answers])


KINDS = {
    "words": (words(B, 5), words(B, N, 3, seed=4), words(B, N, 2, seed=5), words(7, 2, seed=6)),
    "features": (rand(B, D), rand(B, N, D, seed=4), rand(B, N, D, seed=5), rand(7, D, seed=6)),
    "mixed": (words(B, 5), rand(B, N, D, seed=4), words(B, N, 2, seed=5), words(B, 4, 2, seed=6)),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_key_value_memory_follows_the_paper(kind: str, tied: bool) -> None:
    module, (x, keys, values, answers) = loud(KeyValueMemory(D, SIZE, hops=3, tied=tied)), KINDS[kind]
    got = module(x, keys, values, torch.tensor(LENGTHS), candidates=answers)
    mask = torch.arange(N) < torch.tensor(LENGTHS).unsqueeze(1)
    masked = module(x, keys, values, mask=mask, candidates=answers)
    for b, n in enumerate(LENGTHS):
        own = answers[b] if answers.dim() == 3 else answers
        state, weights, scores = read_by_hand(module, x[b], keys[b, :n], values[b, :n], own)
        for result in (got, masked):
            torch.testing.assert_close(result.state[b], state)
            torch.testing.assert_close(result.weights[b], torch.nn.functional.pad(weights, (0, N - n)))
            torch.testing.assert_close(result.scores[b], scores)
    assert module(x, keys, values).scores is None
    torch.testing.assert_close(module(x, keys, values).weights.sum(-1), torch.ones(B, 3, dtype=F64))


def test_a_question_that_may_read_nothing_reads_zero() -> None:
    module, (x, keys, values, _) = loud(KeyValueMemory(D, SIZE, hops=1)), KINDS["features"]
    got = module(x, keys, values, torch.tensor([0, 6, 6]))
    torch.testing.assert_close(got.state[0], module.hop_weight[0] @ (x[0] @ module.embedding))
    assert got.weights[0].eq(0).all()


@pytest.mark.parametrize("tied", [True, False])
def test_key_value_memory_gradients(tied: bool) -> None:
    module = loud(KeyValueMemory(D, SIZE, tied=tied))

    def call(f: Callable[..., Any], x: Tensor, keys: Tensor, values: Tensor, answers: Tensor) -> tuple[Tensor, ...]:
        return tuple(f(x, keys, values, torch.tensor([3, 2]), candidates=answers))

    assert_gradients(module, call, [rand(2, D), rand(2, 3, D), rand(2, 3, D), rand(4, D)])
    asked, keys, values, answers = KINDS["words"]
    assert_gradients(module, lambda f: tuple(f(asked, keys, values, torch.tensor(LENGTHS), candidates=answers)), [])


def test_key_value_memory_begins_as_its_notes_say() -> None:
    module = KeyValueMemory(300, 50, hops=3, tied=False)
    for parameter in module.parameters():
        drawn = parameter.detach() if parameter is module.hop_weight else parameter.detach()[1:]
        assert abs(drawn.mean()) < 6 * 0.1 / math.sqrt(drawn.numel())
        assert abs(drawn.std() / 0.1 - 1) < 6 / math.sqrt(2 * drawn.numel())
        assert abs((drawn / 0.1).pow(4).mean() - 3) < 6 * math.sqrt(96 / drawn.numel())
    assert module.embedding[0].eq(0).all() and module.answer_embedding[0].eq(0).all()


# --- the head of a neural Turing machine -----------------------------------------------------------------------------

Q, M, SLOTS = 5, 3, 7


def head_by_hand(module: Any, x: Tensor, memory: Tensor, previous: Tensor) -> Tensor:
    """The weights of one sample, slot by slot."""
    key = module.key.weight @ x + module.key.bias
    strength, gate, sharpness, *shifts = module.control.weight @ x + module.control.bias
    cosines = torch.stack([key @ m / (key.norm() * m.norm()).clamp(min=1e-16) for m in memory])
    energies = torch.log1p(strength.exp()) * cosines
    content = energies.exp() / energies.exp().sum()
    g = 1 / (1 + (-gate).exp())
    gated = [g * content[i] + (1 - g) * previous[i] for i in range(len(memory))]
    s = torch.stack(shifts).exp() / torch.stack(shifts).exp().sum()
    moved = []
    for i in range(len(memory)):
        moved.append(sum(s[d + module.shift] * gated[(i - d) % len(memory)]
                         for d in range(-module.shift, module.shift + 1)))  # fmt: skip
    power = torch.stack(moved) ** (1 + torch.log1p(sharpness.exp()))
    return power / power.sum()


@pytest.mark.parametrize("shift", [0, 1, 2, 5])
@pytest.mark.parametrize("writes", [False, True])
def test_ntm_head_follows_the_paper(writes: bool, shift: int) -> None:
    module = loud(NTMHead(Q, M, shift=shift, writes=writes))
    x, memory, previous = rand(B, Q), rand(B, SLOTS, M, seed=4), rand(B, SLOTS, seed=5).softmax(-1)
    kept = memory.clone()
    result, weights = module(x, memory, previous)
    assert torch.equal(memory, kept)
    for b in range(B):
        w = head_by_hand(module, x[b], memory[b], previous[b])
        torch.testing.assert_close(weights[b], w)
        if writes:
            erase = torch.sigmoid(module.erase.weight @ x[b] + module.erase.bias)
            add = module.add.weight @ x[b] + module.add.bias
            expected = [memory[b, i] * (1 - w[i] * erase) + w[i] * add for i in range(SLOTS)]
            torch.testing.assert_close(result[b], torch.stack(expected))
        else:
            torch.testing.assert_close(result[b], sum(w[i] * memory[b, i] for i in range(SLOTS)))


@pytest.mark.parametrize("writes", [False, True])
def test_ntm_head_gradients_through_two_steps(writes: bool) -> None:
    module = loud(NTMHead(Q, M, writes=writes))

    def call(f: Callable[..., Any], x: Tensor, memory: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        first, weights = f(x, memory, previous.softmax(-1))
        second, again = f(x.sin(), first if writes else memory, weights)
        return second + (0 if writes else first), again

    assert_gradients(module, call, [rand(2, Q), rand(2, 4, M, seed=4), rand(2, 4, seed=5)])


def test_shifting_goes_round_the_ends() -> None:
    weights = torch.eye(5, dtype=F64)[[4, 0]]
    forwards, backwards = torch.tensor([[0.0, 0, 1], [1, 0, 0]], dtype=F64)
    moved = circular_shift(weights, torch.stack([forwards, backwards]))
    assert moved.argmax(-1).tolist() == [0, 4] and moved.sum() == 2
    spread = circular_shift(weights[:1], torch.tensor([[0.1, 0.7, 0.2]], dtype=F64))
    torch.testing.assert_close(spread, torch.tensor([[0.2, 0, 0, 0.1, 0.7]], dtype=F64))
    assert circular_shift(torch.ones(2, 0), torch.ones(2, 3)).shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_sharpening_survives_small_weights_and_a_large_power(dtype: torch.dtype) -> None:
    weights = torch.full((1, 1000), 1e-3, dtype=dtype).requires_grad_()
    sharpness = torch.tensor([[120.0]], dtype=dtype).requires_grad_()
    found = sharpen(weights, sharpness)
    torch.testing.assert_close(found, torch.full_like(weights, 1e-3), rtol=0.01, atol=0)
    with torch.no_grad():
        weights[0, 3], weights[0, 4] = 0.5, 0.0
    found = sharpen(weights, sharpness)
    assert found[0, 3] == 1 and found.sum() == 1
    gradients = torch.autograd.grad(found[0, 3] + found[0, 4], (weights, sharpness))
    assert all(g.isfinite().all() for g in gradients)


def test_sharpening_keeps_zeros_and_rounds_once() -> None:
    nothing = torch.zeros(1, 4, requires_grad=True)
    found = sharpen(nothing, torch.full((1, 1), 2.5))
    assert found.eq(0).all() and torch.autograd.grad(found.sum(), nothing)[0].isfinite().all()
    weights, sharpness = rand(3, 50).softmax(-1).bfloat16(), torch.full((3, 1), 3.3).bfloat16()
    exact = sharpen(weights.double(), sharpness.double())
    torch.testing.assert_close(sharpen(weights, sharpness).double(), exact, rtol=2**-8, atol=1e-12)


def test_a_sharp_head_copies_a_slot() -> None:
    """Content finds a slot, the shift moves on by one, the focus is read exactly."""
    module = NTMHead(M, M).double()
    with torch.no_grad():
        module.key.weight.copy_(torch.eye(M))
        module.key.bias.zero_()
        module.control.weight.zero_()
        module.control.bias.copy_(torch.tensor([4000.0, 40, 5, -40, -40, 40]))  # gate open, shift by one
    memory = rand(2, SLOTS, M)
    read, weights = module(3 * memory[:, 2], memory, torch.full((2, SLOTS), 1 / SLOTS, dtype=F64))
    assert weights.argmax(-1).tolist() == [3, 3]
    torch.testing.assert_close(read, memory[:, 3], atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        module.control.bias[1] = -40  # gate closed: the focus before moves on
    _, weights = module(3 * memory[:, 2], memory, torch.eye(SLOTS, dtype=F64)[[6, 0]])
    assert weights.argmax(-1).tolist() == [0, 1]


def test_ntm_head_begins_as_its_notes_say() -> None:
    module = NTMHead(90, 80, shift=20, writes=True)
    for layer in (module.key, module.control, module.erase, module.add):
        bound = math.sqrt(6 / sum(layer.weight.shape))
        weight = layer.weight.detach()
        assert 0.99 * bound < weight.abs().max() <= bound and layer.bias.eq(0).all()
        assert abs(weight.square().mean() / (bound**2 / 3) - 1) < 6 * math.sqrt(0.8 / weight.numel())


# --- both ------------------------------------------------------------------------------------------------------------


class _Read(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = KeyValueMemory(D, SIZE)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.inner(*given, candidates=given[0]))


BOTH: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "key-value": (_Read, (rand(B, D), rand(B, N, D), rand(B, N, D, seed=4), torch.tensor(LENGTHS))),
    "ntm-read": (lambda: NTMHead(Q, M), (rand(B, Q), rand(B, N, M), rand(B, N, seed=9).softmax(-1))),
    "ntm-write": (lambda: NTMHead(Q, M, writes=True), (rand(B, Q), rand(B, N, M), rand(B, N, seed=9).softmax(-1))),
}


@pytest.mark.bf16
@pytest.mark.parametrize("name", BOTH)
def test_machinery(name: str) -> None:
    make, given = BOTH[name]
    truth = loud(make())
    module = copy.deepcopy(truth).float()
    single = [x.float() if x.is_floating_point() else x for x in given]
    expected = module(*single)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)(*single)
    torch.testing.assert_close(tuple(compiled), tuple(expected))
    torch._dynamo.reset()
    torch.testing.assert_close(tuple(torch.export.export(module, tuple(single)).module()(*single)), tuple(expected))
    for half in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(truth).to(half)
        rounded = [x.to(half) if x.is_floating_point() else x for x in given]
        exact = copy.deepcopy(low).double()(*[x.double() if x.is_floating_point() else x for x in rounded])
        with torch.autocast("cpu", dtype=half):
            casted = module(*single)
        for a, b, c in zip(low(*rounded), exact, casted, strict=True):
            assert a.dtype == half
            assert (a - b).abs().max() < 20 * torch.finfo(half).eps * b.abs().max()
            assert (c - b).abs().max() < 40 * torch.finfo(half).eps * b.abs().max()
    parameters = {k: v.detach() for k, v in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        results = torch.func.functional_call(module, parameters, tuple(x[None] for x in sample))
        return sum(x.sin().sum() for x in results)

    if name != "key-value":  # there the candidates are shared by the batch
        each = torch.vmap(torch.func.grad(loss), (None, *[0] * len(single)))(parameters, *single)
        for i in range(B):
            one = torch.func.grad(loss)(parameters, *(x[i] for x in single))
            torch.testing.assert_close({k: v[i] for k, v in each.items()}, one)


kv, ntm, f = KeyValueMemory(D, SIZE), NTMHead(Q, M), torch.zeros
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "size": (lambda: KeyValueMemory(D, 0), ValueError, "size: expected an integer > 0, got 0"),
    "dims": (lambda: kv(f(2, D), f(2, D), f(2, 3, D)), ValueError, r"keys: expected 3 dimensions, got \[2, 9\]"),
    "features": (lambda: kv(f(2, 8), f(2, 3, D), f(2, 3, D)), ValueError, "question: .* D = 9, got"),
    "bool": (lambda: kv(f(2, D).bool(), f(2, 3, D), f(2, 3, D)), TypeError, r"question: .*got torch\.bool"),
    "pairs": (lambda: kv(f(2, D), f(2, 3, D), f(2, 4, D)), ValueError, r"values: expected N = 3 \(the keys'\), got 4"),
    "batch": (lambda: kv(f(2, D), f(3, 3, D), f(2, 3, D)), ValueError, r"keys: expected B = 2 .*got 3"),
    "shift": (lambda: NTMHead(Q, M, shift=-1), ValueError, "shift: expected an integer >= 0, got -1"),
    "query": (lambda: ntm(f(2, 4), f(2, 3, M), f(2, 3)), ValueError, r"query: expected \[B, 5\], got \[2, 4\]"),
    "memory": (lambda: ntm(f(2, Q), f(1, 3, M), f(2, 3)), ValueError, r"memory: expected \[B, N, 3\] of B = 2, got"),
    "previous": (lambda: ntm(f(2, Q), f(2, 3, M), f(2, 4)), ValueError, r"previous: expected \[B, N\] = \[2, 3\], got"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use(name: str) -> None:
    call, exception, pattern = WRONG[name]
    with pytest.raises(exception, match=pattern):
        call()


def test_texts() -> None:
    assert kv.extra_repr() == "features=9, size=4, hops=2, tied=True"
    assert ntm.extra_repr() == "query_size=5, memory_size=3, shift=1, writes=False"
