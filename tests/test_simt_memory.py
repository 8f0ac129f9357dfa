"""The memory kernels of csrc/cuda under the SIMT emulator, behind attnfast's own functions.

The tests of the CPU's kernels are run as they are, with the emulated kernels in the place of the CPU's: those listed
in SHARED. Each runs under a schedule that its name chooses. What is particular to the kernels of a GPU follows.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import test_gather
import test_product_keys
import test_topk
import torch
from torch import Tensor

import attnfast
from attnfast import _gather_ops, _memory_ops, reference

# Tests of the CPU's kernels that are run here as well, as test_gather_strides and so on.
SHARED: dict[ModuleType, tuple[str, ...]] = {
    test_gather: (
        "autocast_changes_nothing",
        "half_tables_with_float_weights",
        "int8_tables",
        "missing_slots_take_no_part",
        "result_and_gradients",
        "sparse_gradient_is_the_dense_one",
        "strides",
        "third_derivatives",
    ),
    test_product_keys: (
        "gradients_are_the_reference_s",
        "merge_takes_every_tie_in_order",
        "scores_that_are_not_finite",
        "slots_are_those_of_a_stable_sort",
        "sums_that_rounding_makes_equal",
    ),
    test_topk: (
        "a_full_house_of_nan",
        "derivatives_with_keys_in_int8",
        "dtypes_may_differ",
        "equals_a_stable_sort",
        "gradcheck",
        "gradients_are_the_reference_s",
        "keys_in_int8",
        "mask_of_other_bytes",
        "masks",
        "not_finite",
        "orders_of_the_slots",
        "ordinary_numbers",
        "scale",
        "shapes",
        "strides",
        "strides_of_int8",
        "what_is_hidden_reaches_no_gradient",
    ),
}
for _module, _names in SHARED.items():
    for _name in _names:
        globals()[f"{_module.__name__}_{_name}"] = getattr(_module, f"test_{_name}")

SEEDS = range(8)  # two of each kind of schedule
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAUNCH_NOTHING = {"test_what_the_kernels_do_not_have_is_refused_by_name", "test_device_tensors_reach_the_device"}


@pytest.fixture(autouse=True)
def kernels(simt: ModuleType, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The memory functions take CPU tensors where they take those of a device, and find the emulated kernels there."""
    simt.set_seed(zlib.crc32(request.node.name.encode()) % 1024)
    for module in (_gather_ops, _memory_ops):
        monkeypatch.setattr(module, "cuda_binary", lambda: simt)
    monkeypatch.setattr(_memory_ops, "_choose", _memory_ops._choose_on_device)
    monkeypatch.setattr(_gather_ops, "_gather", _gather_ops.gather_on_device)
    monkeypatch.setattr(_gather_ops, "_differentiate", _gather_ops.differentiate_on_device)
    monkeypatch.setattr(_gather_ops, "_merge", simt.product_keys)
    before = simt.launches()
    yield simt
    assert simt.launches() > before or request.node.name in LAUNCH_NOTHING or "no " in request.node.name


@pytest.fixture
def isa() -> str:
    """In the shared tests: what runs is not of an instruction set."""
    return "simt"


@pytest.fixture
def topk() -> Callable[..., tuple[Tensor, Tensor]]:
    return attnfast.topk_scores


@pytest.fixture
def read() -> Any:
    return attnfast.product_key_read


def under_every_schedule(kernels: ModuleType, call: Callable[[], tuple[Tensor, ...]]) -> None:
    """The results have the same bits under all of them."""
    first: tuple[Tensor, ...] | None = None
    for seed in SEEDS:
        kernels.set_seed(seed)
        found = tuple(x.detach().to_dense() for x in call())
        first = found if first is None else first
        assert all(torch.equal(x, y) for x, y in zip(found, first, strict=True)), f"seed {seed}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("B", "N", "k"), [(40, 300, 9), (3, 9000, 20), (2, 900, 700)])
def test_schedules_change_no_bit_of_the_best(kernels: ModuleType, dtype: torch.dtype, B: int, N: int, k: int) -> None:
    query, keys = (torch.randn(n, 19).to(dtype).requires_grad_() for n in (B, N))
    mask = torch.rand(B, N) < 0.9

    def call() -> tuple[Tensor, ...]:
        scores, indices = attnfast.topk_scores(query, keys, k, mask=mask)
        return scores, indices, *torch.autograd.grad(scores, (query, keys), torch.ones_like(scores))

    under_every_schedule(kernels, call)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_schedules_change_no_bit_of_a_gather(kernels: ModuleType, dtype: torch.dtype, sparse: bool) -> None:
    indices = torch.randint(-1, 7, (40, 33))
    indices[indices > 3] = 2  # most uses are of one slot
    weights = torch.randn(40, 33).to(dtype).requires_grad_()
    values = torch.randn(7, 21).to(dtype).requires_grad_()

    def call() -> tuple[Tensor, ...]:
        out = attnfast.weighted_gather(indices, weights, values, sparse_grad=sparse)
        return out, *torch.autograd.grad(out, (weights, values), torch.ones_like(out))

    under_every_schedule(kernels, call)


def test_schedules_change_no_bit_of_a_product_key_read(kernels: ModuleType) -> None:
    query, keys, values = torch.randn(5, 3, 2, 8), torch.randn(2, 3, 40, 8), torch.randn(1600, 20)
    under_every_schedule(
        kernels, lambda: tuple(attnfast.product_key_read(query, keys[0], keys[1], values, 40, return_aux=True))
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_score_does_not_depend_on_how_it_was_formed(dtype: torch.dtype) -> None:
    """One query alone and among many, slots in one range and in many, rows read whole and by element: the same bits."""
    query, keys = torch.randn(40, 19).to(dtype), torch.randn(9000, 19).to(dtype)
    wanted = attnfast.topk_scores(query, keys, 30)
    for B in (1, 2, 7, 33):  # one plan each, and many ranges for the first ones
        for found, whole in zip(attnfast.topk_scores(query[:B], keys, 30), wanted, strict=True):
            assert torch.equal(found, whole[:B])
    more = attnfast.topk_scores(query[:9], keys, 100)  # lists of another length
    assert all(torch.equal(found[:, :30], whole[:9]) for found, whole in zip(more, wanted, strict=True))
    padded = torch.full((9000, 24), math.nan, dtype=dtype)
    padded[:, :19] = keys
    assert padded.stride(0) * padded.element_size() % 16 == 0 and keys.stride(0) * keys.element_size() % 16 != 0
    for found, whole in zip(attnfast.topk_scores(query, padded[:, :19], 30), wanted, strict=True):
        assert torch.equal(found, whole)


def test_two_operands_of_one_half_type_take_tensor_cores(kernels: ModuleType) -> None:
    """Whatever their layout, and no others do."""
    query, keys = torch.randn(3, 19), torch.randn(70, 40)
    for one in FLOATS:
        for other in FLOATS:
            if (one == torch.float64) != (other == torch.float64):
                continue
            rows = keys.to(other)
            for table in (rows[:, :19], rows.as_strided((70, 19), (40, 1), 1), rows[:, :19].T.contiguous().T):
                before = kernels.mma_instructions()
                attnfast.topk_scores(query.to(one), table, 5)
                assert (kernels.mma_instructions() > before) == (one == other and one.itemsize == 2)


def test_lists_that_fill_up_again_and_again(kernels: ModuleType) -> None:
    """Scores that rise all the time: each tile's are better than all before, which lists of every size must take."""
    for dtype, B, k in itertools.product(
        (torch.float32, torch.bfloat16), (1, 5, 33), (1, 2, 63, 64, 65, 511, 512, 513)
    ):
        N = 1500 if B == 1 else 700
        keys = torch.arange(N).unsqueeze(1) - 350.0
        query = torch.full((B, 1), 1.0)
        query[B // 2] = -1.0  # these fall
        levels = keys.to(dtype).float()  # bfloat16 rounds neighbours to ties
        scores, indices = attnfast.topk_scores(query.to(dtype), keys.to(dtype), k)
        wanted = (query @ levels.T).sort(dim=1, descending=True, stable=True)
        assert torch.equal(scores, wanted.values[:, :k]) and torch.equal(indices, wanted.indices[:, :k])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_wide_queries_do_not_stay_in_shared_memory(dtype: torch.dtype) -> None:
    for size in (64, 65, 256, 257, 300):
        query, keys = torch.randn(10, size).to(dtype), torch.randn(130, size).to(dtype)
        scores, indices = attnfast.topk_scores(query, keys, 130, scale=0.5)
        wanted = (0.5 * query.double() @ keys.double().T).gather(1, indices)
        assert (indices.sort().values == torch.arange(130)).all()
        tolerance = 1e-13 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(scores.double(), wanted, rtol=tolerance, atol=10 * tolerance)


def test_a_wrong_index_counts_as_none() -> None:
    """Telling would wait for the device."""
    indices = torch.tensor([[0, 3, 1], [-2, 1, 2**40], [2, -(2**63), 2]])
    none = indices.where((indices >= 0) & (indices < 3), -1)
    weights, values = torch.randn(3, 3, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    for sparse in (False, True):
        results = []
        for picks in (indices, none):
            out = attnfast.weighted_gather(picks, weights, values, sparse_grad=sparse)
            results.append((out, *torch.autograd.grad(out, (weights, values), torch.ones_like(out))))
        assert all(torch.equal(x.to_dense(), y.to_dense()) for x, y in zip(*results, strict=True))


def test_what_the_kernels_do_not_have_is_refused_by_name() -> None:
    keys = torch.zeros(1, 1).expand(2**32, 1)
    with pytest.raises(NotImplementedError, match="attnfast has no simt kernel with 2\\^32 slots or more"):
        attnfast.topk_scores(torch.zeros(1, 1), keys, 1)
    scores, indices = torch.zeros(1, 2049), torch.arange(2049).unsqueeze(0)
    with pytest.raises(NotImplementedError, match="more than 2048 candidates of a half"):
        _gather_ops.product_keys(scores, indices, scores, indices, 2049, 1)


def test_device_tensors_reach_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tensor that is not the CPU's only the CUDA binary hears; meta tensors stand for it here."""
    heard: list[str] = []
    fake = SimpleNamespace(
        topk_scores_workspace=lambda *args: 5,
        weighted_gather_partial_rows=lambda entries: 2,
        **{
            name: lambda *args, name=name: heard.append(name)
            for name in ("topk_scores_fwd", "weighted_gather_fwd", "weighted_gather_bwd", "product_keys")
        },
    )
    for module in (_gather_ops, _memory_ops):
        monkeypatch.setattr(module, "cuda_binary", lambda: fake)
    with torch.device("meta"):
        query, keys, values = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(5, 4)
        indices, weights = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2)
        _memory_ops.topk_scores_fwd(query, keys, None, None, 2, 1.0)
        _memory_ops.topk_scores_bwd(weights, query, keys, None, indices, 1.0, (True, True))
        _gather_ops.weighted_gather_fwd(indices, weights, values, None)
        _gather_ops.weighted_gather_bwd(torch.zeros(2, 4), indices, weights, values, None, (True, True))
        _gather_ops.product_keys(weights, indices, weights, indices, 5, 2)
    assert heard == [
        "topk_scores_fwd", "weighted_gather_fwd", "weighted_gather_bwd", "weighted_gather_fwd", "weighted_gather_bwd",
        "product_keys",
    ]  # fmt: skip
    for name in ("topk_scores", "weighted_gather"):
        for direction in ("fwd", "bwd"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"attnfast::{name}_{direction}", "CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("attnfast::product_keys", "CUDA")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reads_of_a_memory(dtype: torch.dtype) -> None:
    query, keys, values = (torch.randn(n, 12).to(dtype) for n in (4, 90, 90))
    found = attnfast.memory_read(query, keys, values, topk=6, return_aux=True)
    wanted = reference.memory_read(query.double(), keys.double(), values.double(), topk=6, return_aux=True)
    assert torch.equal(found.indices, wanted.indices)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(found.output.double(), wanted.output, rtol=0, atol=tolerance)
