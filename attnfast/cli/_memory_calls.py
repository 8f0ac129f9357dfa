"""The made-up calls of ``python -m attnfast explain --memory NAME``."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

import attnfast

from . import CommandError

# What each takes beside dtype, grad and json; another option would be dropped without a word.
FUNCTIONS: dict[str, set[str]] = {
    "topk_scores": {"queries", "slots", "size", "topk", "mask"},
    "weighted_gather": {"queries", "slots", "value_size", "topk", "sparse_grad"},
    "memory_read": {
        "queries", "slots", "size", "value_size", "topk", "score", "mask", "candidates", "sparse_grad",
    },
    "product_key_read": {"queries", "slots", "size", "value_size", "topk", "heads", "sparse_grad"},
}  # fmt: skip
_COMMON = {"memory", "dtype", "grad", "json", "command", "run", "default_of"}


def memory_call(
    arguments: argparse.Namespace, dtype: torch.dtype
) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    """The function, its tensors by position, and its other arguments."""
    name = arguments.memory
    for option, given in vars(arguments).items():
        if option not in _COMMON | FUNCTIONS[name] and given != arguments.default_of(option):
            raise CommandError(f"--{option.replace('_', '-')} is not an option of {name}")
    queries, slots, size = arguments.queries, arguments.slots, arguments.size
    value_size = size if arguments.value_size is None else arguments.value_size
    topk = 32 if arguments.topk is None else arguments.topk
    if min(queries, slots, size, value_size, arguments.heads, topk) < 0:
        raise CommandError("a size is negative")

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, requires_grad=arguments.grad)

    sparse = {"sparse_grad": arguments.sparse_grad}
    mask = torch.ones(slots, dtype=torch.bool) if arguments.mask else None
    if name == "topk_scores":
        return attnfast.topk_scores, {"query": empty(queries, size), "keys": empty(slots, size)}, {
            "k": topk, "mask": mask,
        }  # fmt: skip
    if name == "weighted_gather":
        indices = torch.zeros(queries, topk, dtype=torch.int64)
        tensors = {"indices": indices, "weights": empty(*indices.shape), "values": empty(slots, value_size)}
        return attnfast.weighted_gather, tensors, sparse
    if name == "product_key_read":
        side, half = math.isqrt(slots), size // 2
        if side * side != slots or 2 * half != size:
            raise CommandError(
                "product keys have n * n slots, and a query of two halves: --slots a square, --size even"
            )
        keys = {name: empty(arguments.heads, side, half) for name in ("row_keys", "column_keys")}
        tensors = {"query": empty(queries, arguments.heads, 2, half), **keys, "values": empty(slots, value_size)}
        return attnfast.product_key_read, tensors, {"topk": topk, **sparse}
    lists = None
    if arguments.candidates is not None:
        count = arguments.candidates
        if not 0 <= count <= slots:
            raise CommandError(f"--candidates takes 0 to N = {slots}, got {count}")
        lists = torch.arange(queries + 1) * count, torch.arange(count).repeat(queries)
    score: Any = "dot" if arguments.score == arguments.default_of("score") else arguments.score
    if score == "additive":
        score = ("additive", empty(size))
    tensors = {"query": empty(queries, size), "keys": empty(slots, size), "values": empty(slots, value_size)}
    options = {"topk": arguments.topk, "score": score, "mask": mask, "candidates": lists, **sparse}
    return attnfast.memory_read, tensors, options
