"""Training a model of attnfast under DDP, FSDP2 and tensor parallelism, against training in one process."""

from __future__ import annotations

from typing import Any

import ranks as processes
import torch
from torch import Tensor, nn

import attnfast
from attnfast.nn import MultiheadAttention

F64 = torch.float64
BATCH, TOKENS, SIZE, HEADS, STEPS = 4, 5, 8, 4, 4


class Block(nn.Module):
    """Both ways to have heads: a module that has all projections, and projections of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = MultiheadAttention(SIZE, HEADS, batch_first=True)
        self.query, self.key, self.value = (nn.Linear(SIZE, size) for size in (SIZE, SIZE // 2, SIZE // 2))
        self.out = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x, x, x, need_weights=False, is_causal=True)[0]
        heads = [linear(x).unflatten(-1, (-1, SIZE // HEADS)).transpose(1, 2)
                 for linear in (self.query, self.key, self.value)]  # fmt: skip
        y: Any = attnfast.attention(heads[0], heads[1], heads[2], causal="top_left", softcap=5.0)
        return x + self.out(y.transpose(1, 2).flatten(2))


def build() -> Block:
    torch.manual_seed(1)
    return Block().to(F64)


def train(model: nn.Module, parts: int = 1, part: int = 0) -> None:
    """So many steps; of each batch one of equal parts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for step in range(STEPS):
        x = torch.randn(BATCH, TOKENS, SIZE, generator=torch.Generator().manual_seed(step), dtype=F64)
        optimizer.zero_grad()
        (model(x.chunk(parts)[part]) ** 2).mean().backward()
        optimizer.step()


def parallel(rank: int, ranks: int) -> dict[str, dict[str, Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.nn.parallel import DistributedDataParallel

    import attnfast.distributed  # noqa: F401  (operators take DTensors)

    mesh = init_device_mesh("cpu", (ranks,))
    copies = build()
    train(DistributedDataParallel(copies), ranks, rank)
    sharded = build()
    fully_shard(sharded.first, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    train(sharded, ranks, rank)
    assert all(isinstance(x, DTensor) for x in sharded.parameters())
    found = {"DDP": copies, "FSDP2": sharded}
    # Heads on ranks: as DTensors, which attnfast's operators take, or as the local tensors of each rank.
    for kind, local in (("heads, DTensors", False), ("heads, local tensors", True)):
        heads = build()
        columns = ColwiseParallel(use_local_output=local)
        plan: dict[str, Any] = {
            "query": columns, "key": columns, "value": columns,
            "out": RowwiseParallel(output_layouts=Replicate()),
        }  # fmt: skip
        parallelize_module(heads, mesh, plan)
        assert isinstance(heads.query.weight, DTensor) and heads.query.weight.to_local().shape[0] == SIZE // ranks
        train(heads)
        found[kind] = heads
    return {kind: {name: processes.whole(x) for name, x in model.named_parameters()} for kind, model in found.items()}


def test_parameters_are_those_of_one_process() -> None:
    model = build()
    start = {name: x.detach().clone() for name, x in model.named_parameters()}
    train(model)
    want = dict(model.named_parameters())
    for results in processes.run(2, parallel):
        assert len(results) == 4
        for kind, parameters in results.items():
            assert parameters.keys() == want.keys()
            for name, x in parameters.items():
                assert not torch.equal(x, start[name])
                torch.testing.assert_close(x, want[name], rtol=1e-8, atol=1e-9, msg=f"{kind}: {name}")
