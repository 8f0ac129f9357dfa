"""What ``attnfast.explain`` says of tensors on a GPU is what a call there does. The GPU is that of pretend_gpu."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from pretend_gpu import pretend_gpu, to_gpu
from torch import Tensor

import attnfast

HALF = torch.bfloat16


def operands(dtype: torch.dtype, rows: int, keys: int, size: int = 16, value_size: int = 16) -> list[Tensor]:
    return [torch.randn(1, 2, n, d).to(dtype) for n, d in ((rows, size), (keys, size), (keys, value_size))]


NO_TF32 = "torch.backends.cuda.matmul.fp32_precision does not allow tf32"
NARROW = "is not a multiple of 8 from 8 to 256"
# Operands, elements from row to row of the keys, why not tensor cores.
ATTENTION: dict[str, tuple[list[Tensor], int, str]] = {
    "tensor cores": (operands(HALF, 9, 9), 16, ""),
    "float16": (operands(torch.float16, 9, 9), 16, ""),
    "float32": (operands(torch.float32, 9, 9), 16, NO_TF32),
    "float64": (operands(torch.float64, 9, 9), 16, "products of float64 are formed in float64"),
    "odd size": (operands(HALF, 9, 9, 12), 12, f"query's D = 12 {NARROW}"),
    "odd value": (operands(HALF, 9, 9, 16, 4), 16, f"value's D_v = 4 {NARROW}"),
    "wide": (operands(HALF, 9, 9, 264), 264, f"query's D = 264 {NARROW}"),
    "rows apart": (operands(HALF, 9, 9), 24, ""),
    "rows not aligned": (operands(HALF, 9, 9), 20, "rows of key do not start at multiples of 16 bytes"),
    "split": (operands(HALF, 1, 700), 16, ""),
    "split, float32": (operands(torch.float32, 1, 700), 16, NO_TF32),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(simt: ModuleType, name: str) -> None:
    (query, key, value), stride, reason = ATTENTION[name]
    with pretend_gpu(simt):
        padded = torch.nn.functional.pad(key, (0, stride - key.shape[3]))
        moved = (to_gpu(query), to_gpu(padded)[..., : key.shape[3]], to_gpu(value))
        said = attnfast.explain(attnfast.attention, *moved)
        launches, products = simt.launches(), simt.mma_instructions()
        attnfast.attention(*moved)
        launches, products = simt.launches() - launches, simt.mma_instructions() - products
    assert "ISA" not in said
    assert ("kernel: dot_attention_mma on CUDA" in said) == (products > 0) == (reason == "")
    assert ("kernel: dot_attention_fma on CUDA" in said) == (products == 0)
    found = re.search(r"not dot_attention_mma, .*: (.*)", said)
    assert (found[1] if found else "") == reason
    split = re.search(r"split: keys in (\d+) ranges, joined by attention_merge", said)
    assert launches == (2 if split else 1) and (split is not None) == ("split" in name)
    assert not split or int(split[1]) == 2


@pytest.fixture
def _tf32_allowed() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("_tf32_allowed")
def test_tf32_is_named_where_it_is_allowed(simt: ModuleType) -> None:
    with pretend_gpu(simt):
        query, key, value = (to_gpu(x) for x in operands(torch.float32, 9, 9))
        query.requires_grad_()
        said = attnfast.explain(attnfast.attention, query, key, value)
        assert "dot_attention_mma on CUDA, products of float32 rounded to tf32 on tensor cores, sums in float32" in said
        assert "backward: dot_attention_bwd_mma" in said
        before = simt.mma_instructions()
        attnfast.attention(query, key, value)
        assert simt.mma_instructions() > before
        odd = [to_gpu(x) for x in operands(torch.float32, 9, 9, 14)]
        said = attnfast.explain(attnfast.attention, *odd)
        assert "dot_attention_fma on CUDA, float32 arithmetic" in said
        assert "query's D = 14 is not a multiple of 4 from 4 to 256" in said
        before = simt.mma_instructions()
        attnfast.attention(*odd)
        assert simt.mma_instructions() == before


def test_gradients_and_weights_are_named(simt: ModuleType) -> None:
    with pretend_gpu(simt):
        query, key, value = (to_gpu(x) for x in operands(HALF, 9, 9))
        query.requires_grad_()
        said = attnfast.explain(attnfast.attention, query, key, value, return_weights="row_max")
        assert "backward: dot_attention_bwd_mma" in said and "second pass: writes the weights' row maxima" in said
        assert "backward" not in attnfast.explain(attnfast.attention, query.detach(), key, value)


def test_additive(simt: ModuleType) -> None:
    with pretend_gpu(simt):
        weight = to_gpu(torch.randn(16))
        for rows, keys, launches in ((9, 9, 1), (1, 700, 2)):
            moved = [to_gpu(x) for x in operands(torch.float32, rows, keys)]
            said = attnfast.explain(attnfast.additive_attention, *moved, weight)
            before = simt.launches()
            attnfast.additive_attention(*moved, weight)
            assert simt.launches() == before + launches
            assert "kernel: additive_attention_fwd on CUDA, float32 arithmetic" in said and "ISA" not in said
            found = re.search(r"split: keys in (\d+) ranges, joined by attention_merge", said)
            assert (found is not None) == (launches == 2) and (not found or int(found[1]) == 10)


@pytest.mark.parametrize("B", [3, 9])
def test_topk(simt: ModuleType, B: int) -> None:
    with pretend_gpu(simt):
        for one, other in ((HALF, HALF), (torch.float32, HALF), (torch.float64, torch.float64)):
            for N in (50, 9000):
                query, keys = to_gpu(torch.randn(B, 8).to(one)), to_gpu(torch.randn(N, 8).to(other))
                said = attnfast.explain(attnfast.topk_scores, query, keys, 5)
                launches, products = simt.launches(), simt.mma_instructions()
                attnfast.topk_scores(query, keys, 5)
                launches, products = simt.launches() - launches, simt.mma_instructions() - products
                assert ("kernel: topk_scores_mma on CUDA" in said) == (products > 0) == (one == other == HALF)
                assert ("not topk_scores_mma" in said) == (products == 0) and "ISA" not in said
                found = re.search(r"split: slots in (\d+) ranges, joined by topk_merge", said)
                assert (found is not None) == (launches == 2) == (N == 9000) and (not found or int(found[1]) == 4)


def test_reads(simt: ModuleType) -> None:
    with pretend_gpu(simt):
        query, table = to_gpu(torch.randn(3, 8)), to_gpu(torch.randn(40, 8))
        said = attnfast.explain(attnfast.memory_read, query, table, table, topk=4)
        assert "kernel: topk_scores on CUDA" in said and "kernel: weighted_gather on CUDA" in said and "ISA" not in said
        assert "not 16 bytes at a time" not in said
        indices, weights = to_gpu(torch.zeros(3, 2, dtype=torch.int64)), to_gpu(torch.ones(3, 2))
        odd = to_gpu(torch.randn(40, 7))
        assert "not 16 bytes at a time" in attnfast.explain(attnfast.weighted_gather, indices, weights, odd)
        assert "dot_attention_fma on CUDA" in attnfast.explain(attnfast.memory_read, query, table, table)
