"""The cases of topk_scores: the halves of a product-key memory, and flat memories of 10^4 to 10^6 slots."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .cases_dot import _DTYPE_NAMES
from .measure import Settings
from .registry import BACKWARD, BOTH, FORWARD, PASSES, Inputs, register_cases

_ORACLE_ROWS = 128  # queries whose scores are held at once, in float64


@dataclass(frozen=True)
class TopkCase:
    """query [B, D], keys [N, D] -> the k best scores [B, k]; the gradients are those of both."""

    name: str
    queries: int
    slots: int
    size: int
    count: int = 32
    dtype: torch.dtype = torch.float32
    masked: bool = False  # one slot in four is hidden
    passes: tuple[str, ...] = (FORWARD,)
    quick: bool = False
    compiled_peers: bool = False
    suite: str = "topk"
    settings: Settings | None = None

    def columns(self) -> dict[str, Any]:
        return {
            "dtype": _DTYPE_NAMES[self.dtype],
            "batch": 1,
            "heads": 1,
            "kv_heads": 1,
            "query_tokens": self.queries,
            "key_tokens": self.slots,
            "head_size": self.size,
            "value_size": 0,
            "options": f"k:{self.count}" + (" mask" if self.masked else ""),
        }

    def small(self) -> TopkCase:
        return replace(self, queries=min(self.queries, 8), slots=max(64, self.count))

    def flops(self, which: str) -> float:
        """Of the product; the backward has two products with the rows that were chosen."""
        forward = 2.0 * self.queries * self.slots * self.size
        backward = 4.0 * self.queries * self.count * self.size
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[which]

    def inputs(self) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(self.queries, self.size, generator=generator).to(self.dtype).requires_grad_()
        keys = torch.randn(self.slots, self.size, generator=generator).to(self.dtype).requires_grad_()
        tensors = {"query": query, "keys": keys}
        if self.masked:
            tensors["mask"] = torch.arange(self.slots) % 4 != 1
        real = torch.promote_types(self.dtype, torch.float32)
        grad_out = torch.randn(self.queries, self.count, generator=generator, dtype=real)
        return Inputs(tensors, ("query", "keys"), grad_out)

    def streamed(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """What a single query must at least read."""
        return (inputs["keys"].detach(),) if self.queries == 1 else ()

    def oracle_part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def oracle(self, inputs: Inputs) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
        query, keys = (inputs[name].detach().double() for name in ("query", "keys"))
        scores, indices = [], []
        for rows in query.split(_ORACLE_ROWS):
            products = rows @ keys.T
            if self.masked:
                products.masked_fill_(~inputs["mask"], -torch.inf)
            best = products.topk(self.count)
            scores.append(best.values)
            indices.append(best.indices)
        chosen, grad = torch.cat(indices), inputs.grad_out.double()
        if BACKWARD not in self.passes:
            return torch.cat(scores), ()
        grad_query = torch.stack([g @ keys[slots] for g, slots in zip(grad, chosen, strict=True)])
        grad_keys = torch.zeros_like(keys)
        for at in range(self.count):
            grad_keys.index_add_(0, chosen[:, at], grad[:, at, None] * query)
        return torch.cat(scores), (grad_query, grad_keys)


register_cases(
    [
        TopkCase("4096x1024,256 half of product keys", 4096, 1024, 256, passes=PASSES),
        TopkCase("1024x100k,64", 1024, 100_000, 64),
        TopkCase("32x1M,128", 32, 1_000_000, 128),
        TopkCase("1x1M,128", 1, 1_000_000, 128),
        TopkCase("1x1M,128 bf16", 1, 1_000_000, 128, dtype=torch.bfloat16),
        TopkCase("32x1M,128 bf16", 32, 1_000_000, 128, dtype=torch.bfloat16),
        TopkCase("1x10k,64", 1, 10_000, 64, quick=True),
        TopkCase("32x10k,64", 32, 10_000, 64, quick=True, passes=PASSES),
        TopkCase("1024x10k,64", 1024, 10_000, 64),
        TopkCase("32x100k,64 k=512", 32, 100_000, 64, count=512),
        TopkCase("32x100k,64 mask", 32, 100_000, 64, masked=True),
    ]
)
