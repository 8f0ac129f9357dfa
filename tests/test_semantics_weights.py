"""Contract lines 14 and 15 of semantics.md: weights on request, full, column sums, row maxima, and ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import HALVES, assert_close_to_truth, leaves, oracle, problem, real, rest, run_attention
from torch import Tensor

PATHS: dict[str, dict[str, int]] = {
    "tiles": {"B": 2, "H": 2, "T_q": 70, "T_k": 130, "D": 16},
    "small": {"B": 2, "H": 2, "T_q": 5, "T_k": 3, "D": 8},
    "groups": {"B": 1, "H": 6, "H_kv": 2, "T_q": 33, "T_k": 65, "D": 8},
    "decode": {"B": 3, "H": 4, "H_kv": 2, "T_q": 1, "T_k": 77, "D": 16},
    "split_decode": {"B": 1, "H": 2, "T_q": 1, "T_k": 2100, "D": 8},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": "bottom_right"},
    "mask": {"mask": True},
    "mixed": {"bias": True, "sink": True, "softcap": 3.0, "key_lengths": True, "window": (20, 40)},
}


def reduced(full: Tensor, which: str) -> Tensor:
    if which == "full":
        return full
    if which == "column_sum":
        return full.sum(-2)
    return full.gather(-1, full.detach().argmax(-1, keepdim=True)).squeeze(-1)


def with_options(shape: dict[str, int], name: str, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    B, H, T_q, T_k = (shape[n] for n in ("B", "H", "T_q", "T_k"))
    g = torch.Generator().manual_seed(1)
    makers = {
        "mask": lambda: torch.rand(B, 1, T_q, T_k, generator=g) < 0.5,
        "bias": lambda: torch.randn(H, 1, T_k, generator=g).to(dtype),
        "sink": lambda: torch.randn(H, generator=g).to(real(dtype)),
        "key_lengths": lambda: torch.randint(0, T_k + 1, (B,), generator=g),
    }
    options = OPTIONS[name]
    tensors = {**problem(**shape, dtype=dtype), **{n: makers[n]() for n, x in options.items() if x is True}}
    if "mask" in tensors:
        tensors["mask"][0, 0, 0] = False
    return tensors, {n: x for n, x in options.items() if x is not True}


@pytest.mark.parametrize("alone", [False, True], ids=["with_output", "alone"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("which", ["full", "column_sum", "row_max"])
@pytest.mark.parametrize("path", PATHS)
def test_s14_weights_and_gradients(
    backend: Any, dtype: torch.dtype, path: str, which: str, options: str, alone: bool
) -> None:
    """Values, and gradients through the weights, alone or together with those through output and lse."""
    tensors, plain_options = with_options(PATHS[path], options, dtype)
    x = leaves(tensors)
    result = backend.attention(
        x["query"], x["key"], x["value"], **rest(x), **plain_options, return_weights=which, return_lse=not alone
    )
    assert (result.lse is None) == alone
    assert result.weights.dtype == (dtype if which == "full" else real(dtype))
    names = [n for n in x if isinstance(x[n], Tensor) and x[n].requires_grad and not (alone and n == "value")]
    probe = torch.randn(result.weights.shape, dtype=torch.float64).to(result.weights.dtype).double()
    other = torch.randn(result.output.shape, dtype=torch.float64).to(dtype).double()

    def gradients(inputs: dict[str, Any], weights: Tensor, output: Tensor, lse: Tensor | None) -> list[Tensor]:
        total = (weights * probe.to(weights.dtype)).sum()
        if lse is not None:
            total = total + (output * other.to(output.dtype)).sum()
            total = total + torch.where(lse.isfinite(), lse, 0).to(total.dtype).sum()
        found = torch.autograd.grad(total, [inputs[n] for n in names], allow_unused=True)
        return [torch.zeros_like(inputs[n]) if g is None else g for n, g in zip(names, found)]

    found = gradients(x, result.weights, result.output, result.lse)
    wanted = []
    for kind in (torch.float64, dtype):
        y = leaves(tensors, kind)
        full = oracle(y["query"], y["key"], y["value"], **rest(y), **plain_options)
        # in the dtype under test, sums over rows run in the accumulation dtype, as the kernels' do
        weights = reduced(full.weights if which == "full" else full.weights.to(real(kind)), which)
        wanted.append((weights, gradients(y, weights, full.output, None if alone else full.lse)))
    (truth, truth_grads), (plain, plain_grads) = wanted
    assert_close_to_truth(result.weights, truth, plain, which)
    for name, a, t, p in zip(names, found, truth_grads, plain_grads):
        # row_max: two nearly equal weights may change places between float64 and the dtype; not at these seeds
        assert_close_to_truth(a, t, p, f"grad_{name}", slack=2 * torch.finfo(dtype).eps if dtype in HALVES else 0.0)


@pytest.mark.parametrize("path", PATHS)
def test_s14_output_is_weights_times_value(backend: Any, dtype: torch.dtype, path: str) -> None:
    inputs = problem(**PATHS[path], dtype=dtype)
    result = backend.attention(*inputs.values(), return_weights=True, causal="bottom_right")
    value = inputs["value"].double().repeat_interleave(inputs["query"].shape[1] // inputs["value"].shape[1], 1)
    atol = {8: 1e-13, 4: 1e-5, 2: 2e-2}[result.output.element_size()]
    torch.testing.assert_close(result.weights.double() @ value, result.output.double(), rtol=0, atol=atol)
    true = backend.attention(*inputs.values(), return_weights="full", causal="bottom_right")
    assert torch.equal(true.weights, result.weights)
    alone = backend.attention(*inputs.values(), causal="bottom_right")
    if "decode" in path:  # without weights one query per head has a kernel of its own, which sums in another order
        ulps = {8: 1e-14, 4: 1e-6, 2: 1e-2}[alone.element_size()]
        torch.testing.assert_close(alone, result.output, rtol=ulps, atol=ulps)
    else:
        assert torch.equal(alone, result.output)


@pytest.mark.parametrize("which", ["full", "column_sum", "row_max"])
def test_s14_masked_rows_and_columns_are_zero(backend: Any, dtype: torch.dtype, which: str) -> None:
    inputs = problem(2, 2, 40, 70, 8, dtype=dtype)
    inputs["query_lengths"], inputs["key_lengths"] = torch.tensor([30, 40]), torch.tensor([70, 20])
    run = run_attention(backend.attention, inputs, return_weights=which)
    assert run.weights is not None
    if which == "full":
        assert (run.weights[0, :, 30:] == 0).all() and (run.weights[1, :, :, 20:] == 0).all()
        assert (run.weights[1, :, :, :20] > 0).all()
    elif which == "column_sum":
        assert (run.weights[1, :, 20:] == 0).all()
        torch.testing.assert_close(run.weights.sum(-1), torch.tensor([[30.0] * 2, [40.0] * 2]).to(run.weights.dtype))
    else:
        assert (run.weights[0, :, 30:] == 0).all() and (run.weights[0, :, :30] > 0).all()


@pytest.mark.parametrize("which,T_q", [("full", 5), ("column_sum", 5), ("row_max", 5), ("column_sum", 1)])
@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_s14_strides_of_the_weights_gradient(
    backend: Any, dtype: torch.dtype, which: str, T_q: int, layout: str
) -> None:
    x = leaves(problem(2, 2, T_q, 70, 8, dtype=dtype))
    weights = backend.attention(*x.values(), return_weights=which).weights
    if layout == "expanded":
        grad = torch.randn(1).to(weights.dtype).expand(weights.shape)
    else:
        grad = torch.randn(weights.mT.shape).to(weights.dtype).mT
    have = torch.autograd.grad(weights, [x["query"], x["key"]], grad, retain_graph=True)
    want = torch.autograd.grad(weights, [x["query"], x["key"]], grad.clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(have, want)


@pytest.mark.parametrize("which", ["full", "column_sum", "row_max"])
def test_s14_poisoned_gradient_of_masked_weights(backend: Any, dtype: torch.dtype, which: str) -> None:
    """NaN that arrives for a masked weight goes nowhere."""
    x = leaves(problem(2, 2, 40, 70, 8, dtype=dtype))
    lengths = {"query_lengths": torch.tensor([30, 40]), "key_lengths": torch.tensor([70, 20])}
    weights = backend.attention(*x.values(), **lengths, return_weights=which).weights
    clean = torch.randn(weights.shape).to(weights.dtype)
    bad = clean.clone()
    if which == "full":
        bad[1, :, :, 20:] = float("nan")
        bad[0, :, 30:] = float("nan")
    elif which == "column_sum":
        bad[1, :, 20:] = float("nan")
    else:
        bad[0, :, 30:] = float("nan")
    inputs = [x["query"], x["key"]]
    want = torch.autograd.grad(weights, inputs, clean, retain_graph=True)
    have = torch.autograd.grad(weights, inputs, bad)
    torch.testing.assert_close(have, want)
    assert all(g.isfinite().all() for g in want)


@pytest.mark.parametrize("causal", [None, "bottom_right"])
@pytest.mark.parametrize("which", ["full", "column_sum", "row_max"])
def test_s14_varlen_weights(backend: Any, dtype: torch.dtype, which: str, causal: str | None) -> None:
    n_q, n_k = [3, 0, 70, 1], [5, 4, 67, 130]
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()]) for n in (n_q, n_k))
    x = [torch.randn(n, 2, 8).to(dtype).requires_grad_() for n in (sum(n_q), sum(n_k), sum(n_k))]
    y = [t.detach().double().requires_grad_() for t in x]
    weights = backend.varlen_attention(*x, cu_q, cu_k, 70, 130, causal=causal, return_weights=which).weights
    full = torch.zeros(2, sum(n_q), sum(n_k), dtype=torch.float64)
    blocks = []
    for b in range(4):
        rows, columns = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        query, key, value = (t[s].transpose(0, 1)[None] for t, s in zip(y, (rows, columns, columns)))
        block = torch.zeros_like(full)
        block[:, rows, columns] = 1
        one = torch.zeros_like(full)
        one[:, rows, columns] = oracle(query, key, value, causal=causal).weights[0]
        blocks.append(one)
    want = reduced(torch.stack(blocks).sum(0), which)
    assert weights.shape == want.shape
    rtol = {8: 1e-12, 4: 1e-4, 2: 3e-2}[torch.empty(0, dtype=dtype).element_size()]
    torch.testing.assert_close(weights.double(), want, rtol=rtol, atol=rtol)
    probe = torch.randn(want.shape)
    have_grads = torch.autograd.grad((weights * probe).sum(), x[:2])
    for a, b in zip(have_grads, torch.autograd.grad((want * probe).sum(), y[:2])):
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("T_q,T_k", [(1, 7), (1, 900), (5, 70), (70, 200)])
@pytest.mark.parametrize("twins", ["all_equal", "two_maxima"])
def test_s15_row_max_ties_go_to_the_lowest_index(
    backend: Any, dtype: torch.dtype, T_q: int, T_k: int, twins: str
) -> None:
    """Equal weights: the gradient of the maximum enters at the first of them alone, seen in the bias's gradient."""
    first, second = (0, 1) if twins == "all_equal" else (T_k // 3, T_k - 2)
    key = torch.zeros(1, 1, T_k, 8)
    if twins == "two_maxima":
        key[:, :, [first, second]] = 1.0
    key = key.to(dtype)
    query, value = torch.ones(1, 1, T_q, 8).to(dtype), torch.randn(1, 1, T_k, 8).to(dtype)
    bias = torch.zeros(1, 1, T_q, T_k, dtype=dtype, requires_grad=True)
    weights = backend.attention(query, key, value, bias=bias, return_weights="row_max").weights
    (grad,) = torch.autograd.grad(weights.sum(), bias)
    grad = grad[0, 0]
    assert (grad[:, first] > 0).all()
    rest_of_row = torch.cat([grad[:, :first], grad[:, first + 1 :]], 1)
    assert (rest_of_row < 0).all() and grad[0, second] < 0


def test_s15_row_max_after_dropout_of_everything(backend: Any, dtype: torch.dtype) -> None:
    x = leaves(problem(1, 1, 3, 5, 8, dtype=dtype))
    weights = backend.attention(*x.values(), dropout_p=1.0, return_weights="row_max").weights
    assert (weights == 0).all()
    grads = torch.autograd.grad(weights.sum(), [x["query"], x["key"]], allow_unused=True)
    assert all(g is None or (g == 0).all() for g in grads)
