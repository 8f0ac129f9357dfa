"""A model with attention, a sharded memory and buffers, in DDP, for tests/test_checkpoints.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import attnfast
from attnfast.distributed import ShardedMemory


class Model(nn.Module):
    """Attention, and a memory that all ranks share; rows of it may be missing on some."""

    def __init__(self, slots: int = 5) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.memory = ShardedMemory(capacity=slots, key_size=8, value_size=8, trainable=True)
        self.norm = nn.BatchNorm1d(8)  # buffers, one of them an integer

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in self.project(x).chunk(3, -1))
        seen = attnfast.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.norm((seen + self.memory(seen, topk=min(2, self.memory.capacity))).flatten(0, 1))


def build(slots: int = 5) -> tuple[Model, nn.Module, torch.optim.Optimizer]:
    """The model, itself in DDP without the memory (whose gradients are complete), and its optimizer."""
    torch.manual_seed(3)
    model = Model(slots)
    with torch.no_grad():  # the same tables whatever the number of ranks
        for table in (model.memory.keys, model.memory.values):
            whole = torch.randn(slots, table.shape[1], generator=torch.Generator().manual_seed(9))
            table.copy_(whole[model.memory.first :][: len(table)])
    ignored = [f"memory.{name}" for name in model.memory.state_dict()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    wrapped = DistributedDataParallel(model)
    named = dict(model.named_parameters())
    tables = [named.pop("memory.keys"), named.pop("memory.values")]
    # A state for every element, and groups that differ.
    groups: list[dict[str, Any]] = [{"params": tables, "lr": 0.3}, {"params": list(named.values())}]
    return model, wrapped, torch.optim.Adagrad(groups, lr=0.1)


def train(wrapped: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    rank = dist.get_rank()
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(100 * step + rank))
    optimizer.zero_grad()
    (wrapped(x) ** 3).sum().backward()
    optimizer.step()
