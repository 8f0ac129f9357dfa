"""WordIndex and ClusterIndex: candidates against sets, upkeep, reads of candidates, recall; wrong calls."""

from __future__ import annotations

import builtins
import random
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from attnfast.memory import ClusterIndex, MemoryStore, WordIndex, kmeans

try:
    import faiss
except ImportError:
    faiss = None
BACKENDS = [
    pytest.param("faiss", marks=pytest.mark.skipif(faiss is None, reason="faiss is not installed")),
    "sklearn",
]


def filled(count: int = 10, capacity: int = 12, size: int = 4, **options: Any) -> MemoryStore:
    store = MemoryStore(capacity, size, 3, **options)
    store.write(torch.randn(count, size), torch.randn(count, 3))
    return store


def lists(candidates: tuple[Tensor, Tensor]) -> list[list[int]]:
    offsets, slots = candidates
    assert offsets.dtype is torch.int64 and slots.dtype is torch.int64
    bounds = offsets.tolist()
    assert bounds[0] == 0 and bounds[-1] == slots.shape[0]
    return [slots[i:j].tolist() for i, j in pairwise(bounds)]


def csr(rows: list[list[int]], dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return offsets.to(dtype), torch.tensor([word for row in rows for word in row], dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("form", ["lists", "tensors"])
def test_word_index_follows_sets(seed: int, form: str) -> None:
    """Random adds, replacements and removals, enough to pack the buckets; candidates against plain sets."""
    draw = random.Random(seed)
    store = MemoryStore(20, 2, 2)
    index, words = WordIndex(store), {}
    give: Callable[[Any], Any] = csr if form == "tensors" else lambda rows: rows
    for _ in range(200):
        slots = draw.sample(range(20), draw.randint(0, 5))
        if draw.random() < 0.6:
            rows = [[draw.randint(-2, 9) for _ in range(draw.randint(0, 4))] for _ in slots]
            index.add(torch.tensor(slots, dtype=torch.int64), give(rows))
            words.update(zip(slots, map(set, rows)))
        else:
            index.remove(torch.tensor(slots, dtype=torch.int64))
            for slot in slots:
                words.pop(slot, None)
        queries = [[draw.randint(-2, 12) for _ in range(draw.randint(0, 3))] for _ in range(3)]
        expected = [sorted(s for s, own in words.items() if own & set(q)) or sorted(words) for q in queries]
        assert lists(index.candidates(give(queries))) == expected
        assert len(index) == len(words)


def test_buckets_do_not_grow_with_what_was_forgotten() -> None:
    store = MemoryStore(8, 2, 2)
    index = WordIndex(store)
    for step in range(2000):
        index.add(torch.tensor([step % 8]), [[1, 2 + step % 3]])
    sizes = [log._pairs.shape[1] for log in index._buckets._logs.values()]
    assert len(sizes) == 4 and max(sizes) <= 128


def test_no_queries_and_no_memories() -> None:
    index = WordIndex(MemoryStore(8, 2, 2))
    assert lists(index.candidates([])) == []
    assert lists(index.candidates([[1], []])) == [[], []]


def test_reads_score_the_candidates_alone() -> None:
    """The read is exact for what is listed, and leaves out what was deleted behind the back of the index."""
    store = filled(dtype=torch.float64)
    index = WordIndex(store)
    index.add(torch.arange(10), [[slot % 3] for slot in range(10)])
    store.delete(torch.tensor([3, 4]))
    query = torch.randn(3, 4, dtype=torch.float64)
    listed = [[0, 6, 9], [1, 2, 5, 7, 8], [0, 1, 2, 5, 6, 7, 8, 9]]
    for topk in (None, 2, 6):
        got = store.read(query, topk, candidates=index.candidates([[0], [1, 2], [99]]), return_aux=True)
        for row, slots in enumerate(listed):
            scores = store.keys[slots] @ query[row]
            best = scores.sort(descending=True).indices[:topk]
            weights = scores[best].softmax(0)
            torch.testing.assert_close(got.output[row], weights @ store.values[slots][best])
            if topk is not None:
                found = torch.tensor(slots)[best]
                assert got.indices[row].tolist() == found.tolist() + [-1] * (topk - len(found))


def test_recall_counts_the_best_slots_that_are_listed() -> None:
    store = MemoryStore(6, 1, 1)
    store.write(torch.tensor([[5.0], [4.0], [3.0], [2.0], [1.0]]), torch.zeros(5, 1))
    index = WordIndex(store)
    index.add(torch.arange(5), [[0], [1], [0], [1], [2]])
    query = torch.ones(2, 1)
    assert index.recall(query, 2, [[0], [1]]) == 0.5  # {0, 2} and {1, 3} of {0, 1}
    assert index.recall(query, 1, [[0], [1]]) == 0.5
    assert index.recall(query, 4, [[0], [0, 1]]) == 0.75
    assert index.recall(query, 6, [[77], [77]]) == 1.0  # all five
    assert index.recall(-query, 1, [[2], [0]]) == 0.5
    assert index.recall(query, 1, [[0], [1]], score="l2") == 0.0  # nearest to 1 is slot 4
    before = store.usage.clone()
    index.recall(query, 2, [[0], [1]])
    assert torch.equal(store.usage, before)


def test_an_index_kept_up_with_a_store_that_evicts() -> None:
    """What a user does: add what write returned. Evicted memories are no candidates of their old words."""
    store = MemoryStore(16, 4, 4, policy="lru")
    index, words = WordIndex(store), {}
    draw = random.Random(0)
    for _ in range(60):
        rows = [[draw.randint(0, 5), draw.randint(0, 5)] for _ in range(3)]
        slots = store.write(torch.randn(3, 4), torch.randn(3, 4))
        index.add(slots, rows)
        words.update(zip(slots.tolist(), map(set, rows)))
        query = draw.randint(0, 5)
        found = index.candidates([[query]])
        assert lists(found) == [sorted(s for s, own in words.items() if query in own) or sorted(words)]
        store.read(torch.randn(1, 4), 2, candidates=found)


def test_threads_share_an_index() -> None:
    store = filled(12)
    index, failures = WordIndex(store), []
    index.add(torch.arange(12), [[0, slot] for slot in range(12)])

    def change() -> None:
        for step in range(150):
            index.remove(torch.tensor([step % 12]))
            index.add(torch.tensor([step % 12]), [[0, step % 12]])

    def look() -> None:
        for _ in range(150):
            (found,) = lists(index.candidates([[0]]))
            if len(found) < 10 or sorted(set(found)) != found:
                failures.append(found)

    threads = [threading.Thread(target=f) for f in (change, change, look, look)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(index) == 12


# ------------------------------------------------------------------------------------------------------------- clusters


def blobs(count: int, centers: Tensor, spread: float = 0.05) -> tuple[Tensor, Tensor]:
    names = torch.arange(count) % centers.shape[0]
    return centers[names] + spread * torch.randn(count, centers.shape[1]), names


CENTERS = 10 * torch.eye(4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", ["dot", "l2", "cosine"])
def test_clusters_are_those_of_the_data(backend: str, score: str) -> None:
    store = MemoryStore(60, 4, 3)
    keys, names = blobs(40, CENTERS)
    store.write(keys, torch.randn(40, 3))
    index = ClusterIndex(store, 4, score=score, backend=backend)
    index.fit()
    assert len(index) == 40
    query = CENTERS.clone()
    expected = [(names == name).nonzero().flatten().tolist() for name in range(4)]
    assert lists(index.candidates(query)) == expected
    # Kept up: new keys join their cluster, removed and moved ones leave it.
    fresh, _ = blobs(4, CENTERS)
    index.add(store.write(fresh, torch.randn(4, 3)))
    store.update(torch.tensor([0]), keys=CENTERS[1:2])
    index.add(torch.tensor([0]))
    index.remove(torch.tensor([5]))
    expected = [[*own, 40 + name] for name, own in enumerate(expected)]
    expected[0].remove(0)
    expected[1].remove(5)
    expected[1].insert(0, 0)
    assert lists(index.candidates(query)) == expected
    both = ClusterIndex(store, 4, probes=2, score=score, backend=backend)
    both.fit()
    query = CENTERS[:1] + 0.5 * CENTERS[2:3]
    index.fit()
    (found,), (one,) = lists(both.candidates(query)), lists(index.candidates(query))
    (other,) = lists(index.candidates(CENTERS[2:3]))
    assert found == sorted(one + other)


def test_with_cosine_the_length_of_a_key_does_not_matter() -> None:
    """Directions make the clusters, although lengths from 0.01 to 100 lie much further apart."""
    store = MemoryStore(60, 4, 3)
    keys, names = blobs(40, CENTERS)
    store.write(keys * torch.logspace(-3, 1, 40)[torch.randperm(40)].unsqueeze(-1), torch.randn(40, 3))
    index = ClusterIndex(store, 4, score="cosine", backend="sklearn")
    index.fit()
    assert lists(index.candidates(CENTERS)) == [(names == name).nonzero().flatten().tolist() for name in range(4)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_kmeans_is_repeatable_and_finds_the_centres(backend: str) -> None:
    vectors, _ = blobs(80, CENTERS)
    first, second = (kmeans(vectors, 4, backend=backend, seed=3) for _ in range(2))
    assert torch.equal(first, second) and first.dtype is torch.float32
    torch.testing.assert_close(first[first.argmax(-1).argsort()], CENTERS, atol=0.1, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8], ids=str)
def test_recall_grows_with_probes(dtype: torch.dtype) -> None:
    store = filled(300, 400, 8, dtype=dtype)
    query = torch.randn(20, 8, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    recalls = []
    for probes in (1, 3, 12):
        index = ClusterIndex(store, 12, probes, backend="sklearn")
        index.fit()
        recalls.append(index.recall(query, 10))
        offsets, slots = index.candidates(query)
        full = store.read(query, 10, count=False, return_aux=True).indices
        own = [set(slots[i:j].tolist()) for i, j in zip(offsets[:-1].tolist(), offsets[1:].tolist())]
        expected = sum(len(own[row] & set(best.tolist())) for row, best in enumerate(full)) / 200
        assert recalls[-1] == pytest.approx(expected)
    assert 0 < recalls[0] < recalls[1] < recalls[2] == 1.0


# One key for each cluster, of which each score calls another one the best for the query (1, 0.9).
APART = torch.tensor([[10.0, 0.0], [3.0, 2.7], [0.5, 0.1]])
BEST = {"dot": 0, "cosine": 1, "l2": 2}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", BEST)
def test_queries_go_by_the_score_and_keys_by_distance(backend: str, score: str) -> None:
    store = MemoryStore(8, 2, 3)
    store.write(APART, torch.randn(3, 3))
    index, query = ClusterIndex(store, 3, score=score, backend=backend), torch.tensor([[1.0, 0.9]])
    index.fit()
    assert lists(index.candidates(query)) == [[BEST[score]]]
    assert index.recall(query, 1) == 1.0, "recall goes by the score as well"
    two = ClusterIndex(store, 3, probes=2, score=score, backend=backend)
    two.fit()
    order = {"dot": [0, 1], "cosine": [1, 2], "l2": [1, 2]}[score]
    assert lists(two.candidates(query)) == [order]
    # A key near the third; its product with the first is larger.
    index.add(store.write(torch.tensor([[0.6, 0.13]]), torch.randn(1, 3)))
    for (found,), own in zip([lists(index.candidates(key)) for key in _asks(score)], [[0], [1], [2, 3]]):
        assert found == own


def _asks(score: str) -> list[Tensor]:
    """Queries to which the centroids of the three keys are nearest, one after the other."""
    if score == "dot":
        return [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[-1.0, -1.0]])]
    return [APART[i : i + 1] for i in range(3)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_the_seed_is_that_of_the_kmeans(backend: str, score: str) -> None:
    """Keys without clusters, so that seeds find different ones."""
    store = filled(200, 200, 6)
    keys = torch.nn.functional.normalize(store.keys, dim=-1) if score == "cosine" else store.keys
    found = {}
    for seed in (0, 1, 2):
        index = ClusterIndex(store, 9, score=score, backend=backend, seed=seed)
        index.fit()
        found[seed] = index.centroids
        assert torch.equal(index.centroids, kmeans(keys, 9, backend=backend, seed=seed))
    default = ClusterIndex(store, 9, score=score, backend=backend)
    default.fit()
    assert torch.equal(default.centroids, found[0])
    if backend == "sklearn":
        assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    else:
        assert any(not torch.equal(found[0], found[seed]) for seed in (1, 2))


def test_empty_clusters_fall_back_to_all() -> None:
    store = MemoryStore(60, 4, 3)
    store.write(blobs(40, CENTERS)[0], torch.randn(40, 3))
    index = ClusterIndex(store, 4, backend="sklearn")
    index.fit()
    (own,) = lists(index.candidates(CENTERS[2:3]))
    index.remove(torch.tensor(own))
    assert lists(index.candidates(CENTERS[2:3])) == [sorted(set(range(40)) - set(own))]


def test_word_clusters_are_the_papers_second_hashing() -> None:
    """One bucket for each cluster of word embeddings: a query finds memories that hold a like word."""
    embeddings, names = blobs(8, CENTERS)
    index = WordIndex(filled(4, 8))
    index.add(torch.arange(4), [[int(names[word])] for word in (0, 1, 4, 6)])
    assert lists(index.candidates([[int(names[4])], [int(names[5])]])) == [[0, 2], [1]]
    centroids = kmeans(embeddings, 4, backend="sklearn")
    nearest = torch.cdist(embeddings, centroids).argmin(-1)
    assert torch.equal(nearest[:4], nearest[4:])


def test_without_a_kmeans_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".")[0] in ("faiss", "sklearn"):
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    store = filled()
    with pytest.raises(ImportError, match=r"pip install 'attnfast\[memory\]'"):
        ClusterIndex(store, 2).fit()
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        ClusterIndex(store, 2, backend="faiss").fit()


# ---------------------------------------------------------------------------------------------------------- wrong calls


def words() -> WordIndex:
    index = WordIndex(filled())
    index.add(torch.arange(10), [[slot] for slot in range(10)])
    return index


def clusters() -> ClusterIndex:
    index = ClusterIndex(filled(), 2, backend="sklearn")
    index.fit()
    return index


S = torch.tensor([1, 2])
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "store": (lambda: WordIndex(5), TypeError, "store: expected a MemoryStore, got int"),
    "slots-range": (lambda: words().add(S + 10, [[1], [2]]), ValueError, "slots: expected 0 <= slot < .*= 12, got 12"),
    "slots-twice": (lambda: words().add(S * 0, [[1], [2]]), ValueError, "slots: expected each slot once"),
    "slots-list": (lambda: words().add([1], [[1]]), TypeError, r"slots: expected a torch\.Tensor"),
    "remove-range": (lambda: words().remove(S - 2), ValueError, "slots: expected 0 <= slot < .*got -1"),
    "remove-float": (lambda: words().remove(S * 1.0), TypeError, "slots: expected an integer tensor"),
    "words-number": (lambda: words().add(S, [[1]]), ValueError, "words: expected one list for each of 2 slots, got 1"),
    "words-text": (lambda: words().candidates("ab"), TypeError, "words: expected a list of lists .*got str"),
    "words-texts": (lambda: words().candidates(["ab"]), TypeError, "words: expected a list of integers .*got str"),
    "words-flat": (lambda: words().candidates([1, 2]), TypeError, "words: expected a list of integers .*got int"),
    "words-float": (lambda: words().candidates([[1.0]]), TypeError, "words: expected integers, got 1.0"),
    "words-bool": (lambda: words().candidates([[True]]), TypeError, "words: expected integers, got True"),
    "words-tensor": (lambda: words().candidates(S), TypeError, "words: expected a list of lists .*got Tensor"),
    "words-offsets": (lambda: words().candidates((S, S)), ValueError, "words' offsets: expected to rise from 0"),
    "words-falling": (
        lambda: words().candidates((torch.tensor([0, 2, 1, 2]), S)),
        ValueError,
        "words' offsets: expected to rise",
    ),
    "words-2d": (lambda: words().candidates((S.view(1, 2), S)), ValueError, "words' offsets: expected one dimension"),
    "recall-number": (
        lambda: words().recall(torch.zeros(3, 4), 1, [[1]]),
        ValueError,
        "words: expected one list for each of 3 queries, got 1",
    ),
    "recall-k": (lambda: words().recall(torch.zeros(1, 4), 13, [[1]]), ValueError, "topk: expected at most N = 12"),
    "recall-size": (lambda: words().recall(torch.zeros(1, 5), 1, [[1]]), ValueError, "query: expected"),
    "clusters-zero": (lambda: ClusterIndex(filled(), 0), ValueError, "clusters: expected an integer >= 1, got 0"),
    "probes": (lambda: ClusterIndex(filled(), 2, 3), ValueError, "probes: expected at most clusters = 2, got 3"),
    "backend": (lambda: ClusterIndex(filled(), 2, backend="x"), ValueError, "backend: expected one of 'faiss'"),
    "score": (lambda: ClusterIndex(filled(), 2, score="x"), ValueError, "score: expected one of 'dot'"),
    "fit-few": (lambda: ClusterIndex(filled(), 11).fit(), ValueError, "clusters: expected at most the 10 slots"),
    "not-fitted": (lambda: ClusterIndex(filled(), 2).add(S), ValueError, "no clusters yet: call fit"),
    "not-fitted-query": (
        lambda: ClusterIndex(filled(), 2).candidates(torch.zeros(1, 4)),
        ValueError,
        "no clusters yet: call fit",
    ),
    "add-free": (lambda: clusters().add(torch.tensor([11])), ValueError, "slots: slot 11 is free"),
    "query-size": (lambda: clusters().candidates(torch.zeros(1, 5)), ValueError, "query: expected"),
    "kmeans-few": (
        lambda: kmeans(torch.zeros(3, 2), 4),
        ValueError,
        r"vectors: expected \[n, D\] of n >= clusters = 4",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    call, kind, pattern = WRONG[name]
    with pytest.raises(kind, match=pattern):
        call()
