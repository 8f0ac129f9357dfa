"""The history of timings and its regression report, on made-up histories: nothing here is timed."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import attnfast
from attnfast import cli
from attnfast.cli import gradcheck
from attnfast.cli._benchmarks import load_benchmarks

registry = load_benchmarks("registry")
results = load_benchmarks("results")
history = load_benchmarks("history")
functions = load_benchmarks("cases_functions")
Row = results.Row
OLD, NEW = "1111111aaa", "2222222bbb"


def run(
    commit: str, ratios: dict[str, float], *, scatter: float = 0.02, cpu: str = "Some CPU (1)", **more: Any
) -> list[Any]:
    """attnfast at 1 ms and its peer `ratio` times slower, for each case."""
    kind = {"cpu": cpu, "isa": "avx2", "commit": commit, "date": "2026-11-01 10:00 UTC", "torch": "2.13.0", **more}
    rows = []
    for case, ratio in ratios.items():
        at = ("functions", case, "forward", 1)
        rows.append(Row(*at, "attnfast", time_ms=1.0, time_ms_q25=0.9, time_ms_q75=1.1, ratio=1.0, rounds=9, **kind))
        quartiles = {"ratio_q25": ratio / (1 + scatter), "ratio_q75": ratio * (1 + scatter)}
        rows.append(Row(*at, "sdpa", time_ms=ratio, ratio=ratio, rounds=9, **quartiles, **kind))
    return rows


def verdicts(new: list[Any], old: list[Any]) -> dict[str, str]:
    return {row.new.case: row.verdict for row in history.judge(new, old)}


# ---------------------------------------------------------------------- the judgement


def test_only_what_exceeds_the_noise_is_slower() -> None:
    old = run(OLD, {"same": 2.0, "wobbles": 2.0, "slower": 2.0, "faster": 2.0})
    new = run(NEW, {"same": 2.0, "wobbles": 1.9, "slower": 1.6, "faster": 2.5})
    assert verdicts(new, old) == {"same": "same", "wobbles": "same", "slower": "slower", "faster": "faster"}


def test_the_bound_grows_with_the_scatter_of_either_run() -> None:
    for scatters in ((0.2, 0.0), (0.0, 0.2)):
        old, new = run(OLD, {"a": 2.0}, scatter=scatters[0]), run(NEW, {"a": 1.6}, scatter=scatters[1])
        assert verdicts(new, old) == {"a": "same"}
    assert verdicts(run(NEW, {"a": 1.6}, scatter=0.0), run(OLD, {"a": 2.0}, scatter=0.0)) == {"a": "slower"}
    (row,) = history.judge(run(NEW, {"a": 1.6}, scatter=0.1), run(OLD, {"a": 2.0}, scatter=0.1))
    sigma = math.log(1.1**2) / 1.349
    assert row.bound == pytest.approx(1.03 * math.exp(2 * math.sqrt(2) * sigma) - 1)


def test_without_scatter_three_per_cent_remain() -> None:
    for ratio, verdict in ((1.96, "same"), (1.92, "slower"), (2.04, "same"), (2.09, "faster")):
        old, new = run(OLD, {"a": 2.0}, scatter=0.0), run(NEW, {"a": ratio}, scatter=0.0)
        assert verdicts(new, old) == {"a": verdict}


def test_a_slower_machine_is_no_regression() -> None:
    old, new = run(OLD, {"a": 2.0}), run(NEW, {"a": 2.0})
    slow = [dataclasses.replace(row, time_ms=10 * row.time_ms) for row in new]
    assert verdicts(slow, old) == {"a": "same"}


def test_only_the_same_peer_is_compared() -> None:
    old, new = run(OLD, {"a": 9.0}), run(NEW, {"a": 1.0})
    eager = [dataclasses.replace(row, peer="eager" if row.peer == "sdpa" else row.peer) for row in old]
    assert history.judge(new, eager) == []
    assert verdicts([dataclasses.replace(r, peer="eager" if r.peer == "sdpa" else r.peer) for r in new], eager) == {
        "a": "slower"
    }


def test_rows_of_one_run_only_are_left_out_but_a_failure_is_lost() -> None:
    old, new = run(OLD, {"a": 2.0, "gone": 2.0}), run(NEW, {"a": 2.0, "added": 2.0})
    assert verdicts(new, old) == {"a": "same"} and history.lost(new, old) == []
    failed = dataclasses.replace(new[0], status=results.FAILED, time_ms=None)
    assert history.lost([failed, *new[1:]], old) == ["functions: a, forward, 1 threads"]


# ---------------------------------------------------------------------- the files


def test_a_run_is_appended_and_read_again(tmp_path: Path) -> None:
    rows = run(OLD, {"a": 2.0, "b": 3.0})
    rows.append(dataclasses.replace(rows[0], peer="compile", ratio=9.0))
    path, count = history.append(rows, tmp_path / "history")
    assert (path.name, count) == ("some-cpu-1.csv", 4), "attnfast and the peer that counts, of each case"
    again, _ = history.append(run(NEW, {"a": 2.5}), tmp_path / "history")
    lines = path.read_text().splitlines()
    assert again == path and len(lines) == 1 + 4 + 2 and lines[0] == ",".join(history.COLUMNS)
    back = history.read_all(tmp_path / "history")
    assert [row.commit for row in back] == [OLD] * 4 + [NEW] * 2
    assert back[1].ratio == 2.0 and back[1].ratio_q25 == pytest.approx(2 / 1.02, rel=1e-4) and back[0].rounds == 9


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (run("", {"a": 2.0}), "this is no checkout"),
        (run(f"{OLD}-dirty", {"a": 2.0}), f"changes that {OLD}-dirty does not name"),
        (run(OLD, {"a": 2.0})[:1], "no row has both"),
    ],
)
def test_what_the_history_refuses(rows: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        history.append(rows, tmp_path)
    assert not list(tmp_path.iterdir())


def test_find_prefers_the_same_machine_and_the_latest(tmp_path: Path) -> None:
    history.append(run(OLD, {"a": 1.0}, cpu="Other", date="2026-11-09 10:00 UTC"), tmp_path)
    history.append(run(OLD, {"a": 2.0}, date="2026-11-01 10:00 UTC"), tmp_path)
    history.append(run(OLD, {"a": 3.0}, date="2026-11-02 10:00 UTC"), tmp_path)
    history.append(run(NEW, {"a": 4.0}), tmp_path)
    here = run("", {"a": 1.0})[0]
    assert [row.ratio for row in history.find(OLD[:7], tmp_path, here)] == [1.0, 3.0]
    assert [row.ratio for row in history.find(OLD[:7], tmp_path)] == [1.0, 1.0], "any machine: the latest"
    with pytest.raises(LookupError, match=rf"no run of '3333333'; it has {OLD} \(2026-11-02\), {NEW}"):
        history.find("3333333", tmp_path)
    with pytest.raises(LookupError, match="none at all"):
        history.find(OLD, tmp_path / "nowhere")


def test_find_knows_tags_and_releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    hashes = []
    for tag in ("v0.1.0", "v0.2.0", "v0.10.0", ""):
        git("commit", "-q", "--allow-empty", "-m", tag or "later")
        hashes.append(git("rev-parse", "HEAD")[:10])
        if tag:
            git("tag", tag)
    assert len(set(hashes)) == 4
    monkeypatch.setattr(history, "_git", git)
    folder = tmp_path / "history"
    for number in (0, 1):  # v0.10.0 was not measured
        history.append(run(hashes[number], {"a": 1.0 + number}), folder)
    assert history.find("release", folder)[0].commit == hashes[1]
    assert history.find("0.1.0", folder)[0].commit == hashes[0]
    assert history.find("v0.1.0", folder)[0].commit == history.find("HEAD~3", folder)[0].commit == hashes[0]
    with pytest.raises(LookupError, match="no run of 'HEAD'"):
        history.find("HEAD", folder)


# ---------------------------------------------------------------------- the command


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, Path]:
    """A history with one run, and a present result that is slower in one of its rows."""
    history.append(run(OLD, {"a": 2.0, "b": 2.0}), tmp_path / "history")
    results.write_csv(run(NEW, {"a": 2.0, "b": 1.0}), tmp_path / "bench.csv")
    return tmp_path / "history", tmp_path / "bench.csv"


def test_the_report_and_its_status(kept: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--from", str(kept[1]), "--compare"]
    monkey = pytest.MonkeyPatch()
    monkey.setattr(history, "FOLDER", kept[0])
    try:
        assert cli.main([*arguments, OLD]) == 1
        text = capsys.readouterr().out
        assert "Changed by more than the noise" in text and "1 slower, 1 same, 0 faster, 0 lost" in text
        (line,) = [line for line in text.splitlines() if "slower" in line and "functions: b, forward" in line]
        assert "2.00x" in line and "1.00x" in line and "-50 %" in line
        results.write_csv(run(NEW, {"a": 2.0, "b": 2.4}), kept[1])
        assert cli.main([*arguments, OLD]) == 0
        assert "0 slower, 1 same, 1 faster" in capsys.readouterr().out
        assert cli.main([*arguments, "7777777"]) == 2
        assert "--compare: the history has no run of '7777777'" in capsys.readouterr().err
    finally:
        monkey.undo()


def test_nothing_to_compare_is_no_success(
    kept: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "FOLDER", kept[0])
    results.write_csv(run(NEW, {"another": 2.0}), kept[1])
    assert cli.main(["bench", "--from", str(kept[1]), "--compare", OLD]) == 2
    assert "--compare: the two results have no row with the same peer" in capsys.readouterr().err


def test_the_report_as_json(
    kept: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "FOLDER", kept[0])
    assert cli.main(["bench", "--from", str(kept[1]), "--compare", OLD, "--json"]) == 1
    comparison = json.loads(capsys.readouterr().out)["comparison"]
    assert comparison["against"]["commit"] == OLD and comparison["lost"] == []
    assert comparison["slower"] == ["functions: b, forward, 1 threads"]
    first = comparison["rows"][0]
    assert (first["case"], first["old_ratio"], first["new_ratio"], first["verdict"]) == ("a", 2.0, 2.0, "same")
    assert first["change"] == 1.0 and 0.03 < first["bound"] < 0.2


def test_saving_from_the_command(kept: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--from", str(kept[1]), "--save-history", str(kept[0])]
    assert cli.main(arguments) == 0
    assert "Added 4 rows to" in capsys.readouterr().out
    assert {row.commit for row in history.read_all(kept[0])} == {OLD, NEW}
    results.write_csv(run(f"{NEW}-dirty", {"a": 2.0}), kept[1])
    assert cli.main(arguments) == 2
    assert "--save-history: the checkout has changes" in capsys.readouterr().err


def test_a_result_that_lost_a_row_fails(kept: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "FOLDER", kept[0])
    rows = run(NEW, {"a": 2.0, "b": 2.0})
    rows[0] = dataclasses.replace(rows[0], status=results.UNSUPPORTED, note="no longer", time_ms=None)
    results.write_csv(rows, kept[1])
    assert cli.main(["bench", "--from", str(kept[1]), "--compare", OLD]) == 1


# ---------------------------------------------------------------------- what is followed


def test_every_public_function_is_followed() -> None:
    public = {name for name in attnfast.__all__ if not name.startswith("__") and name not in gradcheck.NOT_CHECKED}
    assert set(functions.FUNCTIONS) == public
    cases = registry.cases("functions", quick=True)
    assert {case.name for case in cases} == {f"{name} {size}" for name in public for size in ("small", "medium")}
    assert all({"forward", "backward"} <= set(case.passes) for case in cases)
    speed = load_benchmarks("test_speed")
    assert {case.name for case in cases} <= {case.name for case in speed.CASES}
    assert {"forward", "backward"} <= {run.values[1] for run in speed.RUNS}


@pytest.mark.parametrize("case", registry.cases("functions"), ids=lambda case: case.name)
def test_both_sides_compute_the_same(case: Any) -> None:
    inputs = case.inputs()
    expected, gradients = case.oracle(inputs)
    agreed = []
    for peer in registry.peers(case):
        try:
            workload = peer.build(case, inputs)
        except registry.Unsupported:
            continue
        out = workload.call()
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
        found = torch.autograd.grad(out, workload.wanted, workload.grad_out)
        for name, got, want in zip(inputs.wanted, found, gradients, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3, msg=f"{peer.name}: {name}")
        agreed.append(peer.name)
    assert agreed in (["attnfast", "sdpa"], ["attnfast", "eager"])


def test_the_recorded_history_can_be_read() -> None:
    rows = history.read_all(history.FOLDER)
    assert {row.case for row in rows} >= {case.name for case in registry.cases("functions")}
    assert all(row.commit and row.date and row.cpu and row.isa and row.torch and row.time_ms for row in rows)
    assert {row.peer for row in rows} == {"attnfast", "sdpa", "eager"}
