"""What :func:`attnfast.explain` says of the memory functions: their route and kernel, and what a read is made of.

The checks are those of the functions themselves, the rules those of `_memory_hops` and ``autograd.plan``. What a stage
would get from the one before is stood in for by an empty tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnfast import _explain_cuda, _gather, _memory, _memory_hops, _memory_read, autograd, functional, reference
from attnfast import _explain_text as text
from attnfast._memory_hops import Lists, Plan, Tables

# Up to so many queries keys are streamed: kRowQueries in csrc/cpu/topk_scores.cpp.
ROW_QUERIES = 4

Explain = Callable[..., str]


def _topk(fn: Any, explain: Explain, args: Any, kwargs: Any) -> list[str]:
    query, keys, mask, k, _, sparse, _ = _memory.topk_call(*args, **kwargs)
    headline = f"topk_scores: {text.shapes(query=query, keys=keys)}, k = {k}, {_dtypes(query, keys)}"
    return [headline, *(_plain(fn) or _topk_way(query, keys, mask, k, sparse))]


def _topk_way(query: Tensor, keys: Tensor, mask: Tensor | None, k: int, sparse: bool) -> list[str]:
    route = autograd.plan(query, keys)
    wanted = keys.requires_grad and torch.is_grad_enabled()
    if sparse and wanted and route != "function":
        return [_no_sparse(route)]
    lines = [text.route_line(route, "the matrix of scores Q x N")]
    if route == "reference":
        return [*lines, "kernel: none"]
    if not (text.is_readable(query) and text.is_readable(keys)):
        return [
            *lines,
            f"kernel: chosen when real tensors arrive (these carry none); ISA {text.isa()}, {_arithmetic(keys)}",
        ]
    streamed = query.shape[0] <= ROW_QUERIES
    name = "streams the keys once" if streamed else "tiles of queries by slots with a running threshold"
    if not query.is_cpu:
        lines += _explain_cuda.topk(query, keys, k)
    else:
        lines.append(f"kernel: {name}, ISA {text.isa()}, {_arithmetic(keys)}")
        if not streamed:
            lines.append(f"not the streaming kernel: there are more than {ROW_QUERIES} queries")
    if keys.stride(1) != 1 and keys.shape[1] != 1:
        lines.append("copy of the keys: the elements of a row do not lie side by side")
    if mask is not None:
        lines.append(f"mask: {'one row for all queries' if mask.shape[0] == 1 else 'a row for each query'}")
    if route == "function" and keys.requires_grad:
        kind = "sparse, a row for each slot that was chosen" if sparse else "dense [N, D] (sparse_grad=False)"
        lines.append(f"gradient of the keys: {kind}")
    return lines + (text.isa_lines() if query.is_cpu else [])


def _no_sparse(route: str) -> str:
    return f"route: none; sparse_grad=True works in eager mode only, and this call would take route {route}"


def _gathered(fn: Any, explain: Explain, args: Any, kwargs: Any) -> list[str]:
    indices, weights, values, _, sparse = _gather.gather_call(*args, **kwargs)
    headline = f"weighted_gather: {text.shapes(indices=indices, values=values)}, {_dtypes(weights, values)}"
    return [headline, *(_plain(fn) or _gather_way(weights, values, sparse))]


def _gather_way(weights: Tensor, values: Tensor, sparse: bool) -> list[str]:
    route = autograd.plan(weights, values)
    wanted = values.requires_grad and torch.is_grad_enabled()
    if sparse and wanted and route != "function":
        return [_no_sparse(route)]
    lines = [text.route_line(route, "all picked rows, Q x K x D_v")]
    if route == "reference":
        return [*lines, "kernel: none"]
    if values.is_cpu:
        lines.append(f"kernel: weighted sums of prefetched rows, ISA {text.isa()}, {_arithmetic(values)}")
    else:
        lines += _explain_cuda.gather(values)
    if wanted:
        kind = "sparse, a row for each slot that occurs" if sparse else "dense [N, D_v] (sparse_grad=False)"
        lines.append(f"gradient of the values: {kind}")
    return lines + (text.isa_lines() if values.is_cpu else [])


def _product_keys(fn: Any, explain: Explain, args: Any, kwargs: Any) -> list[str]:
    k = _gather.product_key_call(*args, **kwargs)
    query, row_keys, column_keys, values, sparse = _bound(
        args, kwargs, ("query", "row_keys", "column_keys", "values", "topk", "scales", "sparse_grad"), (0, 1, 2, 3, 6)
    )
    heads, half = query.shape[-3], query.shape[-1]
    rows, n = query.shape[:-3].numel(), row_keys.shape[1]
    headline = f"product_key_read: {text.shapes(query=query, row_keys=row_keys, values=values)}, topk = {k}"
    headline += f", {_dtypes(query, values)}"
    if plain := _plain(fn):
        return [headline, *plain]
    candidates = min(k, n)
    pairs = sum(min(candidates, k // i) for i in range(1, candidates + 1))
    parts = (query, row_keys, column_keys)
    flat = _stand_in((rows, half), query.dtype, *parts)
    weights = _stand_in((rows, heads * k), reference.real_dtype(query.dtype), *parts)
    return [
        headline,
        f"candidates: the {candidates} best of n = {n} half keys, for each head and half, by topk_scores",
        *_indented(_topk_way(flat, _stand_in((n, half), row_keys.dtype, *parts), None, candidates, False)),
        f"choice: {pairs} pairs of candidates are looked at for the best {k} (i j <= k), of {n * n} slots",
        f"weights: a softmax by torch operations, {rows} x {heads} x {k}",
        f"values: weighted_gather of {heads * k} rows a query",
        *_indented(_gather_way(weights, values, bool(sparse))),
    ]


def _read(fn: Any, explain: Explain, args: Any, kwargs: Any) -> list[str]:
    flat, plan, seen, lists = _memory_read.memory_call(*args, **kwargs)
    query, keys, values = _bound(args, kwargs, ("query", "keys", "values"), (0, 1, 2))
    headline = f"memory_read: {text.shapes(query=query, keys=keys, values=values)}, {text.dtype_name(query.dtype)}"
    if plain := _plain(fn):
        return [headline, *plain]
    lines = [headline]
    if plan.hops > 1:
        stop = f" unless a query changes by at most {plan.eps:g}" if plan.eps else ""
        lines.append(f"hops: {plan.hops}{stop}, the last as follows")
        flat = _stand_in(tuple(flat.shape), flat.dtype, flat, keys, values)  # what the hop before has read
    tables = Tables(keys, values)
    if lists is not None:
        return lines + _read_lists(explain, flat, tables, plan, lists)
    if plan.topk is not None:
        return lines + _read_best(flat, tables, plan, seen)
    full = "full" if kwargs.get("return_aux", False) else ""
    function, arguments, options = _memory_hops.soft_call(flat, keys, values, plan, seen, full)
    why = ": return_aux asks for them" if full else ""
    weights = f", with the weights Q x N{why}" if full else ""
    lines.append(f"way: all slots, by attention whose keys all queries share{weights}")
    return lines + _indented(explain(function, *arguments, **options).splitlines())


def _read_best(query: Tensor, tables: Tables, plan: Plan, mask: Tensor | None) -> list[str]:
    assert plan.topk is not None
    mask = mask.unsqueeze(0) if mask is not None and mask.dim() == 1 else mask
    if _memory_hops.scores_in_kernel(query, tables, plan):
        lines = [f"way: the {plan.topk} best slots by topk_scores, whose scores are also those of the weights"]
        lines += _indented(_topk_way(query, tables.keys, mask, plan.topk, plan.sparse_grad))
    else:
        block = _memory_hops.block_size(query, tables.keys, plan, plan.topk)
        lines = [f"way: the {plan.topk} best slots in blocks of {block}, then the chosen keys are scored again"]
        lines.append(f"not one topk_scores: the score {plan.score!r} is not a dot product of the keys as they are")
        if plan.score == "additive":
            lines.append("  kernel: none; scores of a block are torch operations on queries x slots x D")
        else:
            lines.append("  each block of keys is prepared by torch operations, and scored by topk_scores")
            lines += _indented(_topk_way(query.detach(), tables.keys.detach(), mask, plan.topk, False))
    return lines + _weigh(query, tables, plan)


def _read_lists(explain: Explain, query: Tensor, tables: Tables, plan: Plan, lists: Lists) -> list[str]:
    found = lists.slots.shape[0]
    if plan.topk is not None:
        lines = [f"way: {found} pairs of query and candidate are scored by torch operations and sorted"]
        return lines + _weigh(query, tables, plan)
    lines = [f"way: the rows of {found} candidates are copied and read by attention"]
    keys, values = (_stand_in((found, x.shape[1]), query.dtype, x) for x in (tables.keys, tables.values))
    if plan.score == "additive":
        lines.append(f"not packed attention, which has no additive score: {query.shape[0]} calls, like this one")
        some = int(lists.offsets.diff().max()) if query.shape[0] else 0
        function, arguments, options = _memory_hops.soft_call(query[:1], keys[:some], values[:some], plan, None, "full")
    else:
        function = functional.varlen_attention
        arguments, options = _memory_hops.packed_call(query, keys, values, plan, lists)
    return lines + _indented(explain(function, *arguments, **options).splitlines())


def _weigh(query: Tensor, tables: Tables, plan: Plan) -> list[str]:
    """Normaliser and values of a read that picks."""
    assert plan.topk is not None
    vectors = [x for x in (plan.score_weight, plan.score_bias) if x is not None]
    shape = (query.shape[0], plan.topk)
    weights = _stand_in(shape, reference.real_dtype(query.dtype), query, tables.keys, *vectors)
    return [
        f"weights: {plan.normalizer} by torch operations, {shape[0]} x {shape[1]}",
        "values: weighted_gather of the chosen rows",
        *_indented(_gather_way(weights, tables.values, plan.sparse_grad)),
    ]


# --- helpers --------------------------------------------------------------------------------------------------------


def _plain(fn: Any) -> list[str]:
    """What is said of the reference."""
    if fn.__module__.startswith("attnfast.reference") or fn.__module__.startswith("attnfast._reference"):
        return ["kernel: none; attnfast.reference is plain PyTorch by definition"]
    return []


def _stand_in(shape: tuple[int, ...], dtype: torch.dtype, *sources: Tensor) -> Tensor:
    """An empty tensor that takes the routes of what is computed from `sources`."""
    like = next((x for x in sources if not text.is_readable(x)), sources[0])
    made = like.detach().new_empty(shape, dtype=dtype)
    return made.requires_grad_() if torch.is_grad_enabled() and any(x.requires_grad for x in sources) else made


def _bound(args: Any, kwargs: Any, names: tuple[str, ...], wanted: tuple[int, ...]) -> list[Any]:
    """Arguments of a call that was checked already, by position or name; None where one was left out."""
    return [args[at] if at < len(args) else kwargs.get(names[at]) for at in wanted]


def _arithmetic(table: Tensor) -> str:
    return "int8 widened to float32" if table.dtype == torch.int8 else text.arithmetic(table.dtype)


def _dtypes(first: Tensor, table: Tensor) -> str:
    one, other = text.dtype_name(first.dtype), text.dtype_name(table.dtype)
    return one if one == other else f"{one}, table {other}"


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


NAMES = ("topk_scores", "weighted_gather", "memory_read", "product_key_read")
FUNCTIONS: dict[Any, Callable[[Any, Explain, Any, Any], list[str]]] = {
    getattr(module, name): lines
    for name, module, lines in (
        ("topk_scores", _memory, _topk),
        ("weighted_gather", _gather, _gathered),
        ("product_key_read", _gather, _product_keys),
        ("memory_read", _memory_read, _read),
    )
    for module in (module, reference)
}
