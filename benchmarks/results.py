"""Rows of results and their CSV form."""

from __future__ import annotations

import csv
import dataclasses
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OK, UNSUPPORTED, FAILED, SKIPPED = "ok", "unsupported", "failed", "skipped"


@dataclass
class Row:
    """One peer on one pass of one case at one number of threads. None: not measured or without meaning."""

    suite: str
    case: str
    pass_: str
    threads: int
    peer: str
    status: str = OK
    note: str = ""
    dtype: str = ""
    batch: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    query_tokens: int | None = None
    key_tokens: int | None = None
    head_size: int | None = None
    value_size: int | None = None
    options: str = ""
    rounds: int | None = None
    calls_per_round: int | None = None
    time_ms: float | None = None  # median over rounds, and quartiles
    time_ms_q25: float | None = None
    time_ms_q75: float | None = None
    ratio: float | None = None  # this peer's time over attnfast's: above 1, attnfast is faster
    ratio_q25: float | None = None
    ratio_q75: float | None = None
    peak_extra_mib: float | None = None
    error: float | None = None  # of the pass's results against float64, relative to the largest of them
    gflops: float | None = None
    of_fma_peak: float | None = None  # share of the peak of float32 multiply-adds, timed in the same rounds
    of_stream: float | None = None  # one query: share of the rate at which its keys and values can be read once
    over_one_thread: float | None = None  # attnfast with one thread over this row's time, in the same rounds
    tiles: float | None = None  # suite "masks": share of tiles that the mask leaves
    ranks: int | None = None  # suite "distributed": processes; what follows is that of the rank that has most of it
    waited_ms: float | None = None  # for what other ranks send
    alone_ms: float | None = None  # the same exchanges with nothing to compute meanwhile
    sent_bytes: int | None = None  # handed to torch.distributed for other ranks
    sent_formula: int | None = None
    wire_bytes: int | None = None  # that left the process's sockets
    peak_formula_mib: float | None = None
    machine: str = ""
    cpu: str = ""
    isa: str = ""
    attnfast: str = ""
    torch: str = ""
    python: str = ""
    commit: str = ""
    date: str = ""
    quick: bool = False

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        return (self.suite, self.case, self.pass_, self.threads, self.peer)


def _column(name: str) -> str:
    return name.rstrip("_")


COLUMNS = tuple(_column(field.name) for field in dataclasses.fields(Row))


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def plain(row: Row) -> dict[str, Any]:
    """A row as a dictionary by column, for JSON."""
    return {_column(field.name): getattr(row, field.name) for field in dataclasses.fields(Row)}


def write_csv(rows: Iterable[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([_text(getattr(row, field.name)) for field in dataclasses.fields(Row)])


def read_csv(path: Path) -> list[Row]:
    """Rows of a CSV written by `write_csv`; columns it does not know are ignored.

    Raises
    ------
    ValueError
        The file is not a benchmark result.
    """
    hints = typing.get_type_hints(Row)
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        needed = {"suite", "case", "pass", "threads", "peer"}
        missing = needed - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} is not a benchmark result: it has no column {', '.join(sorted(missing))}")
        rows = []
        for line in reader:
            values: dict[str, Any] = {}
            for field in dataclasses.fields(Row):
                text = line.get(_column(field.name)) or ""
                values[field.name] = _parse(text, hints[field.name])
            rows.append(Row(**values))
    return rows


def _parse(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if kind is bool:
        return text == "True"
    if text == "":
        return None
    return float(text) if float in typing.get_args(kind) else int(text)
