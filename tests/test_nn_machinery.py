"""torch's machinery around attnfast.nn: dtypes, compile, export, autocast, copies, torch.func, checkpointing, freezing.

What the modules compute is checked against the papers in test_nn.py; here a module agrees with itself outside of the
machinery, and in the half types with the same module on `attnfast.reference`, the plain formulas.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import HALVES, dtype_id
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import attnfast
from attnfast import reference
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

Q, M, U, B, TQ, TK = 8, 6, 5, 2, 3, 7
LENGTHS = torch.tensor([5, 7])
MODULES: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Attention(Q, M, heads=2),
    "attention-additive": lambda: Attention(Q, M, heads=2, kv_heads=1, score="additive"),
    "attention-cosine": lambda: Attention(Q, M, heads=2, score="cosine"),
    "attention-l2-entmax": lambda: Attention(Q, M, heads=2, score="l2", normalizer="entmax15"),
    "bahdanau": lambda: BahdanauAttention(Q, M, U),
    "luong-dot": lambda: LuongAttention(M, M, "dot"),
    "luong-general": lambda: LuongAttention(Q, M),
    "luong-concat": lambda: LuongAttention(Q, M, "concat"),
    "luong-location": lambda: LuongAttention(Q, M, "location", max_length=9),
    "luong-general-m": lambda: LuongAttention(Q, M, local="m", window=2),
    "luong-concat-p": lambda: LuongAttention(Q, M, "concat", local="p", window=2),
    "location": lambda: LocationAttention(Q, M, 8),
    "content": lambda: ContentAttention(Q, M),
    "location-sensitive": lambda: LocationSensitiveAttention(Q, M, U, 2, 5),
    "hard": lambda: HardAttention(Q, M, U).eval(),
}


def make(name: str, seed: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """With parameters of ordinary size, so that nothing hides behind a small initial value."""
    module, generator = MODULES[name](), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
    return module.to(dtype)


def inputs(module: Any, dtype: torch.dtype = torch.float32, tokens: int = TK) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = (B, TQ, module.query_size), (B, tokens, module.memory_size)
    query, memory = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return query, memory


def extra(module: Any) -> dict[str, Any]:
    return {"position": 2} if getattr(module, "local", None) == "m" else {}


class Whole(nn.Module):
    """Every float that a module's forward gives (for location-sensitive attention: two steps)."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, query: Tensor, memory: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.inner, LocationSensitiveAttention):
            projected = self.inner.project_memory(memory)
            _, previous = self.inner.step(query[:, 0], projected, lengths)
            result = self.inner.step(query[:, 1], projected, lengths, previous=previous)
        elif isinstance(self.inner, Attention):
            result = self.inner(query, memory, lengths, return_weights=True)
        else:
            result = self.inner(query, memory, lengths)
        return tuple(x for x in result if x.is_floating_point())


class Step(nn.Module):
    """One step on a projected memory."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        result = self.inner.step(query, ProjectedMemory(keys, values), lengths, **extra(self.inner))
        return tuple(x for x in result if x.is_floating_point())


def total(results: tuple[Tensor, ...]) -> Tensor:
    return sum((x.double().sin() * (i + 1)).sum() for i, x in enumerate(results))  # type: ignore[return-value]


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(tuple(found), tuple(expected))


def arguments(cls: type, module: Any, tokens: int = TK, lengths: Tensor = LENGTHS) -> tuple[Tensor, ...]:
    query, memory = inputs(module, tokens=tokens)
    if cls is Whole:
        return query, memory, lengths
    return query[:, 0], *(x.detach() for x in module.project_memory(memory)), lengths


# --- dtypes ----------------------------------------------------------------------------------------------------------


def results_and_gradients(module: Any, query: Tensor, memory: Tensor) -> list[Tensor]:
    """Of forward, of a step, and the gradients of both."""
    query, memory = query.requires_grad_(), memory.requires_grad_()
    results = Whole(module)(query, memory, LENGTHS)
    results += Step(module)(query[:, 0], *module.project_memory(memory), LENGTHS)
    leaves = [query, memory, *module.parameters()]
    return [*results, *torch.autograd.grad(total(results), leaves)]


@pytest.mark.bf16
@pytest.mark.parametrize("half", HALVES, ids=dtype_id)
@pytest.mark.parametrize("name", MODULES)
def test_half_types(name: str, half: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """err(module) <= 2 err(module on the plain formulas, same dtype) + floor, both against float64."""
    module = make(name, dtype=half)
    found = results_and_gradients(module, *inputs(module, half))
    wanted = results_and_gradients(copy.deepcopy(module).double(), *(x.double() for x in inputs(module, half)))
    assert all(x.dtype == half for x in found)
    for function in ("attention", "additive_attention"):
        monkeypatch.setattr(attnfast.functional, function, getattr(reference, function))
    plain = results_and_gradients(module, *inputs(module, half))
    largest = max(truth.abs().max() for truth in wanted)  # the gradient of a key's bias is zero, but for roundings
    for ours, theirs, truth in zip(found, plain, wanted, strict=True):
        floor = 4 * torch.finfo(half).eps * max(truth.abs().max(), largest / 10)
        error, allowed = ((x.double() - truth).abs().max() for x in (ours, theirs))
        assert error <= 2 * allowed + floor, f"{error} against {allowed} and {floor}"


@pytest.mark.bf16
@pytest.mark.parametrize("half", HALVES, ids=dtype_id)
@pytest.mark.parametrize("tokens", [2001, 777])
def test_a_predicted_centre_may_lie_between_what_half_types_can_name(half: torch.dtype, tokens: int) -> None:
    module = make("luong-concat-p")
    with torch.no_grad():
        module.position_score.zero_()  # the middle
    query, memory = inputs(module, tokens=tokens)
    expected = Whole(module)(query, memory, torch.tensor([tokens, 333]))[1] > 0
    assert expected[0].sum(-1).eq(4).all()
    found = Whole(module.to(half))(query.to(half), memory.to(half), torch.tensor([tokens, 333]))[1] > 0
    assert torch.equal(found, expected)
    with torch.autocast("cpu", dtype=half):
        assert torch.equal(Whole(module.float())(query, memory, torch.tensor([tokens, 333]))[1] > 0, expected)


@pytest.mark.parametrize("name", MODULES)
def test_float64_is_computed_in_float64(name: str) -> None:
    module = make(name, dtype=torch.float64)
    rounded = make(name)
    found = results_and_gradients(module, *inputs(module, torch.float64))
    single = results_and_gradients(rounded, *inputs(rounded))
    assert all(x.dtype == torch.float64 for x in found)
    torch.testing.assert_close([x.float() for x in found], single, rtol=1e-4, atol=1e-5)
    weights = found[1]
    assert not torch.equal(weights, weights.float().double()), "rounded to float32 on the way"


@pytest.mark.bf16
@pytest.mark.parametrize("half", HALVES, ids=dtype_id)
@pytest.mark.parametrize("name", MODULES)
def test_autocast(name: str, half: torch.dtype) -> None:
    module = make(name)
    query, memory = inputs(module)
    expected = Whole(module)(query, memory, LENGTHS)
    with torch.autocast("cpu", dtype=half):
        found = Whole(module)(query, memory, LENGTHS)
        step = Step(module)(query[:, 0], *module.project_memory(memory), LENGTHS)
    assert all(x.dtype == half for x in (*found, *step))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 20 * torch.finfo(half).eps * theirs.abs().max()
    parameters = list(module.parameters())
    if parameters:
        gradients = torch.autograd.grad(total(found), parameters)
        assert all(g.dtype == torch.float32 and g.abs().max() > 1e-6 for g in gradients)


# --- compile and export ----------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("cls", [Whole, Step])
@pytest.mark.parametrize("name", MODULES)
def test_compile_fullgraph(name: str, cls: type) -> None:
    module = make(name)
    given, parameters = arguments(cls, module), list(module.parameters())
    found = torch.compile(cls(module), backend="aot_eager", fullgraph=True)(*given)
    expected = cls(module)(*given)
    assert_same(found, expected)
    if any(x.requires_grad for x in expected):
        gradients = (torch.autograd.grad(total(x), parameters, allow_unused=True) for x in (found, expected))
        for ours, theirs in zip(*gradients, strict=True):
            if theirs is not None:  # a step on a projected memory needs no memory_weight
                torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["bahdanau", "hard"])
def test_compile_by_inductor(name: str) -> None:
    module = make(name)
    given = arguments(Step, module)
    assert_same(torch.compile(Step(module), fullgraph=True)(*given), Step(module)(*given))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("cls", [Whole, Step])
@pytest.mark.parametrize("name", MODULES)
def test_export_with_a_memory_of_any_length(name: str, cls: type) -> None:
    module = make(name)
    # What a step of local-m reads is a slice of constant bounds: the memory must reach beyond them.
    shortest = 6 if name.endswith("-m") else 2
    tokens = torch.export.Dim("tokens", min=shortest, max=8 if "location" in name else 4096)
    if cls is Whole:
        shapes = {"query": None, "memory": {1: tokens}, "lengths": None}
    else:
        along = 2 if isinstance(module, Attention) else 1
        shapes = {"query": None, "keys": {along: tokens}, "values": {along: tokens}, "lengths": None}
    program = torch.export.export(cls(module), arguments(cls, module), dynamic_shapes=shapes).module()
    for length, lengths in ((TK, LENGTHS), (shortest, torch.tensor([2, 0])), (8, torch.tensor([8, 3]))):
        given = arguments(cls, module, length, lengths)
        assert_same(program(*given), cls(module)(*given))


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_copies_compute_the_same(name: str) -> None:
    module, other = make(name), make(name, seed=9)
    given = arguments(Whole, module)
    expected = Whole(module)(*given)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(twin) == repr(module) and twin.training == module.training
        assert_same(Whole(twin)(*given), expected)
        assert all(a is not b for a, b in zip(twin.parameters(), module.parameters(), strict=True))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    if module.state_dict():
        assert not torch.equal(Whole(other)(*given)[0], expected[0])
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_same(Whole(other)(*given), expected)
    projected = module.project_memory(given[1])
    for twin in (copy.deepcopy(projected.__class__(*(x.detach() for x in projected))),
                 pickle.loads(pickle.dumps(projected))):  # fmt: skip
        assert isinstance(twin, ProjectedMemory)
        torch.testing.assert_close(tuple(twin), tuple(projected))


# --- torch.func ------------------------------------------------------------------------------------------------------


def named(module: nn.Module) -> dict[str, Tensor]:
    return {f"inner.{name}": parameter.detach() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "luong-dot"])
def test_vmap_over_an_ensemble(name: str) -> None:
    models = [make(name, seed=seed) for seed in (1, 2, 3)]
    given, whole = arguments(Whole, models[0]), Whole(models[0])
    stacked, buffers = stack_module_state(models)
    assert not buffers
    call = lambda parameters: functional_call(whole, {f"inner.{k}": v for k, v in parameters.items()}, given)  # noqa: E731
    found = vmap(call)(stacked)
    for i, model in enumerate(models):
        assert_same((x[i] for x in found), Whole(model)(*given))


@pytest.mark.parametrize("name", MODULES)
def test_gradients_of_each_sample(name: str) -> None:
    module = make(name)
    whole, parameters = Whole(module), named(module)
    query, memory = inputs(module)

    def loss(parameters: dict[str, Tensor], query: Tensor, memory: Tensor, length: Tensor) -> Tensor:
        return total(functional_call(whole, parameters, (query[None], memory[None], length[None])))

    found = vmap(grad(loss, (0, 2)), (None, 0, 0, 0))(parameters, query, memory, LENGTHS)
    for i in range(B):
        leaves = {k: v.clone().requires_grad_() for k, v in parameters.items()}
        notes = memory[i].clone().requires_grad_()
        expected = torch.autograd.grad(loss(leaves, query[i], notes, LENGTHS[i]), [*leaves.values(), notes])
        assert_same([*(found[0][k][i] for k in leaves), found[1][i]], expected)


# --- checkpointing and freezing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", [*MODULES, "hard in training"])
def test_checkpoint(name: str, use_reentrant: bool) -> None:
    module = make(name.split()[0]).train()
    whole, found = Whole(module), []
    for again in (False, True):
        torch.manual_seed(11)
        query, memory = (x.requires_grad_() for x in inputs(module))
        module.zero_grad()
        run = (lambda *x: checkpoint(whole, *x, use_reentrant=use_reentrant)) if again else whole
        results = run(query, memory, LENGTHS)
        torch.rand(3)  # the generator moves on before the recomputation, which must draw the same choices
        total(results).backward()
        found.append([*results, query.grad, memory.grad, *(p.grad for p in module.parameters())])
    assert_same(*found)


@pytest.mark.parametrize("name", MODULES)
def test_frozen_parts_change_no_other_gradient(name: str) -> None:
    module = make(name)
    query, memory = inputs(module)
    leaves = [*module.parameters(), query.requires_grad_(), memory.requires_grad_()]
    whole = torch.autograd.grad(total(Whole(module)(query, memory, LENGTHS)), leaves)
    for chosen, expected in zip(leaves, whole, strict=True):
        for leaf in leaves:
            leaf.requires_grad_(leaf is chosen)
        (found,) = torch.autograd.grad(total(Whole(module)(query, memory, LENGTHS)), [chosen])
        assert expected.abs().max() > 1e-6, "a gradient that says nothing"
        torch.testing.assert_close(found, expected)
    for leaf in leaves:
        leaf.requires_grad_(False)
    assert not any(x.requires_grad for x in Whole(module)(query, memory, LENGTHS))
