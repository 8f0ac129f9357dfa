"""Additive attention with one query per head: kernels of its own, forward and backward, by the error rule.

A gradient that arrives at weights, or that a bias wants, goes through the tile kernel: ``test_additive`` has those.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import FLOATS, dtype_id
from test_additive import Tensors, check, leaves, make, oracle
from torch import Tensor

import attnfast
from attnfast import reference

SHAPES: dict[str, dict[str, int]] = {
    "record": {"B": 3, "H": 1, "T_q": 1, "T_k": 64, "D": 512, "D_v": 512},
    "ragged": {"B": 2, "H": 3, "T_q": 1, "T_k": 77, "D": 40, "D_v": 33},
    "split": {"B": 1, "H": 2, "T_q": 1, "T_k": 2100, "D": 24, "D_v": 20},
    "grouped": {"B": 2, "H": 4, "H_kv": 2, "T_q": 1, "T_k": 90, "D": 17, "D_v": 5},
    "one": {"B": 1, "H": 1, "T_q": 1, "T_k": 1, "D": 1, "D_v": 1},
    "narrow": {"B": 5, "H": 1, "T_q": 1, "T_k": 9, "D": 3, "D_v": 70},
    "wide": {"B": 1, "H": 1, "T_q": 1, "T_k": 17, "D": 1030, "D_v": 2},
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_dtypes(isa: str, shape: str, dtype: torch.dtype) -> None:
    check(make(**SHAPES[shape], dtype=dtype), weights=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("shape", ["record", "ragged", "split", "grouped"])
@pytest.mark.parametrize("name", ["mask", "shared_mask", "float_mask", "lengths", "alibi", "sink", "window", "most"])
def test_options(isa: str, shape: str, name: str, dtype: torch.dtype) -> None:
    tensors = make(**SHAPES[shape], dtype=dtype)
    B, H, T_k = *tensors["query"].shape[:2], tensors["key"].shape[2]
    g = generator(3)
    k = torch.arange(T_k)
    options: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    visible = torch.ones(B, H, 1, T_k, dtype=torch.bool)
    if name in ("mask", "shared_mask", "most"):
        size = (1, 1, 1, T_k) if name == "shared_mask" else (B, H, 1, T_k)
        options["mask"] = torch.rand(size, generator=g) < 0.6
        visible = visible & options["mask"]
    if name in ("lengths", "most"):
        options["key_lengths"] = T_k - 3 - torch.arange(B)
        visible = visible & (k < options["key_lengths"].view(-1, 1, 1, 1))
    if name == "lengths":  # and a sample without a query
        options["query_lengths"] = (torch.arange(B) != 1).long()
        visible = visible & (options["query_lengths"] > 0).view(-1, 1, 1, 1)
    if name in ("window", "most"):
        options["causal"], options["window"] = "bottom_right", (T_k // 2, 0)
        offset = options.get("key_lengths", torch.full((B,), T_k)).view(-1, 1, 1, 1) - 1
        visible = visible & (k <= offset) & (k >= offset - T_k // 2)
    if name == "alibi":
        options["alibi_slopes"] = torch.rand(H, generator=g) / T_k
        expected["bias"] = -options["alibi_slopes"].double().view(1, H, 1, 1) * k
    if name == "float_mask":
        options["mask"] = torch.randn(B, 1, 1, T_k, generator=g).to(dtype)
        options["mask"][..., ::5] = -math.inf
        expected["bias"] = options["mask"].double()
    if name in ("sink", "most"):
        tensors["sink"] = torch.randn(H, generator=g)
    expected["visible"] = visible
    check(tensors, options, expected, weights=False)


@pytest.mark.parametrize("spread", [0.01, 0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0])
@pytest.mark.parametrize("shape", ["ragged", "record"])
def test_every_spread_of_inputs(isa: str, spread: float, shape: str) -> None:
    """No slack: tanh is exact to its last digits everywhere, near zero too."""
    check(make(**SHAPES[shape], spread=spread), weights=False)


@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1000.0, 1e6, 1e30])
def test_every_scale_of_the_weights(isa: str, factor: float) -> None:
    tensors = make(**SHAPES["ragged"], weight_scale=factor)
    found = attnfast.additive_attention(**tensors, return_lse=True)
    want = oracle(**{n: x.double() for n, x in tensors.items()})
    plain = oracle(**tensors)
    for a, b, c in zip(found[:2], want, plain):
        size = max(1.0, b.abs().max().item())
        assert (a - b).abs().max() <= 2 * (c - b).abs().max() + 1e-6 * size


@pytest.mark.parametrize("shape", ["ragged", "split", "grouped"])
@pytest.mark.parametrize("weight_scale", [1.0, 100.0])
@pytest.mark.parametrize("option", ["plain", "bias"])
def test_forward_weights_and_backward_form_the_same_scores(
    isa: str, option: str, weight_scale: float, shape: str
) -> None:
    """With scores in the hundreds, a score that is rounded in another way does not cancel against the lse."""
    tensors = make(**SHAPES[shape], weight_scale=weight_scale)
    T_k = tensors["key"].shape[2]
    options: dict[str, Any] = {}
    if option == "bias":
        options["bias"] = weight_scale * torch.randn(1, 1, 1, T_k, generator=generator(2))
        options["alibi_slopes"] = torch.rand(tensors["query"].shape[1], generator=generator(4))
    inputs = leaves(tensors)
    result = attnfast.additive_attention(**inputs, **options, return_lse=True, return_weights=True)
    weights = result.weights.detach()
    groups = tensors["query"].shape[1] // tensors["key"].shape[1]
    values = tensors["value"].repeat_interleave(groups, 1)
    # The lse is rounded, which is one factor for a whole row; with biases, each of large scores is rounded with them.
    lse = result.lse.detach().abs().max().item()
    rounding = 4 * torch.finfo(torch.float32).eps * lse
    total = weights.double().sum(-1, keepdim=True)
    assert (total - 1).abs().max() <= 2e-6 + rounding
    tolerance = 2e-6 if option == "plain" else 2e-6 + rounding
    torch.testing.assert_close(
        result.output.double(), (weights.double() / total) @ values.double(), rtol=tolerance, atol=tolerance
    )
    # The gradient by the values of a sum of outputs is the weights themselves.
    alone = attnfast.additive_attention(**inputs, **options)
    assert torch.equal(alone, result.output), "what else is asked for must not change the output"
    (grad,) = torch.autograd.grad(alone.sum(), inputs["value"])
    want = weights.squeeze(2).unflatten(1, (-1, groups)).sum(2).unsqueeze(-1).expand_as(grad)
    if groups == 1:
        assert torch.equal(grad, want)
    else:
        torch.testing.assert_close(grad, want)


def test_saturated_scores_are_exact(isa: str) -> None:
    weight = torch.tensor([[0.25, -1.75, 2.5, 0.5, 0.125]])
    for offset in (9.1, 40.0, 90.0, math.inf):
        query = torch.full((1, 1, 1, 5), offset)
        lse = attnfast.additive_attention(query, query.sign(), torch.ones(1, 1, 1, 1), weight, return_lse=True).lse
        assert abs(lse.item() - weight.sum().item()) <= 2e-7 * 2


def with_nan_behind(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 16), torch.nan, dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize(("D", "D_v"), [(1, 2), (7, 3), (12, 20), (17, 31), (33, 65)])
def test_nothing_behind_a_row_is_read(isa: str, D: int, D_v: int, dtype: torch.dtype) -> None:
    tensors = make(B=2, H=1, T_q=1, T_k=19, D=D, D_v=D_v, dtype=dtype)
    inputs = leaves({n: with_nan_behind(x) if n in ("query", "key", "value") else x for n, x in tensors.items()})
    plain = leaves(tensors)
    found, want = attnfast.additive_attention(**inputs), attnfast.additive_attention(**plain)
    assert torch.equal(found, want)
    probe = torch.randn(want.shape, generator=generator()).to(dtype)
    pairs = zip(torch.autograd.grad(found, list(inputs.values()), probe),
                torch.autograd.grad(want, list(plain.values()), probe))  # fmt: skip
    for a, b in pairs:
        assert torch.equal(a, b)


@pytest.mark.parametrize("hide", ["mask", "lengths"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_hidden_keys_hold_changes_nothing(isa: str, bad: float, hide: str) -> None:
    tensors = make(**SHAPES["split"])
    T_k = tensors["key"].shape[2]
    mask = torch.ones(T_k, dtype=torch.bool)
    options: dict[str, Any] = {"mask": mask}
    if hide == "mask":
        mask[torch.randperm(T_k, generator=generator())[: T_k // 3]] = False
    else:
        options = {"key_lengths": torch.tensor([1501])}
        mask[1501:] = False
    results: list[list[Tensor]] = []
    for poison in (0.0, bad):
        tensors["key"][:, :, ~mask] = poison
        tensors["value"][:, :, ~mask] = poison
        inputs = leaves(tensors)
        out = attnfast.additive_attention(**inputs, **options)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(inputs.values()))])
    for a, b in zip(*results):
        assert a.isfinite().all()
        assert torch.equal(a, b)
    assert (results[0][2][:, :, ~mask] == 0).all()
    assert (results[0][3][:, :, ~mask] == 0).all()


def test_infinite_inputs_saturate_and_nan_reaches_its_row(isa: str) -> None:
    tensors = make(**SHAPES["ragged"])
    tensors["key"][0, 0, 3, 5], tensors["key"][1, 2, 4] = math.inf, -math.inf
    inputs = leaves(tensors)
    out = attnfast.additive_attention(**inputs)
    torch.testing.assert_close(out, oracle(**tensors)[0])
    for grad in torch.autograd.grad(out.sum(), list(inputs.values())):
        assert grad.isfinite().all()
    tensors["key"][1, 1, 70, 2] = math.nan
    nan = attnfast.additive_attention(**tensors).isnan()
    assert nan[1, 1].all()
    assert nan.sum() == nan[1, 1].numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_the_most_negative_number_in_a_float_mask_is_no_mask(isa: str, dtype: torch.dtype) -> None:
    """The lse, near -1e38, has no digits left for the logarithm of the sum."""
    tensors = make(B=1, H=1, T_q=1, T_k=70, D=9, D_v=4, dtype=dtype)
    inputs = leaves(tensors)
    mask = torch.full((1, 1, 1, 70), torch.finfo(dtype).min, dtype=dtype)
    out = attnfast.additive_attention(**inputs, mask=mask)
    torch.testing.assert_close(out, tensors["value"].mean(2, keepdim=True))
    (grad,) = torch.autograd.grad(out.sum(), inputs["value"])
    torch.testing.assert_close(grad, torch.full_like(grad, 1 / 70))


@pytest.mark.parametrize("shape", ["record", "split", "ragged"])
def test_threads_change_no_bit(isa: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {**SHAPES[shape], "D": 4 * SHAPES[shape]["D"]}  # beyond what runs serially
    inputs = leaves(make(**sizes))
    before = torch.get_num_threads()
    results: list[tuple[Tensor, ...]] = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = attnfast.additive_attention(**inputs)
            results.append((out, *torch.autograd.grad(out.square().sum(), list(inputs.values()))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", ["query", "key", "value", "weight", "score_bias"])
def test_each_gradient_alone(isa: str, wanted: str) -> None:
    tensors = make(**SHAPES["ragged"])
    everything = leaves(tensors)
    out = attnfast.additive_attention(**everything)
    (want,) = torch.autograd.grad(out.square().sum(), everything[wanted])
    alone = {n: x.requires_grad_() if n == wanted else x for n, x in tensors.items()}
    (found,) = torch.autograd.grad(attnfast.additive_attention(**alone).square().sum(), alone[wanted])
    assert torch.equal(found, want)


@pytest.mark.parametrize("H_kv", [1, 2])
def test_gradcheck(isa: str, H_kv: int) -> None:
    tensors = make(B=2, H=2, H_kv=H_kv, T_q=1, T_k=9, D=5, D_v=3, dtype=torch.float64)
    mask = torch.rand(2, 1, 1, 9, generator=generator(1)) < 0.7

    def call(*inputs: Tensor) -> tuple[Any, Any]:
        return attnfast.additive_attention(*inputs[:4], score_bias=inputs[4], mask=mask, return_lse=True)[:2]

    inputs = [x.requires_grad_() for x in tensors.values()]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_rows_that_do_not_lie_in_order_take_the_tile_kernel(isa: str, dtype: torch.dtype) -> None:
    tensors: Tensors = make(B=2, H=1, T_q=1, T_k=30, D=20, D_v=16, dtype=dtype)
    want = attnfast.additive_attention(**tensors)
    for name in ("key", "value"):
        moved = {**tensors, name: tensors[name].mT.contiguous().mT}
        text = attnfast.explain(attnfast.additive_attention, **moved)
        assert f"not the decode kernel: the last dimension of {name} is not contiguous" in text
        torch.testing.assert_close(attnfast.additive_attention(**moved), want)


def test_explain() -> None:
    q, k, w = torch.randn(2, 1, 8), torch.randn(2, 5, 8), torch.randn(8)
    fast = attnfast.explain(attnfast.additive_attention, q, k, k, w, return_lse=True)
    assert "kernel: decode kernel" in fast
    assert "additive_attention: query [2, 1, 1, 8]" in fast
    for options, words in (
        ({"softcap": 2.0}, "softcap is on"),
        ({"dropout_p": 0.5}, "dropout is on"),
        ({"prior": ("gaussian", torch.zeros(2, 1), 2.0)}, "a prior is on"),
    ):
        text = attnfast.explain(attnfast.additive_attention, q, k, k, w, **options)
        assert f"not the decode kernel: {words}" in text, text
    text = attnfast.explain(attnfast.additive_attention, k, k, k, w.requires_grad_())
    assert "route: function" in text
    assert "not the decode kernel: T_q is not 1" in text
    assert "kernel: none" in attnfast.explain(reference.additive_attention, q, k, k, w)
    with pytest.raises(ValueError, match="softcap"):
        attnfast.explain(attnfast.additive_attention, q, k, k, w, softcap=-1.0)
