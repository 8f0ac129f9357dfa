"""Contract lines 1 to 6 of semantics.md: which keys a query sees, and what happens to those that it does not see."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import check_attention, dtype_id, oracle, problem, real, run_attention, visible_pairs
from torch import Tensor

INF, NAN = math.inf, math.nan

# One shape per route through the kernels: whole and ragged tiles, one tile, one query, one query over split keys.
PATHS: dict[str, dict[str, int]] = {
    "tiles": {"B": 2, "H": 2, "T_q": 70, "T_k": 130, "D": 16},
    "small": {"B": 2, "H": 2, "T_q": 5, "T_k": 3, "D": 8},
    "decode": {"B": 3, "H": 4, "H_kv": 2, "T_q": 1, "T_k": 77, "D": 16},
    "split_decode": {"B": 2, "H": 1, "T_q": 1, "T_k": 2100, "D": 8},
}


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
    inputs["mask"] = torch.zeros(1, 1, 1, 1, dtype=torch.bool).expand(shape["B"], shape["H"], shape["T_q"], shape["T_k"])
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
    result = backend.varlen_attention(
        query, key, value, cu_q, cu_k, max(n_q), max(n_k), causal=causal, return_lse=True
    )
    probe = torch.randn(79, 2, 8, generator=g, dtype=torch.float64).to(dtype)
    found = torch.autograd.grad((result.output * probe).sum(), (query, key, value))
    assert all(x.isfinite().all() for x in found)
    seen = torch.cat([visible_pairs(1, a, b, causal).any(-1)[0, 0] if b else torch.zeros(a) > 0 for a, b in zip(n_q, n_k)])
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


@pytest.mark.parametrize("poison", [NAN, INF, -INF], ids=["nan", "inf", "minus_inf"])
@pytest.mark.parametrize(
    "how", ["bool_mask", "mask_broadcast", "inf_bias", "inf_bias_broadcast", "lengths", "window", "top_left", "bottom_right"]
)
@pytest.mark.parametrize("path", PATHS)
def test_s02_masked_poison_is_selected_out(
    backend: Any, dtype: torch.dtype, path: str, how: str, poison: float
) -> None:
    """Keys and values that nobody sees, queries that see nothing and their grad_out: poison there changes nothing."""
    options, seen = poison_case(how, PATHS[path], dtype)
    tensors, plain = split_tensors(options)
    clean = {**problem(**PATHS[path], dtype=dtype), **tensors}
    H, H_kv = clean["query"].shape[1], clean["key"].shape[1]
    keys_seen = seen.any(-2).unflatten(1, (H_kv, H // H_kv)).any(2)  # [B, H_kv, T_k]
    queries_seen = seen.any(-1)
    poisoned = dict(clean)
    for name, kept in (("query", queries_seen), ("key", keys_seen), ("value", keys_seen)):
        poisoned[name] = torch.where(kept[..., None], clean[name], poison)
    assert (~keys_seen).any() or (~queries_seen).any() or (how == "top_left" and path == "small")
    probe = torch.randn_like(clean["query"], dtype=torch.float32)
    bad_probe = torch.where(queries_seen[..., None], probe, poison)
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
    torch.testing.assert_close(have[:, :, :at], want[:, :, :at])
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


# ----------------------------------------------------------------------------------------------------- line 3: polarity


def test_s03_bool_mask_true_attends(backend: Any, dtype: torch.dtype) -> None:
    inputs = problem(1, 1, 4, 4, 8, dtype=dtype)
    mask = torch.eye(4, dtype=torch.bool)
    output = backend.attention(*inputs.values(), mask=mask)
    torch.testing.assert_close(output, inputs["value"], rtol=0, atol=0)
    output = backend.scaled_dot_product_attention(*inputs.values(), mask)
    torch.testing.assert_close(output, inputs["value"], rtol=0, atol=0)
    torch.testing.assert_close(
        backend.scaled_dot_product_attention(*inputs.values(), ~mask),
        torch.nn.functional.scaled_dot_product_attention(*inputs.values(), ~mask),
        rtol=2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5,
        atol=1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5,
    )


def test_s03_float_mask_is_a_bias(backend: Any, dtype: torch.dtype) -> None:
    """The same numbers as `mask`, as `bias` or half in each; in the query's dtype or another."""
    inputs = problem(2, 2, 6, 70, 8, dtype=dtype)
    extra = torch.randn(2, 1, 6, 70).to(dtype)
    by_mask = check_attention(backend.attention, {**inputs, "mask": extra})
    by_bias = check_attention(backend.attention, {**inputs, "bias": extra})
    torch.testing.assert_close(by_mask.output, by_bias.output, rtol=0, atol=0)
    torch.testing.assert_close(by_mask.grads["mask"], by_bias.grads["bias"], rtol=0, atol=0)
    check_attention(backend.attention, {**inputs, "mask": extra, "bias": torch.randn(6, 70, dtype=torch.float32)})


@pytest.mark.parametrize("path", PATHS)
def test_s03_finfo_min_means_no_weight(backend: Any, dtype: torch.dtype, path: str) -> None:
    shape = PATHS[path]
    lowest = torch.finfo(dtype).min
    mask = torch.rand(shape["T_q"], shape["T_k"]) < 0.6
    mask[:, 0] = True
    inputs = problem(**shape, dtype=dtype)
    inputs["bias"] = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, lowest)
    run = check_attention(backend.attention, inputs)
    assert run.weights is not None
    assert (run.weights[..., ~mask] == 0).all() and (run.weights[..., mask] > 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_s03_row_full_of_finfo_min_is_uniform(backend: Any, dtype: torch.dtype, path: str) -> None:
    """finfo.min is a finite number: alone in its row it takes nobody's weight. float16's is too small to drown scores."""
    shape = PATHS[path]
    lowest = torch.finfo(dtype).min
    inputs = problem(**shape, dtype=dtype)
    inputs["bias"] = torch.full((shape["T_q"], shape["T_k"]), lowest, dtype=dtype)
    if dtype != torch.float16:
        run = run_attention(backend.attention, inputs, return_weights=True, return_lse=True)
        assert run.weights is not None and run.lse is not None
        torch.testing.assert_close(run.weights, torch.full_like(run.weights, 1 / shape["T_k"]))
        assert run.lse.isfinite().all() or (run.lse > -INF).all()
    else:
        run = run_attention(backend.attention, inputs, return_weights=True)
        assert run.weights is not None
        inputs.pop("bias")
        # the sum keeps 2^-8 of the score beside -65504 in float32
        want = oracle(*(x.double() for x in inputs.values())).weights
        torch.testing.assert_close(run.weights.double(), want, rtol=2e-2, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- line 4: composition

COMPOSITIONS: list[dict[str, Any]] = [
    {"causal": "top_left", "window": (3, 0)},
    {"causal": "bottom_right", "window": (5, 2), "key_lengths": True},
    {"causal": "bottom_right", "window": (-1, 0), "key_lengths": True, "query_lengths": True},
    {"window": (2, 2), "mask": True},
    {"window": (0, -1), "key_lengths": True, "bias": True},
    {"window": (0, 0)},
    {"window": (-1, 3)},
    {"causal": "top_left", "mask": True, "key_lengths": True},
    {"causal": "top_left", "mask": True, "bias": True, "key_lengths": True, "query_lengths": True, "window": (9, 4)},
    {
        "causal": "bottom_right",
        "mask": True,
        "bias": True,
        "key_lengths": True,
        "query_lengths": True,
        "window": (6, 1),
        "alibi_slopes": True,
        "sink": True,
        "softcap": 2.0,
    },
]


def composed(options: dict[str, Any], shape: dict[str, int], dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    B, H, T_q, T_k = (shape[n] for n in ("B", "H", "T_q", "T_k"))
    g = torch.Generator().manual_seed(9)
    makers = {
        "mask": lambda: torch.rand(B, 1, T_q, T_k, generator=g) < 0.8,
        "bias": lambda: torch.randn(H, T_q, T_k, generator=g).to(dtype),
        "key_lengths": lambda: torch.randint(T_k // 2, T_k + 1, (B,), generator=g),
        "query_lengths": lambda: torch.randint((T_q + 1) // 2, T_q + 1, (B,), generator=g),
        "alibi_slopes": lambda: (0.05 + torch.rand(H, generator=g)).to(real(dtype)),
        "sink": lambda: torch.randn(H, generator=g).to(real(dtype)),
    }
    tensors = {n: makers[n]() for n, x in options.items() if x is True}
    return tensors, {n: x for n, x in options.items() if x is not True}


@pytest.mark.parametrize("index", range(len(COMPOSITIONS)))
@pytest.mark.parametrize("path", PATHS)
def test_s04_masks_compose(backend: Any, dtype: torch.dtype, path: str, index: int) -> None:
    tensors, plain = composed(COMPOSITIONS[index], PATHS[path], dtype)
    check_attention(backend.attention, {**problem(**PATHS[path], dtype=dtype), **tensors}, **plain)


def test_s04_sdpa_mask_and_is_causal(backend: Any, dtype: torch.dtype) -> None:
    """torch refuses attn_mask together with is_causal; here they compose."""
    inputs = problem(2, 2, 20, 20, 8, dtype=dtype)
    mask = torch.rand(20, 20) < 0.7
    both = backend.scaled_dot_product_attention(*inputs.values(), mask, is_causal=True)
    merged = backend.scaled_dot_product_attention(*inputs.values(), mask & torch.ones(20, 20, dtype=torch.bool).tril())
    torch.testing.assert_close(both, merged)


# ------------------------------------------------------------------------------------------------------ line 5: alignment


@pytest.mark.parametrize("causal", ["top_left", "bottom_right"])
@pytest.mark.parametrize("T_q,T_k", [(1, 9), (9, 1), (64, 64), (65, 191), (191, 65), (100, 513), (3, 3)])
def test_s05_alignment(backend: Any, dtype: torch.dtype, causal: str, T_q: int, T_k: int) -> None:
    check_attention(backend.attention, problem(1, 2, T_q, T_k, 8, dtype=dtype), causal=causal)


@pytest.mark.parametrize("T_q,T_k", [(4, 9), (9, 4), (1, 5), (70, 100)])
def test_s05_sdpa_is_top_left(backend: Any, dtype: torch.dtype, T_q: int, T_k: int) -> None:
    inputs = problem(2, 2, T_q, T_k, 16, dtype=dtype)
    have = backend.scaled_dot_product_attention(*inputs.values(), is_causal=True)
    own = backend.attention(*inputs.values(), causal="top_left")
    torch.testing.assert_close(have, own, rtol=0, atol=0)
    theirs = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in inputs.values()), is_causal=True)
    torch.testing.assert_close(have.double(), theirs, rtol=1e-5, atol={8: 1e-12, 4: 1e-5, 2: 2e-2}[have.element_size()])


# -------------------------------------------------------------------------------------------------------- line 6: softcap


@pytest.mark.parametrize("softcap", [0.5, 2.0, 30.0])
@pytest.mark.parametrize("path", PATHS)
def test_s06_softcap_before_bias_and_masks(backend: Any, dtype: torch.dtype, path: str, softcap: float) -> None:
    """With spread scores a cap applied after the bias would squash the bias: check that this case can tell."""
    shape = PATHS[path]
    inputs = problem(**shape, dtype=dtype, spread=2.0)
    inputs["bias"] = (3 * torch.randn(shape["T_q"], shape["T_k"])).to(dtype)
    run = check_attention(backend.attention, inputs, softcap=softcap, causal="bottom_right")
    if softcap < 3:
        wide = {n: x.double() for n, x in inputs.items()}
        key = wide["key"].repeat_interleave(shape["H"] // wide["key"].shape[1], 1)
        s = wide["query"] @ key.mT / math.sqrt(shape["D"]) + wide["bias"]
        wrong = torch.softmax(softcap * torch.tanh(s / softcap), -1)[:, :, -1]
        assert run.weights is not None and (run.weights[:, :, -1].double() - wrong).abs().max() > 0.05


def test_s06_softcap_zero_is_off(backend: Any, dtype: torch.dtype) -> None:
    inputs = problem(1, 2, 9, 9, 8, dtype=dtype, spread=3.0)
    torch.testing.assert_close(
        backend.attention(*inputs.values(), softcap=0.0), backend.attention(*inputs.values()), rtol=0, atol=0
    )


def test_s06_softcap_of_huge_scores(backend: Any, dtype: torch.dtype) -> None:
    """tanh saturates: every score is +-softcap, gradients of query and key vanish, nothing overflows."""
    inputs = problem(1, 1, 5, 12, 8, dtype=dtype, spread=100.0 if dtype == torch.float16 else 1e6)
    run = check_attention(backend.attention, inputs, softcap=5.0, scale=1.0)
    assert all(g.isfinite().all() for g in run.grads.values()), [dtype_id(dtype)]
