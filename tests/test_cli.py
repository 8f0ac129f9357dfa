"""The command line, as a user runs it: in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import attnfast
from attnfast import cli
from attnfast.cli import _benchmarks, bench, info

ROOT = Path(attnfast.__file__).resolve().parents[1]
COMMANDS = ("info", "explain", "bench", "gradcheck", "plot")


def run(*arguments: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    answer = subprocess.run(
        [sys.executable, "-m", "attnfast", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert answer.returncode == status, f"{arguments} ended with {answer.returncode}\n{answer.stdout}\n{answer.stderr}"
    return answer


# ---------------------------------------------------------------------- usage


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    for command in COMMANDS:
        assert re.search(rf"^ +{command}\s{{2,}}\w", text, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: python -m attnfast {command}" in text
    examples, _, statuses = text.partition("examples:\n")[2].partition("exit status:\n")
    assert examples.count(f"python -m attnfast {command} ") >= 2
    assert "  0  success\n" in statuses and "  2  wrong usage" in statuses
    assert ("  1  " in statuses) == (command in ("bench", "gradcheck"))
    assert ("--json" in text) == ("\nJSON: {" in text) == (command != "plot")
    assert max(len(line) for line in text.splitlines()) <= 120


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_in_the_help_are_right_usage(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As far as reading the command line goes: `run` is not called."""
    parser = cli.build_parser()
    with pytest.raises(SystemExit):
        parser.parse_args([command, "--help"])
    examples = re.findall(r"^  (?:\w+=\w+ )?python -m attnfast (.*?)(?:  .*)?$", capsys.readouterr().out, re.MULTILINE)
    assert len(examples) >= 2
    for example in examples:
        assert parser.parse_args(shlex.split(example)).command == command


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "python -m attnfast: the following arguments are required: COMMAND (python -m attnfast --help)"),
        (("no-such-command",), "python -m attnfast: argument COMMAND: invalid choice: 'no-such-command'"),
        (("explain", "--shape", "1,2,3"), "python -m attnfast explain: argument --shape: takes B,H,T_q,D"),
        (("explain", "--softcap", "high"), "python -m attnfast explain: argument --softcap: invalid float value"),
        (("plot",), "python -m attnfast plot: the following arguments are required: FILE"),
        (("info", "--no-such-option"), "python -m attnfast: unrecognized arguments: --no-such-option"),
        (("bench", "--threads"), "python -m attnfast bench: argument --threads: expected one argument"),
    ],
)
def test_wrong_usage_is_status_2_and_one_line(
    arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(line) and said.err.count("\n") == 1


def test_errors_of_many_lines_become_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(arguments: Any) -> int:
        raise cli.CommandError("first line\n  second line")

    monkeypatch.setattr(info, "run", refuse)
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "python -m attnfast info: first line second line\n"


# ---------------------------------------------------------------------- info


def test_info_tells_versions_and_isas() -> None:
    from attnfast import _C
    from attnfast._ext import has_cuda

    text = run("info").stdout
    assert attnfast.__version__ in text
    assert str(torch.__version__) in text
    assert ("cuda built for sm 80" if has_cuda() else "cuda not built") in text
    for name in ("baseline", "avx2", "avx512", "avx512_bf16"):
        assert f"\n  {name} " in text
    data = json.loads(run("info", "--json").stdout)
    assert data["isa"]["compiled"] == list(_C.compiled_isas())
    assert data["isa"]["available"] == list(_C.available_isas())
    assert data["isa"]["used"] in data["isa"]["available"]
    assert data["isa"]["status"][data["isa"]["used"]] == "in use"
    assert data["attnfast"] == attnfast.__version__
    assert Path(data["binary"]).exists()


def test_info_under_a_forced_isa() -> None:
    data = json.loads(run("info", "--json", ATTNFAST_ISA="baseline").stdout)
    assert data["isa"]["used"] == "baseline"
    assert data["isa"]["forced"] == "baseline"
    for name in data["isa"]["available"]:
        if name != "baseline":
            assert data["isa"]["status"][name] == "available, not in use: ATTNFAST_ISA=baseline asks for another"


@pytest.mark.parametrize(
    ("name", "compiled", "available", "used", "missing", "expected"),
    [
        ("avx2", "baseline avx2", "baseline avx2", "avx2", "", "in use"),
        ("baseline", "baseline avx2", "baseline avx2", "avx2", "", "available, not in use: avx2 is faster"),
        ("avx512", "baseline avx2", "baseline avx2", "avx2", "", "not built (this"),
        (
            "avx512",
            "baseline avx2 avx512",
            "baseline avx2",
            "avx2",
            "avx512f",
            "built, but this processor lacks avx512f",
        ),
        ("avx2", "baseline avx2", "baseline", "baseline", "fma avx512f", "built, but this processor lacks fma"),
        (
            "avx512",
            "baseline avx2 avx512 avx512_bf16",
            "baseline avx2",
            "avx2",
            "avx512f avx512_bf16",
            "built, but this processor lacks avx512f",
        ),
        (
            "avx512_bf16",
            "baseline avx2 avx512 avx512_bf16",
            "baseline avx2 avx512",
            "avx512",
            "avx512_bf16",
            "built, but this processor lacks avx512_bf16",
        ),
        ("avx2", "baseline avx2", "baseline avx2", "baseline", "", "available, not in use: another was chosen"),
    ],
)
def test_isa_status_says_why(
    monkeypatch: pytest.MonkeyPatch, name: str, compiled: str, available: str, used: str, missing: str, expected: str
) -> None:
    monkeypatch.delenv("ATTNFAST_ISA", raising=False)
    known = dict.fromkeys(("avx2", "fma", "avx512f", "avx512_bf16"), True)
    features = {**known, **dict.fromkeys(missing.split(), False)}
    status = info.isa_status(name, compiled.split(), available.split(), used, features)
    assert status.startswith(expected)
    if "lacks" in expected:
        assert status == expected


# ---------------------------------------------------------------------- explain


def test_explain_matches_the_function(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "--shape", "1,2,16,8", "--causal", "top_left"]) == 0
    query = torch.zeros(1, 2, 16, 8)
    expected = attnfast.explain(attnfast.attention, query, query, query, causal="top_left")
    assert capsys.readouterr().out.strip() == expected.strip()
    assert expected.strip()


def test_explain_json_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kv-heads", "1", "--key-tokens", "5", "--value-size", "3", "--dtype", "float64", "--window=2,-1"]
    extra = ["--mask", "--bias", "--grad", "--softcap", "4", "--return-weights", "row_max", "--score", "cosine"]
    assert cli.main(["explain", "--shape", "1,2,4,8", *options, *extra, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["function"] == "attention"
    assert data["shapes"] == {"query": [1, 2, 4, 8], "key": [1, 1, 5, 8], "value": [1, 1, 5, 3]}
    assert data["options"]["window"] == [2, -1]
    assert data["options"]["softcap"] == 4
    assert data["explanation"]
    assert cli.main(["explain", "--torch-signature", "--kv-heads", "4", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["function"] == "scaled_dot_product_attention"
    assert data["options"]["enable_gqa"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-heads", "3"], "H"),
        (["--score", "manhattan"], "score"),
        (["--dropout", "1.5"], "dropout_p"),
        (["--torch-signature", "--softcap", "2"], "--softcap is not part of scaled_dot_product_attention's signature"),
        (["--torch-signature", "--causal", "bottom_right"], "top-left causality"),
        (["--shape", "1,-2,3,4"], "takes B,H,T_q,D"),
    ],
)
def test_explain_refuses_a_wrong_call(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = cli.main(["explain", *arguments])
    except SystemExit as stop:
        status = int(str(stop.code))
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


MEMORY_CALLS: dict[str, tuple[list[str], Any]] = {
    "topk_scores": (
        ["--queries", "3", "--slots", "50", "--size", "8", "--topk", "5", "--mask", "--dtype", "bfloat16"],
        lambda: attnfast.explain(
            attnfast.topk_scores, torch.zeros(3, 8).bfloat16(), torch.zeros(50, 8).bfloat16(), 5,
            mask=torch.ones(50, dtype=torch.bool),
        ),
    ),
    "weighted_gather": (
        ["--queries", "3", "--slots", "50", "--value-size", "8", "--topk", "5", "--sparse-grad", "--grad"],
        lambda: attnfast.explain(
            attnfast.weighted_gather, torch.zeros(3, 5).long(), torch.zeros(3, 5, requires_grad=True),
            torch.zeros(50, 8, requires_grad=True), sparse_grad=True,
        ),
    ),
    "memory_read": (
        ["--queries", "3", "--slots", "50", "--size", "8", "--value-size", "6", "--score", "additive", "--topk", "4"],
        lambda: attnfast.explain(
            attnfast.memory_read, torch.zeros(3, 8), torch.zeros(50, 8), torch.zeros(50, 6), topk=4,
            score=("additive", torch.zeros(8)),
        ),
    ),
    "product_key_read": (
        ["--queries", "3", "--slots", "49", "--size", "8", "--value-size", "6", "--topk", "9", "--heads", "2"],
        lambda: attnfast.explain(
            attnfast.product_key_read, torch.zeros(3, 2, 2, 4), torch.zeros(2, 7, 4), torch.zeros(2, 7, 4),
            torch.zeros(49, 6), 9,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEMORY_CALLS)
def test_explain_of_memory_functions(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options, expected = MEMORY_CALLS[name]
    assert cli.main(["explain", "--memory", name, *options]) == 0
    assert capsys.readouterr().out.strip() == expected().strip()
    assert cli.main(["explain", "--memory", name, *options, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["function"] == name and data["explanation"] == expected()
    assert cli.main(["explain", "--memory", name]) == 0, "the defaults are a right call"


def test_explain_of_candidates(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "--memory", "memory_read", "--queries", "6", "--candidates", "7", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["shapes"]["values"] == [65536, 64]
    assert "the rows of 42 candidates are copied" in data["explanation"] and "6 packed" in data["explanation"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topk", "3"], "--topk is an option of the memory functions (--memory NAME)"),
        (["--memory", "memory_read", "--causal", "top_left"], "--causal is not an option of memory_read"),
        (["--memory", "topk_scores", "--value-size", "3"], "--value-size is not an option of topk_scores"),
        (["--memory", "topk_scores", "--topk", "-3"], "a size is negative"),
        (["--memory", "topk_scores", "--slots", "9", "--topk", "10"], "k: expected an integer from 0"),
        (["--memory", "memory_read", "--score", "manhattan"], "score: expected one of"),
        (["--memory", "memory_read", "--candidates", "70000"], "--candidates takes 0 to N = 65536, got 70000"),
        (["--memory", "product_key_read", "--slots", "50"], "--slots a square"),
        (["--memory", "no_such_read"], "invalid choice"),
    ],
)
def test_explain_refuses_a_wrong_memory_call(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(["explain", *arguments])
    except SystemExit as stop:
        status = int(str(stop.code))
    error = capsys.readouterr().err
    assert status == 2 and message in error and "Traceback" not in error


# ---------------------------------------------------------------------- bench and plot


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A real run of the smallest suite: folder and what was printed."""
    folder = tmp_path_factory.mktemp("bench")
    answer = run("bench", "--suite", "overhead", "--quick", "--threads", "1", "--out", str(folder))
    return folder, answer.stdout


def test_bench_prints_tables_and_writes_files(result: tuple[Path, str]) -> None:
    folder, text = result
    assert "Cost of a call" in text
    assert "Summary" in text
    assert "1,1,8,64" in text
    rows = _benchmarks.load_benchmarks("results").read_csv(folder / "bench.csv")
    assert {row.peer for row in rows} == {"attnfast", "attnfast._C", "sdpa", "sdpa math"}
    assert {row.pass_ for row in rows} == {"forward", "forward, recording", "forward+backward"}
    assert {row.status for row in rows} == {"ok"}
    assert {row.threads for row in rows} == {1}
    assert all(row.quick and row.isa and row.date and row.machine for row in rows)
    assert (folder / "bench.png").read_bytes()[:4] == b"\x89PNG"


def test_bench_shows_and_compares_a_result(result: tuple[Path, str], tmp_path: Path) -> None:
    source = str(result[0] / "bench.csv")
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- bench:begin -->\n<!-- bench:end -->\n")
    text = run("bench", "--from", source, "--compare", source, "--readme", str(readme)).stdout
    assert "Cost of a call" in text
    assert "geometric mean: 1.00x faster than before, 1.00x against torch" in text
    assert "| overhead: 1,1,8,64, forward | 1 |" in readme.read_text()


def test_bench_json_is_the_csv_and_nothing_else(result: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    results = _benchmarks.load_benchmarks("results")
    assert cli.main(["bench", "--from", str(result[0] / "bench.csv"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    rows = results.read_csv(result[0] / "bench.csv")
    assert data == {"rows": [results.plain(row) for row in rows], "interrupted": False}
    assert all(tuple(row) == results.COLUMNS for row in data["rows"]) and data["rows"][0]["pass"] == "forward"


def test_a_run_with_json_says_the_rest_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--suite", "overhead", "--quick", "--threads", "1", "--no-memory", "--json"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    data = json.loads(said.out)
    assert {row["status"] for row in data["rows"]} == {"ok"} and data["interrupted"] is False
    assert "bench.csv" in said.err


def test_plot_draws_a_result(result: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "picture.png"
    assert cli.main(["plot", str(result[0] / "bench.csv"), "--out", str(target)]) == 0
    assert target.read_bytes()[:4] == b"\x89PNG"
    assert str(target) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--device", "cuda"], "this build of attnfast has no CUDA kernels"),
        (
            ["bench", "--suite", "nothing"],
            "no suite 'nothing'; there are ",
        ),
        (["bench", "--isa", "mmx"], "unknown ISA 'mmx'"),
        (["bench", "--threads", "0"], "--threads takes positive numbers separated by commas, got '0'"),
        (["bench", "--threads", "one"], "--threads takes positive numbers separated by commas, got 'one'"),
        (["bench", "--case", "no such case"], "has 'no such case' in its name"),
        (["bench", "--compare", "missing.csv"], "cannot read missing.csv: No such file"),
        (["bench", "--out", "pyproject.toml"], "--out: cannot make the folder pyproject.toml: File exists"),
        (["bench", "--readme", "missing.md"], "--readme: there is no file missing.md"),
        (["plot", "missing.csv"], "cannot read missing.csv: No such file"),
        (["plot", "pyproject.toml"], "pyproject.toml is not a benchmark result"),
    ],
)
def test_bench_and_plot_refuse_clearly(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"python -m attnfast {arguments[0]}: ")
    assert "Traceback" not in error


def test_an_interrupted_bench_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = _benchmarks.load_benchmarks("runner")
    case = runner.Run._case

    def once(self: Any, chosen: Any) -> None:
        case(self, chosen)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.Run, "_case", once)
    arguments = ["bench", "--suite", "overhead", "--quick", "--threads", "1", "--no-memory", "--out", str(tmp_path)]
    assert cli.main(arguments) == 130
    rows = _benchmarks.load_benchmarks("results").read_csv(tmp_path / "bench.csv")
    assert {row.case for row in rows} == {runner.registry.cases("overhead", True)[0].name}
    assert (tmp_path / "bench.png").exists()


def test_bench_holds_both_sides_to_an_instruction_set(tmp_path: Path) -> None:
    code = (
        "import sys, torch, attnfast.cli as cli; from attnfast.cli import bench; from attnfast._ext import _C;"
        "bench._measure = lambda *a: (print(_C.get_isa(), torch.backends.cpu.get_cpu_capability()), sys.exit(0));"
        "cli.main(['bench', '--isa', 'baseline'])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == ["baseline", "DEFAULT"]


def test_bench_names_missing_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(bench._NEEDED, "no_such_module", "no-such-package")
    assert cli.main(["bench", "--list"]) == 2
    assert "needs no-such-package" in capsys.readouterr().err


def test_bench_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--list", "--suite", "dot"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "dot: Dot-product attention"
    assert "  1,4,8192,64 (forward, backward, forward+backward), full run only" in lines
    assert not any(line.startswith("overhead") for line in lines)


def test_bench_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--list", "--suite", "overhead", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert set(data) == {"suites"} and set(data["suites"]) == {"overhead"}
    assert data["suites"]["overhead"][0] == {
        "case": "1,1,8,64", "passes": ["forward", "forward, recording", "forward+backward"], "quick": True,
    }  # fmt: skip


def test_bench_fails_where_attnfast_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = _benchmarks.load_benchmarks("results")
    row = results.Row("overhead", "1,1,8,64", "forward", 1, "attnfast", status=results.FAILED, note="broken")
    results.write_csv([row], tmp_path / "bench.csv")
    assert cli.main(["bench", "--from", str(tmp_path / "bench.csv"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["rows"][0]["note"] == "broken"


def test_threads_are_read_in_order() -> None:
    assert bench.parse_threads("2,1,2") == (2, 1)
    with pytest.raises(cli.CommandError):
        bench.parse_threads("1,,2")


def test_benchmarks_are_found_in_an_installed_package(tmp_path: Path) -> None:
    """A wheel holds benchmarks/ as attnfast/benchmarks: made here of links, and preferred to the checkout's folder."""
    package = tmp_path / "attnfast"
    package.mkdir()
    for path in Path(attnfast.__file__).resolve().parent.iterdir():
        if path.name not in ("benchmarks", "__pycache__"):
            (package / path.name).symlink_to(path)
    (package / "benchmarks").symlink_to(Path(_benchmarks.load_benchmarks().__file__ or "").resolve().parent)
    code = (
        "from attnfast.cli._benchmarks import load_benchmarks as l; print(l().__file__); print(l('registry').suites())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert answer.returncode == 0, answer.stderr
    first, second = answer.stdout.splitlines()
    assert first == str(package / "benchmarks" / "__init__.py")
    assert "'threads'" in second


def test_benchmarks_missing_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.split(".")[:2] == ["attnfast", "benchmarks"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(_benchmarks.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(_benchmarks, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(ModuleNotFoundError, match=r"neither installed as attnfast\.benchmarks nor found in"):
        _benchmarks.load_benchmarks()
