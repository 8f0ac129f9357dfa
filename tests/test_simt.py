"""The CUDA kernels under the SIMT emulator, behind attnfast's own functions: backend "simt".

The module ``_simt`` holds the kernels of csrc/cuda as C++ beside the emulator, with the arguments of ``_C``. Here it
takes the place of the CPU's forward, so that the calls and the expectations are those of any other test of semantics.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import must_launch
from torch import Tensor

import attnfast
from attnfast import _cuda_ops, ops, reference

SEEDS = range(4)  # one of each kind of schedule
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def take_over(simt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_forward", functools.partial(_cuda_ops.dot_attention_fwd_of, simt))


@pytest.fixture
def backend(simt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Forwards of the dot core run under the emulator, and did: a test that never launched a kernel fails."""
    simt.set_seed(0)
    take_over(simt, monkeypatch)
    with must_launch(simt):
        yield simt


def operands(dtype: torch.dtype, heads: int, kv_heads: int, rows: int, keys: int, size: int, value_size: int) -> Any:
    torch.manual_seed(rows * 1000 + keys + size)
    return (
        torch.randn(2, heads, rows, size, dtype=dtype),
        torch.randn(2, kv_heads, keys, size, dtype=dtype),
        torch.randn(2, kv_heads, keys, value_size, dtype=dtype),
    )


def options_of(name: str, query: Tensor, key: Tensor) -> dict[str, Any]:
    shape = (2, query.shape[1], query.shape[2], key.shape[2])
    generator = torch.Generator().manual_seed(5)
    real = reference.real_dtype(query.dtype)
    center = torch.rand(shape[:3], generator=generator, dtype=real) * shape[3]
    return {
        "plain": {},
        "causal": {"causal": "top_left"},
        "bottom_right": {"causal": "bottom_right"},
        "window": {"window": (7, 3), "return_weights": "column_sum"},
        "lengths": {
            "query_lengths": torch.tensor([0, shape[2]]),
            "key_lengths": torch.tensor([shape[3], shape[3] // 2]),
            "causal": "bottom_right",
        },
        "mask": {"mask": torch.rand(shape, generator=generator) < 0.6},
        "bias": {"bias": torch.randn(shape[2:], generator=generator).to(query.dtype)},
        "alibi": {"alibi_slopes": torch.rand(shape[1], generator=generator, dtype=real)},
        "sink": {"sink": torch.randn(shape[1], generator=generator, dtype=real)},
        "softcap": {"softcap": 2.0, "scale": -0.7},
        "window_center": {"window": (4, 6), "window_center": center, "return_weights": "row_max"},
        "prior": {"prior": ("gaussian", center, 5.0), "return_weights": "column_sum"},
        "weights": {"causal": "top_left", "sink": torch.zeros(shape[1], dtype=real), "return_weights": "full"},
    }[name]


def check(dtype: torch.dtype, call: Any, *args: Any, **kwargs: Any) -> None:
    got = call(*args, return_lse=True, **kwargs)
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    wide_options = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in kwargs.items()
    }
    if "prior" in kwargs:
        wide_options["prior"] = ("gaussian", kwargs["prior"][1].double(), kwargs["prior"][2])
    wanted = getattr(reference, call.__name__)(*wide, return_lse=True, **wide_options)
    limit = TOLERANCE[dtype]
    scale = max(1.0, wanted.output.abs().max().item()) if wanted.output.numel() else 1.0
    assert got.output.dtype == dtype
    torch.testing.assert_close(got.output.double(), wanted.output, rtol=0, atol=limit * scale)
    torch.testing.assert_close(got.lse.double(), wanted.lse, rtol=limit, atol=10 * limit)
    if kwargs.get("return_weights"):
        torch.testing.assert_close(got.weights.double(), wanted.weights, rtol=limit, atol=2 * limit)


OPTIONS = (
    "plain", "causal", "bottom_right", "window", "lengths", "mask", "bias", "alibi", "sink", "softcap",
    "window_center", "prior", "weights",
)  # fmt: skip


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_under_every_schedule(backend: ModuleType, dtype: torch.dtype, name: str) -> None:
    query, key, value = operands(dtype, 2, 1, 37, 70, 16, 16)
    for seed in SEEDS:
        backend.set_seed(seed)
        check(dtype, attnfast.attention, query, key, value, **options_of(name, query, key))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "keys", "size", "value_size"),
    [
        (1, 1, 1, 1),
        (3, 0, 8, 8),
        (0, 4, 8, 8),
        (65, 129, 64, 64),
        (16, 40, 72, 136),
        (5, 33, 256, 256),
        (9, 9, 0, 8),
        (3, 20, 300, 8),
        (3, 20, 8, 520),
    ],
)
def test_shapes(
    simt: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, keys: int, size: int,
    value_size: int,
) -> None:  # fmt: skip
    take_over(simt, monkeypatch)
    before = simt.launches()
    check(dtype, attnfast.attention, *operands(dtype, 2, 2, rows, keys, size, value_size), scale=0.3)
    assert simt.launches() == before + (rows > 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_take_tensor_cores_where_rows_are_aligned(backend: ModuleType, dtype: torch.dtype) -> None:
    query, key, value = operands(dtype, 1, 1, 20, 20, 16, 16)
    for x, uses in ((query, True), (query.transpose(-2, -1).contiguous().transpose(-2, -1), False)):
        before = backend.mma_instructions()
        check(dtype, attnfast.attention, x, key, value)
        assert (backend.mma_instructions() > before) == uses


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_what_is_masked_takes_no_part(backend: ModuleType, dtype: torch.dtype) -> None:
    query, key, value = operands(dtype, 1, 1, 20, 40, 16, 16)
    mask = torch.rand(20, 40) < 0.5
    mask[:, 5] = mask[3] = False
    expected = attnfast.attention(query, key, value, mask=mask)
    key[:, :, 5], value[:, :, 5] = math.nan, math.inf
    for seed in SEEDS:
        backend.set_seed(seed)
        assert torch.equal(attnfast.attention(query, key, value, mask=mask), expected)
    assert torch.equal(expected[:, :, 3], torch.zeros_like(expected[:, :, 3]))
    # A NaN that some rows see is theirs alone, and the other columns are what they were.
    value[:, :, 7, 2] = math.nan
    found = attnfast.attention(query, key, value, mask=mask)
    assert torch.equal(found.isnan()[0, 0, :, 2], mask[:, 7])
    others = [column for column in range(16) if column != 2]
    torch.testing.assert_close(found[..., others], expected[..., others], rtol=0, atol=2 * TOLERANCE[dtype])


def packed_calls() -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(6)
    center = torch.rand(2, 150, generator=generator) * 60
    return {
        "plain": {},
        "bottom_right": {"causal": "bottom_right", "return_weights": "full"},
        "alibi": {
            "alibi_slopes": torch.rand(5, 2, generator=generator),
            "window": (20, 3),
            "return_weights": "row_max",
        },
        "mask and bias": {
            "mask": torch.rand(150, 170, generator=generator) < 0.5,
            "bias": torch.randn(2, 150, 170, generator=generator),
            "return_weights": "column_sum",
        },
        "center": {"window": (9, 9), "window_center": center},
        "prior": {"prior": ("gaussian", center, 3.0), "return_weights": "column_sum"},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(packed_calls()))
def test_packed_sequences(backend: ModuleType, dtype: torch.dtype, name: str) -> None:
    """Tiles begin in the middle of nothing: lengths of 0, 1, one tile and more."""
    query, key, value = (
        torch.randn(n, h, 16, generator=torch.Generator().manual_seed(n + h)).to(dtype)
        for n, h in ((150, 2), (170, 1), (170, 1))
    )
    cu_q, cu_k = torch.tensor([0, 1, 1, 66, 70, 150]), torch.tensor([0, 60, 64, 64, 65, 170])
    options = packed_calls()[name]
    for seed in SEEDS[:2]:
        backend.set_seed(seed)
        check(dtype, attnfast.varlen_attention, query, key, value, cu_q, cu_k, 80, 105, **options)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("heads", "rows"), [(2, 1), (6, 1), (2, 3)], ids=["one query", "grouped heads", "three queries"]
)
def test_long_keys_are_split(backend: ModuleType, dtype: torch.dtype, heads: int, rows: int) -> None:
    query, key, value = operands(dtype, heads, 2, rows, 700, 16, 24)
    assert backend.dot_attention_workspace(query, key, value, None) == 2 * (2 * heads * rows) * (24 + 2)
    real = reference.real_dtype(dtype)
    slopes, sink = torch.rand(heads, dtype=real) * 0.01, torch.randn(heads, dtype=real)
    mask = torch.rand(2, heads, rows, 700) < 0.9
    lengths = torch.tensor([700, 300])
    before = backend.launches()
    check(
        dtype, attnfast.attention, query, key, value, causal="bottom_right", alibi_slopes=slopes, sink=sink, mask=mask
    )
    check(dtype, attnfast.attention, query, key, value, key_lengths=lengths, query_lengths=torch.tensor([rows, 0]))
    center = torch.rand(2, heads, rows, dtype=real) * 700
    prior = ("gaussian", center, 30.0)
    check(dtype, attnfast.attention, query, key, value, window=(40, 200), window_center=center, prior=prior)
    assert backend.launches() == before + 6


def test_heads_that_share_keys_share_a_tile(simt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are read once for all of them: the instructions are those of one head."""
    take_over(simt, monkeypatch)
    counts = []
    for heads in (1, 4):
        query, key, value = operands(torch.bfloat16, heads, 1, 1, 64, 16, 16)
        before = simt.mma_instructions()
        check(torch.bfloat16, attnfast.attention, query, key, value)
        counts.append(simt.mma_instructions() - before)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("kind", ["attention", "decode", "packed"])
def test_dropout_is_the_cpu_s(simt: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    heads, rows, keys = (6, 1, 700) if kind == "decode" else (2, 37, 70)
    query, key, value = operands(torch.float64, heads, 2, rows, keys, 16, 16)
    center = torch.rand(2, heads, rows, dtype=torch.float64) * keys

    def call() -> Any:
        torch.manual_seed(3)
        options = {"dropout_p": 0.4, "return_weights": "full"}
        if kind != "packed":
            return attnfast.attention(query, key, value, prior=("gaussian", center, 30.0), **options)  # type: ignore[arg-type]
        tokens = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
        cu_q, cu_k = torch.tensor([0, 40, 74]), torch.tensor([0, 31, 140])
        return attnfast.varlen_attention(*tokens, cu_q, cu_k, 40, 109, **options)  # type: ignore[arg-type]

    expected = call()
    take_over(simt, monkeypatch)
    got = call()
    torch.testing.assert_close(got.output, expected.output, rtol=0, atol=1e-13)
    torch.testing.assert_close(got.weights, expected.weights, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_most_negative_number_hides_nothing(backend: ModuleType, dtype: torch.dtype) -> None:
    query, key, value = operands(dtype, 1, 1, 5, 40, 16, 16)
    bias = torch.zeros(5, 40, dtype=dtype)
    bias[1], bias[2, 3:], bias[3, :20] = torch.finfo(dtype).min, torch.finfo(dtype).min, -math.inf
    bias[3, 20:] = torch.finfo(dtype).min
    wide = [x.double() for x in (query, key, value)]
    for mode in ("full", "column_sum", "row_max"):
        got = attnfast.attention(query, key, value, bias=bias, return_weights=mode)
        wanted = reference.attention(*wide, bias=bias.double(), return_weights=mode)
        torch.testing.assert_close(got.output.double(), wanted.output, rtol=0, atol=4 * TOLERANCE[dtype])
        torch.testing.assert_close(got.weights.double(), wanted.weights, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    got = attnfast.attention(query, key, value, bias=bias, return_weights="full")
    torch.testing.assert_close(got.weights[:, :, 1], torch.full_like(got.weights[:, :, 1], 1 / 40), rtol=1e-2, atol=0)
    assert not got.weights[:, :, 3, :20].any()


def test_row_maxima(backend: ModuleType) -> None:
    """Among equals the lowest key, NaN before all, -1 where nothing is seen."""
    query = torch.zeros(1, 1, 4, 8)
    key, value = torch.zeros(1, 1, 40, 8), torch.randn(1, 1, 40, 8)
    mask = torch.ones(4, 40, dtype=torch.bool)
    mask[1, :19] = mask[2] = False
    options = ops.DotAttentionOptions(mask=mask[None, None], weights_mode=ops.WEIGHTS_ROW_MAX)
    _, _, weights, index = ops.dot_attention_fwd(query, key, value, None, None, None, None, options, True)
    assert weights is not None and index is not None
    torch.testing.assert_close(weights[0, 0], torch.tensor([1 / 40, 1 / 21, 0, 1 / 40]))
    assert index[0, 0].tolist() == [0, 19, -1, 0]
    key[0, 0, 7, 0] = math.nan
    _, _, weights, index = ops.dot_attention_fwd(query, key, value, None, None, None, None, options, True)
    assert weights is not None and index is not None
    assert weights[0, 0].isnan().tolist() == [True, False, False, True] and index[0, 0, 1:3].tolist() == [19, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(70, 130), (1, 600)])
def test_schedules_change_no_bit(backend: ModuleType, dtype: torch.dtype, rows: int, keys: int) -> None:
    query, key, value = operands(dtype, 2, 1, rows, keys, 32, 32)
    results = []
    for seed in range(8):
        backend.set_seed(seed)
        results.append(attnfast.attention(query, key, value, causal="bottom_right", return_weights="column_sum"))
    assert all(torch.equal(result.output, results[0].output) for result in results)
    assert all(torch.equal(result.weights, results[0].weights) for result in results)


def test_lengths_and_offsets_are_cut_to_the_tensors(backend: ModuleType) -> None:
    """A GPU's are not looked at before the launch, and the emulator's are treated as a GPU's."""
    query, key, value = operands(torch.float32, 1, 1, 4, 4, 8, 8)
    lengths = {"query_lengths": torch.tensor([4, 2]), "key_lengths": torch.tensor([1, 4])}
    beyond = {"query_lengths": torch.tensor([9, 2]), "key_lengths": torch.tensor([1, 5])}
    expected = attnfast.attention(query, key, value, **lengths)  # type: ignore[arg-type]
    assert torch.equal(attnfast.attention(query, key, value, **beyond), expected)  # type: ignore[arg-type]
    tokens = [x[0].transpose(0, 1) for x in (query, key, value)]
    expected = attnfast.varlen_attention(*tokens, *[torch.tensor([0, 1, 4])] * 2, 4, 4)
    assert torch.equal(attnfast.varlen_attention(*tokens, *[torch.tensor([0, 1, 9])] * 2, 4, 4), expected)


def test_a_wrong_workspace_is_refused(simt: ModuleType) -> None:
    query, key, value = operands(torch.float32, 1, 1, 1, 600, 8, 8)
    size = simt.dot_attention_workspace(query, key, value, None)
    tail = (torch.empty_like(query), None, None, None, 0, *[None] * 12, 1.0, 0.0, 0.0, 0.0, 0, -1, -1)
    with pytest.raises(ValueError, match=f"workspace: expected a tensor of {size} elements, got None"):
        simt.dot_attention_fwd(query, key, value, *tail, None, False)
    with pytest.raises(ValueError, match="workspace: expected shape"):
        simt.dot_attention_fwd(query, key, value, *tail, torch.empty(size - 1), False)
    with pytest.raises(TypeError, match="workspace: expected dtype float32"):
        simt.dot_attention_fwd(query, key, value, *tail, torch.empty(size).double(), False)
