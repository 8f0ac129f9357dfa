"""``python -m attnfast gradcheck``: are the derivatives right on this machine?"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

import attnfast

from ._memory_checks import memory_checks

_WIDTH = 32  # of a row's name


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "gradcheck",
        help="check first and second derivatives in float64",
        description="Compare the first and second derivatives of attention, over its options, of the memory functions "
        "and of the networks around a memory with finite differences in float64. Exit status 1 when one is wrong.",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name contains TEXT")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def checks() -> dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]:
    """A function of differentiable float64 tensors and the point to check it at, by name."""
    torch.manual_seed(0)
    query, key, value = _draw(1, 2, 3, 4), _draw(1, 2, 5, 4), _draw(1, 2, 5, 3)
    shared_key, shared_value = _draw(1, 1, 5, 4), _draw(1, 1, 5, 3)
    packed_query, packed_key, packed_value = _draw(5, 2, 4), _draw(6, 2, 4), _draw(6, 2, 3)
    bias, sink = _draw(2, 3, 5), _draw(2)
    mask = torch.rand(3, 5) < 0.6
    mask[0] = False  # one row that sees nothing
    lengths = torch.tensor([4])
    offsets_q, offsets_k = torch.tensor([0, 2, 5]), torch.tensor([0, 4, 6])
    inputs = (query, key, value)

    def plain(**options: Any) -> tuple[Callable[..., Any], tuple[torch.Tensor, ...]]:
        return lambda q, k, v: attnfast.attention(q, k, v, **options), inputs

    def fields(*names: str, **options: Any) -> tuple[Callable[..., Any], tuple[torch.Tensor, ...]]:
        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
            result = attnfast.attention(q, k, v, **options)
            return tuple(getattr(result, name) for name in names)

        return call, inputs

    return {
        "plain": plain(),
        "score dot": plain(score="dot"),
        "score cosine": plain(score="cosine"),
        "score l2": plain(score="l2"),
        "causal, top left": plain(causal="top_left"),
        "causal, bottom right": plain(causal="bottom_right"),
        "window": plain(window=(1, 1)),
        "boolean mask": plain(mask=mask),
        "key lengths": plain(key_lengths=lengths),
        "ALiBi": plain(alibi_slopes=torch.tensor([0.5, 0.25], dtype=torch.float64)),
        "soft cap": plain(softcap=2.0),
        "grouped heads": (attnfast.attention, (query, shared_key, shared_value)),
        "bias": (lambda q, k, v, b: attnfast.attention(q, k, v, bias=b), (*inputs, bias)),
        "sink": (lambda q, k, v, s: attnfast.attention(q, k, v, sink=s), (*inputs, sink)),
        "local-p": (
            lambda q, k, v, c: attnfast.attention(q, k, v, window=(1, 2), window_center=c, prior=("gaussian", c, 1.5)),
            (*inputs, torch.tensor([0.3, 2.2, 4.4], dtype=torch.float64, requires_grad=True)),
        ),
        "lse": fields("output", "lse", return_lse=True),
        "weights": fields("output", "weights", return_weights="full"),
        "column sums": fields("output", "weights", return_weights="column_sum"),
        "row maximum": fields("output", "weights", return_weights="row_max"),
        "varlen": (
            lambda q, k, v: attnfast.varlen_attention(q, k, v, offsets_q, offsets_k, 3, 4),
            (packed_query, packed_key, packed_value),
        ),
        "torch's signature": (
            lambda q, k, v: attnfast.scaled_dot_product_attention(q, k, v, is_causal=True),
            inputs,
        ),
        **memory_checks(),
    }


def check_one(check: Callable[..., bool], function: Callable[..., Any], point: tuple[torch.Tensor, ...]) -> str:
    """ "ok", or the first line that says what is wrong."""
    try:
        return "ok" if check(function, point, raise_exception=True) else "wrong"
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def run(arguments: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    if not arguments.json:
        print(f"{'derivatives of':<{_WIDTH}}{'first':<10}{'second':<10}{'seconds':>8}")
    for name, (function, point) in checks().items():
        if arguments.only not in name:
            continue
        start = time.perf_counter()
        first = check_one(torch.autograd.gradcheck, function, point)
        second = check_one(torch.autograd.gradgradcheck, function, point)
        seconds = time.perf_counter() - start
        rows.append({"name": name, "first": first, "second": second, "seconds": round(seconds, 3)})
        if not arguments.json:
            shown = ["ok" if answer == "ok" else "WRONG" for answer in (first, second)]
            print(f"{name:<{_WIDTH}}{shown[0]:<10}{shown[1]:<10}{seconds:>8.2f}", flush=True)
            for order, answer in (("first", first), ("second", second)):
                if answer != "ok":
                    print(f"  {order}: {answer}")
    wrong = [row["name"] for row in rows if (row["first"], row["second"]) != ("ok", "ok")]
    if arguments.json:
        print(json.dumps({"rows": rows, "wrong": wrong}, indent=2))
    else:
        print(f"{len(rows) - len(wrong)} of {len(rows)} right" + (f"; wrong: {', '.join(wrong)}" if wrong else ""))
    return 1 if wrong or not rows else 0
