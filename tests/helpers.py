"""The tests' own oracle, error rule and input generators.

Nothing here imports attnfast: the formulas are written a second time, from semantics.md, so that an error in
``attnfast.reference`` cannot hide an error in a kernel. `oracle` runs in whatever dtype its inputs have: in float64 it
is the truth; in the dtype under test it is "plain torch in the same dtype", the other half of the error rule

    err(kernel) <= 2 * err(plain torch, same dtype) + floor        (both against float64)
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
TENSOR_OPTIONS = ("mask", "bias", "sink")  # options that may carry a gradient


def real(dtype: torch.dtype) -> torch.dtype:
    """The dtype a kernel accumulates in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def load_tool(name: str) -> ModuleType:
    """A module of tools/, which is no package: tests look into what the Makefile runs."""
    path = Path(__file__).resolve().parent.parent / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@contextlib.contextmanager
def imported_tool(name: str) -> Iterator[ModuleType]:
    """The same of a tool that imports others, for as long as tools/ is on the path."""
    folder = str(Path(__file__).resolve().parent.parent / "tools")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(folder)


@contextlib.contextmanager
def must_launch(simt: ModuleType) -> Iterator[None]:
    """Around a test of kernels under the emulator, which fails if none was launched."""
    before = simt.launches()
    yield
    assert simt.launches() > before, "no kernel was launched"


@contextlib.contextmanager
def opennmt_attention() -> Iterator[None]:
    """Within, ``onmt.modules.global_attention`` can be imported; afterwards nothing of onmt is in ``sys.modules``.

    OpenNMT-py 3.5.1 is pinned in requirements-no-deps.txt: it asks for torch < 2.3 and much else. ``import onmt`` loads
    the whole toolkit and fails, but its attention needs two other files alone. So the packages around them are stood in
    for by empty modules that know where the files lie, and Python imports the three files as they were installed.
    """
    spec = importlib.util.find_spec("onmt")
    assert spec is not None and spec.submodule_search_locations, "pip install --no-deps -r requirements-no-deps.txt"
    (root,) = spec.submodule_search_locations
    assert not any(name.split(".")[0] == "onmt" for name in sys.modules)
    for name in ("onmt", "onmt.modules", "onmt.utils"):
        package = ModuleType(name)
        package.__path__ = [root + name.removeprefix("onmt").replace(".", "/")]
        sys.modules[name] = package
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.cuda.amp.custom_", FutureWarning)
            importlib.import_module("onmt.modules.global_attention")
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "onmt"]:
            del sys.modules[name]


def dtype_id(dtype: torch.dtype) -> str:
    return {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]


# --------------------------------------------------------------------------------------------------------------- oracle


class Result(NamedTuple):
    output: Tensor
    lse: Tensor
    weights: Tensor  # full, after dropout


def visible_pairs(
    B: int,
    T_q: int,
    T_k: int,
    causal: str | None = None,
    window: tuple[int, int] | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Return [B, 1, T_q, T_k] booleans, built row by row from the interval of keys that a query may see."""
    seen = torch.zeros(B, 1, T_q, T_k, dtype=torch.bool)
    for b in range(B):
        n_q = T_q if query_lengths is None else int(query_lengths.reshape(-1)[b])
        n_k = T_k if key_lengths is None else int(key_lengths.reshape(-1)[b])
        shift = n_k - n_q if causal == "bottom_right" else 0
        for i in range(n_q):
            first, last = 0, n_k - 1
            if causal is not None:
                last = min(last, i + shift)
            if window is not None and window[0] >= 0:
                first = max(first, i + shift - window[0])
            if window is not None and window[1] >= 0:
                last = min(last, i + shift + window[1])
            if last >= first:
                seen[b, 0, i, first : last + 1] = True
    return seen


def near_centers(centers: Tensor, window: tuple[int, int], T_k: int) -> Tensor:
    """Return [..., T_q, T_k] booleans, ``center - left <= k <= center + right`` in exact arithmetic, one by one."""
    left, right = window

    def near(c: float, k: int) -> bool:
        if math.isnan(c):
            return False
        if math.isinf(c):
            return left < 0 if c > 0 else right < 0
        exact = Fraction(c)
        return (left < 0 or k >= exact - left) and (right < 0 or k <= exact + right)

    rows = [[near(c, k) for k in range(T_k)] for c in centers.flatten().tolist()]
    return torch.tensor(rows, dtype=torch.bool).reshape(*centers.shape, T_k)


def distances(B: int, T_q: int, T_k: int, shifts: Sequence[int]) -> Tensor:
    """|position of the query - position of the key|, [B, 1, T_q, T_k]."""
    rows = [[[[abs(i + shifts[b] - j) for j in range(T_k)] for i in range(T_q)]] for b in range(B)]
    return torch.tensor(rows, dtype=torch.float64).reshape(B, 1, T_q, T_k)


def raw_scores(query: Tensor, key: Tensor, score: str, scale: float | None) -> Tensor:
    if score == "scaled_dot" and scale is None:
        scale = 1 / math.sqrt(query.shape[-1]) if query.shape[-1] else 1.0
    scale = 1.0 if scale is None else scale
    if score in ("dot", "scaled_dot"):
        return scale * torch.einsum("bhqd,bhkd->bhqk", query, key)
    if score == "cosine":
        norms = query.norm(dim=-1).clamp_min(1e-8)[..., :, None] * key.norm(dim=-1).clamp_min(1e-8)[..., None, :]
        return scale * torch.einsum("bhqd,bhkd->bhqk", query, key) / norms
    assert score == "l2", score
    return -scale * (query[..., :, None, :] - key[..., None, :, :]).square().sum(-1)


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: str = "scaled_dot",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: str | None = None,
    window: tuple[int, int] | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    window_center: Tensor | None = None,
    center: Tensor | None = None,
    sigma: float = 1.0,
) -> Result:
    """Attention on [B, H, T, D] in plain torch, unfused, in the inputs' dtype; `keep` is the dropout mask, `center`
    [B, H, T_q] and `sigma` are those of a Gaussian prior.
    """
    B, H, T_q, _ = query.shape
    T_k = key.shape[-2]
    repeats = H // key.shape[1] if key.shape[1] else 1
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    s = raw_scores(query, key, score, scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    around = None if window_center is not None else window
    seen = visible_pairs(B, T_q, T_k, causal, around, query_lengths, key_lengths).expand(B, H, T_q, T_k)
    if window_center is not None:
        assert window is not None
        seen = seen & near_centers(window_center.expand(B, H, T_q), window, T_k)
    if alibi_slopes is not None:
        shifts = [0] * B
        if causal == "bottom_right":
            n_q = [T_q] * B if query_lengths is None else query_lengths.reshape(-1).tolist()
            n_k = [T_k] * B if key_lengths is None else key_lengths.reshape(-1).tolist()
            shifts = [int(a - b) for a, b in zip(n_k, n_q)]
        slopes = alibi_slopes.to(s.dtype).expand(B, H)[:, :, None, None]
        s = s - slopes * distances(B, T_q, T_k, shifts).to(s.dtype)
    for extra in (mask, bias):
        if extra is None:
            continue
        extra = extra.expand(B, H, T_q, T_k)
        if extra.dtype == torch.bool:
            seen = seen & extra
        else:
            seen = seen & (extra != -math.inf)
            s = s + torch.where(seen, extra, 0).to(s.dtype)
    s = torch.where(seen, s, -math.inf)
    top = s.detach().amax(-1, keepdim=True) if T_k else torch.full((B, H, T_q, 1), -math.inf, dtype=s.dtype)
    if sink is not None:
        top = torch.maximum(top, sink.detach().to(s.dtype).view(H, 1, 1))
    top = torch.where(top == -math.inf, 0, top)
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink.to(s.dtype).view(H, 1, 1) - top)
    empty = total == 0
    total = torch.where(empty, 1, total)
    p = e / total
    lse = torch.where(empty, -math.inf, top + torch.log(total)).squeeze(-1)
    if center is not None:
        place = torch.arange(T_k, dtype=s.dtype) - center.to(s.dtype).expand(B, H, T_q).unsqueeze(-1)
        p = p * torch.exp(-place.square() / (2 * sigma**2))
    if dropout_p > 0:
        assert keep is not None
        p = torch.where(keep, p / (1 - dropout_p) if dropout_p < 1 else 0 * p, 0)
    return Result(torch.einsum("bhqk,bhkd->bhqd", p, value), lse, p)


@functools.lru_cache(maxsize=256)
def philox_keep(seed: tuple[int, int], B: int, H: int, T_q: int, T_k: int, p: float) -> Tensor:
    """The dropout mask by Philox4x32-7 in Python integers, one (row, column) at a time."""
    low = 0xFFFFFFFF
    threshold = min(math.ceil(p * 2**32), 2**32)

    def words(row: int, block: int) -> list[int]:
        c = [block, row & low, (row >> 32) & low, seed[1] & low]
        k0, k1 = seed[0] & low, (seed[0] >> 32) & low
        for _ in range(7):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(b >> 32) ^ c[1] ^ k0, b & low, (a >> 32) ^ c[3] ^ k1, a & low]
            k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
        return c

    rows = []
    for row in range(B * H * T_q):
        line = [w for block in range((T_k + 3) // 4) for w in words(row, block)]
        rows.append([w >= threshold for w in line[:T_k]])
    return torch.tensor(rows, dtype=torch.bool).reshape(B, H, T_q, T_k)


def patch_seed(patch: pytest.MonkeyPatch, seed: Sequence[int]) -> None:
    """Replace the seed that a dropout call would draw, wherever the package has imported the function that draws it."""
    modules = [m for n, m in list(sys.modules.items()) if n.startswith("attnfast.") and hasattr(m, "draw_seed")]
    assert modules
    for module in modules:
        patch.setattr(module, "draw_seed", lambda: torch.tensor(seed))


# ----------------------------------------------------------------------------------------------------------- error rule


def error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; infinities of the truth must be met exactly."""
    actual, truth = actual.detach().double(), truth.detach().double()
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)} where {tuple(truth.shape)} was expected"
    same = torch.where(truth.isinf(), actual == truth, False)
    difference = torch.where(same, 0.0, (actual - truth).abs())
    difference = torch.where(difference.isnan(), math.inf, difference)
    return difference.max().item() if difference.numel() else 0.0


def magnitude(truth: Tensor) -> float:
    truth = truth.detach().double()
    finite = truth[truth.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def assert_close_to_truth(
    actual: Tensor, truth: Tensor, plain: Tensor, name: str, *, slack: float = 0.0, tight: bool = False
) -> None:
    """The error rule. `slack` widens the floor, in units of the magnitude of the truth.

    The floor is 8 ulp of the accumulation type of the largest entry (of 1, if that is larger), and half an ulp of the
    tensor's own dtype for the last rounding, which plain torch may escape by luck on small tensors. In float64, where
    plain torch is the truth itself, it is 64 ulp. `tight`, for large tensors, takes 2 ulp of the largest entry.
    """
    size = magnitude(truth) if tight else max(magnitude(truth), 1.0)
    ulps = 2 if tight else 64 if actual.dtype == torch.float64 else 8
    floor = ulps * max(torch.finfo(real(x.dtype)).eps for x in (actual, plain)) * size
    if actual.dtype in HALVES:
        floor += 0.5 * torch.finfo(actual.dtype).eps * size
    ours, theirs = error(actual, truth), error(plain, truth)
    assert ours <= 2 * theirs + floor + slack * size, (
        f"{name}: error {ours:.3g} against float64, plain torch in {dtype_id(plain.dtype)} has {theirs:.3g}, "
        f"floor {floor + slack * size:.3g}, largest entry {size:.3g}"
    )


# ---------------------------------------------------------------------------------------------- run a problem both ways


class Run(NamedTuple):
    output: Tensor
    lse: Tensor | None
    weights: Tensor | None
    grads: dict[str, Tensor]


def leaves(tensors: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Detach floating tensors into leaves, in `dtype` or their own, with their strides kept where the dtype is."""
    out: dict[str, Any] = {}
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            x = x.detach() if dtype is None or x.dtype == dtype else x.detach().to(dtype)
            if name != "alibi_slopes":
                x = x.detach().requires_grad_()
        out[name] = x
    return out


def differentiate(result: Any, inputs: Mapping[str, Any], probes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of sum(probe * result) over the named results by every leaf; rows of infinite lse are left out."""
    total: Any = 0
    for name, probe in probes.items():
        x = getattr(result, name)
        total = total + torch.where(x.detach().isfinite(), x * probe.to(x.dtype), 0).sum()
    wanted = [n for n, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad]
    if not isinstance(total, Tensor) or not total.requires_grad:
        return {n: torch.zeros_like(inputs[n]) for n in wanted}
    grads = torch.autograd.grad(total, [inputs[n] for n in wanted], allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(inputs[n]) if g is None else g for n, g in zip(wanted, grads)}


def run_attention(
    attention: Callable[..., Any],
    tensors: Mapping[str, Any],
    *,
    probes: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Run:
    """Call `attention` on leaves; with `probes`, also the gradients of every floating tensor."""
    inputs = leaves(tensors)
    result = attention(inputs["query"], inputs["key"], inputs["value"], **rest(inputs), **options)
    if isinstance(result, Tensor):
        result = Run(result, None, None, {})
    grads = differentiate(result, inputs, probes) if probes is not None else {}
    return Run(result.output, result.lse, result.weights, grads)


def rest(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {n: x for n, x in inputs.items() if n not in ("query", "key", "value")}


def check_attention(
    attention: Callable[..., Any],
    tensors: Mapping[str, Any],
    *,
    keep: Tensor | None = None,
    gradients: bool = True,
    slack: float = 0.0,
    **options: Any,
) -> Run:
    """Hold one call, forward and all gradients (through output, lse and weights), against `oracle` by the error rule.

    `tensors` holds query, key, value ([B, H, T, D]) and tensor options; `options` the plain ones. With dropout, pass
    the mask the call is to draw (`keep`).
    """
    dtype = tensors["query"].dtype
    generator = torch.Generator().manual_seed(7)

    def probe(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).double()

    B, H, T_q, _ = tensors["query"].shape
    T_k, D_v = tensors["value"].shape[-2:]
    probes = {"output": probe((B, H, T_q, D_v)), "lse": probe((B, H, T_q)), "weights": probe((B, H, T_q, T_k))}
    found = run_attention(
        attention, tensors, probes=probes if gradients else None, return_lse=True, return_weights=True, **options
    )
    references = []
    for kind in (torch.float64, dtype):
        inputs = leaves(tensors, kind)
        result = oracle(inputs["query"], inputs["key"], inputs["value"], keep=keep, **rest(inputs), **options)
        both = (probes, rounded_probes(probes, result, found.output))
        grads = [differentiate(result, inputs, p) for p in both if gradients]
        references.append((result, grads))
    (truth, truth_grads), (plain, plain_grads) = references
    assert found.output.dtype == dtype
    assert found.lse is not None and found.lse.dtype == real(dtype)
    assert found.weights is not None and found.weights.dtype == dtype
    # Weights and gradients are formed again from scores and the saved lse, as in every flash attention; the roundings
    # of both are relative errors of theirs that plain torch, which keeps all weights, does not have.
    saved = 2.0 * torch.finfo(real(dtype)).eps * magnitude(truth.lse)
    if dtype == torch.float64:
        slack, saved = slack + 4 * saved, 4 * saved  # plain torch is the truth here: allow for rounding the scores
    for name in ("output", "lse", "weights"):
        extra = slack + (saved if name == "weights" else 0.0)
        assert_close_to_truth(getattr(found, name), getattr(truth, name), getattr(plain, name), name, slack=extra)
    for name, grad in found.grads.items():
        assert grad.dtype == tensors[name].dtype and grad.shape == tensors[name].shape
        want, flash = (g[name] for g in truth_grads)
        torch_grad = max((plain_grads[0][name], flash.to(dtype)), key=lambda g, w=want: error(g, w))
        assert_close_to_truth(grad, want, torch_grad, f"grad_{name}", slack=slack + saved)
    return found


def rounded_probes(probes: Mapping[str, Tensor], result: Result, rounded: Tensor) -> dict[str, Tensor]:
    """Probes whose exact gradients are those of a flash attention with the output `rounded`.

    It forms delta = rowsum(grad_out * out) from the output as rounded to its dtype. An error e of delta changes every
    score's gradient by -e times the weight before dropout, which is what a gradient -e of lse does.
    """
    e = (probes["output"] * (rounded.detach().double() - result.output.detach().double())).sum(-1)
    return {**probes, "lse": probes["lse"] - e}


# ----------------------------------------------------------------------------------------------------- input generators


# One shape per route through the kernels: whole and ragged tiles, one tile, one query, one query over split keys.
PATHS: dict[str, dict[str, int]] = {
    "tiles": {"B": 2, "H": 2, "T_q": 70, "T_k": 130, "D": 16},
    "small": {"B": 2, "H": 2, "T_q": 5, "T_k": 3, "D": 8},
    "decode": {"B": 3, "H": 4, "H_kv": 2, "T_q": 1, "T_k": 77, "D": 16},
    "split_decode": {"B": 2, "H": 1, "T_q": 1, "T_k": 2100, "D": 8},
}


def problem(
    B: int = 2,
    H: int = 2,
    T_q: int = 5,
    T_k: int = 7,
    D: int = 8,
    D_v: int | None = None,
    *,
    H_kv: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 1.0,
) -> dict[str, Any]:
    """Seeded normal query, key and value of the usual shapes; query and key times `spread`."""
    g = torch.Generator().manual_seed(seed)
    H_kv, D_v = H if H_kv is None else H_kv, D if D_v is None else D_v

    def make(shape: Sequence[int], factor: float) -> Tensor:
        return (factor * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)

    return {
        "query": make((B, H, T_q, D), spread),
        "key": make((B, H_kv, T_k, D), spread),
        "value": make((B, H_kv, T_k, D_v), 1.0),
    }


def _expanded(dim: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.narrow(dim, 0, min(1, x.shape[dim])).expand(x.shape)


def _permuted(*order: int) -> Callable[[Tensor], Tensor]:
    back = [order.index(i) for i in range(4)]
    return lambda x: x.permute(order).contiguous().permute(back)


def _padded(x: Tensor) -> Tensor:
    """A window in the middle of a larger buffer of NaN: anything read outside of it shows."""
    big = torch.full([n + 2 for n in x.shape], math.nan, dtype=x.dtype)
    inner = big[tuple(slice(1, -1) for _ in x.shape)]
    return inner.copy_(x)


def _spaced(x: Tensor) -> Tensor:
    """Last stride 3, the gaps holding NaN."""
    big = torch.full((*x.shape, 3), math.nan, dtype=x.dtype)
    big[..., 1] = x
    return big[..., 1]


# Each layout takes a contiguous [B, H, T, D] tensor to one of the same shape; "stride 0" layouts change the values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "token_major": _permuted(0, 2, 1, 3),  # [B, T, H, D] storage, as projections leave it
    "last_dim_not_unit": _permuted(0, 1, 3, 2),
    "batch_innermost": _permuted(1, 2, 3, 0),
    "last_stride_3": _spaced,
    "storage_offset": _padded,
    "stride0_batch": _expanded(0),
    "stride0_heads": _expanded(1),
    "stride0_tokens": _expanded(2),
    "stride0_features": _expanded(3),
    "stride0_all": lambda x: x.reshape(-1)[:1].expand(x.shape) if x.numel() else x,
    "negative_bit": torch._neg_view,
}
