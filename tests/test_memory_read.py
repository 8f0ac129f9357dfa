"""memory_read against the formula written out slot by slot, in every mode; masks, ties, gradients, wrong calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import attnfast
from attnfast import MemoryReadOutput, memory_read

F64 = torch.float64
WEIGHT, BIAS = torch.linspace(-1, 1.5, 4, dtype=F64), torch.linspace(0.3, -0.2, 4, dtype=F64)
SCORES: dict[str, Any] = {
    "dot": "dot",
    "cosine": "cosine",
    "l2": "l2",
    "additive": ("additive", WEIGHT),
    "additive-bias": ("additive", WEIGHT, BIAS),
}
NORMALIZERS = ("softmax", "sparsemax", "entmax15", "sigmoid", "none", "hard")


def score_of(score: Any, q: Tensor, k: Tensor) -> Tensor:
    if isinstance(score, tuple):
        return score[1] @ torch.tanh(q + k + (score[2] if len(score) > 2 else 0.0))
    if score == "l2":
        return -(q - k) @ (q - k)
    return q @ k / (1.0 if score == "dot" else q.norm().clamp_min(1e-8) * k.norm().clamp_min(1e-8))


def normalized(name: str, scores: Tensor) -> Tensor:
    """Over the slots that are read; thresholds by bisection, which shares nothing with the sorts of the library."""
    if name == "softmax":
        return scores.softmax(0)
    if name == "sigmoid":
        return torch.sigmoid(scores)
    if name == "none":
        return scores
    if name == "hard":
        return torch.nn.functional.one_hot(scores.argmax(), scores.shape[0]).to(scores.dtype)
    power, x = (1, scores) if name == "sparsemax" else (2, scores / 2)
    low, high = x.max() - 1, x.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if ((x - middle).clamp_min(0) ** power).sum() > 1 else (low, middle)
    return (x - low).clamp_min(0) ** power


def oracle(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    topk: int | None = None,
    score: Any = "dot",
    scale: float = 1.0,
    normalizer: str = "softmax",
    mask: Tensor | None = None,
    candidates: tuple[Tensor, Tensor] | None = None,
    hops: int = 1,
    hop: str = "add",
) -> tuple[Tensor, list[list[int]], list[Tensor], Tensor]:
    """Output, picks, weights and usage, one query and one slot at a time."""
    flat = query.reshape(-1, query.shape[-1])
    seen = None if mask is None else mask.expand(*query.shape[:-1], keys.shape[0]).reshape(flat.shape[0], -1)
    outputs, picks, shares = [], [], []
    usage = torch.zeros(keys.shape[0], dtype=F64)
    for row, q in enumerate(flat):
        for number in range(hops):
            slots = list(range(keys.shape[0]))
            if candidates is not None:
                slots = candidates[1][candidates[0][row] : candidates[0][row + 1]].tolist()
            slots = [slot for slot in slots if seen is None or seen[row, slot]]
            if not slots:
                out, weights = torch.zeros(values.shape[1], dtype=F64), torch.zeros(0, dtype=F64)
            else:
                scores = torch.stack([scale * score_of(score, q, keys[slot]) for slot in slots])
                if topk is not None:
                    best = scores.sort(descending=True, stable=True).indices[:topk]
                    slots, scores = [slots[i] for i in best], scores[best]
                weights = normalized(normalizer, scores)
                out = weights @ values[slots]
            for slot, weight in zip(slots, weights.detach().tolist()):
                usage[slot] += 1 if topk is not None else weight
            if number + 1 < hops:
                q = q + out if hop == "add" else out
        outputs.append(out)
        picks.append(slots)
        shares.append(weights)
    return torch.stack(outputs).reshape(*query.shape[:-1], -1), picks, shares, usage


def problem(leading: Sequence[int] = (5,), slots: int = 9, size: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    made = ((*leading, 4), (slots, 4), (slots, size))
    query, keys, values = (torch.randn(*shape, dtype=F64, generator=draw) for shape in made)
    return query, keys, values


LISTS = torch.tensor([0, 3, 3, 7, 8, 10]), torch.tensor([0, 4, 8, 1, 2, 3, 5, 6, 0, 7])
MASK = torch.tensor([True, True, False, True, True, False, True, True, True])
ROWS = torch.tensor([[i != j and i != j + 4 for i in range(9)] for j in range(5)])


def options(**given: Any) -> dict[str, Any]:
    return {name: x for name, x in given.items() if x is not None}


def check(query: Tensor, keys: Tensor, values: Tensor, **given: Any) -> None:
    expected, picks, shares, usage = oracle(query, keys, values, **given)
    for read in (memory_read, attnfast.reference.memory_read):
        torch.testing.assert_close(read(query, keys, values, **given), expected)
        result = read(query, keys, values, return_aux=True, **given)
        compare(query, expected, picks, shares, usage, result, given)


def compare(
    query: Tensor,
    expected: Tensor,
    picks: list[list[int]],
    shares: list[Tensor],
    usage: Tensor,
    result: Any,
    given: dict[str, Any],
) -> None:
    assert isinstance(result, MemoryReadOutput)
    torch.testing.assert_close(result.output, expected)
    torch.testing.assert_close(result.usage.double(), usage, atol=1e-6, rtol=1e-6)
    assert result.weights is not None
    if given.get("topk") is not None:
        assert result.indices is not None and result.usage.dtype is torch.int64
        assert result.indices.shape == result.weights.shape == (*query.shape[:-1], given["topk"])
        indices, weights = result.indices.reshape(len(picks), -1), result.weights.reshape(len(picks), -1)
        for row, slots in enumerate(picks):
            assert indices[row].tolist() == slots + [-1] * (given["topk"] - len(slots))
            torch.testing.assert_close(weights[row, : len(slots)], shares[row])
            assert bool((weights[row, len(slots) :] == 0).all())
    elif given.get("candidates") is not None:
        assert result.indices is not None
        assert result.indices.tolist() == [slot for slots in picks for slot in slots]
        torch.testing.assert_close(result.weights, torch.cat(shares))
    else:
        assert result.indices is None
        for row, weights in enumerate(result.weights.reshape(len(picks), -1)):
            torch.testing.assert_close(weights[picks[row]], shares[row])
            assert float(weights.sum()) == pytest.approx(float(shares[row].sum()))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("topk", [None, 1, 4, 9])
@pytest.mark.parametrize("where", ["all", "mask", "row-mask", "lists", "lists-mask"])
def test_follows_the_formula(score: str, topk: int | None, where: str) -> None:
    given = options(
        mask={"mask": MASK, "row-mask": ROWS, "lists-mask": ROWS}.get(where),
        candidates=LISTS if "lists" in where else None,
        topk=topk,
    )
    check(*problem(size=3), score=SCORES[score], scale=0.7, **given)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("topk", [None, 4])
@pytest.mark.parametrize("where", ["all", "mask", "lists"])
def test_every_normaliser(normalizer: str, topk: int | None, where: str) -> None:
    given = options(mask=MASK if where == "mask" else None, candidates=LISTS if where == "lists" else None, topk=topk)
    check(*problem(), normalizer=normalizer, **given)


@pytest.mark.parametrize("hop", ["add", "replace"])
@pytest.mark.parametrize("topk", [None, 3])
@pytest.mark.parametrize("listed", [False, True])
def test_hops(hop: str, topk: int | None, listed: bool) -> None:
    given = options(topk=topk, candidates=LISTS if listed else None)
    for hops in (2, 4):
        check(*problem(), hops=hops, hop=hop, scale=0.5, **given)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 0), (3, 1, 2)])
@pytest.mark.parametrize("topk", [None, 2])
def test_leading_dimensions(leading: tuple[int, ...], topk: int | None) -> None:
    query, keys, values = problem(leading, size=6)
    if query.numel():
        check(query, keys, values, **options(topk=topk))
        check(query, keys, values, mask=MASK, **options(topk=topk))
    assert memory_read(query, keys, values, topk=topk).shape == (*leading, 6)


def test_one_row_of_a_mask_serves_all_and_one_query_has_its_own() -> None:
    query, keys, values = problem((2, 3))
    for mask in (MASK, MASK.view(1, 1, 9), ROWS[:3], ROWS[:2].view(2, 1, 9), torch.ones(1, dtype=torch.bool)):
        for topk in (None, 2):
            check(query, keys, values, mask=mask, **options(topk=topk))


@pytest.mark.parametrize("scale", [0.0, -1.5])
@pytest.mark.parametrize("score", SCORES)
def test_a_scale_of_zero_or_below(scale: float, score: str) -> None:
    query, keys, values = problem()
    query.requires_grad_(False)
    for given in (
        {},
        {"mask": ROWS},
        {"candidates": LISTS},
        {"mask": MASK, "topk": 3},
        {"candidates": LISTS, "topk": 3},
    ):
        check(query, keys, values, scale=scale, score=SCORES[score], **given)


def test_eps_stops_when_nothing_changes() -> None:
    """Well apart, large scale: one step of a Hopfield network retrieves the pattern, and the second confirms it."""
    keys = 3 * torch.eye(4, dtype=F64)
    query = keys[:2] + 0.1
    given: dict[str, Any] = {"scale": 4.0, "hop": "replace"}
    patient = memory_read(query, keys, keys, hops=50, return_aux=True, **given)
    stopped = memory_read(query, keys, keys, hops=50, eps=1e-6, return_aux=True, **given)
    torch.testing.assert_close(stopped.output, patient.output, atol=1e-6, rtol=0)
    assert float(patient.usage.sum()) == pytest.approx(2 * 50)
    assert 2 * 2 <= float(stopped.usage.sum()) <= 2 * 4 + 1e-3
    loose = memory_read(query, keys, keys, hops=50, eps=10.0, return_aux=True, **given)
    assert float(loose.usage.sum()) == pytest.approx(2)


@pytest.mark.parametrize("score", SCORES)
def test_ties_go_to_the_lowest_slot(score: str) -> None:
    """Also across the blocks in which slots are looked at."""
    query = torch.ones(2, 4, dtype=F64)
    keys = torch.ones(3000, 4, dtype=F64)
    keys[1500] = 2.0
    result = memory_read(query, keys, keys, topk=5, score=SCORES[score], return_aux=True)
    scores = torch.stack([score_of(SCORES[score], query[0], key) for key in keys[[0, 1500]]])
    first = [1500] if scores[1] > scores[0] + 1e-12 else []
    assert result.indices.tolist() == [(first + list(range(5)))[:5]] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnfast._memory_hops._BLOCK", 4 * 64)
        assert torch.equal(
            memory_read(query, keys, keys, topk=5, score=SCORES[score], return_aux=True).indices, result.indices
        )


@pytest.mark.parametrize("score", SCORES)
def test_blocks_of_slots_change_nothing(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys, values = problem((6,), slots=500)
    mask = torch.rand(500) > 0.4
    whole = memory_read(query, keys, values, topk=7, score=SCORES[score], mask=mask, return_aux=True)
    monkeypatch.setattr("attnfast._memory_hops._BLOCK", 64)
    parts = memory_read(query, keys, values, topk=7, score=SCORES[score], mask=mask, return_aux=True)
    assert torch.equal(whole.indices, parts.indices)
    torch.testing.assert_close(whole.output, parts.output)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("topk", [None, 3])
@pytest.mark.parametrize("listed", [False, True])
def test_nan_in_a_masked_slot_reaches_nothing(score: str, topk: int | None, listed: bool) -> None:
    query, keys, values = problem()
    clean = [x.clone().requires_grad_() for x in (query, keys, values)]
    keys[~MASK] = values[~MASK] = torch.nan
    spoilt = [x.clone().requires_grad_() for x in (query, keys, values)]
    given = options(topk=topk, candidates=LISTS if listed else None)
    for read in (memory_read, attnfast.reference.memory_read):
        outputs = [read(*x, score=SCORES[score], mask=MASK, **given) for x in (clean, spoilt)]
        torch.testing.assert_close(outputs[0], outputs[1])
        for a, b in zip(*(torch.autograd.grad(out.square().sum(), x) for out, x in zip(outputs, (clean, spoilt)))):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("topk", [None, 2])
def test_a_query_that_sees_nothing_gets_zero(topk: int | None) -> None:
    query, keys, values = (x.requires_grad_() for x in problem())
    mask = ROWS.clone()
    mask[1] = False
    out = memory_read(query, keys, values, topk=topk, mask=mask)
    assert torch.equal(out[1], torch.zeros(4, dtype=F64))
    (grad,) = torch.autograd.grad(out.sum(), query)
    assert torch.equal(grad[1], torch.zeros(4, dtype=F64)) and bool(grad.isfinite().all())


def test_an_empty_memory_reads_as_zero() -> None:
    query = torch.randn(3, 4)
    assert torch.equal(memory_read(query, torch.zeros(0, 4), torch.zeros(0, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "given", [{}, {"topk": 3}, {"hops": 2, "topk": 2}, {"candidates": LISTS}, {"hops": 2}], ids=str
)
def test_gradients(score: str, given: dict[str, Any]) -> None:
    inputs = [x.requires_grad_() for x in problem(slots=9)]
    vectors = SCORES[score]
    if isinstance(vectors, tuple):
        inputs += [x.clone().requires_grad_() for x in vectors[1:]]

    def read(query: Tensor, keys: Tensor, values: Tensor, *more: Tensor) -> Any:
        return memory_read(query, keys, values, score=("additive", *more) if more else vectors, scale=0.6, **given)

    assert torch.autograd.gradcheck(read, inputs)


@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "given", [{"topk": 2}, {"topk": 2, "candidates": LISTS}, {"candidates": LISTS}], ids=["topk", "both", "lists"]
)
def test_sparse_gradients_are_the_dense_ones(given: dict[str, Any], score: str, hops: int) -> None:
    query, keys, values = problem()
    found = []
    for sparse in (True, False):
        tables = keys.clone().requires_grad_(), values.clone().requires_grad_()
        out = memory_read(query, *tables, score=SCORES[score], hops=hops, sparse_grad=sparse, **given)
        grads = torch.autograd.grad(out.square().sum(), tables)
        assert all(grad.is_sparse is sparse for grad in grads)
        found.append([grad.to_dense() for grad in grads])
    for got, wanted in zip(*found, strict=True):
        assert wanted.any()
        assert torch.equal(got, wanted) if hops == 1 else torch.allclose(got, wanted, rtol=1e-12)


@pytest.mark.parametrize("optimizer", ["SparseAdam", "SGD"])
def test_optimizers_take_the_sparse_gradients(optimizer: str) -> None:
    query, keys, values = problem()
    tables = [torch.nn.Parameter(x.clone()) for x in (keys, values)]
    steps = getattr(torch.optim, optimizer)(tables, lr=0.1)
    read = memory_read(query, *tables, topk=1, sparse_grad=True, return_aux=True)
    read.output.square().sum().backward()
    steps.step()
    chosen = torch.zeros(keys.shape[0], dtype=torch.bool)
    chosen[read.indices.flatten()] = True
    # One slot has weight 1 whatever its key is: the gradient of keys is there, and 0.
    assert torch.equal(tables[0], keys) and tables[0].grad.is_sparse
    assert torch.equal((tables[1] != values).any(1), chosen) and not chosen.all()


@pytest.mark.parametrize("given", [{"topk": 3}, {"topk": 2, "hops": 2}], ids=str)
def test_second_derivatives_of_a_read_that_picks(given: dict[str, Any]) -> None:
    inputs = [x.requires_grad_() for x in problem((2,), slots=5)]
    assert torch.autograd.gradgradcheck(lambda *x: memory_read(*x, **given), inputs)


def test_second_derivatives_of_a_read_over_all_slots() -> None:
    inputs = [x.requires_grad_() for x in problem((2,), slots=5)]
    assert torch.autograd.gradgradcheck(memory_read, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [{}, {"topk": 4}, {"topk": 4, "score": "l2"}, {"candidates": LISTS}], ids=str)
def test_dtypes(dtype: torch.dtype, given: dict[str, Any]) -> None:
    rounded = [x.to(dtype) for x in problem()]
    got = memory_read(*rounded, **given)
    expected = memory_read(*(x.double() for x in rounded), **given)
    assert got.dtype is dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("given", [{}, {"topk": 4}, {"topk": 4, "score": "cosine"}, {"topk": 3, "hops": 2}], ids=str)
def test_compiles_in_one_graph(given: dict[str, Any]) -> None:
    inputs = [x.float().requires_grad_() for x in problem()]
    compiled = torch.compile(lambda *x: memory_read(*x, mask=MASK, **given), backend="aot_eager", fullgraph=True)
    outputs = [read(*inputs) for read in (compiled, lambda *x: memory_read(*x, mask=MASK, **given))]
    torch.testing.assert_close(*outputs)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in outputs)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("given", [{}, {"topk": 40}, {"topk": 40, "score": "l2"}, {"listed": 1}], ids=str)
def test_results_do_not_depend_on_threads(given: dict[str, Any]) -> None:
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        inputs = [x.float().requires_grad_() for x in problem((300,), slots=700)]
        if "listed" in given:
            lists = torch.arange(301) * 50, (torch.arange(300).unsqueeze(1) + torch.arange(50)).flatten()
            output = memory_read(*inputs, candidates=lists)
        else:
            output = memory_read(*inputs, **given)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_reads_over_all_slots_never_hold_queries_by_slots() -> None:
    """The largest tensor that the call makes, as the dispatcher sees it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, Tensor):
                    self.size = max(self.size, x.numel())
            return out

    query, keys, values = torch.randn(512, 8), torch.randn(4096, 8), torch.randn(4096, 8)
    with Largest() as largest:
        memory_read(query, keys, values)
        memory_read(query, keys, values, hops=3)
    assert largest.size <= 4096 * 8
    with Largest() as largest:
        memory_read(query, keys, values, return_aux=True)
    assert largest.size == 512 * 4096  # its weights were asked for


Q, K, V = torch.zeros(5, 4), torch.zeros(9, 4), torch.zeros(9, 4)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "query-list": (lambda: memory_read([1.0], K, V), TypeError, r"query: expected a torch\.Tensor, got list"),
    "query-scalar": (
        lambda: memory_read(torch.tensor(1.0), K, V),
        ValueError,
        r"query: expected \[\.\.\., D\] of D = 4",
    ),
    "query-size": (lambda: memory_read(Q[:, :3], K, V), ValueError, r"query: expected .* D = 4 .*got \[5, 3\]"),
    "keys-dtype": (lambda: memory_read(Q, K.double(), V), TypeError, r"keys: expected dtype torch.float32"),
    "keys-3d": (lambda: memory_read(Q, K[None], V), ValueError, r"keys: expected \[N, D\], got \[1, 9, 4\]"),
    "keys-meta": (lambda: memory_read(Q, K.to("meta"), V), ValueError, r"keys: .*meta"),
    "values-rows": (lambda: memory_read(Q, K, V[:8]), ValueError, r"values: expected \[N, D_v\] of N = 9"),
    "values-integers": (lambda: memory_read(Q, K, V.long()), TypeError, r"values: expected dtype"),
    "topk-zero": (lambda: memory_read(Q, K, V, topk=0), ValueError, r"topk: expected an integer >= 1, got 0"),
    "topk-large": (lambda: memory_read(Q, K, V, topk=10), ValueError, r"topk: expected at most N = 9, got 10"),
    "topk-many": (
        lambda: memory_read(Q, torch.zeros(3000, 4), torch.zeros(3000, 4), topk=2049),
        ValueError,
        r"topk: expected at most 2048, got 2049",
    ),
    "topk-bool": (lambda: memory_read(Q, K, V, topk=True), TypeError, r"topk: expected an integer >= 1, got True"),
    "score": (lambda: memory_read(Q, K, V, score="scaled_dot"), ValueError, r"score: expected one of 'dot', 'cosine'"),
    "score-bare": (lambda: memory_read(Q, K, V, score="additive"), ValueError, r"needs its vector"),
    "score-tuple": (
        lambda: memory_read(Q, K, V, score=("dot", K[0])),
        ValueError,
        r'score: expected a name, \("additive',
    ),
    "score-weight": (
        lambda: memory_read(Q, K, V, score=("additive", K)),
        ValueError,
        r"score's weight: expected \[D\] = \[4\], got \[9, 4\]",
    ),
    "scale": (lambda: memory_read(Q, K, V, scale=float("nan")), ValueError, r"scale: expected a finite number"),
    "normalizer": (lambda: memory_read(Q, K, V, normalizer="hard_sample"), ValueError, r"normalizer: expected one of"),
    "mask-dtype": (lambda: memory_read(Q, K, V, mask=torch.zeros(9)), TypeError, r"mask: expected dtype bool, got"),
    "mask-shape": (
        lambda: memory_read(Q, K, V, mask=ROWS[:4]),
        ValueError,
        r"mask: expected broadcastable to .*\[5, 9\]",
    ),
    "hops": (lambda: memory_read(Q, K, V, hops=0), ValueError, r"hops: expected an integer >= 1, got 0"),
    "hops-size": (lambda: memory_read(Q, K, V[:, :3], hops=2), ValueError, r"hops: more than one needs D_v = D"),
    "hop": (lambda: memory_read(Q, K, V, hop="mean"), ValueError, r"hop: expected one of 'add', 'replace'"),
    "eps": (lambda: memory_read(Q, K, V, hop="replace", eps=-1.0), ValueError, r"eps: expected a finite number >= 0"),
    "eps-add": (lambda: memory_read(Q, K, V, eps=0.1), ValueError, r'eps: only hop="replace"'),
    "sparse": (lambda: memory_read(Q, K, V, sparse_grad=True), ValueError, r"sparse_grad: expected False for a r"),
    "aux": (lambda: memory_read(Q, K, V, return_aux="yes"), TypeError, r"return_aux: expected True or False"),
    "lists-kind": (lambda: memory_read(Q, K, V, candidates=LISTS[0]), TypeError, r"candidates: expected \(offsets"),
    "lists-dtype": (
        lambda: memory_read(Q, K, V, candidates=(LISTS[0] * 1.0, LISTS[1])),
        TypeError,
        r"candidates' offsets: expected an integer tensor",
    ),
    "lists-number": (
        lambda: memory_read(Q, K, V, candidates=(LISTS[0][1:], LISTS[1])),
        ValueError,
        r"candidates' offsets: expected \[Q \+ 1\] = \[6\], got \[5\]",
    ),
    "lists-end": (
        lambda: memory_read(Q, K, V, candidates=(LISTS[0], LISTS[1][:-1])),
        ValueError,
        r"candidates' offsets: expected to rise from 0 to nnz = 9",
    ),
    "lists-falling": (
        lambda: memory_read(Q, K, V, candidates=(torch.tensor([0, 3, 2, 7, 8, 10]), LISTS[1])),
        ValueError,
        r"candidates' offsets: expected to rise",
    ),
    "lists-range": (
        lambda: memory_read(Q, K, V, candidates=(LISTS[0], LISTS[1] + 1)),
        ValueError,
        r"candidates' slots: expected 0 <= slot < N = 9, got 9",
    ),
    "lists-negative": (
        lambda: memory_read(Q, K, V, candidates=(LISTS[0], LISTS[1] - 1)),
        ValueError,
        r"candidates' slots: expected 0 <= slot < N = 9, got -1",
    ),
    "lists-order": (
        lambda: memory_read(Q, K, V, candidates=(LISTS[0], LISTS[1].flip(0))),
        ValueError,
        r"candidates' slots: expected each list ascending without duplicates",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    call, kind, pattern = WRONG[name]
    with pytest.raises(kind, match=pattern):
        call()


def test_is_public() -> None:
    assert "memory_read" in attnfast.__all__ and "MemoryReadOutput" in attnfast.__all__
