"""Which slots are worth scoring for a query: buckets by word, or by cluster of the keys.

An index gives lists of candidates, and a read scores those alone (Weston, Chopra and Bordes, "Memory Networks", ICLR
2015, section 3.3): exact for the slots listed, blind to the rest, which `recall` measures. An index knows what it was
told by `add` and `remove`: tell it of every write. A slot that is deleted from the store without `remove` costs time
only, because reads leave out slots that are free. Indexes and their lists live on the host, wherever the store is, and
are safe to use from several threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from attnfast import _validate as check
from attnfast._memory_hops import Plan, Tables, select
from attnfast._memory_read import SCORES, check_query, whole
from attnfast.memory.clusters import kmeans
from attnfast.memory.policies import SlotLog
from attnfast.memory.store import MemoryStore
from attnfast.reference import MemoryReadOutput

Words = Sequence[Iterable[int]] | tuple[Tensor, Tensor]


class _Buckets:
    """Slots by bucket number.

    A pair (slot, stamp) in a bucket holds while the slot has that stamp, so a new stamp takes a slot out of all its
    buckets; the pairs left behind are dropped when a bucket is packed.
    """

    def __init__(self, capacity: int) -> None:
        self.stamps = torch.zeros(capacity, dtype=torch.int64)  # 0: in no bucket
        self._clock = 0
        self._logs: dict[int, SlotLog] = {}

    def _holds(self, slots: Tensor, stamps: Tensor) -> Tensor:
        return self.stamps[slots] == stamps

    def add(self, slots: Tensor, offsets: Tensor, numbers: Tensor) -> None:
        """Put slot i into the buckets ``numbers[offsets[i]:offsets[i + 1]]`` and no others."""
        self._clock += 1
        self.stamps[slots] = self._clock
        pairs = torch.stack([numbers, torch.repeat_interleave(slots, offsets.diff())], -1).unique(dim=0)
        names, counts = pairs[:, 0].unique_consecutive(return_counts=True)
        for name, group in zip(names.tolist(), pairs[:, 1].split(counts.tolist())):
            log = self._logs.get(name)
            if log is None:
                log = self._logs[name] = SlotLog()
            log.append(group, torch.full_like(group, self._clock), self._holds)

    def remove(self, slots: Tensor) -> None:
        self.stamps[slots] = 0

    def union(self, offsets: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Lists of the slots in any of each query's buckets, ascending; all slots where there is none."""
        lists: list[Tensor] = []
        everything: Tensor | None = None
        bounds, names = offsets.tolist(), numbers.tolist()
        for begin, end in pairwise(bounds):
            found = [log.held(self._holds) for name in set(names[begin:end]) if (log := self._logs.get(name))]
            slots = torch.cat(found).unique() if found else self.stamps.new_empty(0)
            if not slots.shape[0]:
                if everything is None:
                    everything = self.stamps.nonzero().flatten()
                slots = everything
            lists.append(slots)
        counts = torch.tensor([0, *(slots.shape[0] for slots in lists)])
        return counts.cumsum(0), torch.cat(lists) if lists else self.stamps.new_empty(0)


class _Index:
    """What both indexes share."""

    def __init__(self, store: MemoryStore) -> None:
        if not isinstance(store, MemoryStore):
            raise TypeError(f"store: expected a MemoryStore, got {type(store).__name__}")
        self.store = store
        self._buckets = _Buckets(store.capacity)
        self._lock = Lock()

    def __len__(self) -> int:
        """Number of slots in the index."""
        with self._lock:
            return int((self._buckets.stamps > 0).sum())

    def remove(self, slots: Tensor) -> None:
        """Take slots out of all buckets; those that are in none stay so.

        Raises
        ------
        ValueError, TypeError
            `slots` that are not integers in [0, capacity).
        """
        at = self._checked_slots(slots)
        with self._lock:
            self._buckets.remove(at)

    def _checked_slots(self, slots: Any, once: bool = False) -> Tensor:
        check.integers("slots", slots)
        at = slots.reshape(-1).long().cpu()
        outside = at[(at < 0) | (at >= self.store.capacity)]
        if outside.shape[0]:
            raise ValueError(f"slots: expected 0 <= slot < capacity = {self.store.capacity}, got {int(outside[0])}")
        if once and at.unique().shape[0] != at.shape[0]:
            raise ValueError("slots: expected each slot once")
        return at

    def _recall(self, query: Tensor, k: int, lists: tuple[Tensor, Tensor], score: str) -> float:
        full = self.store.read(query, k, score=score, count=False, return_aux=True)
        assert isinstance(full, MemoryReadOutput) and full.indices is not None
        best = full.indices.reshape(-1, k).cpu()
        offsets, slots = lists
        row = torch.repeat_interleave(torch.arange(best.shape[0]), offsets.diff())
        listed = row * self.store.capacity + slots
        wanted = torch.arange(best.shape[0]).unsqueeze(-1) * self.store.capacity + best
        wanted = wanted[best >= 0]
        return float(torch.isin(wanted, listed).double().mean()) if wanted.shape[0] else 1.0


class WordIndex(_Index):
    """One bucket for each word: the candidates of a query are the memories that share a word with it.

    Words are integers of any range. With the cluster of each word in the place of the word it is the paper's second
    way: one bucket for each cluster of word embeddings.

    Parameters
    ----------
    store : MemoryStore
        The memory that is indexed.

    References
    ----------
    Weston, Chopra and Bordes, "Memory Networks", ICLR 2015, section 3.3.

    Examples
    --------
    >>> import torch
    >>> from attnfast.memory import MemoryStore, WordIndex
    >>> store = MemoryStore(100, 8, 8)
    >>> index = WordIndex(store)
    >>> index.add(store.write(torch.randn(3, 8), torch.randn(3, 8)), [[4, 7], [7], [9, 9]])
    >>> index.candidates([[7], [9, 4], [1000]])
    (tensor([0, 2, 4, 7]), tensor([0, 1, 0, 2, 0, 1, 2]))
    """

    def add(self, slots: Tensor, words: Words) -> None:
        """Put slots into the buckets of their words; what was known of these slots is forgotten.

        Parameters
        ----------
        slots : Tensor
            Integer ``[...]``, each once: what ``store.write`` returned.
        words : sequence of iterables of int, or (offsets, ids)
            One list for each slot, repeats allowed; or integer tensors ``[n + 1]`` and ``[nnz]`` that say the same.

        Raises
        ------
        ValueError, TypeError
            Slots out of range or named twice, another number of lists than of slots, words that are not integers.
        """
        at = self._checked_slots(slots, once=True)
        offsets, ids = _lists("words", words)
        if offsets.shape[0] != at.shape[0] + 1:
            raise ValueError(f"words: expected one list for each of {at.shape[0]} slots, got {offsets.shape[0] - 1}")
        with self._lock:
            self._buckets.add(at, offsets, ids)

    def candidates(self, words: Words) -> tuple[Tensor, Tensor]:
        """Slots that share a word with each query.

        Parameters
        ----------
        words : sequence of iterables of int, or (offsets, ids)
            One list for each of Q queries.

        Returns
        -------
        tuple
            offsets ``[Q + 1]`` and slots ``[nnz]``, int64: list i is ``slots[offsets[i]:offsets[i + 1]]``, ascending
            without duplicates. A query that shares no word with anything gets all slots of the index.
        """
        offsets, ids = _lists("words", words)
        with self._lock:
            return self._buckets.union(offsets, ids)

    def recall(self, query: Tensor, k: int, words: Words, *, score: str = "dot") -> float:
        """Which part of the `k` best slots of the whole memory is among the candidates, over all queries.

        Parameters
        ----------
        query : Tensor
            ``[..., D]``, Q queries.
        k : int
            1 <= k <= capacity.
        words : sequence of iterables of int, or (offsets, ids)
            Their words, as for :meth:`candidates`.
        score : {"dot", "cosine", "l2"}
            What "best" means.
        """
        check_query(query, self.store.key_size)
        lists = self.candidates(words)
        queries = query.shape[:-1].numel()
        if lists[0].shape[0] != queries + 1:
            raise ValueError(f"words: expected one list for each of {queries} queries, got {lists[0].shape[0] - 1}")
        return self._recall(query, k, lists, score)


class ClusterIndex(_Index):
    """One bucket for each cluster of keys: the candidates of a query are the memories in the clusters nearest to it.

    Clusters come from k-means by faiss or scikit-learn (``pip install 'attnfast[memory]'`` brings the latter). Keys
    written after :meth:`fit` go to the nearest centroid; fit again when the keys have moved away.

    Parameters
    ----------
    store : MemoryStore
        The memory that is indexed.
    clusters : int
        Number of buckets.
    probes : int
        How many buckets a query looks into, at most `clusters`.
    score : {"dot", "cosine", "l2"}
        Which centroids are near a query: those of the best scores. Keys always go to the centroid at the least
        distance (with ``cosine``, keys and centroids of unit length).
    backend : {"faiss", "sklearn"}, optional
        Default: faiss where it is installed, else scikit-learn.
    seed : int
        Of the k-means.

    References
    ----------
    Weston, Chopra and Bordes, "Memory Networks", ICLR 2015, section 3.3; Jégou, Douze and Schmid, "Product Quantization
    for Nearest Neighbor Search", TPAMI 2011, section IV (inverted lists of a coarse quantiser).

    Examples
    --------
    >>> import torch
    >>> from attnfast.memory import ClusterIndex, MemoryStore
    >>> store = MemoryStore(1000, 8, 8)
    >>> slots = store.write(torch.randn(500, 8), torch.randn(500, 8))
    >>> index = ClusterIndex(store, clusters=16, probes=4)
    >>> index.fit()
    >>> query = torch.randn(3, 8)
    >>> store.read(query, topk=5, candidates=index.candidates(query)).shape
    torch.Size([3, 8])
    """

    def __init__(
        self,
        store: MemoryStore,
        clusters: int,
        probes: int = 1,
        *,
        score: str = "dot",
        backend: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(store)
        self.clusters, self.probes = whole("clusters", clusters), whole("probes", probes)
        if probes > clusters:
            raise ValueError(f"probes: expected at most clusters = {clusters}, got {probes}")
        self.score = check.choice("score", score, SCORES)
        self.backend = None if backend is None else check.choice("backend", backend, ("faiss", "sklearn"))
        self.seed = whole("seed", seed, 0)
        self.centroids: Tensor | None = None

    def fit(self) -> None:
        """Cluster the keys that are written now, and put them, and nothing else, into the index.

        Raises
        ------
        ValueError
            Fewer slots written than `clusters`.
        ImportError
            Neither faiss nor scikit-learn is installed (or not the one asked for).
        """
        slots = self.store.valid.nonzero().flatten()
        if slots.shape[0] < self.clusters:
            raise ValueError(f"clusters: expected at most the {slots.shape[0]} slots written, got {self.clusters}")
        keys = self._keys(slots)
        centroids = kmeans(keys, self.clusters, backend=self.backend, seed=self.seed)
        buckets = _Buckets(self.store.capacity)
        buckets.add(slots.cpu(), torch.arange(slots.shape[0] + 1), _nearest(keys, centroids))
        with self._lock:
            self.centroids, self._buckets = centroids, buckets

    def add(self, slots: Tensor) -> None:
        """Put slots into the buckets of the keys that the store has there now.

        Parameters
        ----------
        slots : Tensor
            Integer ``[...]``, each once: what ``store.write`` returned, or was updated.

        Raises
        ------
        ValueError, TypeError
            Slots out of range, free, or named twice; an index that was never fitted.
        """
        at = self._checked_slots(slots, once=True)
        centroids = self._fitted()
        numbers = _nearest(self._keys(at), centroids)
        with self._lock:
            self._buckets.add(at, torch.arange(at.shape[0] + 1), numbers)

    def candidates(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Slots in the `probes` clusters nearest to each query.

        Parameters
        ----------
        query : Tensor
            ``[..., D]``, Q queries.

        Returns
        -------
        tuple
            offsets ``[Q + 1]`` and slots ``[nnz]``, int64: list i is ``slots[offsets[i]:offsets[i + 1]]``, ascending
            without duplicates. A query whose clusters are empty gets all slots of the index.
        """
        check_query(query, self.store.key_size)
        centroids = self._fitted()
        flat = query.detach().reshape(-1, query.shape[-1]).float().cpu()
        found = _best(flat, centroids, self.score, self.probes)
        with self._lock:
            return self._buckets.union(torch.arange(flat.shape[0] + 1) * self.probes, found.flatten())

    def recall(self, query: Tensor, k: int) -> float:
        """Which part of the `k` best slots of the whole memory is among the candidates of queries ``[..., D]``."""
        return self._recall(query, k, self.candidates(query), self.score)

    def _fitted(self) -> Tensor:
        if self.centroids is None:
            raise ValueError("this ClusterIndex has no clusters yet: call fit() when the store has keys")
        return self.centroids

    def _keys(self, slots: Tensor) -> Tensor:
        keys = self.store.rows(slots)[0].float().cpu()
        return torch.nn.functional.normalize(keys, dim=-1) if self.score == "cosine" else keys


def _best(query: Tensor, centroids: Tensor, score: str, count: int) -> Tensor:
    plan = Plan(count, score, None, None, 1.0, "softmax", 1, "add", 0.0, False)
    with torch.no_grad():
        return select(query, Tables(centroids, centroids), plan, None, count)


def _nearest(keys: Tensor, centroids: Tensor) -> Tensor:
    return _best(keys, centroids, "l2", 1).flatten()


def _lists(name: str, words: Any) -> tuple[Tensor, Tensor]:
    """offsets ``[n + 1]`` and ids ``[nnz]`` of either form."""
    if isinstance(words, tuple) and len(words) == 2 and all(isinstance(x, Tensor) for x in words):
        offsets, ids = words
        for part, x in (("offsets", offsets), ("ids", ids)):
            check.integers(f"{name}' {part}", x)
            if x.dim() != 1:
                raise ValueError(f"{name}' {part}: expected one dimension, got {check.shape_text(x.shape)}")
        rising = offsets.shape[0] > 0 and int(offsets[0]) == 0 and bool((offsets.diff() >= 0).all())
        if not rising or int(offsets[-1]) != ids.shape[0]:
            raise ValueError(f"{name}' offsets: expected to rise from 0 to nnz = {ids.shape[0]}")
        return offsets.long().cpu(), ids.long().cpu()
    if isinstance(words, Tensor | str) or not isinstance(words, Sequence):
        raise TypeError(f"{name}: expected a list of lists of integers or (offsets, ids), got {type(words).__name__}")
    rows: list[list[int]] = []
    for row in words:
        if isinstance(row, str) or not isinstance(row, Iterable):
            raise TypeError(f"{name}: expected a list of integers for each, got {type(row).__name__}")
        rows.append(list(row))
    flat = [word for row in rows for word in row]
    for word in flat:
        if isinstance(word, bool) or not isinstance(word, int):
            raise TypeError(f"{name}: expected integers, got {word!r}")
    counts = torch.tensor([0, *map(len, rows)])
    return counts.cumsum(0), torch.tensor(flat, dtype=torch.int64)
