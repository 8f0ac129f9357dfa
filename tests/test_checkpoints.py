"""save_checkpoint on some ranks, load_checkpoint on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpointed
import pytest
import ranks as processes
import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnfast.distributed import ShardedMemory, load_checkpoint, save_checkpoint
from attnfast.nn import MultiheadAttention

SIZES = (37, 3, 1)  # no multiple of 4; fewer rows than ranks


def query(topk: int | None) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(topk or 99))


def reads(memory: ShardedMemory) -> list[Tensor]:
    """By queries that are the same on every rank; a soft read is merged by rank, so its bits depend on their number."""
    best = [memory(query(topk), topk=min(topk, memory.capacity), return_aux=True) for topk in (1, 3)]
    return [x.detach() for aux in best for x in aux[:3]]


def whole(x: Tensor, memory: ShardedMemory) -> Tensor:
    """All ranks' rows of something that has one for each of the memory's."""
    rows = torch.zeros(memory.rows_of_rank, *x.shape[1:], dtype=x.dtype)
    rows[: len(x)] = x
    parts = [torch.empty_like(rows) for _ in range(memory.ranks)]
    dist.all_gather(parts, rows)
    return torch.cat(parts)[: memory.capacity]


def everything(model: checkpointed.Model, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    memory, sharded = model.memory, []
    for parameter in (memory.keys, memory.values):
        state = optimizer.state[parameter]
        sharded += [whole(parameter.detach(), memory), whole(state["sum"], memory), state["step"]]
    rest = [x for name, x in model.state_dict().items() if name not in ("memory.keys", "memory.values", "memory.valid")]
    rest += [x for p in optimizer.param_groups[1]["params"] for _, x in sorted(optimizer.state[p].items())]
    return [*sharded, whole(memory.valid, memory), *rest, *reads(memory)]


def ring(folder: Path) -> tuple[ShardedMemory, nn.Module]:
    memory = ShardedMemory(capacity=10, key_size=8, value_size=2, dtype=torch.bfloat16)
    return memory, nn.ModuleDict({"inner": memory})


def save(rank: int, ranks: int, folder: Path) -> list[Any]:
    found = []
    for slots in SIZES:
        model, wrapped, optimizer = checkpointed.build(slots)
        for step in range(3):
            checkpointed.train(wrapped, optimizer, step)
        optimizer.param_groups[1]["lr"] = 0.07
        save_checkpoint(folder / str(slots), 3, wrapped, optimizer)
        found += everything(model, optimizer)
    memory, holder = ring(folder)
    memory.write(*(torch.randn(1, size, generator=torch.Generator().manual_seed(rank)) for size in (8, 2)))
    for step in (7, 8, 10):
        save_checkpoint(folder / "ring", step, holder)
        memory.write(*(torch.full((1, size), float(rank)) for size in (8, 2)))  # not in the last one
    return found


def load(rank: int, ranks: int, folder: Path) -> list[Any]:
    found = []
    for slots in SIZES:
        torch.manual_seed(rank)
        model, wrapped, optimizer = checkpointed.build(slots)
        with torch.no_grad():
            for x in model.parameters():
                x.fill_(7.0)
        assert load_checkpoint(folder / str(slots), wrapped, optimizer) == 3
        assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.07]
        found += everything(model, optimizer)
    memory, holder = ring(folder)
    assert sorted(path.name for path in (folder / "ring").iterdir()) == ["step-10", "step-8"]
    assert load_checkpoint(folder / "ring", holder) == 10
    # 4 ranks wrote 4 rows, saved 7, wrote 4, saved 8, wrote 4 (two of them over the first), and saved 10.
    assert int(memory.position) == 2 and bool(memory.valid.all())
    rows = whole(memory.values.float(), memory)[:, 0].tolist()
    assert rows[4:] == [0, 1, 2, 3, 0, 1] and rows[:2] == [2, 3]
    assert load_checkpoint(folder / "ring", holder, step=8) == 8
    assert int(memory.position) == 8 and int(whole(memory.valid, memory).sum()) == 8
    return found


def test_saved_on_four_ranks_and_loaded_on_others(tmp_path: Path) -> None:
    saved = processes.run(4, save, tmp_path)[0]
    for ranks in (2, 1):
        for loaded in processes.run(ranks, load, tmp_path):
            assert len(loaded) == len(saved) > 60
            for mine, theirs in zip(loaded, saved, strict=True):
                assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Attention under fully_shard; no size is a multiple of 4, so that shards differ and some are empty."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(dist.get_rank() + 1)
    model = nn.Sequential(nn.Linear(6, 7), SelfAttention(7), nn.LayerNorm(7), nn.Linear(7, 3))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.03)


class SelfAttention(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.attention = MultiheadAttention(size, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {name: processes.whole(x) for name, x in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        found |= {f"{name}.{what}": processes.whole(x) for what, x in optimizer.state[parameter].items()}
    return found


def save_sharded(rank: int, ranks: int, folder: Path) -> dict[str, Tensor]:
    model, optimizer = sharded()
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(10 * step + rank))
        model(x).square().mean().backward()
        optimizer.step()
    save_checkpoint(folder, 3, model, optimizer)
    return states(model, optimizer)


def load_sharded(rank: int, ranks: int, folder: Path) -> dict[str, Tensor]:
    model, optimizer = sharded()
    optimizer.param_groups[0]["lr"] = 7.0
    assert load_checkpoint(folder, model, optimizer) == 3
    assert optimizer.param_groups[0]["lr"] == 0.03
    found = states(model, optimizer)
    model(torch.randn(2, 5, 6)).square().mean().backward()
    optimizer.step()  # what was loaded is laid out as the optimizer wants it
    return found


def test_shards_of_fsdp_are_saved_on_four_ranks_and_loaded_on_others(tmp_path: Path) -> None:
    saved = processes.run(4, save_sharded, tmp_path)[0]
    assert len(saved) == 4 * len([name for name in saved if name.endswith("exp_avg")]) > 30
    for ranks in (4, 2, 1):
        for loaded in processes.run(ranks, load_sharded, tmp_path):
            assert loaded.keys() == saved.keys()
            for name, x in saved.items():
                assert x.dtype == loaded[name].dtype and torch.equal(x, loaded[name]), name


def refuse(rank: int, ranks: int, folder: Path) -> list[str]:
    model, wrapped, optimizer = checkpointed.build()
    nothing = folder / "nothing"
    assert load_checkpoint(nothing, model, optimizer) is None
    checkpointed.train(wrapped, optimizer, 0)
    save_checkpoint(folder, 1, model, optimizer)
    unfinished = folder / "step-2.unfinished"  # of a job that died: it is not loaded, and makes place
    if rank == 0:
        unfinished.mkdir()
    assert load_checkpoint(folder, model, optimizer) == 1
    larger = checkpointed.build(6)[0]
    small = nn.Linear(2, 2)
    swapped = torch.optim.Adagrad([{"params": group["params"]} for group in reversed(optimizer.param_groups)])
    calls: list[Any] = [
        lambda: save_checkpoint(folder, 1, model, optimizer),
        lambda: save_checkpoint(folder, -1, model),
        lambda: save_checkpoint(folder, 2, model, keep=0),
        lambda: save_checkpoint(folder, 2, small, optimizer),
        lambda: load_checkpoint(folder, model, step=5),
        lambda: load_checkpoint(folder, larger),
        lambda: load_checkpoint(folder, small),
        lambda: load_checkpoint(folder, model, torch.optim.Adagrad(model.parameters())),
        lambda: load_checkpoint(folder, model, swapped),
    ]
    messages = []
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        messages.append(str(error.value).replace(str(folder), "FOLDER"))
    columns = ShardedMemory(placement="columns", capacity=4, key_size=4, value_size=4)
    with pytest.raises(ValueError) as refused:
        save_checkpoint(folder, 2, nn.ModuleDict({"memory": columns}))
    messages.append(str(refused.value))
    (folder / "file").touch()
    with pytest.raises(RuntimeError) as failed:
        save_checkpoint(folder / "file", 2, model)
    messages.append(type(failed.value).__name__)
    save_checkpoint(folder, 2, model, optimizer)
    assert not unfinished.exists()
    return messages


def test_refusals_are_on_all_ranks(tmp_path: Path) -> None:
    first, second = processes.run(2, refuse, tmp_path)
    assert first == second
    wanted = [
        "step: expected one without a checkpoint, got 1 and FOLDER/step-1",
        "step: expected an integer >= 0, got -1",
        "keep: expected an integer >= 1, got 0",
        "optimizer: expected parameters of the model alone, got another one",
        "step: expected one of [1], got 5",
        "model/memory.keys: expected [5, 8], as it was saved, got [6, 8]",
        "model: expected weight, which FOLDER/step-1 has not",
        "optimizer: expected as many groups of parameters as were saved, got 1",
        "optimizer: expected ['memory.keys', 'memory.values'] in group 0, got ['project.weight',",
        "memory: expected a memory by rows, got by columns",
        "RuntimeError",
    ]
    for message, want in zip(first, wanted, strict=True):
        assert message.startswith(want)
