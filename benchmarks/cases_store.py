"""The cases of memories that change: a stream of steps, each of which writes rows, deletes as many and reads.

The rows written are those of a pool, in order and over again; each step deletes the oldest, so the memory always holds
the same number, and what it holds after a step depends on the number of steps alone. One call is one step, and its
output the read's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .measure import Settings
from .registry import FORWARD, Inputs, register_cases


@dataclass(frozen=True)
class StoreCase:
    """A memory of `slots` rows [D] -> [D_v]; a step writes and deletes `rows` and reads `queries` -> [B, D_v]."""

    name: str
    slots: int
    rows: int
    queries: int
    size: int = 64
    value_size: int = 64
    picks: int = 32
    passes: tuple[str, ...] = (FORWARD,)
    quick: bool = False
    compiled_peers: bool = False
    suite: str = "store"
    settings: Settings | None = None

    @property
    def capacity(self) -> int:
        """Room for the rows of a step before those that leave are gone, and as much again that stays free."""
        return self.slots + 2 * self.rows

    def columns(self) -> dict[str, Any]:
        return {
            "dtype": "fp32",
            "batch": 1,
            "heads": 1,
            "kv_heads": 1,
            "query_tokens": self.queries,
            "key_tokens": self.slots,
            "head_size": self.size,
            "value_size": self.value_size,
            "options": f"k:{self.picks} write:{self.rows}",
        }

    def small(self) -> StoreCase:
        return replace(self, slots=128, rows=min(self.rows, 16), queries=min(self.queries, 4))

    def flops(self, which: str) -> float:
        """Of the product with all keys and the sums of what is picked."""
        return 2.0 * self.queries * (self.slots * self.size + self.picks * self.value_size)

    def inputs(self) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        pool = 2 * self.slots // self.rows * self.rows  # whole steps, and no row in the memory twice
        tensors = {
            "query": torch.randn(self.queries, self.size, generator=generator),
            "keys": torch.randn(pool, self.size, generator=generator) * self.size**-0.5,
            "values": torch.randn(pool, self.value_size, generator=generator),
        }
        return Inputs(tensors, (), torch.zeros(0))

    def step_rows(self, inputs: Inputs, step: int) -> slice:
        """The rows of the pool that step number `step` writes, from 0 on; before it the memory holds the first."""
        pool = inputs["keys"].shape[0]
        first = (self.slots // self.rows + step) * self.rows % pool
        return slice(first, first + self.rows)

    def streamed(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        return ()

    def oracle_part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def oracle(self, inputs: Inputs) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
        """The read of the first step, in float64."""
        held = slice(self.rows, self.slots // self.rows * self.rows + self.rows)
        keys, values = (inputs[name][held].double() for name in ("keys", "values"))
        best = (inputs["query"].double() @ keys.T).topk(self.picks)
        return torch.einsum("bk,bkd->bd", best.values.softmax(-1), values[best.indices]), ()


register_cases(
    [
        StoreCase("10k,64: 1 row, 1 query", 10_000, 1, 1, quick=True),
        StoreCase("100k,64: 32 rows, 32 queries", 100_000, 32, 32),
        StoreCase("100k,64: 1024 rows, 1 query", 100_000, 1024, 1),
    ]
)
