"""Memory reads, the store and its indexes with tensors of a GPU: the Python around the kernels, which are emulated.

What is compared is the CPU's result. `pretend_gpu` refuses operations on tensors of two devices.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pretend_gpu import GPU, Pretend, PretendGpu, pretend_gpu, to_gpu, to_host
from torch import Tensor

import attnfast
from attnfast.memory import ClusterIndex, MemoryStore, WordIndex

LISTS = (torch.tensor([0, 2, 2, 7, 9]), torch.tensor([1, 19, 0, 3, 4, 5, 11, 2, 3]))


@pytest.fixture
def gpu(simt: ModuleType) -> Iterator[PretendGpu]:
    """The test fails if it has launched no kernel."""
    simt.set_seed(3)
    before = simt.launches()
    with pretend_gpu(simt) as mode:
        yield mode
    assert simt.launches() > before or mode.skipped


def same(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    found, wanted = to_host(found), to_host(wanted)
    if not isinstance(found, tuple):
        found, wanted = (found,), (wanted,)
    for x, y in zip(found, wanted, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x.detach().to_dense(), y.detach().to_dense(), rtol=tolerance, atol=tolerance)


def test_the_pretended_gpu_refuses_what_a_gpu_refuses(simt: ModuleType) -> None:
    with pretend_gpu(simt) as gpu:
        x, y = to_gpu(torch.arange(3.0)), torch.arange(3.0)
        assert x.device == GPU and not x.is_cpu and torch.zeros(2, device=x.device).device == GPU
        assert torch.equal(to_host(x + torch.tensor(1.0)), y + 1)
        for wrong in (lambda: x + y, lambda: x[torch.tensor([0])], lambda: attnfast.topk_scores(x[None], y[None], 1)):
            with pytest.raises((AssertionError, RuntimeError)):
                wrong()
        with pytest.raises((TypeError, RuntimeError, AssertionError)):
            x.numpy()
        before = gpu.to_host
        assert int(x[1]) == 1 and gpu.to_host == before + 1
        x[1:].copy_(y[:2])
        assert x.tolist() == [0, 0, 1]


READS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"mask": torch.arange(80).reshape(4, 20) % 3 != 0},
    "two hops": {"hops": 2},
    "rest": {"hops": 4, "hop": "replace", "eps": 1e-3},
    "top 3": {"topk": 3},
    "top 3, masked, two hops": {"topk": 3, "mask": torch.arange(20) % 4 != 0, "hops": 2},
    "top 3, sparse": {"topk": 3, "sparse_grad": True},
    "lists": {"candidates": LISTS},
    "lists, masked": {"candidates": LISTS, "mask": torch.arange(20) != 3},
    "top 2 of lists": {"candidates": LISTS, "topk": 2},
}


@pytest.mark.parametrize("score", ["dot", "cosine", "l2", "additive"])
@pytest.mark.parametrize("name", READS)
def test_a_read_is_the_cpu_s(gpu: PretendGpu, name: str, score: str) -> None:
    generator = torch.Generator().manual_seed(2)
    query, keys, values = (
        torch.randn(n, 8, generator=generator, dtype=torch.float64).requires_grad_() for n in (4, 20, 20)
    )
    vectors = torch.randn(2, 8, generator=generator, dtype=torch.float64)

    def read(on: Any) -> Any:
        leaves = [on(x) for x in (query, keys, values)]
        chosen = ("additive", *on(vectors).unbind()) if score == "additive" else score
        result = attnfast.memory_read(*leaves, score=chosen, return_aux=True, **on(READS[name]))
        grads = torch.autograd.grad(result.output.square().sum(), leaves)
        if on is to_gpu:
            assert all(x is None or isinstance(x, Pretend) for x in (*result, *(g for g in grads if not g.is_sparse)))
        return (*result, *grads)

    try:
        found = read(to_gpu)
    except NotImplementedError as error:
        gpu.skipped = True
        pytest.skip(str(error))
    same(found, read(lambda x: x), 1e-9)


@pytest.mark.parametrize("normalizer", ["softmax", "sparsemax", "entmax15", "sigmoid", "none", "hard"])
@pytest.mark.parametrize("topk", [None, 4])
def test_normalizers(gpu: PretendGpu, normalizer: str, topk: int | None) -> None:
    query, table = torch.randn(3, 8), torch.randn(30, 8)
    found = attnfast.memory_read(*to_gpu((query, table, table)), topk=topk, normalizer=normalizer)
    same(found, attnfast.memory_read(query, table, table, topk=topk, normalizer=normalizer))
    if topk is None:
        attnfast.topk_scores(*to_gpu((query, table)), 3)  # some normalizers of a read over all have no kernel


@pytest.mark.parametrize("policy", ["ring", "lru", "lfu", "least_used"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_store_lives_as_on_the_cpu(gpu: PretendGpu, tmp_path: Path, dtype: torch.dtype, policy: str) -> None:
    """Writes beyond the capacity, updates, deletions, reads of each kind, a file, a state dict: all the same."""

    def live(device: Any) -> list[Any]:
        generator = torch.Generator().manual_seed(4)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        store = MemoryStore(12, 8, 8, dtype=dtype, policy=policy, device=device)
        seen: list[Any] = [store.write(random(2, 4, 8), random(2, 4, 8)), store.write(random(3, 8), random(3, 8))]
        for options in ({"topk": 3}, {}, {"topk": 2, "hops": 2}, {"topk": 3, "score": "l2"}):
            seen.append(tuple(store.read(random(2, 8), return_aux=True, **options)))
        lists = (torch.tensor([0, 2, 3]).to(device), torch.tensor([0, 4, 2]).to(device))
        seen.append(store.read(random(2, 8), candidates=lists))
        seen.append(store.read(random(2, 8), 1, candidates=tuple(x.cpu() for x in lists)))
        store.update(torch.tensor([1, 4, 1]).to(device), random(3, 8), random(3, 8))
        store.update(torch.tensor([5]), values=random(1, 8))  # slots that lie on the host
        store.delete(torch.tensor([0, 2]).to(device))
        seen.append(store.write(random(7, 8), random(7, 8)))
        seen.append(store.rows(torch.tensor([[1], [4]]).to(device)))
        path = tmp_path / f"{torch.device(device).type}.store"
        store.save(path)
        loaded = MemoryStore.load(path, device=device)
        assert loaded.keys.device == torch.empty(0, device=device).device
        other = MemoryStore(12, 8, 8, dtype=dtype, policy=policy, device=device)
        other.load_state_dict(store.state_dict())
        moved = MemoryStore.load(path).to(device)
        for copy in (store, loaded, other, moved):
            seen += [copy.write(random(4, 8), random(4, 8)) for _ in range(1)]
        seen += [store.age, len(store), repr(store), *(x for x in store.buffers())]
        query = random(2, 8).requires_grad_()
        seen.append(torch.autograd.grad(store.read(query, 3, count=False).sum(), query)[0])
        return seen

    for found, wanted in zip(live(GPU), live("cpu"), strict=True):
        if isinstance(found, Tensor):
            assert isinstance(found, Pretend)
        if isinstance(found, Tensor | tuple):
            same(found, wanted, 1e-2 if dtype is torch.bfloat16 else 1e-5)
        else:
            assert found == wanted


def test_reads_wait_for_the_device_no_more_often_than_they_must(gpu: PretendGpu) -> None:
    """A read over all slots or the best of them that does not count looks at nothing; a list has its bounds checked."""
    query, table = to_gpu(torch.randn(4, 8)), to_gpu(torch.randn(20, 8))
    store = MemoryStore(20, 8, 8, device=GPU)
    store.write(table, table)
    store.read(query, 3)
    before = gpu.to_host
    for options in ({}, {"topk": 3}, {"topk": 3, "hops": 3}, {"topk": 3, "score": "l2"}, {"score": "cosine"}):
        attnfast.memory_read(query, table, table, **options)
        store.read(query, count=False, **options)
    assert gpu.to_host == before
    attnfast.memory_read(query, table, table, topk=2, candidates=LISTS)  # lists of the host are looked at there
    assert gpu.to_host == before


@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_indexes_of_a_store_on_a_gpu(gpu: PretendGpu, score: str) -> None:
    keys, query = torch.randn(40, 8), torch.randn(5, 8)
    words = [[i % 7, i % 3] for i in range(40)]
    asked = (torch.arange(6), torch.tensor([0, 1, 2, 5, 9]))
    results = []
    for device in (GPU, "cpu"):
        store = MemoryStore(50, 8, 8, device=device)
        slots = store.write(keys.to(device), keys.to(device))
        index = WordIndex(store)
        index.add(slots, words)
        index.remove(slots[:2])
        clusters = ClusterIndex(store, clusters=4, probes=2, score=score, backend="sklearn")
        clusters.fit()
        clusters.remove(slots[3])
        clusters.add(slots[3:5])
        mine = query.to(device)
        found: list[Any] = []
        for lists in (index.candidates(tuple(x.to(device) for x in asked)), clusters.candidates(mine)):
            assert all(x.is_cpu for x in lists)
            found += [*lists, store.read(mine, 3, candidates=lists), store.read(mine, candidates=lists)]
        found += [index.recall(mine, 3, asked, score=score), clusters.recall(mine, 3), len(index), len(clusters)]
        results.append(found)
    for x, y in zip(*results, strict=True):
        same(x, y) if isinstance(x, Tensor) else None
        assert isinstance(x, Tensor) or x == y
    assert pickle.loads(pickle.dumps(results[1]))
