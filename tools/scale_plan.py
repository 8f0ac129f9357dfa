"""Writes docs/scale.md: reads over 10^9 to 10^11 slots and a context of a million tokens, by simulation.

    python tools/scale_plan.py              say whether docs/scale.md is what this script writes
    python tools/scale_plan.py --write      write it
    python tools/scale_plan.py --measure    measure this machine anew (a minute) into tools/scale_plan.json, and write

What one rank computes is measured, on one core; what ranks send is counted by attnfast/distributed/_traffic.py; links
are data sheets. The same model predicts 2 and 4 processes on this machine, which the page sets beside their times.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import roofline

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attnfast.distributed import _traffic as formulas  # noqa: E402

DOCUMENT = ROOT / "docs" / "scale.md"
MEASURED = ROOT / "tools" / "scale_plan.json"
SIZE, PICKS, QUERIES = 64, 32, 16  # D = D_v, k, and B of each rank
SLOTS = (10**9, 10**10, 10**11)
RANKS = (8, 64, 512, 1024)
TOKENS, HEADS, KV_HEADS, HEAD = 2**20, 32, 8, 128  # a layer of the size of Llama 3's 8 B
MESSAGES = 7  # collectives of a top-k read: agreement, queries, two lists, three of the route
PROBED = 0.001  # of the slots that an inverted file looks at
HBM_GIB, HBM_SHARE = 80, 0.8  # of a GPU, and what of it tables may take


@dataclass(frozen=True)
class Link:
    name: str
    gb_s: float  # one direction of one rank
    message_s: float  # assumed cost of a message
    source: str


LINKS = (
    Link(
        "NVLink 4", 450, 2e-6, "H100 data sheet: 900 GB/s of both directions; within 8 GPUs, 256 with NVLink switches"
    ),
    Link("InfiniBand NDR", 50, 4e-6, "400 Gb/s, ConnectX-7 data sheet; one port for a rank"),
    Link("InfiniBand HDR", 25, 4e-6, "200 Gb/s, ConnectX-6 data sheet"),
    Link("100 GbE", 12.5, 2e-5, "100 Gb/s"),
)
NVLINK, NDR, HDR, ETHERNET = LINKS


@dataclass(frozen=True)
class Costs:
    """Seconds of one core, measured: see `measure` in scale_measure.py."""

    machine: str
    date: str
    commit: str
    cores: int  # that other work left
    call_s: float  # a read of a memory of one rank with next to nothing in it
    message_s: float  # one exchange of a few bytes, 2 processes here
    byte_s: float
    scan_s: float  # topk_scores, for a query and slot
    partial_s: float  # by columns: partial products and the choice, for a query and slot of D columns
    merge_s: float  # for a pair
    fetch_s: float  # for a row of D_v that is gathered
    product_query_s: float  # product_key_read, for a query
    product_key_s: float  # and for each of its 2 n half keys
    candidate_s: float  # memory_read, for a query and candidate
    forward_flops: float  # attention, a second
    backward_flops: float
    merge_output_s: float  # an element of an output that is merged into another
    validation: list[dict[str, Any]]

    @staticmethod
    def load() -> Costs:
        return Costs(**json.loads(MEASURED.read_text()))


def exchange_s(ranks: int, sent: float, link: Link, messages: int = MESSAGES) -> float:
    """Every message of a rank one after another, which is an upper bound, and its bytes at the full rate."""
    return messages * (ranks - 1) * link.message_s + sent / (link.gb_s * 1e9)


def read_of(ranks: int, slots: int) -> formulas.Read:
    """A read in which every rank serves as many picks as it makes."""
    elsewhere = round(QUERIES * PICKS * (ranks - 1) / ranks)
    return formulas.Read(ranks, slots, QUERIES, PICKS, SIZE, SIZE, 4, 4, elsewhere, elsewhere)


def table_bytes(ranks: int, slots: float) -> float:
    return slots / ranks * (2 * SIZE * 4)


def scan_core_s(costs: Costs, ranks: int, slots: float) -> float:
    """Every rank answers all ranks' queries from its own slots."""
    return costs.scan_s * QUERIES * ranks * slots / ranks


def scan_gpu_s(ranks: int, slots: float) -> float:
    """An H100 by arithmetic: keys are read once for all queries, and multiplied in float32."""
    gpu = roofline.H100
    flops = 2.0 * QUERIES * ranks * slots / ranks * SIZE
    rate = 2.0 * gpu.fma * gpu.processors * gpu.ghz * 1e9
    return max(slots / ranks * SIZE * 4 / (gpu.hbm * 1e9), flops / rate)


def rest_s(costs: Costs, ranks: int) -> float:
    """Merging P k pairs of each query and fetching k rows, on a core."""
    pairs = QUERIES * ranks * PICKS
    return costs.call_s + costs.merge_s * pairs + costs.fetch_s * QUERIES * PICKS


def product_s(costs: Costs, slots: float) -> float:
    """The choice among n x n slots for this rank's own queries: half keys are on every rank."""
    return QUERIES * (costs.product_query_s + costs.product_key_s * 2 * math.sqrt(slots))


def probed_s(costs: Costs, ranks: int, slots: float) -> float:
    return costs.candidate_s * QUERIES * ranks * PROBED * slots / ranks


def block_flops(tokens: int, causal_share: float) -> float:
    """Of a rank's queries against another's keys, one layer and sequence."""
    return 4.0 * HEADS * HEAD * tokens * tokens * causal_share


@dataclass(frozen=True)
class Step:
    """One step of the ring: seconds of computing, and bytes that travel meanwhile."""

    compute_s: float
    sent: float

    def total_s(self, link: Link) -> float:
        return max(self.compute_s, self.sent / (link.gb_s * 1e9) + link.message_s)


def ring_step(ranks: int, flops_s: float, backward: bool) -> Step:
    """bf16; a causal mask dealt out in zig-zag leaves half of every block but the rank's own, which is a half too."""
    tokens = TOKENS // ranks
    shape = formulas.Ring(ranks, 1, HEADS, KV_HEADS, tokens, tokens, HEAD, HEAD, 2, 4)
    key_values = shape.key_value_elements()
    sent = key_values * 2 + (key_values * 4 if backward else 0)
    return Step(block_flops(tokens, 0.5) * (2.5 if backward else 1) / flops_s, sent)


def least_tokens(link: Link, flops_s: float, kv_heads: int) -> float:
    """Tokens of a rank from which on a forward step hides its exchange: 2 n^2 H D / F = 4 n H_kv D / rate."""
    return 2 * kv_heads / HEADS * flops_s / (link.gb_s * 1e9)


def slowest(ranks: int, scatter: float) -> float:
    """The expected largest of so many ranks' times over the mean, for a normal scatter."""
    return 1 + scatter * math.sqrt(2 * math.log(ranks))


def predicted_ms(costs: Costs, case: dict[str, Any]) -> float:
    """The same model for processes of this machine, which share its cores."""
    ranks = case["ranks"]
    crowd = max(1.0, ranks / costs.cores)
    if case["kind"] == "ring":
        rows, heads, size = case["tokens"] // ranks, case["heads"], case["size"]
        rate = costs.backward_flops if case["pass"] == "backward" else costs.forward_flops
        flops = 4.0 * heads * size * rows * rows / 2 * (2.5 if case["pass"] == "backward" else 1)
        merge = costs.merge_output_s * heads * rows * size if case["pass"] == "forward" else 0.0
        sent = case["sent"] / max(ranks - 1, 1)
        step = (flops / rate + merge) * crowd
        # Loopback is no wire: what travels is copied by the same cores, so it adds to the computation.
        return 1e3 * (ranks * step + (ranks - 1) * (sent * costs.byte_s * crowd + costs.message_s))
    queries, slots = case["queries"], case["slots"]
    scan = costs.scan_s if case["kind"] == "rows" else costs.partial_s / ranks
    found = costs.call_s + scan * queries * ranks * (slots / ranks if case["kind"] == "rows" else slots)
    found += costs.merge_s * queries * ranks * PICKS + costs.fetch_s * queries * PICKS
    messages = MESSAGES * (ranks - 1) * costs.message_s
    return 1e3 * (crowd * (found + case["sent"] * costs.byte_s) + messages)


# ---------------------------------------------------------------------- the page


def seconds(value: float) -> str:
    if value < 1e-3:
        return f"{1e6 * value:.0f} us"
    if value < 1:
        return f"{1e3 * value:.3g} ms"
    if value >= 3600:
        return f"{value / 3600:.3g} h" if value < 3.6e6 else f"{value / 3600:.0f} h"
    return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"


def size(value: float) -> str:
    for unit, scale in (("PiB", 2**50), ("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def read_rows(costs: Costs) -> Iterable[list[str]]:
    for slots in SLOTS:
        for ranks in RANKS:
            read = read_of(ranks, slots)
            sent = read.rows_best()
            held = table_bytes(ranks, slots)
            fits = "yes" if held <= HBM_SHARE * HBM_GIB * 2**30 else "no"
            link = NVLINK if ranks <= 8 else NDR
            gpu = scan_gpu_s(ranks, slots) + rest_s(costs, ranks) + exchange_s(ranks, sent, link)
            yield [
                f"10^{round(math.log10(slots))}", str(ranks), size(held), fits,
                seconds(scan_core_s(costs, ranks, slots)), seconds(scan_gpu_s(ranks, slots)), size(sent),
                seconds(exchange_s(ranks, sent, NDR)),
                seconds(exchange_s(ranks, sent, ETHERNET)), seconds(rest_s(costs, ranks)), seconds(gpu),
            ]  # fmt: skip


def other_rows(costs: Costs) -> Iterable[list[str]]:
    """Columns, product keys and inverted files in place of the scan."""
    for slots in SLOTS:
        for ranks in RANKS:
            read = read_of(ranks, slots)
            columns = read.columns_best()
            product = product_s(costs, slots) + costs.call_s + exchange_s(ranks, read.rows_best(), NDR, 3)
            probed = probed_s(costs, ranks, slots) + rest_s(costs, ranks) + exchange_s(ranks, read.rows_best(), NDR)
            yield [
                f"10^{round(math.log10(slots))}", str(ranks), size(columns), seconds(exchange_s(ranks, columns, NDR)),
                seconds(product), seconds(probed),
            ]  # fmt: skip


def context_rows(costs: Costs) -> Iterable[list[str]]:
    gpu_flops = roofline.PUBLISHED["H100 SXM", HEAD, False]["FA2"][-1] * 1e12
    for ranks in RANKS:
        for backward in (False, True):
            step = ring_step(ranks, gpu_flops, backward)
            core = ring_step(ranks, costs.backward_flops if backward else costs.forward_flops, backward)
            link = NVLINK if ranks <= 8 else NDR
            hidden = ", ".join(each.name for each in LINKS if step.sent / (each.gb_s * 1e9) <= step.compute_s) or "none"
            yield [
                str(ranks), str(TOKENS // ranks), "backward" if backward else "forward", size(step.sent),
                seconds(core.compute_s), seconds(step.compute_s), seconds(step.sent / (link.gb_s * 1e9)), hidden,
                seconds(ranks * step.total_s(link)),
            ]  # fmt: skip


def failure_rows(costs: Costs) -> Iterable[list[str]]:
    """Young's interval, sqrt(2 C M), for a checkpoint of the whole of a GPU's memory."""
    for ranks in RANKS:
        mean = 54 * 24 * 16384 / 419 / ranks * 3600
        for rate in (1e9, 5e9):
            saved = HBM_SHARE * HBM_GIB * 2**30 / rate
            every = math.sqrt(2 * saved * mean)
            lost = saved / every + every / 2 / mean
            yield [
                str(ranks),
                seconds(mean),
                f"{rate / 1e9:.0f}",
                seconds(saved),
                seconds(every),
                f"{100 * lost:.1f} %",
            ]


def validation_rows(costs: Costs) -> Iterable[list[str]]:
    for case in costs.validation:
        guess = predicted_ms(costs, case)
        yield [
            case["name"],
            case["pass"],
            f"{guess:.1f}",
            f"{case['measured_ms']:.1f}",
            f"{guess / case['measured_ms']:.2f}",
        ]


def cost_rows(costs: Costs) -> Iterable[list[str]]:
    yield ["best k by rows (`topk_scores`)", f"{1e9 * costs.scan_s:.2f} ns a query and slot"]
    yield ["best k by columns, all columns", f"{1e9 * costs.partial_s:.2f} ns a query and slot"]
    yield ["candidates (`memory_read`)", f"{1e9 * costs.candidate_s:.1f} ns a query and candidate"]
    yield [
        "product keys",
        f"{1e6 * costs.product_query_s:.1f} us a query and {1e9 * costs.product_key_s:.2f} ns a half key",
    ]
    yield ["merging lists", f"{1e9 * costs.merge_s:.1f} ns a pair"]
    yield ["fetching rows", f"{1e9 * costs.fetch_s:.1f} ns a row"]
    yield ["a read of almost nothing", f"{1e6 * costs.call_s:.0f} us"]
    yield ["attention, float32, D = 64", f"{costs.forward_flops / 1e9:.1f} GFLOP/s forward, "
           f"{costs.backward_flops / 1e9:.1f} backward"]  # fmt: skip
    yield ["merging outputs", f"{1e9 * costs.merge_output_s:.2f} ns an element"]
    yield [
        "gloo over loopback, 2 processes",
        f"{1e6 * costs.message_s:.0f} us a message, {1e-9 / costs.byte_s:.2f} GB/s",
    ]


def document(costs: Costs) -> str:
    from scale_text import sections

    return sections(sys.modules[__name__], costs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--measure", action="store_true")
    given = parser.parse_args()
    if given.measure:
        import scale_measure

        MEASURED.write_text(json.dumps(scale_measure.measure(), indent=1) + "\n")
    if given.write or given.measure:
        DOCUMENT.write_text(document(Costs.load()))
    current = DOCUMENT.exists() and DOCUMENT.read_text() == document(Costs.load())
    print(f"scale_plan: {DOCUMENT.name} is {'what this script writes' if current else 'out of date, see --write'}")
    return 0 if current else 1


if __name__ == "__main__":
    sys.modules["scale_plan"] = sys.modules["__main__"]
    sys.exit(main())
