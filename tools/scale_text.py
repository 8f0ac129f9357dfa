"""The words of docs/scale.md around the tables of tools/scale_plan.py, and the figures within sentences."""

from __future__ import annotations

from types import ModuleType
from typing import Any


def sections(plan: ModuleType, costs: Any) -> str:
    table = plan.roofline.table
    size, seconds = plan.size, plan.seconds
    gpu_flops = plan.roofline.PUBLISHED["H100 SXM", plan.HEAD, False]["FA2"][-1] * 1e12
    big, most = plan.SLOTS[-1], plan.RANKS[-1]
    read = plan.read_of(most, big)
    columns = plan.read_of(most, big).columns_best()
    needed = min(ranks for ranks in (2**i for i in range(20)) if _fits(plan, ranks, big))
    queries_gib = plan.QUERIES * most * plan.PICKS * 12
    lines = [
        f"""\
# A plan to internet scale: simulated, not run

**Nothing on this page ran on more than four processes of one small machine.** One core's costs were measured
({costs.machine}; {costs.date}, commit {costs.commit or "unknown"}; shared with other work); bytes are those that
[several processes](distributed.md) are tested to send; links and GPUs are figures of others. `python
tools/scale_plan.py --measure` measures anew, `--write` writes this page.

## What is put in

| link | GB/s, one direction of a rank | a message, assumed | source |
|---|---|---|---|""",
        *(f"| {x.name} | {x.gb_s:g} | {seconds(x.message_s)} | {x.source} |" for x in plan.LINKS),
        "",
        f"""\
Measured on one core, float32, D = D_v = {plan.SIZE}, k = {plan.PICKS}:
""",
        *table(("what", "cost"), plan.cost_rows(costs)),
        "",
        f"""\
An H100 is taken from [roofline.md](roofline.md): a scan reads keys at {plan.roofline.H100.hbm} GB/s or multiplies
them at the float32 peak, whichever takes longer, and attention runs at the {gpu_flops / 1e12:.0f} TFLOP/s that
FlashAttention-2's authors measured. Our kernels have not run on one. Messages of a collective are counted one after
another, an upper bound; bytes go at the link's full rate, a lower one. Ranks are alike and nothing else uses the links.

## The model beside this machine

The same model, with gloo over loopback and the cores that other work left, {costs.cores} by the load, which all
processes share; in milliseconds. On loopback bytes are copied by the same cores, so they add to computing and nothing
hides. Measured once: figures are good to a factor of {_worst(plan, costs):.1f}. What the model leaves out (calls of
Python between the pieces, processes that wait for a core) makes it too short more often than too long.
""",
        *table(("case", "pass", "predicted", "measured", "predicted / measured"), plan.validation_rows(costs)),
        "",
        f"""\
Figures below are no better than these, and where a link or a GPU is in them, not tested at all.

## Reads of a memory: exact, by rows

Every rank asks {plan.QUERIES} queries, k = {plan.PICKS}, and answers those of all ranks from its own slots: the work of
a rank for a query falls with P, the number of queries grows with P. So P ranks answer P times as many queries in the
time that one rank needs for its {plan.QUERIES} over all slots; none becomes faster. Keys and values take
{2 * plan.SIZE * 4} bytes a slot. "Fits": in {plan.HBM_SHARE:.0%} of {plan.HBM_GIB} GiB. "Whole, H100": scan, exchange
(NVLink to 8 ranks, else NDR), merging and fetching as one core does them.
""",
        *table(
            ("slots", "ranks", "tables of a rank", "fits", "scan, a core", "scan, H100", "sent by a rank", "over NDR",
             "over 100 GbE", "merge and fetch", "whole, H100"),
            plan.read_rows(costs),
        ),
        "",
        f"""\
What is sent does not depend on the slots. It grows with P, as all queries go to all ranks and P k pairs come back.
The scan is what a read costs, and no link matters to it before {_where_link_matters(plan)}.

## Columns, product keys, inverted files

By columns every score of every slot crosses the link: {size(columns)} a rank for {plan.QUERIES} queries over 10^11
slots. That placement is for memories whose scores are few, and for values so wide that a row does not fit.

Product keys choose among n x n slots with 2 n half keys, which every rank has; only values are fetched. The library
has them in one process (`product_key_read`); over ranks they would use the same routes, which is not written.
An inverted file on each rank (`memory.ClusterIndex`) would look at {plan.PROBED:.1%} of its slots; `ShardedMemory.read`
does not take candidates yet. Neither gives the exact best of arbitrary keys. Times with one core and NDR:
""",
        *table(
            ("slots", "ranks", "columns: sent by a rank", "columns: over NDR", "product keys, a read",
             "inverted files, a read"),
            plan.other_rows(costs),
        ),
        "",
        f"""\
## A context of a million tokens

One layer of attention over T = 2^20 tokens, {plan.HEADS} heads of {plan.HEAD}, {plan.KV_HEADS} of keys and values,
bfloat16, causal, dealt out in zig-zag: every rank has the same work in every step of the ring, half of a block. Dealt
out contiguously the last rank has whole blocks in all P steps and the pass takes {2 - 1 / most:.3g} times as
long at {most} ranks (2 - 1 / P). Backward: 2.5 times the operations, and the sums of gradients travel in float32.
""",
        *table(
            ("ranks", "tokens of a rank", "pass", "sent in a step", "computing, a core", "computing, H100",
             "exchange (NVLink to 8, else NDR)", "hidden on", "pass, H100"),
            plan.context_rows(costs),
        ),
        "",
        """\
A step hides its exchange if a rank has enough tokens, whatever the context: work grows with their square and traffic
with their number. With F operations a second and a link of W bytes a second a forward step needs
n >= 2 F H_kv / (H W) tokens of a rank:
""",
        *table(
            ("link", f"tokens of a rank, H_kv = {plan.KV_HEADS}", f"H_kv = H = {plan.HEADS}"),
            (
                [x.name, *(f"{plan.least_tokens(x, gpu_flops, heads):.0f}" for heads in (plan.KV_HEADS, plan.HEADS))]
                for x in plan.LINKS
            ),
        ),
        "",
        f"""\
One core of this machine would take {seconds(_forward_s(plan, costs.forward_flops, most))} a layer and forward on each
of {most} ranks. Weights, optimizer and the other layers' activations are outside of this page.

## What would break first

In the order in which a memory that grows meets it:

1. **Memory.** 10^11 slots are {size(plan.table_bytes(1, big))} and need {needed} GPUs before anything else is stored.
   Half the bytes in bfloat16; a trained table with Adam's moments takes three times as many.
2. **The scan.** An exact read of 10^11 slots by {most} ranks takes {seconds(plan.scan_gpu_s(most, big))} of an H100 and
   {seconds(plan.scan_core_s(costs, most, big))} of a core. Fewer queries or candidates make it shorter; more ranks that
   ask as much do not.
3. **P k pairs.** At {most} ranks a rank receives {size(queries_gib)} of pairs for its {plan.QUERIES} queries and merges
   them in {seconds(costs.merge_s * plan.QUERIES * most * plan.PICKS)} of a core; and every collective has {most - 1}
   messages a rank, {seconds(plan.MESSAGES * (most - 1) * plan.NDR.message_s)} a read on NDR as counted here. Merging in
   a tree of nodes would make both log P; it is not written.
4. **Stragglers.** Every collective waits for the last rank. If times scatter by 10 % (normal), the slowest of
   {most} is {100 * (plan.slowest(most, 0.1) - 1):.0f} % above the mean, at 8 it is
   {100 * (plan.slowest(8, 0.1) - 1):.0f} %.
5. **Failures.** Below.
6. **Integers.** Slots are 64 bits throughout (10^11 is {big / 2**31:.0f} times 2^31); a rank's own rows pass 2^31 only
   where a rank has more than {size(2**31 * 2 * plan.SIZE * 4)} of tables.
7. **Messages of gloo.** gloo is for CPUs and tests. The largest message of a read by rows at {most} ranks is
   {size(plan.QUERIES * most * plan.PICKS * 8)}, the parts of a block by columns have {size(_block())}. The largest
   of the ring is a rank's sums of gradients: {size(_largest_sums(plan))} at {plan.RANKS[0]} ranks, so 2^31 bytes at
   {_ranks_of_large_messages(plan)}. We have not sent as much in one message.

Failures, by 419 unexpected interruptions in 54 days of 16 384 GPUs (Llama 3, arXiv 2407.21783). A checkpoint of
{plan.HBM_SHARE:.0%} of a GPU's memory at a rate of each rank to storage, taken every sqrt(2 C M) (Young 1974), C its
time and M the mean time between failures; lost: checkpoints and what is done again.
""",
        *table(
            ("ranks", "a failure every", "GB/s to storage", "a checkpoint", "taken every", "lost"),
            plan.failure_rows(costs),
        ),
        "",
        f"""\
What a read sends at {most} ranks ({size(read.rows_best())}) leaves links idle most of the time: its first limits are
memory and the scan, then the number of messages. The ring's is the link, once ranks have too few tokens each. In powers
of two, reads over 10^9 slots fit 8 GPUs and those over 10^10
{min(r for r in (2**i for i in range(20)) if _fits(plan, r, plan.SLOTS[1]))}.
""",
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _worst(plan: ModuleType, costs: Any) -> float:
    """The largest factor between what was predicted and what was measured, either way."""
    ratios = [plan.predicted_ms(costs, case) / case["measured_ms"] for case in costs.validation]
    return max(max(ratio, 1 / ratio) for ratio in ratios)


def _fits(plan: ModuleType, ranks: int, slots: float) -> bool:
    return bool(plan.table_bytes(ranks, slots) <= plan.HBM_SHARE * plan.HBM_GIB * 2**30)


def _where_link_matters(plan: ModuleType) -> str:
    """The first case in which 100 GbE takes longer than an H100's scan."""
    for slots in plan.SLOTS:
        for ranks in plan.RANKS:
            sent = plan.read_of(ranks, slots).rows_best()
            if plan.exchange_s(ranks, sent, plan.ETHERNET) > plan.scan_gpu_s(ranks, slots):
                return f"{ranks} ranks with 10^{len(str(slots)) - 1} slots on 100 GbE"
    return "the largest case here, even on 100 GbE"


def _forward_s(plan: ModuleType, flops_s: float, ranks: int) -> float:
    return float(ranks * plan.ring_step(ranks, flops_s, False).compute_s)


def _largest_sums(plan: ModuleType) -> float:
    first = plan.RANKS[0]
    return float(plan.ring_step(first, 1.0, True).sent - plan.ring_step(first, 1.0, False).sent)


def _ranks_of_large_messages(plan: ModuleType) -> int:
    return int(plan.RANKS[0] * _largest_sums(plan) / 2**31)


def _block() -> int:
    from attnfast.distributed._columns import BLOCK_BYTES

    return BLOCK_BYTES
