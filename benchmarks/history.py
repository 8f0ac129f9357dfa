"""The history of timings: what earlier runs measured, and whether the present one is slower.

benchmarks/history/ holds one CSV for each processor, with the columns of bench.csv that say what was measured, where
and by which commit: attnfast's row and that of the peer it is compared with. A run is appended whole by `append`,
found again by `find`, and set beside another by `judge`.

What is compared is the ratio, the peer's time over attnfast's in the same rounds, so that a machine that is faster or
busier as a whole changes nothing. The rounds of both runs say how far ratios scatter; only a ratio that fell by more is
a regression.
"""

from __future__ import annotations

import csv
import math
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .registry import EAGER, OURS, TORCH
from .report import grouped
from .results import OK, Row, plain, read_csv

FOLDER = Path(__file__).resolve().parent / "history"
COLUMNS = (
    "suite", "case", "pass", "threads", "peer", "status", "dtype", "rounds", "time_ms", "time_ms_q25", "time_ms_q75",
    "ratio", "ratio_q25", "ratio_q75", "machine", "cpu", "isa", "attnfast", "torch", "python", "commit", "date",
    "quick",
)  # fmt: skip
RELEASE = "release"

# A quartile of a normal distribution lies 0.67 of its standard deviation from the middle.
_QUARTILES_TO_SIGMA = 1 / 1.349
_SIGMAS = 2.0
_FLOOR = 0.03  # what two builds may differ by though nothing is different: where code and data come to lie


@dataclass(frozen=True)
class Judgement:
    """One row of both runs. `change` is the new ratio over the old one, `bound` what it may differ from 1 by."""

    new: Row
    old: Row
    change: float
    bound: float

    @property
    def verdict(self) -> str:
        distance = math.log(self.change)
        if abs(distance) <= math.log1p(self.bound):
            return "same"
        return "faster" if distance > 0 else "slower"

    @property
    def name(self) -> str:
        return f"{self.new.suite}: {self.new.case}, {self.new.pass_}, {self.new.threads} threads"

    def as_dict(self) -> dict[str, object]:
        row = self.new
        return {
            "suite": row.suite, "case": row.case, "pass": row.pass_, "threads": row.threads, "peer": row.peer,
            "old_ratio": self.old.ratio, "new_ratio": row.ratio, "change": self.change, "bound": self.bound,
            "verdict": self.verdict,
        }  # fmt: skip


def compared(group: dict[str, Row]) -> Row | None:
    """The row of a case whose ratio counts: that of torch's function, or of the formula where it has none."""
    for name in (TORCH, EAGER):
        row = group.get(name)
        if row is not None and row.status == OK and row.ratio:
            return row
    return None


def scatter(row: Row) -> float:
    """Standard deviation of the logarithm of the ratio from round to round, by its quartiles; 0 where unknown."""
    if not row.ratio_q25 or not row.ratio_q75:
        return 0.0
    return math.log(row.ratio_q75 / row.ratio_q25) * _QUARTILES_TO_SIGMA


def judge(new: Iterable[Row], old: Iterable[Row]) -> list[Judgement]:
    """The rows that both runs have, against the same peer."""
    before, found = grouped(old), []
    for key, group in grouped(new).items():
        now, then = compared(group), compared(before.get(key, {}))
        if now is None or then is None or now.peer != then.peer or not now.ratio or not then.ratio:
            continue
        # One round's scatter, not that of a median of many: the rounds of one run share the state of the machine.
        sigma = math.hypot(scatter(now), scatter(then))
        found.append(Judgement(now, then, now.ratio / then.ratio, math.exp(_SIGMAS * sigma) * (1 + _FLOOR) - 1))
    return found


def lost(new: Iterable[Row], old: Iterable[Row]) -> list[str]:
    """What attnfast could compute before and fails at now."""
    worked = {row.key for row in old if row.peer == OURS and row.status == OK}
    return [
        f"{row.suite}: {row.case}, {row.pass_}, {row.threads} threads"
        for row in new
        if row.peer == OURS and row.status != OK and row.key in worked
    ]


# ---------------------------------------------------------------------- the files


def file_of(row: Row, folder: Path) -> Path:
    """The CSV of a row's processor."""
    name = re.sub(r"[^a-z0-9]+", "-", row.cpu.lower()).strip("-") or "unknown"
    return folder / f"{name}.csv"


def append(rows: Iterable[Row], folder: Path) -> tuple[Path, int]:
    """Add a run to the history: attnfast's rows and those they are compared with. Returns the file and how many."""
    kept: list[Row] = []
    for group in grouped(rows).values():
        peer = compared(group)
        ours = group.get(OURS)
        if ours is not None and ours.status == OK and peer is not None:
            kept += [ours, peer]
    if not kept:
        raise ValueError("nothing to keep: no row has both attnfast's time and that of a peer")
    if not kept[0].commit:
        raise ValueError("the history is kept by commit, and this is no checkout")
    if kept[0].commit.endswith("-dirty"):
        raise ValueError(f"the checkout has changes that {kept[0].commit} does not name; commit them first")
    folder.mkdir(parents=True, exist_ok=True)
    path = file_of(kept[0], folder)
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(COLUMNS)
        for row in kept:
            values = plain(row)
            writer.writerow([_text(values[column]) for column in COLUMNS])
    return path, len(kept)


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def read_all(folder: Path) -> list[Row]:
    """Every row of every file, in the order of the files."""
    return [row for path in sorted(folder.glob("*.csv")) for row in read_csv(path)]


def find(reference: str, folder: Path, like: Row | None = None) -> list[Row]:
    """The rows of one earlier commit.

    Parameters
    ----------
    reference : str
        The beginning of a commit's hash, a version of attnfast whose tag ``v...`` exists, anything else that git
        knows as a commit, or ``"release"``: the last tag ``v...`` before this commit that has rows.
    folder : Path
        Where the files are.
    like : Row, optional
        Rows of its processor and instruction set are preferred, the latest before others.

    Raises
    ------
    LookupError
        Nothing was measured for it; the message names what there is.
    """
    rows = read_all(folder)
    for commit in _commits(reference):
        found = [row for row in rows if _same_commit(row.commit, commit)]
        if found:
            return _one_run(found, like)
    known = ", ".join(f"{commit} ({date})" for commit, date in {row.commit: row.date[:10] for row in rows}.items())
    raise LookupError(
        f"the history has no run of {reference!r}; it has {known or 'none at all'}"
        + (" (a release is a tag v...)" if reference == RELEASE else "")
    )


def _one_run(rows: list[Row], like: Row | None) -> list[Row]:
    """The rows of the run nearest in kind, the latest of them."""

    def rank(row: Row) -> tuple[bool, bool, str]:
        return (like is not None and row.cpu == like.cpu, like is not None and row.isa == like.isa, row.date)

    best = max(rows, key=rank)
    return [row for row in rows if (row.cpu, row.isa, row.date) == (best.cpu, best.isa, best.date)]


def _same_commit(one: str, other: str) -> bool:
    shorter = min(len(one), len(other))
    return shorter >= 6 and one[:shorter] == other[:shorter]


def _commits(reference: str) -> list[str]:
    """What a reference may mean, best first: hashes."""
    if reference == RELEASE:
        tags = _git("tag", "--list", "v*", "--merged", "HEAD", "--sort=-version:refname").split()
        return [hash_ for tag in tags if (hash_ := _git("rev-list", "-n", "1", tag))]
    named = [_git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}") for name in (f"v{reference}", reference)]
    return [*filter(None, named), *([reference] if re.fullmatch(r"[0-9a-f]{6,40}", reference) else [])]


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parents[1]), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
