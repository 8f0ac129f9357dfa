"""Writes docs/roofline.md: what the CUDA kernels could reach at best, by arithmetic. Nothing here was measured.

    python tools/roofline.py            say whether docs/roofline.md is what this script writes
    python tools/roofline.py --write    write it

An op is one line of OPS: kernels that run one after the other. The time of each is that of the busiest unit of a
multiprocessor over its tiles, or of memory; the counts of instructions beside it are those of tests/cuda_budget.json,
which come from the compiled binary.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "roofline.md"
BUDGET = ROOT / "tests" / "cuda_budget.json"
TOKENS, WIDTH = 16384, 2048  # B T and H D of every shape, as in the papers on FlashAttention
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LAUNCH_S = 4e-6


@dataclass(frozen=True)
class Gpu:
    """What one multiprocessor does in a cycle, and the memory that all of them share."""

    name: str
    architecture: str
    processors: int
    ghz: float
    tensor: int  # 16-bit floating-point operations by mma.sync
    fma: int  # float32 multiply-adds
    double: int  # float64 instructions
    special: int  # ex2 and the like
    hbm: int  # GB/s
    l2: int  # GB/s
    tensor_peak: int  # TFLOP/s that the vendor names for 16 bits, dense; on later GPUs not by mma.sync

    def shared(self) -> int:
        return 128  # bytes

    def issue(self) -> int:
        return 4  # instructions of a warp


A100 = Gpu("A100 SXM", "sm_80", 108, 1.41, 2048, 64, 32, 16, 2039, 7200, 312)
H100 = Gpu("H100 SXM", "sm_90", 132, 1.83, 2540, 128, 64, 16, 3350, 7200, 989)
B200 = Gpu("B200", "sm_100", 148, 1.86, 2048, 128, 64, 16, 8000, 7200, 2250)
GPUS = (A100, H100, B200)


@dataclass(frozen=True)
class Kernel:
    """One kernel at one head size: what a block does for a tile of its `rows` queries by `keys` keys, or of a pass by
    keys for `rows` keys by `keys` queries."""

    name: str  # in tests/cuda_budget.json
    head: int
    rows: int
    keys: int
    width: int  # bytes of an element
    shared: Callable[[Kernel], float]  # bytes through shared memory for a tile
    tensor_cores: bool
    products: int = 2  # of matrices, rows x keys x D
    streamed: int = 2  # tensors of the other side that a block reads tile by tile
    moved: int = 4  # tensors of T tokens through HBM, read and written
    loads: float = 0.5  # ldmatrix.x4 for an mma
    per_score: float = 8  # other instructions for a score: scale, maximum, shift, exponential, sum, selects, rounding
    doubles: float = 1  # of them in float64

    def cycles(self, gpu: Gpu) -> dict[str, float]:
        """Cycles of each unit of a multiprocessor for one tile."""
        scores = self.rows * self.keys
        multiply_adds = self.products * scores * self.head
        # mma m16n8k16 is 2048 of them; else 32 an instruction and a sixth of a load.
        each = (1 + self.loads) / 2048 if self.tensor_cores else (1 + 1 / 6) / 32
        instructions = multiply_adds * each
        found = {
            "exponentials": scores / gpu.special,
            "float64": scores * self.doubles / gpu.double,
            "shared memory": self.shared(self) / gpu.shared(),
            "issue": (instructions + scores * self.per_score / 32) / gpu.issue(),
        }
        if self.tensor_cores:
            found["tensor cores"] = 2 * multiply_adds / gpu.tensor
        else:
            found["multiply-adds"] = multiply_adds / gpu.fma
        return found


def fragments(rows_of_warp: int) -> Callable[[Kernel], float]:
    """Each warp reads the streamed tile by ldmatrix for its rows; cp.async writes it once."""
    return lambda k: k.streamed * k.keys * k.head * k.width * (k.rows / rows_of_warp + 1)


def registers(k: Kernel) -> float:
    """Loads of dot_attention_fma.cu, of which a warp's is 256 bytes or, of one row for all, a cycle; and the stores."""
    warps = k.rows * k.keys / 8 / 32
    scores = warps * k.head / 4 * (2 * 256 + 4 * 128)
    values = warps * k.keys / 4 * (4 * 128 + 4 * k.head / 64 * 256)
    return scores + values + k.streamed * k.keys * k.head * k.width


def gradient_fragments(k: Kernel) -> float:
    """Each warp reads its own 16 rows of two tensors for every tile, and a factor of each product from the tile, which
    cp.async writes once. By keys each lane reads three numbers for each of its columns."""
    tile, own = k.keys * k.head * k.width, k.rows * k.head * k.width
    values = k.rows / 16 * 3 * k.keys / 4 * 128 if k.products == 4 else 0  # a load of a warp is a cycle
    return k.rows / 16 * k.products * tile + 2 * own + k.streamed * tile + values


@dataclass(frozen=True)
class Op:
    title: str
    kernels: tuple[Kernel, ...]
    products: int  # that FLOPs are counted for, as the papers and our benchmark do; kernels may form some of them twice
    backward: bool = False

    @property
    def head(self) -> int:
        return self.kernels[0].head


def dot_mma(head: int) -> Kernel:
    return Kernel(f"dot_attention_mma_kernel<BFloat16, {head}>", head, 64, 64, 2, fragments(16), True, doubles=0)


def dot_fma(head: int) -> Kernel:
    return Kernel(f"dot_attention_fma_kernel<float, {head}, false>", head, 32, 32, 4, registers, False)


def forward(title: str, kernel: Kernel) -> Op:
    return Op(title, (kernel,), 2)


def backward_mma(head: int) -> Op:
    """The two passes. What the rows' sums before them read, the output and its gradient, is added to the first's."""
    name, shared = "dot_attention_bwd_mma_kernel<MmaBFloat16", gradient_fragments
    # Scale, comparison, two shifts, exponential, difference, product, selects, rounding.
    by_queries = Kernel(f"{name}, {head}, false, 1>", head, 64, 32, 2, shared, True, 3, 2, 7, 2 / 3, 10, 0)
    by_keys = Kernel(f"{name}, {head}, true, 3>", head, 64, 32, 2, shared, True, 4, 2, 6, 5 / 8, 11, 0)
    return Op("dot backward, bf16", (by_queries, by_keys), 5, backward=True)


# One line for each op of the document.
OPS = (
    *(forward("dot forward, bf16", dot_mma(head)) for head in (64, 128)),
    *(forward("dot forward, f32", dot_fma(head)) for head in (64, 128)),
    *(backward_mma(head) for head in (64, 128)),
)
# Not ours: FlashAttention-2's tiles, 32 rows a warp. What was measured of it says how near to its bound a kernel comes.
FLASH_2 = forward("FlashAttention-2", Kernel("", 128, 128, 64, 2, fragments(32), True, doubles=0))


@dataclass(frozen=True)
class Prediction:
    flops: float
    hbm_bytes: float
    best_s: float  # units work side by side
    worst_s: float  # they take turns
    bound: str

    @property
    def tflops(self) -> tuple[float, float]:
        """Least and most."""
        return self.flops / self.worst_s / 1e12, self.flops / self.best_s / 1e12


def times_of(kernel: Kernel, gpu: Gpu, tokens: int) -> dict[str, float]:
    """Seconds of each unit for a plain call of B T = 16384 tokens of T = `tokens`, H D = 2048, without a mask."""
    matrices = TOKENS // tokens * (WIDTH // kernel.head)
    blocks = matrices * math.ceil(tokens / kernel.rows)
    tiles = math.ceil(blocks / gpu.processors) * math.ceil(tokens / kernel.keys)
    units = kernel.cycles(gpu)
    second = gpu.ghz * 1e9
    times = {name: tiles * cycles / second for name, cycles in units.items()}
    l2_bytes = float(blocks) * tokens * kernel.streamed * kernel.head * kernel.width
    times["L2 cache"] = l2_bytes / gpu.l2 / 1e9
    times["HBM"] = hbm_bytes_of(kernel) / gpu.hbm / 1e9
    return times


def hbm_bytes_of(kernel: Kernel) -> float:
    return float(kernel.moved * TOKENS * WIDTH * kernel.width)


def predict(op: Op, gpu: Gpu, tokens: int) -> Prediction:
    """The kernels of an op in turn, with a launch each, and in the backward one for the rows' sums."""
    passes = [times_of(kernel, gpu, tokens) for kernel in op.kernels]
    longest = max(passes, key=lambda times: max(times.values()))
    bound = max(longest, key=lambda name: longest[name])
    launches = (len(passes) + op.backward) * LAUNCH_S
    best = sum(max(times.values()) for times in passes) + launches
    worst = sum(sum(times.values()) for times in passes) + launches
    matrices = TOKENS // tokens * (WIDTH // op.head)
    flops = 2.0 * op.products * matrices * tokens * tokens * op.head
    return Prediction(flops, sum(map(hbm_bytes_of, op.kernels)), best, worst, bound)


# Published figures of others by GPU, D and whether it is a backward: TFLOP/s without a mask, 16 bits, at LENGTHS and
# the same B T and H D. The labels of the bars of figures 5 and 6 of the paper on FlashAttention-3 (arXiv 2407.08608).
PUBLISHED: dict[tuple[str, int, bool], dict[str, tuple[int, ...]]] = {
    ("H100 SXM", 64, False): {
        "FA2": (282, 306, 318, 321, 322, 324),
        "FA3": (333, 392, 460, 476, 496, 497),
        "cuDNN": (335, 373, 395, 408, 412, 413),
    },
    ("H100 SXM", 128, False): {
        "FA2": (309, 350, 362, 368, 370, 370),
        "FA3": (467, 565, 625, 638, 646, 648),
        "cuDNN": (497, 574, 617, 609, 600, 595),
    },
    ("H100 SXM", 64, True): {
        "FA2": (198, 238, 264, 279, 287, 291),
        "FA3": (272, 363, 422, 453, 472, 474),
        "cuDNN": (266, 348, 395, 417, 432, 433),
    },
    ("H100 SXM", 128, True): {
        "FA2": (214, 260, 291, 310, 318, 322),
        "FA3": (316, 424, 501, 542, 559, 561),
        "cuDNN": (305, 408, 465, 499, 518, 516),
    },
}
# Where only a best figure is known to us.
BEST = {
    ("A100 SXM", False): "FA2 up to 230 (its paper, arXiv 2307.08691, over all shapes)",
    ("B200", False): "FA4 up to 1613, 1.3 times cuDNN 9.13 (its paper, arXiv 2603.05451, over all shapes)",
}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def bound_rows(kernel: Kernel) -> Iterable[list[str]]:
    for gpu in GPUS:
        units = kernel.cycles(gpu)
        order = sorted(units, key=lambda name: -units[name])
        yield [gpu.name, ", ".join(f"{name} {units[name]:.0f}" for name in order)]


def prediction_rows(op: Op, gpu: Gpu) -> Iterable[list[str]]:
    peers = PUBLISHED.get((gpu.name, op.head, op.backward), {}) if op.kernels[0].tensor_cores else {}
    for i, tokens in enumerate(LENGTHS):
        p = predict(op, gpu, tokens)
        yield [
            f"{TOKENS // tokens},{WIDTH // op.head},{tokens},{op.head}",
            f"{p.flops / 1e9:.0f}",
            f"{p.hbm_bytes / 2**20:.0f}",
            p.bound,
            f"{1e3 * p.best_s:.2f} to {1e3 * p.worst_s:.2f}",
            f"{p.tflops[0]:.0f} to {p.tflops[1]:.0f}",
            ", ".join(f"{name} {figures[i]}" for name, figures in peers.items()) or "-",
        ]


def calibration() -> Iterable[list[str]]:
    """FlashAttention-2 by the same model, beside what its authors measured."""
    for gpu, measured in ((A100, 230), (H100, 370)):
        p = predict(FLASH_2, gpu, LENGTHS[-1])
        most = p.tflops[1]
        yield [gpu.name, p.bound, f"{p.tflops[0]:.0f} to {most:.0f}", str(measured), f"{100 * measured / most:.0f} %"]


def remarks(op: Op) -> list[str]:
    """What the shape of the tile has to do with it; which products are formed twice."""
    if op.backward:
        return [
            f"FLOPs are those of {op.products} products, as the papers count them. The two passes form "
            f"{sum(kernel.products for kernel in op.kernels)}, because both need the scores and their gradients: "
            "sums without atomics cost that. MiB are those of both passes and of the rows' sums before them.",
            "",
        ]
    kernel = op.kernels[0]
    if not kernel.tensor_cores:
        return []
    twice = replace(kernel, rows=2 * kernel.rows, shared=fragments(32)).cycles(H100)
    return [
        "A warp has 16 rows and reads all of the tile for them. With 32, as FlashAttention-2 has, two of these tiles "
        f"would take an H100 {twice['shared memory']:.0f} cycles of shared memory and {twice['tensor cores']:.0f} of "
        "tensor cores.",
        "",
    ]


COUNTED = ("HMMA", "LDSM", "LDGSTS", "MUFU", "FFMA", "FFMA2", "double", "registers", "blocks_per_sm")


def mix_rows(budget: dict[str, dict[str, dict[str, int]]]) -> Iterable[list[str]]:
    for kernel in (kernel for op in OPS for kernel in op.kernels):
        for gpu in GPUS:
            used = budget[gpu.architecture][kernel.name]
            code = used["instructions"] * 16 / 1024
            yield [f"`{kernel.name}`", gpu.architecture, f"{code:.0f}", *(str(used[name]) for name in COUNTED)]


INTRODUCTION = f"""\
# A roofline of the CUDA kernels: predicted, never measured

**No kernel of attnfast has run on a GPU. Every figure of ours on this page is arithmetic.** It says what limits a
kernel as it is written and what it could reach at best, not what it does reach. What is proven of the kernels is in
[cuda.md](cuda.md). `python tools/roofline.py --write` writes this page.

## The model

A block computes tiles of rows x keys scores. For one tile the script counts the cycles that each unit of a
multiprocessor needs: tensor cores, float32 and float64 arithmetic, exponentials, shared memory, issue slots (four
warps a cycle). All blocks are shared out evenly, and the last round is a whole one. L2 cache and HBM are counted for
the whole GPU, and {1e6 * LAUNCH_S:.0f} us are added for the launch. Two bounds come of it: all units work side
by side (the best), and all take turns (the worst). Waiting for latency, barriers, address arithmetic, instructions that
are not in a cache and bank conflicts of ordinary accesses are not in the model.

What is assumed of the hardware, for each multiprocessor and cycle:
"""
SOURCES = """\
Multiprocessors, clocks, HBM and peaks are NVIDIA's data sheets, the rates of float32, float64 and ex2 the table of
throughputs in the CUDA programming guide. L2: 5120 bytes a cycle, as the A100's white paper says, taken for all three.
The kernels use `mma.sync`, which on an H100 reaches about 62 % of what `wgmma` does (Luo et al., arXiv 2402.13499).
**For the B200 no such figure is known to us; the A100's rate is assumed.** Its peak by `tcgen05` is out of reach for
`mma.sync`.

The same model of FlashAttention-2 (D = 128, tiles of 128 x 64, 32 rows a warp), whose speed is known, shows how near to
the best bound a very good kernel comes:
"""
PEERS = """\
Published figures are those of FlashAttention-2 and 3 and of cuDNN 9 in figures 5 (forward) and 6 (backward) of the
paper on FlashAttention-3 (arXiv 2407.08608): 16 bits, no mask, H100 80 GB SXM5, the same B T = 16384 and H D = 2048.
They were read from copies of the figures' labels by others, not from the paper itself; at D = 64 backward only one copy
was complete. Their authors measured them, at clocks that a GPU holds under load, which are lower than the model's.

## What the binary holds

Instructions as they stand in the machine code, of all paths together (masks, bias, dropout and the rest), not how often
each runs. `double` counts float64 arithmetic and conversions, `blocks_per_sm` is the occupancy.
"""


def document(budget: dict[str, dict[str, dict[str, int]]]) -> str:
    per_cycle = ("FLOP by `mma.sync`", "float32 FMA", "float64", "exponentials")
    lines = [
        INTRODUCTION,
        *table(
            ("GPU", "multiprocessors", "GHz", *per_cycle, "HBM GB/s", "L2 GB/s", "vendor's 16-bit peak, TFLOP/s"),
            (
                [g.name, *map(str, (g.processors, g.ghz, g.tensor, g.fma, g.double, g.special, g.hbm, g.l2)),
                 str(g.tensor_peak)]
                for g in GPUS
            ),
        ),
        "",
        SOURCES,
        *table(("GPU", "limited by", "TFLOP/s, predicted", "TFLOP/s, published", "published of best"), calibration()),
        "",
    ]  # fmt: skip
    columns = ("B,H,T,D", "GFLOP", "MiB", "limited by", "ms, predicted", "TFLOP/s, predicted", "TFLOP/s, published")
    for op in OPS:
        lines += [f"## {op.title}, D = {op.head}", ""]
        for kernel in op.kernels:
            lines += [
                f"`{kernel.name}`, tiles of {kernel.rows} x {kernel.keys}. Cycles of each unit for a tile:",
                "",
                *table(("GPU", "cycles a tile, predicted"), bound_rows(kernel)),
                "",
            ]
        lines += remarks(op)
        for gpu in GPUS:
            figure = BEST.get((gpu.name, op.backward)) if op.kernels[0].tensor_cores else None
            best = f"; published: {figure}" if figure else ""
            lines += [gpu.name + best + ":", "", *table(columns, prediction_rows(op, gpu)), ""]
    lines += [PEERS, *table(("kernel", "architecture", "KiB of code", *COUNTED), mix_rows(budget)), ""]
    return "\n".join(lines)


def write() -> None:
    DOCUMENT.write_text(document(json.loads(BUDGET.read_text())))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if given.write:
        write()
    current = DOCUMENT.exists() and DOCUMENT.read_text() == document(json.loads(BUDGET.read_text()))
    print(f"roofline: {DOCUMENT.name} is {'what this script writes' if current else 'out of date, see --write'}")
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main())
