"""The rows of ``python -m attnfast gradcheck`` for the memory functions.

Which slots are chosen has no derivative, so a point must not lie where two scores are equal: all operands are drawn at
random, and steps of finite differences are far smaller than what scores differ by.
"""

from __future__ import annotations

from typing import Any

import torch

import attnfast

from ._derivatives import Check, draw


def memory_checks() -> dict[tuple[str, str], Check]:
    """By public name and case."""
    query, keys, values = draw(3, 4), draw(7, 4), draw(7, 4)
    weights, vector, bias = draw(3, 2), draw(4), draw(4)
    indices = torch.tensor([[0, 5], [5, -1], [2, 2]])
    mask = torch.rand(3, 7) < 0.6
    mask[0] = False  # one query that sees nothing
    lists = torch.tensor([0, 3, 3, 7]), torch.tensor([0, 2, 6, 1, 3, 4, 5])
    halves = draw(2, 2, 2, 3), draw(2, 4, 3), draw(2, 4, 3), draw(16, 2)

    def read(**options: Any) -> Check:
        return Check(lambda q, k, v: attnfast.memory_read(q, k, v, **options), (query, keys, values))

    reads = {
        "plain": read(),
        "mask": read(mask=mask),
        "entmax15": read(normalizer="entmax15"),
        "candidates": read(candidates=lists),
        "3 hops": read(hops=3),
        "topk": read(topk=3),
        "topk cosine": read(topk=3, score="cosine"),
        "topk l2 2 hops": read(topk=3, score="l2", hops=2, hop="replace"),
        "topk candidates": read(topk=2, candidates=lists),
        "topk additive": Check(
            lambda q, k, v, w, b: attnfast.memory_read(q, k, v, topk=3, score=("additive", w, b)),
            (query, keys, values, vector, bias),
        ),
    }
    return {
        ("topk_scores", "plain"): Check(lambda q, k: attnfast.topk_scores(q, k, 3, scale=0.7)[0], (query, keys)),
        ("weighted_gather", "plain"): Check(lambda w, v: attnfast.weighted_gather(indices, w, v), (weights, values)),
        **{("memory_read", case): check for case, check in reads.items()},
        ("product_key_read", "plain"): Check(lambda q, r, c, v: attnfast.product_key_read(q, r, c, v, 5), halves),
    }
