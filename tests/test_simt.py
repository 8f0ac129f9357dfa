"""The CUDA kernels under the SIMT emulator, behind attnfast's own functions: backend "simt".

The module ``_simt`` holds the kernels of csrc/cuda as C++ beside the emulator, with the arguments of ``_C``. Here it
takes the place of the CPU's forward, so that the calls and the expectations are those of any other test of semantics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnfast
from attnfast import ops, reference

SEEDS = range(4)  # one of each kind of schedule
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture
def backend(simt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Forwards of the dot core run under the emulator, and did: a test that never launched a kernel fails."""
    simt.set_seed(0)
    monkeypatch.setattr(ops, "_forward", simt.dot_attention_fwd)
    before = simt.launches()
    yield simt
    assert simt.launches() > before, "no kernel was launched"


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
    return {
        "plain": {},
        "causal": {"causal": "top_left"},
        "bottom_right": {"causal": "bottom_right"},
        "window": {"window": (7, 3)},
        "lengths": {
            "query_lengths": torch.tensor([0, shape[2]]),
            "key_lengths": torch.tensor([shape[3], shape[3] // 2]),
            "causal": "bottom_right",
        },
        "mask": {"mask": torch.rand(shape, generator=generator) < 0.6},
        "bias": {"bias": torch.randn(shape[2:], generator=generator).to(query.dtype)},
        "alibi": {"alibi_slopes": torch.rand(shape[1], generator=generator, dtype=reference.real_dtype(query.dtype))},
        "sink": {"sink": torch.randn(shape[1], generator=generator, dtype=reference.real_dtype(query.dtype))},
        "softcap": {"softcap": 2.0, "scale": -0.7},
    }[name]


def check(dtype: torch.dtype, call: Any, *args: Any, **kwargs: Any) -> None:
    got = call(*args, return_lse=True, **kwargs)
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    wide_options = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in kwargs.items()
    }
    wanted = getattr(reference, call.__name__)(*wide, return_lse=True, **wide_options)
    limit = TOLERANCE[dtype]
    scale = max(1.0, wanted.output.abs().max().item()) if wanted.output.numel() else 1.0
    assert got.output.dtype == dtype
    torch.testing.assert_close(got.output.double(), wanted.output, rtol=0, atol=limit * scale)
    torch.testing.assert_close(got.lse.double(), wanted.lse, rtol=limit, atol=10 * limit)


OPTIONS = ("plain", "causal", "bottom_right", "window", "lengths", "mask", "bias", "alibi", "sink", "softcap")


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
    [(1, 1, 1, 1), (3, 0, 8, 8), (0, 4, 8, 8), (65, 129, 64, 64), (16, 40, 72, 136), (5, 33, 256, 256), (9, 9, 0, 8)],
)
def test_shapes(
    simt: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, keys: int, size: int,
    value_size: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(ops, "_forward", simt.dot_attention_fwd)
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
    # A NaN that some rows see is theirs alone.
    value[:, :, 7, 2] = math.nan
    seen = attnfast.attention(query, key, value, mask=mask).isnan()
    assert torch.equal(seen[0, 0, :, 2], mask[:, 7])
    assert not seen[..., 3:].any() and not seen[..., :2].any()


def test_dropout_is_the_cpu_s(simt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = operands(torch.float64, 2, 2, 37, 70, 16, 16)
    torch.manual_seed(3)
    expected = attnfast.attention(query, key, value, dropout_p=0.4)
    monkeypatch.setattr(ops, "_forward", simt.dot_attention_fwd)
    torch.manual_seed(3)
    torch.testing.assert_close(attnfast.attention(query, key, value, dropout_p=0.4), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_schedules_change_no_bit(backend: ModuleType, dtype: torch.dtype) -> None:
    query, key, value = operands(dtype, 2, 1, 70, 130, 32, 32)
    results = []
    for seed in range(8):
        backend.set_seed(seed)
        results.append(attnfast.attention(query, key, value, causal="top_left"))
    assert all(torch.equal(result, results[0]) for result in results)


def test_what_the_kernels_do_not_have_is_refused_by_name(simt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_forward", simt.dot_attention_fwd)
    before = simt.launches()
    query, key, value = operands(torch.float32, 1, 1, 4, 4, 8, 8)
    large = torch.zeros(1, 1, 4, 257)
    packed, offsets = torch.zeros(4, 1, 8), torch.tensor([0, 4])
    center = torch.zeros(2, 1, 4)
    calls = {
        "weights on request": lambda: attnfast.attention(query, key, value, return_weights=True),
        "head sizes above 256": lambda: attnfast.attention(large, large, large),
        "packed sequences": lambda: attnfast.varlen_attention(packed, packed, packed, offsets, offsets, 4, 4),
        "window_center": lambda: attnfast.attention(query, key, value, window=(1, 1), window_center=center),
        "Gaussian prior": lambda: attnfast.attention(query, key, value, prior=("gaussian", center, 1.0)),
    }
    for what, call in calls.items():
        with pytest.raises(NotImplementedError, match=f"attnfast has no simt kernel with .*{what}"):
            call()
    assert simt.launches() == before


def test_a_cuda_call_without_a_backward_says_so() -> None:
    query = SimpleNamespace(is_cpu=False, device="cuda:0")
    with pytest.raises(NotImplementedError, match=r"no CUDA kernel for gradients yet \(query on cuda:0\)"):
        ops.plain_bwd(query, query, query, query, None, None, None, (True, True, True))  # type: ignore[arg-type]


def test_kernels_check_lengths_that_they_can_see(backend: ModuleType) -> None:
    query, key, value = operands(torch.float32, 1, 1, 4, 4, 8, 8)
    with pytest.raises(ValueError, match="key_lengths: expected values from 0 to T_k = 4, got 5 at index 1"):
        attnfast.attention(query, key, value, key_lengths=torch.tensor([1, 5]))
    attnfast.attention(query, key, value)
