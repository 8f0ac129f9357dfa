"""Local attention: windows around centres that rows name, and the Gaussian prior inside the kernels, on both cores."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import test_additive
import torch
from helpers import check_attention, near_centers, patch_seed, philox_keep, problem, real
from torch import Tensor

import attnfast
from attnfast import reference
from attnfast._local import window_bounds

F64 = torch.float64
SEED = (2**40 + 9, 3)


def around(*shape: int, tokens: int, kind: str = "along", seed: int = 1, dtype: torch.dtype = F64) -> Tensor:
    """Centres [B, H, T_q]: along the keys with some noise and past both ends, or scattered, or all over the place."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.rand(shape, generator=g, dtype=F64)
    if kind == "along":
        return (torch.linspace(-4, tokens + 4, shape[-1], dtype=F64) + 3 * noise).to(dtype)
    return (noise * tokens).to(dtype)


def gaussian(attention: Callable[..., Any]) -> Callable[..., Any]:
    """`attention` with `center` and `sigma` as the oracle takes them."""

    def call(*tensors: Tensor, center: Tensor | None = None, sigma: float = 1.0, **options: Any) -> Any:
        if center is not None:
            options["prior"] = ("gaussian", center, sigma)
        return attention(*tensors, **options)

    return call


# ------------------------------------------------------------------------------------------------------- bounds of rows


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8]
)
def test_bounds_are_the_keys_near_the_centre(dtype: torch.dtype) -> None:
    values = [-9.0, -3.5, -1e-30, 0.0, 1e-30, 0.5, 2.0, 3.4999, 7.0, 8.75, 12.0, 19.0, 20.5, 100.0]
    if dtype.is_floating_point:
        values += [math.nan, math.inf, -math.inf]
    center = torch.tensor(values, dtype=F64).to(dtype)
    for window in ((0, 0), (2, 3), (-1, 2), (2, -1), (-1, -1), (2**63 - 1, 0), (0, 2**63 - 1), (19, 1)):
        bounds = window_bounds(center, *window, 12)
        k = torch.arange(12)
        found = (k >= bounds[:, :1]) & (k < bounds[:, 1:])
        if dtype.is_floating_point or max(window) < 2**62:
            wanted = near_centers(center, window, 12)
            wanted &= ~(center.isinf() & (max(window) > 2**61)).unsqueeze(-1) | found  # an infinite window at infinity
            assert torch.equal(found, wanted), (window, center[(found != wanted).any(-1)])
        assert bounds.min() >= 0 and bounds.max() <= 12


def test_bounds_of_extreme_integers_do_not_wrap() -> None:
    least, most = -(2**63), 2**63 - 1
    center = torch.tensor([least, least + 1, -1, 0, 5, most - 1, most])
    for window in ((0, 0), (3, 4), (2**61, 2**61), (most, 0), (0, most)):
        bounds = window_bounds(center, *window, 9)
        wanted = near_centers(center.double(), tuple(min(side, 2**61) for side in window), 9)  # type: ignore[arg-type]
        k = torch.arange(9)
        assert torch.equal((k >= bounds[:, :1]) & (k < bounds[:, 1:]), wanted), window


# ------------------------------------------------------------------------------------------------------------- dot core

PATHS: dict[str, dict[str, int]] = {
    "tiles": {"B": 2, "H": 2, "T_q": 70, "T_k": 130, "D": 16},
    "blocks": {"B": 1, "H": 1, "T_q": 300, "T_k": 330, "D": 8},
    "grouped": {"B": 2, "H": 4, "H_kv": 2, "T_q": 66, "T_k": 90, "D": 20},
    "small": {"B": 2, "H": 2, "T_q": 5, "T_k": 9, "D": 8},
    "decode": {"B": 3, "H": 2, "T_q": 1, "T_k": 77, "D": 16},
    "grouped_decode": {"B": 2, "H": 6, "H_kv": 2, "T_q": 1, "T_k": 77, "D": 16},
    "split_decode": {"B": 1, "H": 1, "T_q": 1, "T_k": 2100, "D": 8},
}


def local_problem(path: str, dtype: torch.dtype, kind: str = "along", prior: bool = True) -> tuple[Any, dict[str, Any]]:
    sizes = PATHS[path]
    tensors = problem(**sizes, dtype=dtype)
    shape = (sizes["B"], sizes["H"], sizes["T_q"])
    centers = around(*shape, tokens=sizes["T_k"], kind=kind, dtype=real(dtype))
    if prior:
        tensors["center"] = centers + 0.3
    centers.view(-1)[sizes["T_q"] // 2] = math.nan
    return tensors, {"window": (7, 5), "window_center": centers, **({"sigma": 3.5} if prior else {})}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["along", "scattered"])
def test_window_around_centres(isa: str, dtype: torch.dtype, path: str, kind: str) -> None:
    tensors, options = local_problem(path, dtype, kind, prior=False)
    check_attention(attnfast.attention, tensors, **options)


@pytest.mark.parametrize("path", PATHS)
def test_gaussian_prior(isa: str, dtype: torch.dtype, path: str) -> None:
    """Over all keys: a prior without a window."""
    tensors, options = local_problem(path, dtype)
    check_attention(gaussian(attnfast.attention), tensors, sigma=options["sigma"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["along", "scattered"])
def test_window_and_prior(isa: str, dtype: torch.dtype, path: str, kind: str) -> None:
    tensors, options = local_problem(path, dtype, kind)
    check_attention(gaussian(attnfast.attention), tensors, **options)


def extras(name: str, sizes: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors (differentiable ones among them) and options of a combination."""
    g = torch.Generator().manual_seed(8)
    B, H, T_q, T_k = (sizes[n] for n in ("B", "H", "T_q", "T_k"))
    tensors: dict[str, Any] = {
        "causal": {},
        "bottom_right": {},
        "lengths": {},
        "mask": {"mask": torch.rand(B, 1, T_q, T_k, generator=g) < 0.7},
        "bias": {"bias": torch.randn(1, H, T_q, T_k, generator=g)},
        "masking_bias": {
            "bias": torch.randn(B, 1, 1, T_k, generator=g).where(torch.rand(T_k, generator=g) < 0.8, -math.inf)
        },
        "sink": {"sink": torch.randn(H, generator=g)},
        "softcap": {},
        "alibi": {"alibi_slopes": torch.rand(H, generator=g)},
    }[name]
    options: dict[str, Any] = {
        "causal": {"causal": "top_left"},
        "bottom_right": {"causal": "bottom_right", "key_lengths": torch.arange(B) + T_k // 2},
        "lengths": {"key_lengths": torch.arange(B) + T_k // 2, "query_lengths": (T_q - torch.arange(B)).clamp_min(0)},
        "softcap": {"softcap": 1.5},
    }.get(name, {})
    return tensors, options


COMBINATIONS = ["causal", "bottom_right", "lengths", "mask", "bias", "masking_bias", "sink", "softcap", "alibi"]


@pytest.mark.parametrize("path", ["tiles", "grouped", "decode", "grouped_decode"])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_with_other_options(isa: str, path: str, name: str) -> None:
    tensors, options = local_problem(path, torch.float32)
    more, choices = extras(name, PATHS[path])
    check_attention(gaussian(attnfast.attention), {**tensors, **more}, **options, **choices)


@pytest.mark.parametrize("path", ["tiles", "grouped", "decode"])
def test_reference_is_the_formula(path: str) -> None:
    tensors, options = local_problem(path, F64)
    check_attention(gaussian(reference.attention), tensors, **options)


@pytest.mark.parametrize("path", ["tiles", "grouped", "blocks"])
def test_dropout(isa: str, dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = local_problem(path, dtype)
    sizes = PATHS[path]
    keep = philox_keep(SEED, *(sizes[n] for n in ("B", "H", "T_q", "T_k")), 0.4)
    patch_seed(monkeypatch, SEED)
    check_attention(gaussian(attnfast.attention), tensors, keep=keep, dropout_p=0.4, **options)


@pytest.mark.parametrize("kind", ["along", "scattered"])
def test_half_types_with_centres_of_their_own(isa: str, kind: str) -> None:
    """A centre in the query's dtype, and one of integers."""
    tensors, options = local_problem("tiles", torch.bfloat16, kind)
    options["window_center"] = options["window_center"].bfloat16()
    tensors["center"] = tensors["center"].bfloat16()
    check_attention(gaussian(attnfast.attention), tensors, **options)
    options["window_center"] = options["window_center"].nan_to_num(3.0).to(torch.int16)
    check_attention(gaussian(attnfast.attention), tensors, **options)


def reduced(attention: Callable[..., Any], inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Every result and, through all of them, every gradient."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in inputs.items()}
    result = gaussian(attention)(*(leaves[n] for n in leaves if n != "center"), center=leaves["center"], **options)
    found = [x for x in result if x is not None]
    g = torch.Generator().manual_seed(5)
    total: Any = 0
    for x in found:
        probe = torch.randn(x.shape, generator=g, dtype=F64).to(x.dtype)
        total = total + torch.where(x.detach().isfinite(), x * probe, 0).sum()
    return [*found, *torch.autograd.grad(total, list(leaves.values()))]


@pytest.mark.parametrize("mode", ["column_sum", "row_max"])
@pytest.mark.parametrize("core", ["dot", "additive"])
@pytest.mark.parametrize("path", ["tiles", "grouped", "decode"])
def test_reduced_weights(isa: str, core: str, path: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = local_problem(path, F64)
    if core == "additive":
        tensors = {**{n: tensors[n] for n in ("query", "key", "value")}, "weight": torch.randn(PATHS[path]["H"],
                   PATHS[path]["D"], dtype=F64), "center": tensors["center"]}  # fmt: skip
    patch_seed(monkeypatch, SEED)
    choices = {"return_lse": True, "return_weights": mode, "dropout_p": 0.3, **options}
    name = "attention" if core == "dot" else "additive_attention"
    have = reduced(getattr(attnfast, name), tensors, **choices)
    want = reduced(getattr(reference, name), tensors, **choices, dropout_seed=torch.tensor(SEED))
    for x, y in zip(have, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


# -------------------------------------------------------------------------------------------------------- additive core


@pytest.mark.parametrize("path", ["tiles", "panels", "grouped", "few_queries", "decode", "split_decode", "one"])
@pytest.mark.parametrize("kind", ["along", "scattered"])
def test_additive_window_and_prior(isa: str, dtype: torch.dtype, path: str, kind: str) -> None:
    """The window and the prior at once; the centre's own gradient is below."""
    sizes = test_additive.SHAPES[path]
    tensors = test_additive.make(**sizes, dtype=dtype)
    T_k = sizes["T_k"]
    centers = around(sizes["B"], sizes["H"], sizes["T_q"], tokens=T_k, kind=kind, dtype=torch.float32)
    place = torch.arange(T_k, dtype=F64) - centers.double().unsqueeze(-1)
    expected = {"visible": near_centers(centers, (9, 4), T_k), "keep": torch.exp(-place.square() / (2 * 3.5**2))}
    options = {"window": (9, 4), "window_center": centers, "prior": ("gaussian", centers, 3.5)}
    test_additive.check(tensors, options, expected)


@pytest.mark.parametrize("path", ["tiles", "panels", "grouped", "few_queries", "decode", "split_decode"])
@pytest.mark.parametrize("name", [None, "causal", "mask", "bias", "softcap", "sink", "lengths", "dropout"])
def test_additive_against_the_reference(isa: str, path: str, name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = test_additive.SHAPES[path]
    made = test_additive.make(**sizes, dtype=F64)
    centers = around(sizes["B"], sizes["H"], sizes["T_q"], tokens=sizes["T_k"])
    tensors = {n: made[n] for n in ("query", "key", "value", "weight")} | {"center": centers}
    more: dict[str, Any] = {"score_bias": made["score_bias"], "window": (9, 4), "window_center": centers, "sigma": 3.0}
    if name == "dropout":
        more["dropout_p"] = 0.4
        patch_seed(monkeypatch, SEED)
    elif name is not None:
        extra, choices = extras(name, sizes)
        more |= choices | {n: x if x.dtype == torch.bool else x.double() for n, x in extra.items()}
    more |= {"return_lse": True, "return_weights": True}
    have = reduced(attnfast.additive_attention, tensors, **more)
    seed = {"dropout_seed": torch.tensor(SEED)} if name == "dropout" else {}
    want = reduced(reference.additive_attention, tensors, **more, **seed)
    for x, y in zip(have, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


def test_additive_without_a_head_axis() -> None:
    query, key, value, weight = (torch.randn(s, dtype=F64) for s in ((2, 5, 4), (2, 9, 4), (2, 9, 3), (4,)))
    centers = around(2, 5, tokens=9)
    options = {"window": (2, 1), "window_center": centers, "prior": ("gaussian", centers, 2.0)}
    have = attnfast.additive_attention(query, key, value, weight, **options)
    torch.testing.assert_close(have, reference.additive_attention(query, key, value, weight, **options))
    heads = (x.unsqueeze(1) for x in (query, key, value))
    options = {"window": (2, 1), "window_center": centers[:, None], "prior": ("gaussian", centers[:, None], 2.0)}
    torch.testing.assert_close(have, attnfast.additive_attention(*heads, weight[None], **options).squeeze(1))


# ---------------------------------------------------------------------------------------------------------- derivatives


def small(core: str) -> tuple[Callable[..., Any], list[Tensor]]:
    """A function of differentiable tensors, the centre last, with everything local about it."""
    g = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=F64).requires_grad_()

    tensors = [draw(1, 2, 3, 3), draw(1, 1, 5, 3), draw(1, 1, 5, 2)]
    tensors += [draw(2, 3)] if core == "additive" else []
    center = around(1, 2, 3, tokens=5, kind="scattered").requires_grad_()
    name = "attention" if core == "dot" else "additive_attention"
    fixed = torch.tensor([[[0.0, math.nan, 3.2], [4.0, 1.4, -9.0]]])

    def call(*inputs: Tensor, module: Any = attnfast, **options: Any) -> Any:
        prior = ("gaussian", inputs[-1], 1.7)
        return getattr(module, name)(*inputs[:-1], prior=prior, window=(1, 2), window_center=fixed, **options)

    return call, [*tensors, center]


@pytest.mark.parametrize("core", ["dot", "additive"])
@pytest.mark.parametrize("mode", [False, True, "column_sum", "row_max"])
def test_gradcheck_and_gradgradcheck(core: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call, tensors = small(core)
    patch_seed(monkeypatch, SEED)

    def function(*inputs: Tensor) -> Any:
        result = call(*inputs, return_weights=mode, return_lse=True, dropout_p=0.2)
        return tuple(torch.where(x.isfinite(), x, 0.0) for x in result if x is not None)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("core", ["dot", "additive"])
def test_second_derivatives_in_blocks_of_rows(core: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block holds its rows of bounds and centres, not the first ones."""
    from attnfast import _second_order

    call, tensors = small(core)
    found = []
    for elements in (_second_order._BLOCK_ELEMENTS, 1):
        monkeypatch.setattr(_second_order, "_BLOCK_ELEMENTS", elements)
        grads = torch.autograd.grad(call(*tensors).square().sum(), tensors, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), tensors))  # type: ignore[arg-type]
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("core", ["dot", "additive"])
def test_only_the_centre_wants_a_gradient(core: str) -> None:
    call, tensors = small(core)
    wanted = torch.autograd.grad(call(*tensors).sum(), tensors[-1])[0]
    assert wanted.count_nonzero() > 2
    fixed = [x.detach() for x in tensors[:-1]]
    torch.testing.assert_close(torch.autograd.grad(call(*fixed, tensors[-1]).sum(), tensors[-1])[0], wanted)
    for at in range(len(fixed)):  # the centre and one other
        some = [x.requires_grad_(i == at) for i, x in enumerate(x.detach() for x in tensors[:-1])]
        grads = torch.autograd.grad(call(*some, tensors[-1]).sum(), [some[at], tensors[-1]])
        torch.testing.assert_close(grads[1], wanted)


@pytest.mark.parametrize("core", ["dot", "additive"])
def test_transforms_and_forward_mode(core: str) -> None:
    call, tensors = small(core)
    stacked = [torch.stack([x.detach(), x.detach().flip(-1)]) for x in tensors]
    stacked[-1] = torch.stack([tensors[-1].detach(), tensors[-1].detach() + 0.7])

    def total(*inputs: Tensor, module: Any = attnfast) -> Tensor:
        return call(*inputs, module=module).square().sum()

    dims = (0, 0, 0, None, 0) if core == "additive" else (0,) * 4
    given = [x if d == 0 else x[0] for x, d in zip(stacked, dims, strict=True)]
    numbers = tuple(range(len(tensors)))
    have = torch.vmap(torch.func.grad(total, numbers), dims)(*given)
    for at in range(2):
        single = [x[at] if d == 0 else x for x, d in zip(given, dims, strict=True)]
        want = torch.func.grad(lambda *x: total(*x, module=reference), numbers)(*single)
        for x, y in zip(have, want, strict=True):
            torch.testing.assert_close(x[at], y)
    values = tuple(x.detach() for x in tensors)
    tangents = tuple(torch.ones_like(x) for x in values)
    _, tangent = torch.func.jvp(total, values, tangents)
    grads = torch.func.grad(total, numbers)(*values)
    torch.testing.assert_close(tangent, sum(g.sum() for g in grads))


@pytest.mark.parametrize("core", ["dot", "additive"])
def test_compile(core: str) -> None:
    torch._dynamo.reset()
    call, tensors = small(core)
    compiled = torch.compile(lambda *x: call(*x).square().sum(), fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(call(*tensors).square().sum(), tensors)
    for x, y in zip(torch.autograd.grad(compiled(*tensors), tensors), want, strict=True):
        torch.testing.assert_close(x, y)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------------ semantics


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("core", ["dot", "additive"])
@pytest.mark.parametrize("kind", ["along", "scattered"])
def test_keys_outside_every_window_take_no_part(isa: str, core: str, kind: str, poison: float) -> None:
    tensors = problem(1, 2, 70, 200, 16, dtype=torch.float32)
    inputs = [tensors[n] for n in ("query", "key", "value")]
    inputs += [torch.randn(2, 16)] if core == "additive" else []
    function = attnfast.attention if core == "dot" else attnfast.additive_attention
    centers = around(1, 2, 70, tokens=200, kind=kind, dtype=torch.float32)
    centers[0, 0, 5] = math.nan
    inside = near_centers(centers, (2, 3), 200)
    hidden = ~inside.any(-2)  # [1, 2, T_k]
    assert hidden.any() and not hidden.all()

    def run(key: Tensor, value: Tensor) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in (inputs[0], key, value, *inputs[3:], centers)]
        prior = ("gaussian", leaves[-1], 2.0)
        out = function(*leaves[:-1], window=(2, 3), window_center=centers, prior=prior)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    clean = run(*inputs[1:3])
    dirty = run(*(torch.where(hidden.unsqueeze(-1), poison, x) for x in inputs[1:3]))
    for x, y in zip(clean, dirty, strict=True):
        assert x.isfinite().all()
        # A tile with something that is not finite may be computed another way, which rounds otherwise.
        torch.testing.assert_close(x, y, rtol=0.0, atol=1e-5 * float(y.abs().max()))
    assert not clean[0][0, 0, 5].any()  # a centre of NaN sees nothing, whatever the prior's centre is
    assert not clean[-1][0, 0, 5].any()


@pytest.mark.parametrize("core", ["dot", "additive"])
def test_a_centre_of_nan_in_the_prior_is_that_rows_affair(core: str) -> None:
    tensors = problem(1, 1, 4, 6, 8, dtype=F64)
    inputs = [tensors[n] for n in ("query", "key", "value")] + ([torch.randn(1, 8, dtype=F64)] if core != "dot" else [])
    function = attnfast.attention if core == "dot" else attnfast.additive_attention
    center = torch.tensor([1.0, math.nan, math.inf, 3.0], dtype=F64)
    out = function(*inputs, prior=("gaussian", center, 1.0))
    assert out[0, 0, 1].isnan().all()
    assert not out[0, 0, 2].any()
    assert out[0, 0, [0, 3]].isfinite().all()


def test_extreme_widths() -> None:
    tensors = problem(1, 1, 4, 70, 8, dtype=torch.float32)
    q, k, v = (tensors[n] for n in ("query", "key", "value"))
    center = torch.arange(4.0).view(1, 1, 4)
    sharp = attnfast.attention(q, k, v, prior=("gaussian", center, 1e-300), return_weights=True).weights
    plain = attnfast.attention(q, k, v, return_weights=True).weights
    assert torch.equal(sharp.nonzero()[:, 2:], torch.arange(4).view(4, 1).expand(4, 2))
    torch.testing.assert_close(sharp.diagonal(dim1=2, dim2=3), plain.diagonal(dim1=2, dim2=3))
    flat = attnfast.attention(q, k, v, prior=("gaussian", center, 1e300), return_weights=True).weights
    torch.testing.assert_close(flat, plain, rtol=1e-6, atol=0)


def test_packed_sequences() -> None:
    lengths_q, lengths_k = [3, 0, 70, 20], [5, 4, 90, 0]
    offsets = [torch.tensor([0, *x]).cumsum(0) for x in (lengths_q, lengths_k)]
    query, key, value = (torch.randn(sum(n), 2, 8, dtype=F64) for n in (lengths_q, lengths_k, lengths_k))
    centers = around(2, sum(lengths_q), tokens=20)
    for options in ({}, {"causal": "bottom_right"}):
        leaves = [x.detach().requires_grad_() for x in (query, key, value, centers)]
        prior = ("gaussian", leaves[-1], 4.0)
        local = {"window": (5, 3), "window_center": centers, "prior": prior, **options}
        out = attnfast.varlen_attention(*leaves[:3], *offsets, 70, 90, **local)
        have = [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
        want_out = reference.varlen_attention(*leaves[:3], *offsets, 70, 90, **local)
        want = [want_out.detach(), *torch.autograd.grad(want_out.square().sum(), leaves)]
        for x, y in zip(have, want, strict=True):
            torch.testing.assert_close(x, y)
        # A sequence is a call of its own: centres count from its first key.
        q0, k0 = lengths_q[0], lengths_k[0] + lengths_k[1]
        rows = slice(q0, q0 + 70)
        single = attnfast.attention(
            *(x.transpose(0, 1)[None] for x in (query[rows], key[k0 : k0 + 90], value[k0 : k0 + 90])),
            window=(5, 3), window_center=centers[:, rows], prior=("gaussian", centers[:, rows], 4.0), **options,
        )  # fmt: skip
        torch.testing.assert_close(out[rows].transpose(0, 1)[None], single)


def test_batch_dimensions_broadcast() -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 5), torch.randn(2, 1, 7, 5), torch.randn(2, 1, 7, 5)
    for shape in ((), (4,), (2, 1), (2, 1, 1), (3, 1, 1, 4), (3, 2, 2, 4)):
        centers = 6 * torch.rand(shape)
        options = {"window": (1, 1), "window_center": centers, "prior": ("gaussian", centers, 2.0)}
        torch.testing.assert_close(attnfast.attention(q, k, v, **options), reference.attention(q, k, v, **options))
    matrix = {"window": (1, 1), "window_center": torch.tensor([0, 3, 4, 9])}
    have = attnfast.attention(q[0, 0, 0], k[0, 0], v[0, 0], **matrix)
    torch.testing.assert_close(have, reference.attention(q[0, 0, 0], k[0, 0], v[0, 0], **matrix))


@pytest.mark.parametrize("normalizer", ["sparsemax", "hard", "none"])
def test_other_normalisers_see_the_same_window(normalizer: str) -> None:
    q, k, v = torch.randn(2, 2, 4, 5), torch.randn(2, 2, 7, 5), torch.randn(2, 2, 7, 5)
    centers = around(2, 2, 4, tokens=7, dtype=torch.float32)
    options = {"window": (1, 2), "window_center": centers, "prior": ("gaussian", centers, 2.0)}
    have = attnfast.attention(q, k, v, normalizer=normalizer, **options)
    torch.testing.assert_close(have, reference.attention(q, k, v, normalizer=normalizer, **options))


@pytest.mark.parametrize("core", ["dot", "additive"])
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (4, 4)])
def test_results_do_not_depend_on_the_number_of_threads(core: str, heads: tuple[int, int]) -> None:
    """Shapes that take each of the backward's schedules."""
    H, H_kv = heads
    tensors = problem(1, H, 700, 900, 16, H_kv=H_kv)
    inputs = [tensors[n] for n in ("query", "key", "value")] + ([torch.randn(H, 16)] if core == "additive" else [])
    centers = around(1, H, 700, tokens=900, dtype=torch.float32)
    function = attnfast.attention if core == "dot" else attnfast.additive_attention
    found = []
    for threads in (1, 2, 4, 16):
        torch.set_num_threads(threads)
        leaves = [x.detach().requires_grad_() for x in (*inputs, centers)]
        out = function(*leaves[:-1], window=(30, 20), window_center=centers, prior=("gaussian", leaves[-1], 15.0))
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
        without_query = torch.autograd.grad(function(*leaves[:-1], prior=("gaussian", leaves[-1], 15.0)).sum(),
                                            [leaves[1], leaves[-1]])  # fmt: skip
        found[-1] += without_query
    for other in found[1:]:
        for x, y in zip(other, found[0], strict=True):
            assert torch.equal(x, y)


# ------------------------------------------------------------------------------------------------- cost grows with T_q


@pytest.mark.parametrize("core", ["dot", "additive"])
def test_nothing_of_size_tokens_by_tokens_is_held(core: str) -> None:
    """What a training step allocates grows with T, not with T x T: eight times the tokens, less than ten the bytes."""

    def held(tokens: int) -> int:
        q, k, v = (torch.randn(1, 1, tokens, 16).requires_grad_() for _ in range(3))
        weight = [torch.randn(1, 16)] if core == "additive" else []
        centers = torch.arange(tokens, dtype=torch.float32).requires_grad_()
        function = attnfast.attention if core == "dot" else attnfast.additive_attention
        with torch.profiler.profile(profile_memory=True) as trace:
            out = function(q, k, v, *weight, window=(10, 10), window_center=centers, prior=("gaussian", centers, 5.0))
            out.sum().backward()
        return sum(max(event.self_cpu_memory_usage, 0) for event in trace.events())

    small_size, large = held(512), held(4096)
    assert 0 < large < 10 * small_size
    assert large < 4096 * 4096


@pytest.mark.parametrize("core", ["dot", "additive"])
def test_far_keys_are_not_read(core: str) -> None:
    """Keys and values that no window reaches lie in memory that cannot be read: touching it would end the process."""
    import subprocess
    import sys

    script = f"""
import ctypes, mmap, torch, attnfast
torch.set_num_threads(2)
pages, size = 64, mmap.PAGESIZE
keep = []
def guarded(tokens, features):
    area = mmap.mmap(-1, 3 * pages * size)
    keep.append(area)
    whole = torch.frombuffer(area, dtype=torch.float32).view(-1, features)
    whole.normal_()
    address = whole.data_ptr()
    libc = ctypes.CDLL(None, use_errno=True)
    for first in (0, 2 * pages * size):
        assert libc.mprotect(ctypes.c_void_p(address + first), ctypes.c_size_t(pages * size), 0) == 0
    return whole
features = 16
key, value = guarded(0, features), guarded(0, features)
tokens = key.shape[0]
first, last = tokens // 3, 2 * tokens // 3
key, value = key[None, None].requires_grad_(), value[None, None].requires_grad_()
query = torch.randn(1, 1, 300, features, requires_grad=True)
centers = torch.linspace(first + 80, last - 80, 300).requires_grad_()
function, weight = {
        "(attnfast.attention, [])" if core == "dot" else "(attnfast.additive_attention, [torch.randn(1, features)])"
    }
out = function(query, key, value, *weight, window=(10, 10), window_center=centers, prior=("gaussian", centers, 5.0))
assert out.isfinite().all()
torch.autograd.grad(out.sum(), [query, key, value, centers])
one = function(query[:, :, :1].detach(), key.detach(), value.detach(), *weight, window=(10, 10),
               window_center=centers[:1])
assert one.isfinite().all()
print("read nothing else")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "read nothing else", (done.returncode, done.stderr[-2000:])


# ---------------------------------------------------------------------------------------------------------- wrong calls

Q, K, V = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 5), torch.randn(2, 3, 6, 5)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no window": ({"window_center": torch.zeros(4)}, ValueError, "window_center: expected a window"),
    "list": ({"window_center": [1.0], "window": (1, 1)}, TypeError, "window_center: expected a torch.Tensor"),
    "boolean": (
        {"window_center": torch.zeros(4).bool(), "window": (1, 1)},
        TypeError,
        "window_center: expected a floating",
    ),
    "complex": (
        {"window_center": torch.zeros(4) * 1j, "window": (1, 1)},
        TypeError,
        "window_center: expected a floating",
    ),
    "shape": ({"window_center": torch.zeros(6), "window": (1, 1)}, ValueError, r"window_center: .*\[\.\.\., H, T_q\]"),
    "rank": ({"window_center": torch.zeros(4, 1), "window": (1, 1)}, ValueError, "window_center"),
    "sigma": ({"prior": ("gaussian", torch.zeros(4), 0.0)}, ValueError, "prior's sigma"),
    "sigma infinite": ({"prior": ("gaussian", torch.zeros(4), math.inf)}, ValueError, "prior's sigma"),
    "center": ({"prior": ("gaussian", torch.zeros(6), 1.0)}, ValueError, "prior's center"),
    "center integer": ({"prior": ("gaussian", torch.zeros(4).long(), 1.0)}, TypeError, "prior's center"),
    "name": ({"prior": ("laplace", torch.zeros(4), 1.0)}, TypeError, "prior"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    options, kind, pattern = WRONG[name]
    with pytest.raises(kind, match=pattern):
        attnfast.attention(Q, K, V, **options)


def test_jagged_tensors_take_no_centres() -> None:
    nested = torch.nested.nested_tensor([torch.randn(n, 2, 4) for n in (3, 5)], layout=torch.jagged).transpose(1, 2)
    with pytest.raises(ValueError, match="window_center: not supported with jagged"):
        attnfast.attention(nested, nested, nested, window=(1, 1), window_center=torch.zeros(1))


def test_explain_tells_which_kernel() -> None:
    prior = ("gaussian", torch.zeros(4), 2.0)
    text = attnfast.explain(attnfast.attention, Q, K, V, window=(1, 1), window_center=torch.zeros(4), prior=prior)
    assert "kernel: tile kernel" in text and "route: kernel" in text
    one = attnfast.explain(attnfast.attention, Q[:, :, :1], K, V, window=(1, 1), window_center=torch.zeros(1))
    assert "kernel: decode kernel" in one
    one = attnfast.explain(attnfast.attention, Q[:, :, :1], K, V, prior=("gaussian", torch.zeros(1), 2.0))
    assert "not the decode kernel: a prior is on" in one
    assert "has no fused kernel" in attnfast.explain(attnfast.attention, Q, K, V, prior=torch.ones(6))
