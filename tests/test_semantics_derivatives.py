"""Contract line 16 of semantics.md: derivatives of both orders, transforms, compile, export, autocast, hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import leaves, oracle, problem, rest
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Everything differentiable at once, options that go with it, small enough for finite differences.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": "bottom_right", "window": (3, 0)},
    "masked_rows": {"mask": True},
    "lengths": {"key_lengths": torch.tensor([3, 0]), "query_lengths": torch.tensor([2, 3])},
    "bias_sink_softcap": {"bias": True, "sink": True, "softcap": 1.5},
    "alibi_negative_scale": {"alibi_slopes": torch.tensor([0.3, 0.1], dtype=torch.float64), "scale": -0.4},
    "dropout": {"dropout_p": 0.4},
    "cosine": {"score": "cosine", "scale": 2.0},
    "l2": {"score": "l2", "scale": 0.3},
}


def tensors_of(case: dict[str, Any], T_q: int = 3) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Differentiable float64 tensors of a case, and its other options."""
    g = torch.Generator().manual_seed(8)
    x: dict[str, Any] = problem(2, 2, T_q, 4, 3, 2, H_kv=1, dtype=torch.float64)
    options = dict(case)
    if options.pop("bias", None):
        x["bias"] = torch.randn(2, 1, 4, generator=g, dtype=torch.float64)
    if options.pop("sink", None):
        x["sink"] = torch.randn(2, generator=g, dtype=torch.float64)
    if options.pop("mask", None):
        options["mask"] = torch.rand(2, 1, T_q, 4, generator=g) < 0.6
        options["mask"][0, 0, 0] = False
    if "query_lengths" in options and T_q < 3:
        options.pop("query_lengths")
    return leaves(x), options


def function_of(attention: Any, names: list[str], options: dict[str, Any], which: bool | str = False) -> Any:
    def function(*args: Tensor) -> Any:
        torch.manual_seed(17)  # dropout: the same mask at every call
        x = dict(zip(names, args))
        result = attention(
            x["query"], x["key"], x["value"], **rest(x), **options, return_lse=bool(which), return_weights=which
        )
        if not which:
            return result
        return tuple(torch.where(r.detach().isfinite(), r, 0) for r in result)

    return function


@pytest.mark.parametrize("which", [False, "full", "column_sum", "row_max"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("T_q", [1, 3])
def test_s16_first_and_second_derivatives(route: Any, T_q: int, case: str, which: bool | str) -> None:
    x, options = tensors_of(CASES[case], T_q)
    function = function_of(route.attention, list(x), options, which)
    assert torch.autograd.gradcheck(function, tuple(x.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tuple(x.values()), atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("case", CASES)
def test_s16_forward_mode(route: Any, case: str) -> None:
    """The tangent is the directional difference, never silently zero."""
    x, options = tensors_of(CASES[case])
    function = function_of(route.attention, list(x), options)
    primals = tuple(t.detach() for t in x.values())
    tangents = tuple(torch.randn_like(t) for t in primals)
    _, found = torch.func.jvp(function, primals, tangents)
    step = 1e-6
    ahead = function(*(p + step * t for p, t in zip(primals, tangents)))
    behind = function(*(p - step * t for p, t in zip(primals, tangents)))
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)
    assert found.abs().max() > 1e-3
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(p, t) for p, t in zip(primals, tangents)]
        tangent = torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent
    torch.testing.assert_close(tangent, found)


@pytest.mark.parametrize("case", [c for c in CASES if c != "dropout"])
def test_s16_functorch(route: Any, case: str) -> None:
    """grad, vmap(grad), jacrev, jacfwd and hessian against each other and plain autograd."""
    x, options = tensors_of(CASES[case])
    function = function_of(route.attention, list(x), options)
    primals = tuple(t.detach() for t in x.values())

    def scalar(*args: Tensor) -> Tensor:
        return function(*args).square().sum()

    want = torch.autograd.grad(scalar(*x.values()), tuple(x.values()))
    have = torch.func.grad(scalar, argnums=tuple(range(len(primals))))(*primals)
    torch.testing.assert_close(have, want)
    torch.testing.assert_close(torch.func.jacrev(scalar)(*primals), want[0])
    torch.testing.assert_close(torch.func.jacfwd(function)(*primals), torch.func.jacrev(function)(*primals))
    stacked = tuple(torch.stack([p, 2 * p]) for p in primals)
    per_sample = torch.func.vmap(torch.func.grad(scalar))(*stacked)
    torch.testing.assert_close(per_sample[1], torch.func.grad(scalar)(*(2 * p for p in primals)))
    mapped = torch.func.vmap(function)(*stacked)
    torch.testing.assert_close(mapped, torch.stack([function(*primals), function(*(2 * p for p in primals))]))
    hessian = torch.func.hessian(scalar)(*primals)
    n = primals[0].numel()
    matrix = hessian.reshape(n, n)
    torch.testing.assert_close(matrix, matrix.mT)
    assert matrix.abs().max() > 1e-4


def test_s16_vmap_in_dims(route: Any) -> None:
    query, key, value = problem(3, 2, 4, 5, 8).values()
    want = route.attention(query, key[:1], value, causal="top_left")
    have = torch.func.vmap(lambda q, v: route.attention(q, key[0], v, causal="top_left"), in_dims=(0, 0))(query, value)
    torch.testing.assert_close(have, want)
    moved = torch.func.vmap(lambda q, k, v: route.attention(q, k, v), in_dims=(2, None, 0), out_dims=1)(
        query.movedim(0, 2), key[0], value
    )
    torch.testing.assert_close(moved.movedim(1, 0), route.attention(query, key[:1], value))


def test_s16_inplace_change_of_a_saved_tensor_is_noticed() -> None:
    import attnfast

    x = leaves(problem())
    scaled = x["query"] * 1.0
    output = attnfast.attention(scaled, x["key"], x["value"])
    scaled.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        output.sum().backward()


def test_s16_backward_twice_and_partial() -> None:
    """Only what requires a gradient gets one; a second backward needs retain_graph, as everywhere in torch."""
    import attnfast

    inputs = problem()
    want = leaves(inputs)
    torch.autograd.backward(attnfast.attention(*want.values()).sum())
    for name in inputs:
        x = dict(inputs)
        x[name] = x[name].detach().requires_grad_()
        output = attnfast.attention(*x.values())
        output.sum().backward(retain_graph=True)
        torch.testing.assert_close(x[name].grad, want[name].grad)
        output.sum().backward()
        torch.testing.assert_close(x[name].grad, 2 * want[name].grad)
        assert all(x[other].grad is None for other in x if other != name)
        with pytest.raises(RuntimeError, match="second time"):
            output.sum().backward()
    with torch.no_grad():
        assert not attnfast.attention(*want.values()).requires_grad
    with torch.inference_mode():
        assert attnfast.attention(*want.values()).is_inference()


# With few keys the backward needs the operands only, see docs/kernels.md; beyond, also out and lse.
@pytest.mark.parametrize(("T_k", "saved"), [(7, 3), (70, 5)])
def test_s16_saved_tensor_hooks_and_checkpoint(T_k: int, saved: int) -> None:
    import attnfast

    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.clone()

    x = leaves(problem(T_k=T_k))
    want = torch.autograd.grad(attnfast.attention(*x.values(), dropout_p=0.0).sum(), list(x.values()))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = attnfast.attention(*x.values())
    have = torch.autograd.grad(output.sum(), list(x.values()))
    torch.testing.assert_close(have, want)
    assert len(packed) == saved
    for p in (0.0, 0.4):
        results = []
        for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
            torch.manual_seed(3)
            output = wrap(lambda q, k, v, p=p: attnfast.attention(q, k, v, dropout_p=p), *x.values())
            results.append([output, *torch.autograd.grad(output.square().sum(), list(x.values()))])
        torch.testing.assert_close(results[0], results[1])


def test_s16_compile_and_export() -> None:
    import attnfast

    mask = torch.rand(5, 7) < 0.7
    slopes = torch.tensor([0.2, 0.4])

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        a = attnfast.attention(query, key, value, causal="bottom_right", mask=mask, alibi_slopes=slopes)
        result = attnfast.attention(query, key, value, softcap=2.0, return_lse=True, return_weights="column_sum")
        b = attnfast.scaled_dot_product_attention(query, key, value, is_causal=True)
        return a + result.output * result.lse[..., None] + b + result.weights.sum()

    x = leaves(problem())
    want = function(*x.values())
    torch.compiler.reset()
    have = torch.compile(function, fullgraph=True, backend="aot_eager")(*x.values())
    torch.testing.assert_close(have, want)
    torch.testing.assert_close(
        torch.autograd.grad(have.sum(), list(x.values())), torch.autograd.grad(want.sum(), list(x.values()))
    )

    class Module(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return function(query, key, value)

    exported = torch.export.export(Module(), tuple(t.detach() for t in x.values()))
    torch.testing.assert_close(exported.module()(*(t.detach() for t in x.values())), want)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_s16_autocast(half: torch.dtype) -> None:
    """As torch's SDPA: under autocast floats become the autocast dtype, gradients come back in the inputs' own."""
    import attnfast

    x = leaves(problem())
    with torch.autocast("cpu", dtype=half):
        output = attnfast.scaled_dot_product_attention(*x.values())
        theirs = torch.nn.functional.scaled_dot_product_attention(*x.values())
        assert output.dtype == theirs.dtype == half
        mixed = attnfast.attention(x["query"], x["key"].to(half), x["value"].to(half))
        assert mixed.dtype == half
    grads = torch.autograd.grad(output.sum(), list(x.values()))
    want = oracle(*(t.detach().double() for t in x.values())).output
    torch.testing.assert_close(output.double(), want, rtol=0, atol=3e-2)
    assert all(g.dtype == torch.float32 for g in grads)


def test_s16_meta_and_fake() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    import attnfast

    with FakeTensorMode() as mode:
        x = {n: mode.from_tensor(t) for n, t in problem(2, 2, 5, 7, 8, 6, dtype=torch.bfloat16).items()}
        result = attnfast.attention(*x.values(), return_lse=True, return_weights=True)
        assert result.output.shape == (2, 2, 5, 6) and result.output.dtype == torch.bfloat16
        assert result.lse.dtype == torch.float32 and result.weights.shape == (2, 2, 5, 7)
