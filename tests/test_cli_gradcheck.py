"""``python -m attnfast gradcheck``: it covers everything public, and it finds a wrong derivative."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch

import attnfast
from attnfast import cli
from attnfast.cli import _derivatives, gradcheck
from attnfast.cli._derivatives import Check

NAMES = {gradcheck.row_name(key) for key in gradcheck.checks()}
OPS = {op for op, _ in gradcheck.checks()}


def test_every_public_name_has_a_row_or_a_reason() -> None:
    public = {name for name in attnfast.__all__ if not name.startswith("__")}
    public |= {f"nn.{name}" for name in attnfast.nn.__all__}
    assert public == OPS | set(gradcheck.NOT_CHECKED)
    assert not OPS & set(gradcheck.NOT_CHECKED)


def test_what_is_not_checked_is_no_function_of_tensors() -> None:
    """A function or module with parameters cannot hide behind a reason."""
    for name in gradcheck.NOT_CHECKED:
        thing: Any = attnfast
        for part in name.split("."):
            thing = getattr(thing, part)
        if inspect.isfunction(thing):
            assert name == "explain"
        if inspect.isclass(thing) and issubclass(thing, torch.nn.Module):
            assert "nn.Parameter" not in inspect.getsource(thing) and "nn.Linear" not in inspect.getsource(thing)


def test_every_option_with_a_derivative_has_a_row() -> None:
    cases = ("soft cap", "bias", "sink", "lse", "weights", "column sums", "row maximum", "grouped heads", "local-p")
    assert {f"attention, {case}" for case in cases} <= NAMES
    for score in ("dot", "cosine", "l2"):
        assert f"attention, score {score}" in NAMES
    for normalizer in ("sparsemax", "entmax15", "sigmoid"):
        assert f"attention, {normalizer}" in NAMES
    for kind in ("mask", "candidates", "3 hops", "topk", "topk cosine", "topk additive", "topk candidates"):
        assert f"memory_read, {kind}" in NAMES


def test_a_row_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gradcheck", "weighted_gather"]) == 0
    head, row, summary = capsys.readouterr().out.splitlines()
    assert head.split()[-3:] == ["rel", "verdict", "seconds"] and "1st abs  1st rel  2nd abs  2nd rel" in head
    name, first_shape, second_shape, *numbers, verdict, seconds = row.split()
    assert (name, first_shape, second_shape, verdict) == ("weighted_gather", "3x2", "7x4", "ok")
    assert len(numbers) == 4 and all(0 < float(number) < 1e-7 for number in numbers) and float(seconds) > 0
    assert summary == "1 of 1 right"


def test_json_has_stable_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gradcheck", "NTMHead", "--only", "reading", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    (row,) = data["rows"]
    numbers = [row.pop(f"{order}_{kind}") for order in ("first", "second") for kind in ("abs", "rel")]
    assert all(0 < number < 1e-7 for number in numbers) and row.pop("seconds") > 0
    assert row == {
        "name": "nn.NTMHead, reading", "op": "nn.NTMHead", "case": "reading",
        "inputs": [[2, 3], [2, 4, 2], [2, 4]], "parameters": 4, "first": "ok", "second": "ok",
    }  # fmt: skip
    assert data["wrong"] == [] and set(data) == {"rows", "wrong"}


def test_list_names_rows_and_what_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gradcheck", "--list"]) == 0
    rows, reasons = capsys.readouterr().out.split("\nNot checked:\n")
    assert set(rows.splitlines()) == NAMES
    assert "  nn.InputMap: integers in, integers out: there is no derivative" in reasons
    assert cli.main(["gradcheck", "attention", "--list", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {row["op"] for row in data["rows"]} == {"attention"} and data["not_checked"] == gradcheck.NOT_CHECKED


@pytest.mark.parametrize("name", ["NTMHead", "nn.NTMHead", "attnfast.nn.NTMHead"])
def test_names_with_and_without_their_package(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gradcheck", name, "--list"]) == 0
    assert capsys.readouterr().out.startswith("nn.NTMHead, reading\nnn.NTMHead, writing\n\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["atention"], "no function or module 'atention'; is it attention?"),
        (["nothing like it"], "no function or module 'nothing like it'; see --list"),
        (["nn.InputMap"], "nn.InputMap cannot be checked: integers in"),
        (["set_isa"], "set_isa cannot be checked: takes no tensor"),
        (["--only", "no such row"], "no row has 'no such row' in its name"),
    ],
)
def test_names_that_have_no_row(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gradcheck", *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"python -m attnfast gradcheck: {message}") and said.err.count("\n") == 1
    assert said.out == ""


# One row of each kind here; `python -m attnfast gradcheck` runs them all.
RUN = [
    "attention, soft cap", "additive_attention, mask", "varlen_attention", "scaled_dot_product_attention, mask",
    "topk_scores", "memory_read, topk l2 2 hops", "product_key_read", "nn.Attention, additive, mask",
    "nn.LuongAttention, general, local-p", "nn.MultiheadAttention, bias_kv, zero_attn", "nn.HardAttention, evaluation",
    "nn.KeyValueMemory", "nn.EndToEndMemory", "nn.TextScore", "nn.WordSegmenter, loss", "nn.MemoryNetwork, loss",
]  # fmt: skip


@pytest.mark.parametrize("name", RUN)
def test_rows_are_right(name: str) -> None:
    rows = {gradcheck.row_name(key): (key, check) for key, check in gradcheck.checks().items()}
    row = gradcheck.check_row(*rows[name])
    assert (row["first"], row["second"]) == ("ok", "ok")
    assert all(row[f"{order}_rel"] < 1e-7 for order in ("first", "second"))


# ---------------------------------------------------------------------- wrong derivatives


def test_gradcheck_finds_a_wrong_derivative(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.softmax(query.detach() @ key.transpose(-2, -1), -1) @ value + query.sum()

    monkeypatch.setattr(attnfast, "attention", wrong)
    assert cli.main(["gradcheck", "--only", "attention, soft cap"]) == 1
    text = capsys.readouterr().out
    assert "WRONG" in text and "  first: GradcheckError" in text
    assert "0 of 1 right; wrong: attention, soft cap" in text


@pytest.mark.parametrize("name", ["topk_scores", "weighted_gather", "memory_read", "product_key_read"])
def test_gradcheck_finds_a_wrong_derivative_of_memory(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = getattr(attnfast, name)

    def wrong(*arguments: Any, **options: Any) -> Any:
        lost = [x.detach() if torch.is_tensor(x) else x for x in arguments[1:]]
        return real(arguments[0], *lost, **options)

    monkeypatch.setattr(attnfast, name, wrong)
    row = name + (", topk cosine" if name == "memory_read" else "")
    assert cli.main(["gradcheck", name, "--only", row]) == 1
    assert f"wrong: {row}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["KeyValueMemory", "BahdanauAttention", "MultiheadAttention"])
def test_gradcheck_finds_a_wrong_derivative_of_a_module(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = getattr(attnfast.nn, name)
    real = module.forward

    def wrong(self: Any, x: torch.Tensor, keys: torch.Tensor, *more: Any, **options: Any) -> Any:
        return real(self, x, keys.detach(), *more, **options)

    monkeypatch.setattr(module, "forward", wrong)
    assert cli.main(["gradcheck", name, "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["wrong"] == [row["name"] for row in data["rows"]]
    assert all(row["first"].startswith("GradcheckError") and row["first_abs"] > 1e-3 for row in data["rows"])


def test_gradcheck_finds_a_wrong_gradient_of_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attnfast.nn.BahdanauAttention.project_memory

    def wrong(self: Any, memory: torch.Tensor) -> Any:
        projected = real(self, memory)
        return projected._replace(keys=memory @ self.memory_weight.detach().t())

    monkeypatch.setattr(attnfast.nn.BahdanauAttention, "project_memory", wrong)
    assert cli.main(["gradcheck", "BahdanauAttention"]) == 1


def test_a_call_that_fails_is_a_wrong_row_without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(attnfast, "topk_scores", fails)
    key = ("topk_scores", "plain")
    row = gradcheck.check_row(key, gradcheck.checks()[key])
    assert row["first"] == row["second"] == "RuntimeError: no such kernel"
    assert row["first_abs"] is row["second_rel"] is None
    assert "WRONG" in gradcheck._line(row) and "        -" in gradcheck._line(row)


# ---------------------------------------------------------------------- the measure itself


def test_differences_are_those_of_the_jacobians() -> None:
    class Off(torch.autograd.Function):
        """x^2 with a gradient that is 0.5 too large everywhere."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            (x,) = ctx.saved_tensors
            return grad * (2 * x + 0.5)

    x = torch.tensor([1.0, -4.0], dtype=torch.float64, requires_grad=True)
    found = _derivatives.first_order(Check(Off.apply, (x,)))
    assert found.absolute == pytest.approx(0.5, abs=1e-6) and found.relative == pytest.approx(0.5 / 8, abs=1e-6)
    good = _derivatives.first_order(Check(lambda x: x * x, (x,)))
    assert good.absolute < 1e-8
    # The second derivative of Off is right in itself: d(grad * (2 x + 0.5)) is what autograd makes of its backward.
    assert _derivatives.second_order(Check(lambda x: x**3, (x,))).relative < 1e-8


def test_second_order_finds_a_first_derivative_without_one() -> None:
    class Once(torch.autograd.Function):
        """x^3; the derivative of its gradient by x is lost."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            (x,) = ctx.saved_tensors
            return grad * 3 * x.detach() ** 2

    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    check = Check(Once.apply, (x,))
    assert _derivatives.first_order(check).relative < 1e-8
    assert _derivatives.second_order(check).relative > 0.5
    row = gradcheck.check_row(("once", "plain"), check)
    assert row["first"] == "ok" and row["second"].startswith("GradcheckError")
