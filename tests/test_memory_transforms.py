"""torch.vmap of the memory functions: each sample's result is that of its own call, or there is one clear error.

`topk_scores`, `weighted_gather` and `product_key_read` have more in their own files (operators, tables of their own,
int8); here is what `memory_read` makes of them, and what all share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import attnfast
from attnfast import memory_read

F64 = torch.float64
X, Q, N, D = 3, 5, 9, 4
LISTS = (torch.tensor([0, 2, 3, 3, 7, 9]), torch.tensor([0, 3, 5, 1, 2, 4, 6, 0, 8]))


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def mask(*shape: int) -> Tensor:
    found = torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.3
    found[..., 0, :] = False  # one query, or sample, that sees nothing
    return found


SCORES: dict[str, Any] = {
    "dot": "dot",
    "cosine": "cosine",
    "l2": "l2",
    "additive": ("additive", rand(D), rand(D, seed=2)),
}
READS: dict[str, dict[str, Any]] = {
    "all": {},
    "all, mask": {"mask": mask(Q, N)},
    "all, entmax15": {"normalizer": "entmax15"},
    "hops": {"hops": 2},
    "topk": {"topk": 3},
    "topk, mask": {"topk": 3, "mask": mask(Q, N)},
    "topk, hops": {"topk": 2, "hops": 2, "hop": "replace"},
    "lists": {"candidates": LISTS},
    "lists, mask": {"candidates": LISTS, "mask": mask(Q, N)},
    "lists, topk": {"candidates": LISTS, "topk": 2},
}
# Which of query, keys, values the samples have for themselves.
MAPPED = {"query": (0, None, None), "tables": (None, 0, 0), "values": (None, None, 1), "everything": (1, 0, 0)}


def operands(mapped: tuple[int | None, ...]) -> list[Tensor]:
    made = []
    for seed, (shape, dim) in enumerate(zip([(Q, D), (N, D), (N, D)], mapped, strict=True)):
        sizes = list(shape)
        if dim is not None:
            sizes.insert(dim, X)
        made.append(rand(*sizes, seed=seed + 3))
    return made


def assert_one_by_one(function: Callable[..., Any], mapped: tuple[int | None, ...], tensors: list[Tensor]) -> None:
    results = vmap(function, mapped)(*tensors)
    for x in range(X):
        own = [t if dim is None else t.select(dim, x) for t, dim in zip(tensors, mapped, strict=True)]
        for got, want in zip(results, function(*own), strict=True):
            torch.testing.assert_close(got[x], want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("score", SCORES)
def test_memory_read(score: str, name: str, mapped: str) -> None:
    """The read with everything it can return, and its gradients."""
    options, tensors = {**READS[name], "score": SCORES[score]}, operands(MAPPED[mapped])

    def read(*x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part for part in memory_read(*x, return_aux=True, **options) if part is not None)  # type: ignore[union-attr]

    def gradients(*x: Tensor) -> Any:
        return grad(lambda *y: memory_read(*y, **options).sin().sum(), (0, 1, 2))(*x)

    assert_one_by_one(read, MAPPED[mapped], tensors)
    assert_one_by_one(gradients, MAPPED[mapped], tensors)


@pytest.mark.parametrize("shape", [(X, N), (X, Q, N), (X, 1, N)], ids=str)
@pytest.mark.parametrize("topk", [None, 3])
@pytest.mark.parametrize("score", ["dot", "l2"])
def test_masks_of_their_own(score: str, topk: int | None, shape: tuple[int, ...]) -> None:
    seen = mask(*shape)
    query, keys, values = operands((0, None, None))

    def read(query: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
        return (memory_read(query, keys, values, mask=seen, topk=topk, score=score),)

    assert_one_by_one(read, (0, 0), [query, seen])
    assert_one_by_one(read, (None, 0), [query[0], seen])
    if topk is not None:
        best = lambda query, seen: attnfast.topk_scores(query, keys, topk, mask=seen)  # noqa: E731
        assert_one_by_one(best, (0, 0), [query, seen])


@pytest.mark.parametrize("topk", [None, 3])
def test_additive_vectors_of_their_own(topk: int | None) -> None:
    query, keys, values = operands((None, None, None))

    def read(weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (memory_read(query, keys, values, topk=topk, score=("additive", weight, bias)),)

    assert_one_by_one(read, (0, None), [rand(X, D), rand(D)])
    assert_one_by_one(lambda *x: grad(lambda *y: read(*y)[0].sin().sum(), (0, 1))(*x), (0, 0), [rand(X, D), rand(X, D)])


@pytest.mark.parametrize("options", [{}, {"topk": 2}, {"topk": 2, "score": "cosine"}], ids=str)
def test_vmap_of_vmap_and_of_nothing(options: dict[str, Any]) -> None:
    query, keys, values = rand(2, X, Q, D), rand(N, D), rand(2, N, D)
    got = vmap(vmap(lambda q, v: memory_read(q, keys, v, **options), (0, None)))(query, values)
    for i in range(2):
        for x in range(X):
            torch.testing.assert_close(got[i, x], memory_read(query[i, x], keys, values[i], **options))
    assert vmap(lambda q: memory_read(q, keys, values[0], **options))(rand(0, Q, D)).shape == (0, Q, D)


def test_all_hops_are_counted() -> None:
    """`usage` adds up over hops, for each sample by itself; a pick of nothing counts nowhere."""
    query, keys, values = operands((0, None, None))
    seen = mask(X, Q, N)

    def usage(query: Tensor, seen: Tensor) -> Tensor:
        found: Tensor = memory_read(query, keys, values, topk=4, hops=3, mask=seen, return_aux=True).usage  # type: ignore[union-attr]
        return found

    got = vmap(usage)(query, seen)
    assert got.dtype is torch.int64
    for x in range(X):
        assert torch.equal(got[x], usage(query[x], seen[x]))
        assert got[x].sum() == 3 * seen[x].sum(-1).clamp(max=4).sum()


# --- what cannot be mapped -------------------------------------------------------------------------------------------

QUERY, KEYS, VALUES = rand(X, Q, D), rand(N, D), rand(N, D)
MANY = tuple(part.expand(X, -1) for part in LISTS)
WRONG: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "eps": (
        lambda q: memory_read(q, KEYS, VALUES, hops=5, hop="replace", eps=1e-3),
        (QUERY,),
        r"eps: under torch\.vmap no sample can stop before the others; use eps=0, or one call with the samples",
    ),
    "eps in a gradient": (
        grad(lambda q: memory_read(q, KEYS, VALUES, hops=5, hop="replace", eps=1e-3).sum()),
        (QUERY,),
        r"eps: under torch\.vmap",
    ),
    "lists": (
        lambda q, offsets, slots: memory_read(q, KEYS, VALUES, candidates=(offsets, slots)),
        (QUERY, *MANY),
        r"candidates: under torch\.vmap all samples share the lists and their mask; for lists of their own make",
    ),
    "slots": (
        lambda q, slots: memory_read(q, KEYS, VALUES, candidates=(LISTS[0], slots), topk=2),
        (QUERY, MANY[1]),
        "candidates: under",
    ),
    "mask of lists": (
        lambda q, seen: memory_read(q, KEYS, VALUES, candidates=LISTS, mask=seen),
        (QUERY, mask(X, Q, N)),
        "candidates: under",
    ),
    "sparse gradient": (
        grad(lambda v: memory_read(QUERY[0], KEYS, v, topk=2, sparse_grad=True).sum()),
        (VALUES.expand(X, -1, -1),),
        "sparse_grad=True works in eager mode only",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_clear_error(name: str) -> None:
    function, tensors, message = WRONG[name]
    with pytest.raises(NotImplementedError, match=message):
        vmap(function)(*tensors)


def test_what_is_not_mapped_may_be_looked_at() -> None:
    """Lists and a rest that all samples share, inside of a vmap over something else."""
    query, seen = QUERY[0], mask(Q, N)

    def read(x: Tensor) -> tuple[Tensor, ...]:
        rest = memory_read(query, KEYS, KEYS, hops=9, hop="replace", eps=1e-3)
        listed = memory_read(query, KEYS, VALUES, candidates=LISTS, mask=seen)
        return x * rest, x * listed

    assert_one_by_one(read, (0,), [rand(X, 1, 1)])


def test_gradients_may_stop_early() -> None:
    """Under torch.func.grad alone `eps` is no different from eager mode."""

    def loss(query: Tensor) -> Tensor:
        return memory_read(query, KEYS, KEYS, hops=9, hop="replace", eps=0.3, scale=4.0).sin().sum()

    leaf = QUERY[0].clone().requires_grad_()
    torch.testing.assert_close(grad(loss)(QUERY[0]), torch.autograd.grad(loss(leaf), leaf)[0])
