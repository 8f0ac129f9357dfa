"""Contract lines 1 and 2 of semantics.md: fully masked rows, and masked keys that are selected out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import PATHS, check_attention, problem, real, run_attention, visible_pairs
from torch import Tensor

INF, NAN = math.inf, math.nan


def blind_options(how: str, shape: dict[str, int], dtype: torch.dtype) -> tuple[dict[str, Any], Tensor]:
    """Options that leave some rows without any key, and [B, 1 or H, T_q] telling which."""
    B, H, T_q, T_k = (shape[n] for n in ("B", "H", "T_q", "T_k"))
    blind = torch.zeros(B, H, T_q, dtype=torch.bool)
    g = torch.Generator().manual_seed(3)
    if how == "bool_mask":
        mask = torch.rand(B, H, T_q, T_k, generator=g) < 0.7
        mask[0, :, 0] = False
        mask[-1, 0, T_q // 2 :] = False
        return {"mask": mask}, ~mask.any(-1)
    if how == "mask_broadcast":  # a key padding mask, [B, 1, 1, T_k], all padding in sample 0
        mask = torch.ones(B, 1, 1, T_k, dtype=torch.bool)
        mask[0] = False
        blind[0] = True
        return {"mask": mask}, blind
    if how == "inf_bias":
        bias = torch.randn(B, H, T_q, T_k, generator=g).to(dtype)
        bias[0, :, 0] = -INF
        bias[-1, 0, T_q // 2 :] = -INF
        return {"bias": bias}, (bias == -INF).all(-1)
    if how == "inf_float_mask":
        mask = torch.zeros(T_q, T_k, dtype=dtype)
        mask[T_q // 2] = -INF
        blind[:, :, T_q // 2] = True
        return {"mask": mask}, blind
    if how == "key_lengths_0":
        lengths = torch.full((B,), T_k)
        lengths[0] = 0
        blind[0] = True
        return {"key_lengths": lengths}, blind
    if how == "query_lengths":
        lengths = torch.full((B,), T_q)
        lengths[0] = T_q // 2
        blind[0, :, T_q // 2 :] = True
        return {"query_lengths": lengths}, blind
    if how == "bottom_right":  # key lengths below the number of queries: the first queries stand before the first key
        lengths = torch.full((B,), min(T_k, max(T_q - 2, 0)))
        seen = visible_pairs(B, T_q, T_k, "bottom_right", key_lengths=lengths)
        blind[:] = ~seen.any(-1)
        return {"key_lengths": lengths, "causal": "bottom_right"}, blind
    assert how == "window"  # top-left window: a query past the last key by more than the left reach
    lengths = torch.full((B,), max(1, T_q // 3))
    seen = visible_pairs(B, T_q, T_k, None, (1, 0), key_lengths=lengths)
    blind[:] = ~seen.any(-1)
    return {"key_lengths": lengths, "window": (1, 0)}, blind


BLIND = [
    "bool_mask",
    "mask_broadcast",
    "inf_bias",
    "inf_float_mask",
    "key_lengths_0",
    "query_lengths",
    "bottom_right",
    "window",
]


def split_tensors(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    tensors = {n: x for n, x in options.items() if isinstance(x, Tensor)}
    return tensors, {n: x for n, x in options.items() if n not in tensors}


@pytest.mark.parametrize("how", BLIND)
@pytest.mark.parametrize("path", PATHS)
def test_s01_fully_masked_row(backend: Any, dtype: torch.dtype, path: str, how: str) -> None:
    options, blind = blind_options(how, PATHS[path], dtype)
    if how == "window" and path in ("decode", "split_decode"):
        assert not blind.any()  # one query always meets key 0 there; the comparison below still holds
    elif not (how == "bottom_right" and path == "tiles"):
        assert blind.any()
    tensors, plain = split_tensors(options)
    inputs = {**problem(**PATHS[path], dtype=dtype), **tensors}
    run = check_attention(backend.attention, inputs, **plain)
    assert run.lse is not None and run.weights is not None
    assert (run.output[blind] == 0).all()
    assert (run.weights[blind] == 0).all()
    assert (run.lse[blind] == -INF).all() and run.lse[~blind].isfinite().all()
    assert (run.grads["query"][blind] == 0).all()
    assert all(g.isfinite().all() for g in run.grads.values())


@pytest.mark.parametrize("path", PATHS)
def test_s01_every_row_masked(backend: Any, dtype: torch.dtype, path: str) -> None:
    shape = PATHS[path]
    inputs = problem(**shape, dtype=dtype)
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    inputs["mask"] = mask.expand(shape["B"], shape["H"], shape["T_q"], shape["T_k"])
    run = check_attention(backend.attention, inputs)
    assert run.lse is not None and (run.lse == -INF).all() and (run.output == 0).all()
    assert all((g == 0).all() for g in run.grads.values())


def test_s01_more_queries_than_keys(backend: Any, dtype: torch.dtype) -> None:
    """causal bottom_right with T_q > T_k: the first T_q - T_k queries see nothing."""
    inputs = problem(2, 2, 90, 33, 8, dtype=dtype)
    run = check_attention(backend.attention, inputs, causal="bottom_right")
    assert run.lse is not None
    assert (run.lse[:, :, : 90 - 33] == -INF).all() and run.lse[:, :, 90 - 33 :].isfinite().all()
    assert (run.output[:, :, : 90 - 33] == 0).all() and (run.grads["query"][:, :, : 90 - 33] == 0).all()


def test_s01_with_sink(backend: Any, dtype: torch.dtype) -> None:
    """A sink keeps a fully masked row's lse finite (it is the sink) and takes the row's whole gradient of lse."""
    inputs = problem(2, 2, 6, 9, 8, dtype=dtype)
    inputs["mask"] = torch.rand(2, 2, 6, 9) < 0.7
    inputs["mask"][:, :, 2] = False
    inputs["sink"] = torch.tensor([0.5, -1.0], dtype=real(dtype))
    run = check_attention(backend.attention, inputs)
    assert run.lse is not None
    torch.testing.assert_close(run.lse[:, :, 2], inputs["sink"].expand(2, 2))
    assert (run.output[:, :, 2] == 0).all()


@pytest.mark.parametrize("causal", [None, "top_left", "bottom_right"])
def test_s01_varlen(backend: Any, dtype: torch.dtype, causal: str | None) -> None:
    """Packed sequences without keys, without queries, and with more queries than keys."""
    n_q, n_k = [3, 0, 5, 70, 1], [0, 4, 2, 30, 9]
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()]) for n in (n_q, n_k))
    g = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(n, 2, 8, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for n in (79, 45, 45)
    )
    result = backend.varlen_attention(query, key, value, cu_q, cu_k, max(n_q), max(n_k), causal=causal, return_lse=True)
    probe = torch.randn(79, 2, 8, generator=g, dtype=torch.float64).to(dtype)
    found = torch.autograd.grad((result.output * probe).sum(), (query, key, value))
    assert all(x.isfinite().all() for x in found)
    seen = torch.cat([visible_pairs(1, a, b, causal)[0, 0].any(-1) for a, b in zip(n_q, n_k)])
    assert (~seen).sum() == 3 + (40 + 3 if causal == "bottom_right" else 0)
    assert (result.output[~seen] == 0).all() and (found[0][~seen] == 0).all()
    lse = result.lse if result.lse.shape[0] == 79 else result.lse.transpose(0, 1)
    assert (lse[~seen] == -INF).all() and lse[seen].isfinite().all()
    assert (result.output[seen] != 0).any(-1).all()


# ------------------------------------------------------------------------------------------------------- line 2: select


def poison_case(how: str, shape: dict[str, int], dtype: torch.dtype) -> tuple[dict[str, Any], Tensor]:
    """Options and the [B, H or 1, T_q, T_k] pairs that they leave visible; some keys are seen by nobody."""
    B, H, T_q, T_k = (shape[n] for n in ("B", "H", "T_q", "T_k"))
    g = torch.Generator().manual_seed(5)
    hidden = torch.rand(B, 1, 1, T_k, generator=g) < 0.4
    hidden[..., T_k // 2 :] |= torch.rand(T_k - T_k // 2, generator=g) < 0.3
    if how == "bool_mask":
        mask = (~hidden).expand(B, H, T_q, T_k) & (torch.rand(B, H, T_q, T_k, generator=g) < 0.8)
        return {"mask": mask}, mask
    if how == "mask_broadcast":
        return {"mask": ~hidden}, (~hidden).expand(B, H, T_q, T_k)
    if how == "inf_bias":
        bias = torch.where(hidden, -INF, torch.randn(B, H, T_q, T_k, generator=g)).to(dtype)
        return {"bias": bias}, bias != -INF
    if how == "inf_bias_broadcast":
        bias = torch.where(hidden, -INF, torch.zeros(())).to(dtype)
        return {"bias": bias}, (bias != -INF).expand(B, H, T_q, T_k)
    if how == "lengths":
        key_lengths = torch.arange(B) * T_k // (2 * B) + 1
        query_lengths = torch.full((B,), max(1, T_q // 2))
        seen = visible_pairs(B, T_q, T_k, None, None, query_lengths, key_lengths)
        return {"key_lengths": key_lengths, "query_lengths": query_lengths}, seen.expand(B, H, T_q, T_k)
    if how == "window":
        lengths = torch.full((B,), T_k)
        seen = visible_pairs(B, T_q, T_k, "bottom_right", (2, 1), None, lengths)
        return {"window": (2, 1), "causal": "bottom_right"}, seen.expand(B, H, T_q, T_k)
    if how == "bottom_right":  # with lengths: without them the last query sees every key
        lengths = torch.full((B,), T_k - T_k // 3)
        seen = visible_pairs(B, T_q, T_k, how, key_lengths=lengths)
        return {"causal": how, "key_lengths": lengths}, seen.expand(B, H, T_q, T_k)
    assert how == "top_left"
    return {"causal": how}, visible_pairs(B, T_q, T_k, how).expand(B, H, T_q, T_k)


@pytest.mark.parametrize(
    "how",
    ["bool_mask", "mask_broadcast", "inf_bias", "inf_bias_broadcast", "lengths", "window", "top_left", "bottom_right"],
)
@pytest.mark.parametrize("path", PATHS)
def test_s02_masked_poison_is_selected_out(backend: Any, dtype: torch.dtype, path: str, how: str) -> None:
    """Keys and values that nobody sees, queries that see nothing and their grad_out: poison there changes nothing."""
    poison = torch.tensor([NAN, INF, -INF]).to(dtype)  # in turn over the features
    options, seen = poison_case(how, PATHS[path], dtype)
    tensors, plain = split_tensors(options)
    clean = {**problem(**PATHS[path], dtype=dtype), **tensors}
    H, H_kv = clean["query"].shape[1], clean["key"].shape[1]
    keys_seen = seen.any(-2).unflatten(1, (H_kv, H // H_kv)).any(2)  # [B, H_kv, T_k]
    queries_seen = seen.any(-1)
    poisoned = dict(clean)
    for name, kept in (("query", queries_seen), ("key", keys_seen), ("value", keys_seen)):
        pattern = poison[torch.arange(clean[name].shape[-1]) % 3]
        poisoned[name] = torch.where(kept[..., None], clean[name], pattern)
    assert (~keys_seen).any() or (~queries_seen).any() or (how == "top_left" and path == "small")
    probe = torch.randn_like(clean["query"], dtype=torch.float32)
    bad_probe = torch.where(queries_seen[..., None], probe, NAN)
    want = run_attention(backend.attention, clean, probes=None, return_lse=True, return_weights=True, **plain)
    have = run_attention(backend.attention, poisoned, probes=None, return_lse=True, return_weights=True, **plain)
    for name in ("output", "lse", "weights"):
        torch.testing.assert_close(getattr(have, name), getattr(want, name))
    grads = []
    for inputs, g in ((clean, probe), (poisoned, bad_probe)):
        x = {n: t.detach().requires_grad_() if t.is_floating_point() else t for n, t in inputs.items()}
        output = backend.attention(x["query"], x["key"], x["value"], **{n: x[n] for n in tensors}, **plain)
        names = [n for n in x if x[n].requires_grad]
        grads.append(dict(zip(names, torch.autograd.grad(output, [x[n] for n in names], g.to(dtype)))))
    for name, want_grad in grads[0].items():
        assert want_grad.isfinite().all(), name
        torch.testing.assert_close(grads[1][name], want_grad, msg=lambda m, n=name: f"grad_{n}: {m}")


@pytest.mark.parametrize("causal", ["top_left", "bottom_right"])
@pytest.mark.parametrize("position", ["first", "middle", "last"])
def test_s02_causal_poison_in_the_future(backend: Any, dtype: torch.dtype, causal: str, position: str) -> None:
    """A NaN key and value hidden from early queries only: those rows stay clean, the others become NaN."""
    T = 150
    at = {"first": 1, "middle": 70, "last": T - 1}[position]
    inputs = problem(1, 2, T, T, 16, dtype=dtype)
    want = run_attention(backend.attention, inputs, causal=causal).output
    for name in ("key", "value"):
        inputs[name][:, :, at] = NAN
    have = run_attention(backend.attention, inputs, causal=causal).output
    # NaN rows make their panel shift by true maxima instead of the lazy one. That changes the last bits of weights, and
    # where those are rounded to bfloat16 for the product, which way.
    rounded = dtype == torch.bfloat16 and backend.isa == "avx512_bf16"
    close = {"rtol": 1.6e-2, "atol": 2**-9} if rounded else {}
    torch.testing.assert_close(have[:, :, :at], want[:, :, :at], **close)
    assert have[:, :, at:].isnan().all()
    x = {n: t.requires_grad_() for n, t in inputs.items()}
    output = backend.attention(x["query"], x["key"], x["value"], causal=causal)
    probe = torch.zeros_like(output)
    probe[:, :, :at] = 1  # only the clean rows
    (grad_query,) = torch.autograd.grad(output, x["query"], probe)
    assert grad_query[:, :, :at].isfinite().all()


def test_s02_poison_in_bias_of_hidden_pairs(backend: Any, dtype: torch.dtype) -> None:
    """NaN and +inf in an additive bias where another mask hides the pair."""
    inputs = problem(2, 2, 40, 50, 8, dtype=dtype)
    inputs["mask"] = torch.rand(2, 1, 40, 50) < 0.6
    inputs["bias"] = torch.randn(2, 2, 40, 50).to(dtype)
    probes = {"output": torch.randn(2, 2, 40, 8, dtype=torch.float64)}
    want = run_attention(backend.attention, inputs, probes=probes)
    for poison in (NAN, INF):
        bad = {**inputs, "bias": torch.where(inputs["mask"], inputs["bias"], poison)}
        have = run_attention(backend.attention, bad, probes=probes)
        torch.testing.assert_close(have.output, want.output)
        for name in want.grads:
            torch.testing.assert_close(have.grads[name], want.grads[name])


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("path", PATHS)
def test_s02_visible_nan_propagates(backend: Any, dtype: torch.dtype, path: str, where: str) -> None:
    inputs = problem(**PATHS[path], dtype=dtype)
    inputs[where][0, 0, -1, 1] = NAN
    output = run_attention(backend.attention, inputs).output
    group = inputs["query"].shape[1] // inputs["key"].shape[1]
    bad = torch.zeros(output.shape, dtype=torch.bool)
    if where == "query":
        bad[0, 0, -1] = True
    elif where == "key":
        bad[0, :group] = True
    else:
        bad[0, :group, :, 1] = True
    assert torch.equal(output.isnan(), bad)


@pytest.mark.parametrize("path", PATHS)
def test_s02_visible_nan_propagates_backward(backend: Any, dtype: torch.dtype, path: str) -> None:
    inputs = problem(**PATHS[path], dtype=dtype)
    shape = inputs["query"].shape
    probe = torch.ones(shape, dtype=torch.float64)
    probe[0, 0, 0, 0] = NAN
    grads = run_attention(backend.attention, inputs, probes={"output": probe}).grads
    assert grads["query"][0, 0, 0].isnan().all() and grads["query"][1:].isfinite().all()
    assert grads["key"][0, 0].isnan().all() and grads["key"][1:].isfinite().all()
    assert grads["value"][0, 0, :, 0].isnan().all() and grads["value"][0, 0, :, 1:].isfinite().all()
