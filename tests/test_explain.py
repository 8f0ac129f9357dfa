"""What ``attnfast.explain`` says is what a call does: plain calls of few keys, and the memory functions.

Attention under its options is explained in test_errors.py and test_decode.py, additive attention in
test_additive_decode.py; the command line in test_cli.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnfast
from attnfast import _explain_memory, _memory_hops, functional, reference
from attnfast import scaled_dot_product_attention as sdpa

ROOT = Path(__file__).resolve().parent.parent
explain = attnfast.explain

# --- plain calls that record a gradient ------------------------------------------------------------------------------

LIMIT = attnfast.ops.WHOLE_ROW_KEYS
GRAPH_CALLS: dict[str, tuple[Any, int, tuple[Any, ...], dict[str, Any]]] = {
    "attention": (attnfast.attention, LIMIT, (), {}),
    "one key more": (attnfast.attention, LIMIT + 1, (), {}),
    "bottom right": (attnfast.attention, 9, (), {"causal": "bottom_right"}),
    "defaults given": (attnfast.attention, 9, (), {"score": "scaled_dot", "softcap": 0, "mask": None, "scale": None}),
    "dot": (attnfast.attention, 9, (), {"score": "dot"}),
    "attention's scale": (attnfast.attention, 9, (), {"scale": 0.3}),
    "mask": (attnfast.attention, 9, (), {"mask": torch.ones(1, 9, dtype=torch.bool)}),
    "window": (attnfast.attention, 9, (), {"window": (2, -1)}),
    "lse": (attnfast.attention, 9, (), {"return_lse": True}),
    "weights": (attnfast.attention, 9, (), {"return_weights": "row_max"}),
    "sdpa": (sdpa, LIMIT, (), {}),
    "one more for sdpa": (sdpa, LIMIT + 1, (), {}),
    "positional": (sdpa, 9, (None, 0.0, True), {}),
    "sdpa's scale": (sdpa, 9, (), {"scale": 0.3}),
    "whole scale": (sdpa, 9, (), {"scale": 2}),
    "sdpa's mask": (sdpa, 9, (torch.zeros(1, 9),), {}),
    "equal heads": (sdpa, 9, (), {"enable_gqa": True}),
}


@pytest.mark.parametrize("shape", [(1, 2), (2,)], ids=["4-D", "3-D"])
@pytest.mark.parametrize("name", GRAPH_CALLS)
def test_few_keys_take_the_decode_kernel_although_a_gradient_is_wanted(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their forward keeps no lse. Which calls these are `functional` decides, and `explain` must know."""
    fn, keys, more, options = GRAPH_CALLS[name]
    query = torch.randn(*shape, 1, 8, requires_grad=True)
    key, value = torch.randn(2, *shape, keys, 8)
    calls = []
    real = functional.whole_row_attention
    monkeypatch.setattr(functional, "whole_row_attention", lambda *x: calls.append(1) or real(*x))
    fn(query, key, value, *more, **options)
    text = explain(fn, query, key, value, *more, **options)
    assert "route: function" in text
    assert ("kernel: decode kernel" in text) == bool(calls), text
    assert "kernel: decode kernel" in explain(fn, query.detach(), key, value)
    assert explain(fn, query=query, key=key, value=value) == explain(fn, query, key, value)


def test_what_else_keeps_an_lse() -> None:
    query, key = torch.randn(1, 2, 1, 8, requires_grad=True), torch.randn(1, 2, 9, 8)
    assert "kernel: decode kernel" in explain(sdpa, query, key, key)
    for other in (query.bfloat16().to(torch.float32), query):
        with torch.autocast("cpu", torch.bfloat16):
            assert "lse is wanted" in explain(sdpa, other, key, key)
    assert "kernel: tile kernel" in explain(sdpa, query.expand(1, 2, 3, 8), key, key)


# --- memory functions ------------------------------------------------------------------------------------------------

Q, K, V = torch.randn(5, 4), torch.randn(9, 4), torch.randn(9, 4)
LISTS = (torch.tensor([0, 2, 3, 3, 7, 9]), torch.tensor([0, 3, 5, 1, 2, 4, 6, 0, 8]))
ADDITIVE = ("additive", torch.randn(4), torch.randn(4))
HALVES = (torch.randn(6, 2, 2, 3), torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.randn(25, 4))
INDICES, WEIGHTS = torch.randint(9, (5, 3)), torch.rand(5, 3)
CALLS: dict[str, Callable[..., tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    "topk_scores": lambda x=Q: (attnfast.topk_scores, (x, K, 3), {}),
    "weighted_gather": lambda x=WEIGHTS: (attnfast.weighted_gather, (INDICES, x, V), {}),
    "memory_read": lambda x=Q: (attnfast.memory_read, (x, K, V), {"topk": 3}),
    "product_key_read": lambda x=HALVES[0]: (attnfast.product_key_read, (x, *HALVES[1:], 4), {}),
}


def test_the_number_of_queries_chooses_the_kernel() -> None:
    source = (ROOT / "csrc" / "cpu" / "topk_scores.cpp").read_text()
    (limit,) = re.findall(r"constexpr int64_t kRowQueries = (\d+);", source)
    assert int(limit) == _explain_memory.ROW_QUERIES
    assert re.search(r"const bool rows = p\.queries <= kRowQueries;", source)
    few, many = (explain(attnfast.topk_scores, torch.zeros(2, n // 2, 4), K, 3) for n in (int(limit), int(limit) + 2))
    assert "kernel: streams the keys once" in few and "not the streaming" not in few
    assert "kernel: tiles of queries by slots" in many and f"more than {limit} queries" in many


@pytest.mark.parametrize("name", CALLS)
def test_routes(name: str) -> None:
    _, args, options = CALLS[name]()
    at = 1 if name == "weighted_gather" else 0
    texts = []

    def call(x: Tensor) -> Tensor:
        again, args, options = CALLS[name](x)
        texts.append(explain(again, *args, **options))
        return x

    call(args[at])
    call(args[at].clone().requires_grad_())
    torch.vmap(call)(args[at].unsqueeze(0))
    torch.func.jvp(call, (args[at],), (args[at],))
    with torch.no_grad():
        call(args[at].clone().requires_grad_())
    expected = ("kernel", "function", "operator", "reference", "kernel")
    for text, route in zip(texts, expected, strict=True):
        assert set(re.findall(r"route: (\w+)", text)) == {route}, text
        assert text.splitlines()[0].startswith(f"{name}: ") and "float32" in text.splitlines()[0]
        assert ("kernel: none" in text) == (route == "reference")
        assert (f"ISA {attnfast.get_isa()}" in text) == (route != "reference")
    plain = explain(getattr(reference, name), *args, **options)
    assert plain.splitlines()[1:] == ["kernel: none; attnfast.reference is plain PyTorch by definition"]


# What a read says it is made of, and which functions it calls: those of `_memory_hops`.
READS: dict[str, tuple[dict[str, Any], list[str], set[str]]] = {
    "all": ({}, ["way: all slots", "  attention: query [1, 1, 5, 4]"], {"attention"}),
    "all, aux": (
        {"return_aux": True, "score": "l2"},
        [
            "with the weights Q x N: return_aux asks for them",
            "  second pass: writes the full weights",
            "two more columns",
        ],
        {"attention"},
    ),
    "all, sparsemax": ({"normalizer": "sparsemax"}, ["  kernel: none; normalizer 'sparsemax'"], {"attention"}),
    "all, additive": ({"score": ADDITIVE}, ["  additive_attention: query"], {"additive_attention"}),
    "hops": (
        {"hops": 3, "hop": "replace", "eps": 0.5},
        ["hops: 3 unless a query changes by at most 0.5, the last as follows", "way: all slots"],
        {"attention"},
    ),
    "topk": (
        {"topk": 3, "normalizer": "entmax15"},
        ["way: the 3 best slots by topk_scores", "weights: entmax15 by torch operations, 5 x 3", "weighted_gather"],
        {"topk_scores", "weighted_gather"},
    ),
    "topk, mask": (
        {"topk": 3, "mask": torch.ones(5, 9, dtype=torch.bool)},
        ["mask: a row for each query"],
        {"topk_scores", "weighted_gather"},
    ),
    "topk, one mask": (
        {"topk": 3, "mask": torch.ones(9, dtype=torch.bool)},
        ["mask: one row for all queries"],
        {"topk_scores", "weighted_gather"},
    ),
    "topk, cosine": (
        {"topk": 3, "score": "cosine"},
        ["in blocks of 262144", "not one topk_scores: the score 'cosine'", "  kernel: tiles of queries by slots"],
        {"topk_scores", "weighted_gather"},
    ),
    "topk, additive": (
        {"topk": 3, "score": ADDITIVE},
        ["in blocks of 52428", "  kernel: none; scores of a block are torch operations"],
        {"weighted_gather"},
    ),
    "lists": (
        {"candidates": LISTS},
        ["the rows of 9 candidates are copied", "  varlen_attention: ", "5 packed sequences"],
        {"varlen_attention", "weighted_gather"},
    ),
    "lists, additive": (
        {"candidates": LISTS, "score": ADDITIVE},
        ["5 calls, like this one", "  additive_attention: query [1, 1, 1, 4], key [1, 1, 4, 4]"],
        {"additive_attention", "weighted_gather"},
    ),
    "lists, topk": (
        {"candidates": LISTS, "topk": 2},
        ["9 pairs of query and candidate are scored by torch", "weights: softmax by torch operations, 5 x 2"],
        {"weighted_gather"},
    ),
}


@pytest.mark.parametrize("name", READS)
def test_a_read_is_made_of_what_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, pieces, functions = READS[name]
    text = explain(attnfast.memory_read, Q, K, V, **options)
    for piece in pieces:
        assert piece in text, text
    called = set()
    for function in ("attention", "additive_attention", "varlen_attention", "topk_scores", "weighted_gather"):
        real = getattr(_memory_hops, function)
        monkeypatch.setattr(
            _memory_hops, function, lambda *x, f=function, real=real, **o: called.add(f) or real(*x, **o)
        )
    attnfast.memory_read(Q, K, V, **options)
    assert called == functions


@pytest.mark.parametrize("wanted", ["query", "keys", "values", "score"])
def test_the_gradients_of_a_read_are_of_its_stages(wanted: str) -> None:
    given = {"query": Q.clone(), "keys": K.clone(), "values": V.clone(), "score": torch.randn(4)}
    given[wanted].requires_grad_()
    *tensors, vector = given.values()
    score: Any = ("additive", vector) if wanted == "score" else "dot"
    text = explain(attnfast.memory_read, *tensors, topk=2, score=score, sparse_grad=True)
    stages = text.split("values: weighted_gather")
    assert ("route: function" in stages[0]) == (wanted in ("query", "keys"))
    assert "route: function" in stages[1]
    assert ("gradient of the keys: sparse" in text) == (wanted == "keys")
    assert ("gradient of the values: sparse" in text) == (wanted == "values")
    dense = explain(attnfast.memory_read, *tensors, topk=2, score=score)
    assert ("gradient of the keys: dense" in dense) == (wanted == "keys")
    soft = explain(attnfast.memory_read, *tensors, score=score)
    assert "  route: function" in soft
    hops = explain(attnfast.memory_read, *tensors, topk=2, hops=2)
    assert ("  route: kernel" in hops) == (wanted == "score"), "the second query depends on all three"


def test_a_sparse_gradient_is_of_eager_mode() -> None:
    table = V.clone().requires_grad_()
    text = explain(attnfast.weighted_gather, INDICES, WEIGHTS, table, sparse_grad=True)
    assert "gradient of the values: sparse, a row for each slot that occurs" in text
    assert "gradient of the values: dense [N, D_v]" in explain(attnfast.weighted_gather, INDICES, WEIGHTS, table)
    assert "gradient" not in explain(attnfast.weighted_gather, INDICES, WEIGHTS, V).replace("no gradient wanted", "")
    texts = []

    def call(weights: Tensor) -> Tensor:
        texts.append(explain(attnfast.weighted_gather, INDICES, weights, table, sparse_grad=True))
        with pytest.raises(NotImplementedError, match="sparse_grad=True works in eager mode only"):
            attnfast.weighted_gather(INDICES, weights, table, sparse_grad=True)
        return weights

    torch.vmap(call)(WEIGHTS.unsqueeze(0))
    assert "route: none; sparse_grad=True works in eager mode only" in texts[0] and "operator" in texts[0]


@pytest.mark.parametrize(("k", "candidates", "pairs"), [(1, 1, 1), (4, 4, 8), (9, 5, 15), (25, 5, 25)])
def test_product_keys_say_what_they_look_at(k: int, candidates: int, pairs: int) -> None:
    text = explain(attnfast.product_key_read, *HALVES, k)
    assert f"candidates: the {candidates} best of n = 5 half keys" in text
    looked = sum(i * j <= k for i in range(1, candidates + 1) for j in range(1, candidates + 1))
    assert looked == pairs and f"choice: {pairs} pairs of candidates are looked at for the best {k}" in text
    assert f"weighted_gather of {2 * k} rows a query" in text


def test_tables_and_their_dtypes(isa: str) -> None:
    codes, scales = torch.zeros(9, 4, dtype=torch.int8), torch.ones(9)
    text = explain(attnfast.weighted_gather, INDICES, WEIGHTS, codes, scales=scales)
    assert "float32, table int8" in text and f"ISA {isa}, int8 widened to float32" in text
    isas = attnfast.available_isas()
    assert ("a lower one was chosen" in text) == (isa != isas[-1])
    text = explain(attnfast.topk_scores, Q, K.bfloat16(), 2)
    assert "float32, table bfloat16" in text and "bfloat16 widened to float32" in text
    assert "copy of the keys: the elements of a row" in explain(attnfast.topk_scores, Q, K.t().contiguous().t(), 2)
    assert "copy of the keys" not in explain(attnfast.topk_scores, Q, K[::2, :], 2)


def test_nothing_is_computed() -> None:
    """A billion slots that are one row in memory."""
    keys = torch.zeros(1, 4).expand(10**9, 4)
    assert "kernel: tile" in explain(attnfast.memory_read, Q, keys, keys)
    assert "kernel: tiles" in explain(attnfast.memory_read, Q, keys, keys, topk=9)
    assert "kernel: tiles" in explain(attnfast.topk_scores, Q, keys, 9)
    n = 30000
    values = torch.zeros(1, 4).expand(n * n, 4)
    assert "of 900000000 slots" in explain(
        attnfast.product_key_read, torch.zeros(3, 1, 2, 2), torch.zeros(1, n, 2), torch.zeros(1, n, 2), values, 8
    )


def test_refuses_what_the_call_refuses() -> None:
    wrong: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
        (attnfast.topk_scores, (Q, K, 10), {}, "k: expected an integer"),
        (attnfast.weighted_gather, (INDICES, WEIGHTS[:2], V), {}, "weights: expected"),
        (attnfast.memory_read, (Q, K, V), {"topk": 10}, "topk: expected at most N = 9"),
        (attnfast.product_key_read, (*HALVES, 26), {}, r"topk: expected .* n \* n = 25"),
    ]
    for fn, args, options, pattern in wrong:
        with pytest.raises(ValueError, match=pattern):
            fn(*args, **options)
        with pytest.raises(ValueError, match=pattern):
            explain(fn, *args, **options)
    with pytest.raises(TypeError, match="topk_scores, weighted_gather, memory_read, product_key_read, got 'relu'"):
        explain(torch.relu, Q)
