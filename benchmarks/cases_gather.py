"""The cases of reads by index: weighted sums of rows of a large table, and product-key memories.

Rows that were read a moment ago lie in the caches, which no memory of that size would find: each call takes the next of
several sets of indices, too many rows for the caches together. A backward alone runs on the graph of one forward again
and again; the rows that the gradient of the weights reads may then come from the last-level cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .measure import Settings
from .registry import BACKWARD, BOTH, FORWARD, PASSES, Inputs, register_cases

_SETS = 16


@dataclass(frozen=True)
class GatherCase:
    """indices [B, K], weights [B, K], values [N, D_v] -> [B, D_v], with a sparse gradient of the values."""

    name: str
    outputs: int = 256
    picks: int = 32
    slots: int = 1_000_000
    size: int = 256
    zipf: bool = False  # slot number n of a random order is picked with a probability that falls as 1 / n
    weights_grad: bool = False
    passes: tuple[str, ...] = PASSES
    quick: bool = False
    compiled_peers: bool = False
    suite: str = "gather"
    settings: Settings | None = None

    def columns(self) -> dict[str, Any]:
        return {
            "dtype": "fp32",
            "batch": 1,
            "heads": 1,
            "kv_heads": 1,
            "query_tokens": self.outputs,
            "key_tokens": self.slots,
            "head_size": self.picks,
            "value_size": self.size,
            "options": "zipf" if self.zipf else "uniform",
        }

    def small(self) -> GatherCase:
        return replace(self, outputs=8, slots=500)

    def flops(self, which: str) -> float:
        forward = 2.0 * self.outputs * self.picks * self.size
        backward = forward * (2 if self.weights_grad else 1)
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[which]

    def inputs(self) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        shape = (_SETS, self.outputs, self.picks)
        if self.zipf:
            chances = 1 / torch.arange(1, self.slots + 1, dtype=torch.float64)
            order = torch.randperm(self.slots, generator=generator)
            places = torch.multinomial(chances, shape[0] * shape[1] * shape[2], True, generator=generator)
            indices = order[places].view(shape)
        else:
            indices = torch.randint(0, self.slots, shape, generator=generator)
        values = torch.randn(self.slots, self.size, generator=generator).requires_grad_()
        weights = torch.randn(self.outputs, self.picks, generator=generator).requires_grad_(self.weights_grad)
        wanted = ("values", "weights") if self.weights_grad else ("values",)
        tensors = {"indices": indices, "weights": weights, "values": values}
        return Inputs(tensors, wanted, torch.randn(self.outputs, self.size, generator=generator))

    def streamed(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        return ()

    def oracle_part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A gradient of the table by the sums of its rows: in full, in float64, it would be twice the table."""
        if name != "values":
            return tensor
        if not tensor.is_sparse:
            return tensor.double().sum(1)
        sparse = tensor.coalesce()
        total = torch.zeros(self.slots, dtype=torch.float64)
        total[sparse.indices()[0]] = sparse.values().double().sum(1)
        return total

    def oracle(self, inputs: Inputs) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
        """Of the first set of indices, which the first call of every peer takes."""
        indices, grad = inputs["indices"][0], inputs.grad_out.double()
        rows, weights = inputs["values"].detach()[indices].double(), inputs["weights"].detach().double()
        grad_values = torch.zeros(self.slots, dtype=torch.float64)
        grad_values.index_add_(0, indices.flatten(), (weights * grad.sum(1, keepdim=True)).flatten())
        grads = (grad_values, torch.einsum("bkd,bd->bk", rows, grad))
        return torch.einsum("bk,bkd->bd", weights, rows), grads[: len(inputs.wanted)]


@dataclass(frozen=True)
class ProductKeysCase:
    """query [B, H, 2, D/2], keys [H, n, 2, D/2], values [n * n, D_v] -> [B, D_v]."""

    name: str
    queries: int
    side: int
    size: int  # of a half key
    value_size: int
    heads: int = 4
    picks: int = 32
    passes: tuple[str, ...] = (FORWARD, BOTH)
    quick: bool = False
    compiled_peers: bool = False
    suite: str = "pkm"
    settings: Settings | None = None

    def columns(self) -> dict[str, Any]:
        return {
            "dtype": "fp32",
            "batch": 1,
            "heads": self.heads,
            "kv_heads": self.heads,
            "query_tokens": self.queries,
            "key_tokens": self.side**2,
            "head_size": 2 * self.size,
            "value_size": self.value_size,
            "options": f"k:{self.picks}",
        }

    def small(self) -> ProductKeysCase:
        return replace(self, queries=6, side=max(16, self.picks))

    def flops(self, which: str) -> float:
        """Of the two products with all half keys, and of the sums of what is picked."""
        picked = 2.0 * self.queries * self.heads * self.picks * self.value_size
        forward = 4.0 * self.queries * self.heads * self.side * self.size + picked
        chosen = 8.0 * self.queries * self.heads * self.picks * self.size  # gradients of the queries and keys
        return {FORWARD: forward, BOTH: forward + 2 * picked + chosen}[which]

    def inputs(self) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).requires_grad_()

        tensors = {
            "query": draw(self.queries, self.heads, 2, self.size),
            "keys": draw(self.heads, self.side, 2, self.size),
            "values": draw(self.side**2, self.value_size),
        }
        with torch.no_grad():  # ordinary scores: a softmax with more than one weight
            tensors["keys"].mul_(self.size**-0.5)
        return Inputs(tensors, tuple(tensors), torch.randn(self.queries, self.value_size, generator=generator))

    def streamed(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        return ()

    def oracle_part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The table's gradient by the sums of its rows, as for GatherCase."""
        if name != "values":
            return tensor
        if tensor.is_sparse:
            tensor = tensor.coalesce()
            total = torch.zeros(self.side**2, dtype=torch.float64)
            total[tensor.indices()[0]] = tensor.values().double().sum(1)
            return total
        return tensor.double().sum(1)

    def oracle(self, inputs: Inputs) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
        """In float64, from all pairs of the best of both halves."""
        query, keys = (inputs[name].detach().double().requires_grad_() for name in ("query", "keys"))
        best, places = torch.einsum("bhpd,hnpd->bhpn", query, keys).topk(self.picks)
        sums = (best[:, :, 0].unsqueeze(-1) + best[:, :, 1].unsqueeze(-2)).flatten(-2)
        pairs = (places[:, :, 0].unsqueeze(-1) * self.side + places[:, :, 1].unsqueeze(-2)).flatten(-2)
        scores, order = sums.topk(self.picks)
        slots, weights = pairs.gather(-1, order).flatten(1), scores.softmax(-1).flatten(1)
        grad, values = inputs.grad_out.double(), inputs["values"].detach()
        outputs, by_weights = [], []
        for some, used, wanted in zip(slots.split(64), weights.detach().split(64), grad.split(64), strict=True):
            rows = values[some].double()
            outputs.append(torch.einsum("bk,bkd->bd", used, rows))
            by_weights.append(torch.einsum("bkd,bd->bk", rows, wanted))
        grad_query, grad_keys = torch.autograd.grad(weights, (query, keys), torch.cat(by_weights))
        grad_values = torch.zeros(self.side**2, dtype=torch.float64)
        grad_values.index_add_(0, slots.flatten(), (weights.detach() * grad.sum(1, keepdim=True)).flatten())
        return torch.cat(outputs), (grad_query, grad_keys, grad_values)


register_cases(
    [
        GatherCase("256x32 of 1M,256", quick=True),
        GatherCase("256x32 of 1M,256 zipf", zipf=True),
        GatherCase("256x32 of 1M,256 with weights", weights_grad=True, passes=(BACKWARD, BOTH)),
        GatherCase("256x32 of 1M,256 zipf with weights", zipf=True, weights_grad=True, passes=(BACKWARD, BOTH)),
        GatherCase("4096x32 of 1M,64", outputs=4096, size=64),
    ]
)
register_cases(
    [
        ProductKeysCase("4096x4 heads of 1024^2,256", 4096, 1024, 128, 256),
        ProductKeysCase("256x4 heads of 1024^2,256", 256, 1024, 128, 256),
        ProductKeysCase("64x4 heads of 128^2,64", 64, 128, 64, 64, quick=True),
    ]
)
