"""attnfast.distributed.context_parallel_attention on 1, 2 and 4 processes against one process's result on the whole."""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

import pytest
import ranks as processes
import torch
from torch import Tensor

import attnfast
from attnfast.distributed import context_parallel_attention, gather_sequence, shard_sequence
from attnfast.distributed._shards import block

F64 = torch.float64
B, H, H_KV, T, D, D_V = 2, 4, 2, 32, 8, 6

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "contiguous": {"layout": "contiguous"},
    "contiguous causal": {"layout": "contiguous", "causal": True},
    "scale, soft cap": {"causal": True, "scale": 0.7, "softcap": 1.5},
    "cosine": {"score": "cosine", "scale": 3.0},
    "l2": {"score": "l2", "causal": True},
    "lengths": {"key_lengths": [32, 11]},
    "lengths, causal": {"key_lengths": [3, 27], "causal": True},
    "lengths, contiguous": {"key_lengths": [17, 0], "layout": "contiguous", "causal": True},
    "additive": {"additive": True, "causal": True},
    "additive lengths": {"additive": True, "key_lengths": [32, 9], "softcap": 2.0},
    "packed": {"cu_seqlens": [0, 16, 16, 48, 64], "causal": True},
    "packed contiguous": {"cu_seqlens": [0, 8, 64], "layout": "contiguous", "causal": True},
    "packed, all": {"cu_seqlens": [0, 32, 64]},
}


def inputs(case: dict[str, Any], dtype: torch.dtype = F64) -> list[Tensor]:
    """query, key, value and the incoming gradients of output and lse; for the additive score weight and score_bias."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64).to(dtype)  # noqa: E731
    if "cu_seqlens" in case:
        total = case["cu_seqlens"][-1]
        return [
            draw(total, H, D),
            draw(total, H_KV, D),
            draw(total, H_KV, D_V),
            draw(total, H, D_V),
            draw(H, total).float(),
        ]
    return [draw(B, H, T, D), draw(B, H_KV, T, D), draw(B, H_KV, T, D_V), draw(B, H, T, D_V), draw(B, H, T).float(),
            *([draw(H, D), draw(H, D)] if case.get("additive") else [])]  # fmt: skip


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in case.items() if name != "additive"}
    for name in ("key_lengths", "cu_seqlens"):
        if name in options:
            options[name] = torch.tensor(options[name])
    return options


def whole(case: dict[str, Any], dtype: torch.dtype = F64, given: list[Tensor] | None = None) -> list[Tensor]:
    """Output, lse and gradients in one process."""
    q, k, v, go, gl, *vectors = inputs(case, dtype) if given is None else given
    options = options_of(case)
    options.pop("layout", None)
    options["causal"] = "top_left" if options.pop("causal", False) else None
    leaves = [x.requires_grad_() for x in (q, k, v, *vectors)]
    if "cu_seqlens" in options:
        cu = options.pop("cu_seqlens")
        out, lse, _ = attnfast.varlen_attention(q, k, v, cu, cu, 64, 64, return_lse=True, **options)
    elif vectors:
        out, lse, _ = attnfast.additive_attention(
            q, k, v, vectors[0], score_bias=vectors[1], return_lse=True, **options
        )
    else:
        out, lse, _ = attnfast.attention(q, k, v, return_lse=True, **options)
    seen = lse.isfinite()
    loss = (out * go).sum() + (lse.where(seen, 0) * gl).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def packed_rows(cu: list[int], rank: int, ranks: int, layout: str) -> Tensor:
    """Which rows of the packed whole a rank has, sequence by sequence."""
    rows = []
    for begin, end in itertools.pairwise(cu):
        chunks = torch.arange(begin, end).chunk(ranks * (1 if layout == "contiguous" else 2))
        if end > begin:
            rows += [chunks[rank]] if layout == "contiguous" else [chunks[rank], chunks[2 * ranks - 1 - rank]]
    return torch.cat(rows)


def sharded(rank: int, ranks: int, names: list[str], dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """The same by all ranks, put together: every rank's rows at their places, vectors' gradients added up."""
    results = {}
    for name in names:
        case = CASES[name]
        q, k, v, go, gl, *vectors = inputs(case, dtype)
        options = options_of(case)
        layout = options.get("layout", "zigzag")
        if "cu_seqlens" in case:
            rows = packed_rows(case["cu_seqlens"], rank, ranks, layout)
            leaves = [x[rows].requires_grad_() for x in (q, k, v)]
            go, gl = go[rows], gl[:, rows]
        else:
            leaves = [shard_sequence(x, layout=layout).requires_grad_() for x in (q, k, v)]
            go, gl = shard_sequence(go, layout=layout), shard_sequence(gl, dim=-1, layout=layout)
        vectors = [x.requires_grad_() for x in vectors]
        extra = dict(zip(("weight", "score_bias"), vectors))
        out, lse, _ = context_parallel_attention(*leaves, return_lse=True, **extra, **options)
        loss = (out * go).sum() + (lse.where(lse.isfinite(), 0) * gl).sum()
        grads = list(torch.autograd.grad(loss, [*leaves, *vectors]))
        mine = [out.detach(), lse.detach(), *grads]
        if "cu_seqlens" in case:
            results[name] = [rows, *mine]
        else:
            together = [gather_sequence(x, dim=-1 if at == 1 else -2, layout=layout) for at, x in enumerate(mine[:5])]
            for grad in grads[3:]:
                torch.distributed.all_reduce(grad)
            results[name] = together + grads[3:]
    return results


def put_together(name: str, parts: list[dict[str, list[Tensor]]]) -> list[Tensor]:
    if "cu_seqlens" not in CASES[name]:
        return parts[0][name]
    order = torch.cat([part[name][0] for part in parts]).argsort()
    columns = zip(*(part[name][1:] for part in parts))
    return [
        torch.cat(column, 1 if at == 1 else 0).index_select(1 if at == 1 else 0, order)
        for at, column in enumerate(columns)
    ]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equals_one_process(ranks: int) -> None:
    names = [name for name, case in CASES.items() if all(n % (2 * ranks) == 0 for n in case.get("cu_seqlens", []))]
    assert len(names) >= 14 if ranks < 4 else len(names) >= 13
    parts = processes.run(ranks, twice, names)
    for name in names:
        for at, (got, want) in enumerate(zip(put_together(name, parts), whole(CASES[name]), strict=True)):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda text: f"{name}, {at}: {text}")  # noqa: B023


HALF = (torch.float32, torch.bfloat16, torch.float16)


def sharded_in(rank: int, ranks: int, names: list[str]) -> list[dict[str, list[Tensor]]]:
    return [sharded(rank, ranks, names, dtype) for dtype in HALF]


def test_rounding_is_that_of_the_dtype() -> None:
    """At most twice the error of one process in the same dtype, as everywhere (docs/semantics.md), and one rounding."""
    names = ["causal", "lengths", "additive"]
    everything = processes.run(2, sharded_in, names)
    for (at, dtype), name in itertools.product(enumerate(HALF), names):
        parts = [rank[at] for rank in everything]
        exact = [x.double() for x in whole_of(CASES[name], dtype)]
        one = whole(CASES[name], dtype)
        for got, single, want in zip(put_together(name, parts), one, exact, strict=True):
            allowed = 2 * (single.double() - want).abs().max() + 2 * torch.finfo(dtype).eps * want.abs().max()
            assert got.dtype is single.dtype
            assert (got.double() - want).abs().max() <= allowed, name


def whole_of(case: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """The float64 result on inputs that were rounded to `dtype`."""
    return whole(case, F64, [x.double() for x in inputs(case, dtype)])


def twice(rank: int, ranks: int, names: list[str]) -> dict[str, list[Tensor]]:
    """Results, which must have the same bits every time."""
    results = [sharded(rank, ranks, names, F64) for _ in range(2)]
    assert all(torch.equal(a, b) for name in names for a, b in zip(results[0][name], results[1][name]))
    return results[0]


def order(rank: int, ranks: int) -> tuple[list[str], list[str]]:
    """What a rank does in turn, forward and backward. A block's computation ends only when all that is on its way has
    arrived, which nobody has waited for: so it travels while this rank computes."""
    import torch.distributed as dist

    from attnfast.distributed import _ring as module

    events: list[str] = []
    arriving: list[Tensor] = []
    post, forward, backward = dist.batch_isend_irecv, module._forward, module._backward

    def posting(operations: list[Any]) -> list[Any]:
        incoming = next(operation.tensor for operation in operations if operation.op is dist.irecv)
        incoming.fill_(torch.nan)
        arriving.append(incoming)
        events.append("post")
        works = post(operations)
        original = works[-1].wait

        class Work:
            def wait(self) -> None:
                events.append("wait")
                original()
                arriving[:] = [x for x in arriving if x is not incoming]

        return [*works[:-1], Work()]

    def computing(compute: Any) -> Any:
        def call(*args: Any) -> Any:
            result = compute(*args)
            end = time.monotonic() + 20
            while any(bool(x.isnan().any()) for x in arriving):
                assert time.monotonic() < end, "what was sent does not arrive while this rank computes"
                time.sleep(0.001)
            events.append("compute")
            return result

        return call

    dist.batch_isend_irecv = posting
    module._forward, module._backward = computing(forward), computing(backward)
    try:
        x = torch.randn(1, 2, 16, 4, requires_grad=True)
        out = context_parallel_attention(x, x, x, causal=True)
        first, events = events, []
        out.sum().backward()
    finally:
        dist.batch_isend_irecv = post
        module._forward, module._backward = forward, backward
    return first, events


def test_keys_travel_while_a_rank_computes() -> None:
    """Posted before a block is computed, waited for after it; sums of gradients likewise, and once more to get home."""
    step, sums = ["post", "compute", "wait"], ["post", "post", "compute", "wait", "wait"]
    for ranks in (2, 4):
        for forward, backward in processes.run(ranks, order):
            assert forward == step * (ranks - 1) + ["compute"]
            assert backward == step + sums * (ranks - 2) + step + ["post", "wait"]


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {  # what rank 1 has in place of the others' options, and the message
    "dtype": (
        {"dtype": F64},
        "dtype: expected the same on every rank, got torch.float32 on rank 0 and torch.float64 on rank 1",
    ),
    "shape": (
        {"tokens": 12},
        "query shape: expected the same on every rank, got [1, 2, 8, 4] on rank 0 and [1, 2, 12, 4] on rank 1",
    ),
    "scale": ({"scale": 0.25}, "scale: expected the same on every rank, got 0.5 on rank 0 and 0.25 on rank 1"),
    "softcap": ({"softcap": 3.0}, "softcap: expected the same on every rank, got 0.0 on rank 0 and 3.0 on rank 1"),
    "causal": ({"causal": True}, "causal: expected the same on every rank, got 0 on rank 0 and 1 on rank 1"),
    "l2": ({"score": "l2", "scale": 0.5}, "l2: expected the same on every rank, got 0 on rank 0 and 1 on rank 1"),
    "lengths": (
        {"key_lengths": [7]},
        "key_lengths: expected the same on every rank, got [] on rank 0 and [1, 7, 7] on rank 1",
    ),
    "refused": (
        {"score": "nonsense"},
        "context_parallel_attention: rank 1 refused its arguments; its own error says why",
    ),
}


def unequal(rank: int, ranks: int) -> dict[str, str]:
    """What each rank hears of calls that differ."""
    messages = {}
    for name, (different, _) in DIFFERENT.items():
        options = dict(different) if rank == 1 else {}
        q = torch.randn(1, 2, options.pop("tokens", 8), 4, dtype=options.pop("dtype", torch.float32))
        if "key_lengths" in options:
            options["key_lengths"] = torch.tensor(options["key_lengths"])
        start = time.monotonic()
        with pytest.raises(ValueError) as error:
            context_parallel_attention(q, q, q, **options)
        assert time.monotonic() - start < 20
        messages[name] = str(error.value)
        good = torch.randn(1, 2, 8, 4)  # the group is as good as before
        assert context_parallel_attention(good, good, good).shape == good.shape
    return messages


def test_what_differs_between_ranks_is_named_on_all() -> None:
    first, second, third = processes.run(3, unequal)
    assert first == third == {name: message for name, (_, message) in DIFFERENT.items()}
    assert second.pop("refused").startswith("score: expected one of")
    assert second == {name: message for name, message in first.items() if name != "refused"}


def dies(rank: int, ranks: int, late: bool) -> str:
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    if late:
        out = context_parallel_attention(q, q, q)
    if rank == 1:
        os._exit(3)
    start = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        out.sum().backward() if late else context_parallel_attention(q, q, q)
    assert time.monotonic() - start < 60
    return str(error.value)


@pytest.mark.parametrize("late", [False, True])
def test_a_rank_that_dies_is_an_error_on_the_others(late: bool) -> None:
    found = processes.outcomes(3, dies, late, timeout=20.0)
    assert found[1] == ("died", 3)
    assert {kind for rank, (kind, _) in enumerate(found) if rank != 1} == {"result"}, found
    texts = [text for rank, (_, text) in enumerate(found) if rank != 1]
    assert all("of 3 lost contact with another rank" in text for text in texts), texts
    assert any(("backward" if late else "context_parallel_attention") in text for text in texts)


def test_zig_zag_blocks_cover_each_pair_of_positions_once_and_evenly() -> None:
    ranks, chunk = 4, 3
    for layout in ("zigzag", "contiguous"):
        for causal in (False, True):
            parts = 2 if layout == "zigzag" else 1
            tokens = ranks * parts * chunk
            seen = torch.zeros(tokens, tokens)
            work = torch.zeros(ranks)
            mine = [packed_rows([0, tokens], rank, ranks, layout) for rank in range(ranks)]
            for rank in range(ranks):
                for source in range(ranks):
                    found = block(rank, source, layout, causal)
                    if found is None:
                        continue
                    halves = ((mine[rank], found.queries), (mine[source], found.keys))
                    rows, columns = (x if half is None else x.chunk(2)[half] for x, half in halves)
                    inside = torch.ones(len(rows), len(columns))
                    inside = inside.tril() if found.causal else inside
                    seen[rows.unsqueeze(1), columns] += inside
                    work[rank] += inside.sum()
            want = torch.ones(tokens, tokens)
            assert torch.equal(seen, want.tril() if causal else want)
            if layout == "zigzag":
                assert work.unique().numel() == 1


def refusals(rank: int, ranks: int) -> list[str]:
    x = torch.randn(1, 2, 7, 4)
    even = torch.randn(1, 2, 8, 4)
    messages = []
    calls: list[Any] = [
        lambda: context_parallel_attention(x, x, x),
        lambda: context_parallel_attention(even, even[:, :, :6], even[:, :, :6], causal=True),
        lambda: context_parallel_attention(even, even, even, layout="striped"),
        lambda: context_parallel_attention(even, even, even, weight=torch.ones(2, 4), score="dot"),
        lambda: context_parallel_attention(even[0].transpose(0, 1), *[even[0].transpose(0, 1)] * 2,
                                           cu_seqlens=torch.tensor([0, 10])),
        lambda: shard_sequence(torch.zeros(3, 10, 2)),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        messages.append(str(error.value))
    return messages


def test_bad_arguments() -> None:
    first, second = processes.run(2, refusals)
    assert first == second
    wanted = ["query: expected an even number of tokens", "causal: expected as many queries as keys, got 8 and 6",
              "layout: expected one of 'zigzag', 'contiguous', got 'striped'", "score: the additive score has none",
              "cu_seqlens: expected lengths that are multiples of 4 (zigzag, 2 ranks), got [10]",
              "x: expected a multiple of 4 tokens (zigzag, 2 ranks), got 10"]  # fmt: skip
    for got, want in zip(first, wanted, strict=True):
        assert got.startswith(want), got


def test_without_a_group() -> None:
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(RuntimeError, match=r"group: torch.distributed is not initialised"):
        context_parallel_attention(x, x, x)
