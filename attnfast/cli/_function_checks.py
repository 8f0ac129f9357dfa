"""The rows of ``python -m attnfast gradcheck`` for the attention functions, over their options."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import attnfast

from ._derivatives import Check, draw


def function_checks() -> dict[tuple[str, str], Check]:
    """By public name and case."""
    return {**_attention(), **_additive(), **_others()}


def _mask(rows: int, columns: int) -> Tensor:
    mask = torch.rand(rows, columns) < 0.6
    mask[0] = False  # one row that sees nothing
    return mask


def _attention() -> dict[tuple[str, str], Check]:
    query, key, value = draw(1, 2, 3, 4), draw(1, 2, 5, 4), draw(1, 2, 5, 3)
    shared_key, shared_value = draw(1, 1, 5, 4), draw(1, 1, 5, 3)
    bias, sink, mask = draw(2, 3, 5), draw(2), _mask(3, 5)
    centre = torch.tensor([0.3, 2.2, 4.4], dtype=torch.float64, requires_grad=True)
    inputs = (query, key, value)

    def plain(**options: Any) -> Check:
        return Check(lambda q, k, v: attnfast.attention(q, k, v, **options), inputs)

    def fields(*names: str, **options: Any) -> Check:
        def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            result = attnfast.attention(q, k, v, **options)
            return tuple(getattr(result, name) for name in names)

        return Check(call, inputs)

    cases = {
        "plain": plain(),
        "score dot": plain(score="dot"),
        "score cosine": plain(score="cosine"),
        "score l2": plain(score="l2"),
        "sparsemax": plain(normalizer="sparsemax"),
        "entmax15": plain(normalizer="entmax15"),
        "sigmoid": plain(normalizer="sigmoid"),
        "causal, top left": plain(causal="top_left"),
        "causal, bottom right": plain(causal="bottom_right"),
        "window": plain(window=(1, 1)),
        "boolean mask": plain(mask=mask),
        "key lengths": plain(key_lengths=torch.tensor([4])),
        "ALiBi": plain(alibi_slopes=torch.tensor([0.5, 0.25], dtype=torch.float64)),
        "soft cap": plain(softcap=2.0),
        "grouped heads": Check(lambda q, k, v: attnfast.attention(q, k, v), (query, shared_key, shared_value)),
        "bias": Check(lambda q, k, v, b: attnfast.attention(q, k, v, bias=b), (*inputs, bias)),
        "sink": Check(lambda q, k, v, s: attnfast.attention(q, k, v, sink=s), (*inputs, sink)),
        "local-p": Check(
            lambda q, k, v, c: attnfast.attention(q, k, v, window=(1, 2), window_center=c, prior=("gaussian", c, 1.5)),
            (*inputs, centre),
        ),
        "lse": fields("output", "lse", return_lse=True),
        "weights": fields("output", "weights", return_weights="full"),
        "column sums": fields("output", "weights", return_weights="column_sum"),
        "row maximum": fields("output", "weights", return_weights="row_max"),
    }
    return {("attention", case): check for case, check in cases.items()}


def _additive() -> dict[tuple[str, str], Check]:
    inputs = draw(1, 2, 3, 4), draw(1, 2, 5, 4), draw(1, 2, 5, 3), draw(2, 4)
    bias, added, mask = draw(2, 4), draw(2, 3, 5), _mask(3, 5)

    def additive(**options: Any) -> Check:
        return Check(lambda q, k, v, w: attnfast.additive_attention(q, k, v, w, **options), inputs)

    def weights(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        result: Any = attnfast.additive_attention(q, k, v, w, return_weights="full", return_lse=True)
        return result.output, result.lse, result.weights

    cases = {
        "plain": additive(),
        "mask": additive(mask=mask),
        "causal": additive(causal="top_left"),
        "entmax15": additive(normalizer="entmax15"),
        "biases": Check(
            lambda q, k, v, w, b, a: attnfast.additive_attention(q, k, v, w, score_bias=b, bias=a),
            (*inputs, bias, added),
        ),
        "weights, lse": Check(weights, inputs),
    }
    return {("additive_attention", case): check for case, check in cases.items()}


def _others() -> dict[tuple[str, str], Check]:
    query, key, value = draw(1, 2, 3, 4), draw(1, 2, 5, 4), draw(1, 2, 5, 3)
    packed = draw(5, 2, 4), draw(6, 2, 4), draw(6, 2, 3)
    offsets_q, offsets_k = torch.tensor([0, 2, 5]), torch.tensor([0, 4, 6])
    mask = draw(3, 5)

    def varlen(**options: Any) -> Check:
        return Check(lambda q, k, v: attnfast.varlen_attention(q, k, v, offsets_q, offsets_k, 3, 4, **options), packed)

    return {
        ("varlen_attention", "plain"): varlen(),
        ("varlen_attention", "causal"): varlen(causal="top_left"),
        ("scaled_dot_product_attention", "causal"): Check(
            lambda q, k, v: attnfast.scaled_dot_product_attention(q, k, v, is_causal=True), (query, key, value)
        ),
        ("scaled_dot_product_attention", "mask"): Check(
            lambda q, k, v, m: attnfast.scaled_dot_product_attention(q, k, v, m), (query, key, value, mask)
        ),
    }
