"""The limits of the machine, timed in the same rounds as a case: multiply-adds on registers, and a pass over memory.

Both run in the binary with torch's threads and the vectors of the variant in use, so a share of 1 means that nothing
but the limit itself is left. A case is held against the limit that binds it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from .measure import Sampler

FMA_PEAK, STREAM = "fma peak", "stream"
_FMA_STEPS = 400_000  # a few milliseconds


@dataclass(frozen=True)
class Yardstick:
    """A sampler and how much it does in one call, in floating-point operations or bytes."""

    name: str
    sample: Sampler
    amount: float


def fma_peak() -> Yardstick:
    """Float32 multiply-adds that wait for nothing."""
    from attnfast._ext import _C

    def sample(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            _C.yardstick_fma(_FMA_STEPS)
        return time.perf_counter() - start

    return Yardstick(FMA_PEAK, sample, _C.yardstick_fma(_FMA_STEPS))


def stream(tensors: tuple[torch.Tensor, ...]) -> Yardstick:
    """One pass over the memory of contiguous tensors."""
    from attnfast._ext import _C

    views = [tensor.detach().view(torch.uint8).numpy() for tensor in tensors]

    def sample(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            for view in views:
                _C.yardstick_read(view)
        return time.perf_counter() - start

    sample(1)
    return Yardstick(STREAM, sample, float(sum(view.nbytes for view in views)))
