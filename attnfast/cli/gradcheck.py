"""``python -m attnfast gradcheck``: are the derivatives right on this machine?"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from . import CommandError, described
from ._derivatives import Check, Difference, first_order, second_order
from ._function_checks import function_checks
from ._memory_checks import memory_checks
from ._module_checks import module_checks

_ROW = "{:<48}{:<30}{:>9}{:>9}{:>9}{:>9}  {:<8}{:>7}"
_HEAD = ("op or module, case", "inputs", "1st abs", "1st rel", "2nd abs", "2nd rel", "verdict", "seconds")

# Public names of attnfast and of attnfast.nn without a row.
_RESULT = "a tuple of results; the function or module that returns it is checked"
_INTEGERS = "integers in, integers out: there is no derivative"
NOT_CHECKED = {
    "AttentionOutput": _RESULT,
    "MemoryReadOutput": _RESULT,
    "ProductKeyReadOutput": _RESULT,
    "SampledAttentionOutput": _RESULT,
    "available_isas": "takes no tensor",
    "explain": "computes nothing: it says what a call would do",
    "get_isa": "takes no tensor",
    "set_isa": "takes no tensor",
    "memory": "tables and indexes; what MemoryStore.read computes is memory_read",
    "reference": "plain torch operations, which have torch's derivatives",
    "viz": "pictures",
    "nn": "a package: its modules have rows, named nn.NAME",
    "nn.ContextBags": _INTEGERS,
    "nn.EndToEndMemoryOutput": _RESULT,
    "nn.Generalization": _INTEGERS,
    "nn.GlimpseSensor": "a gather of pixels and a mean; tests/test_nn_glimpse.py has its gradient",
    "nn.HardAttentionOutput": _RESULT,
    "nn.InputMap": _INTEGERS,
    "nn.KeyValueMemoryOutput": _RESULT,
    "nn.Memory": "a tuple of integers",
    "nn.MemoryAttention": "a base class without a score of its own; the modules made of it are checked",
    "nn.MemoryNetworkOutput": _RESULT,
    "nn.ProjectedMemory": "a tuple; the modules that take it are checked",
    "nn.Text": "a tuple of integers",
}

_EXAMPLES = """\
examples:
  python -m attnfast gradcheck                              every row, about two minutes on one core
  python -m attnfast gradcheck attention memory_read        two functions, over their options
  python -m attnfast gradcheck nn.BahdanauAttention --json  one module with its parameters, as JSON
  python -m attnfast gradcheck --only entmax15              rows by a part of their names
  python -m attnfast gradcheck --list                       the rows, and which names have none and why

columns:
  1st, 2nd  the first and the second derivative: the largest difference between backward and central finite
            differences (step 1e-6), and the same over the largest number of the numerical Jacobian
  inputs    shapes, and how many parameters of a module (+4p) are inputs too
  verdict   of torch.autograd.gradcheck and gradgradcheck with their default tolerances

JSON: {"rows": [{"name", "op", "case", "inputs" (shapes), "parameters" (how many more inputs), "first", "second" ("ok"
or what is wrong), "first_abs", "first_rel", "second_abs", "second_rel" (null: no number), "seconds"}], "wrong":
[names]}; with --list {"rows": [{"name", "op", "case"}], "not_checked": {name: why}}.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = described(
        commands,
        "gradcheck",
        help="check first and second derivatives in float64",
        description="Compare the first and second derivatives of every function of attnfast, over its options, and of "
        "every module of attnfast.nn, with finite differences in float64.",
        examples=_EXAMPLES,
        failure="a derivative is wrong",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="functions or modules (attention, nn.NTMHead); all")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name contains TEXT")
    parser.add_argument("--list", action="store_true", help="name the rows, and what has none, and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def checks() -> dict[tuple[str, str], Check]:
    """The rows by (public name, case)."""
    torch.manual_seed(0)
    return {**function_checks(), **memory_checks(), **module_checks()}


def row_name(key: tuple[str, str]) -> str:
    """``"attention, soft cap"``; the plain case is called by the function's name alone."""
    op, case = key
    return op if case == "plain" else f"{op}, {case}"


def check_one(check: Callable[..., bool], function: Callable[..., Any], point: tuple[torch.Tensor, ...]) -> str:
    """ "ok", or the first line that says what is wrong."""
    try:
        return "ok" if check(function, point, raise_exception=True) else "wrong"
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _measure(order: Callable[[Check], Difference], check: Check, verdict: str) -> Difference:
    """NaN where the derivative cannot be computed at all; the verdict has the reason then."""
    try:
        return order(check)
    except Exception:
        if verdict == "ok":
            raise
        return Difference(math.nan, math.nan)


def check_row(key: tuple[str, str], check: Check) -> dict[str, Any]:
    """One row of the table, as plain data."""
    start = time.perf_counter()
    first = check_one(torch.autograd.gradcheck, check.function, check.point)
    second = check_one(torch.autograd.gradgradcheck, check.function, check.point)
    found = {"first": _measure(first_order, check, first), "second": _measure(second_order, check, second)}
    inputs = check.point[: len(check.point) - check.parameters]
    row = {
        "name": row_name(key),
        "op": key[0],
        "case": key[1],
        "inputs": [list(x.shape) for x in inputs],
        "parameters": check.parameters,
        "first": first,
        "second": second,
    }
    for order, difference in found.items():
        for name, number in zip(("abs", "rel"), difference):
            row[f"{order}_{name}"] = number if math.isfinite(number) else None
    row["seconds"] = round(time.perf_counter() - start, 3)
    return row


def chosen(names: list[str], only: str, rows: dict[tuple[str, str], Check]) -> dict[tuple[str, str], Check]:
    """The rows of these names, given with or without their package: ``nn.NTMHead``, ``NTMHead``."""
    ops = {op for op, _ in rows}
    wanted = set()
    for given in names:
        name = given.removeprefix("attnfast.")
        for candidate in (name, f"nn.{name}"):
            if candidate in NOT_CHECKED:
                raise CommandError(f"{candidate} cannot be checked: {NOT_CHECKED[candidate]}")
            if candidate in ops:
                wanted.add(candidate)
                break
        else:
            near = difflib.get_close_matches(name, sorted(ops) + [op.removeprefix("nn.") for op in ops], 1)
            raise CommandError(f"no function or module {given!r}" + (f"; is it {near[0]}?" if near else "; see --list"))
    found = {key: row for key, row in rows.items() if (not wanted or key[0] in wanted) and only in row_name(key)}
    if not found:
        raise CommandError(f"no row has {only!r} in its name; see --list")
    return found


def _shapes(row: dict[str, Any]) -> str:
    shapes = " ".join("x".join(map(str, shape)) or "1" for shape in row["inputs"])
    if len(shapes) > 24:
        shapes = shapes[:22] + ".."
    return " ".join(filter(None, [shapes, f"+{row['parameters']}p" if row["parameters"] else ""]))


def _number(number: float | None) -> str:
    return "-" if number is None else f"{number:.0e}"


def _line(row: dict[str, Any]) -> str:
    right = (row["first"], row["second"]) == ("ok", "ok")
    numbers = (_number(row[f"{order}_{kind}"]) for order in ("first", "second") for kind in ("abs", "rel"))
    verdict = "ok" if right else "WRONG"
    return _ROW.format(row["name"], _shapes(row), *numbers, verdict, f"{row['seconds']:.2f}")


def _list(rows: dict[tuple[str, str], Check], as_json: bool) -> int:
    if as_json:
        names = [{"name": row_name(key), "op": key[0], "case": key[1]} for key in rows]
        print(json.dumps({"rows": names, "not_checked": NOT_CHECKED}, indent=2))
        return 0
    for key in rows:
        print(row_name(key))
    print("\nNot checked:")
    for name, why in NOT_CHECKED.items():
        print(f"  {name}: {why}")
    return 0


def run(arguments: argparse.Namespace) -> int:
    selected = chosen(arguments.names, arguments.only, checks())
    if arguments.list:
        return _list(selected, arguments.json)
    rows: list[dict[str, Any]] = []
    if not arguments.json:
        print(_ROW.format(*_HEAD))
    for key, check in selected.items():
        row = check_row(key, check)
        rows.append(row)
        if arguments.json:
            continue
        print(_line(row), flush=True)
        for order in ("first", "second"):
            if row[order] != "ok":
                print(f"  {order}: {row[order]}")
    wrong = [row["name"] for row in rows if (row["first"], row["second"]) != ("ok", "ok")]
    if arguments.json:
        print(json.dumps({"rows": rows, "wrong": wrong}, indent=2))
    else:
        print(f"{len(rows) - len(wrong)} of {len(rows)} right" + (f"; wrong: {', '.join(wrong)}" if wrong else ""))
    return 1 if wrong else 0
