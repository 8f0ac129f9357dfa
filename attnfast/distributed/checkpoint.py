"""Checkpoints that any number of ranks saves and any other number loads, whole or not there at all.

``torch.distributed.checkpoint`` writes and reads. What it cannot know is added here:

- The tables of a `ShardedMemory` are plain tensors, of which it would keep one rank's. They, and what an optimizer
  remembers of them, go in as DTensors: rows are dealt out as ``Shard(0)`` does, so nothing is copied or sent.
- An optimizer that has made no step has no state to load into: it is laid out as the checkpoint's metadata says. State
  goes by the names of parameters, so that ranks may have them in another order.
- A checkpoint is written to a folder beside and gets its name when every rank has finished: a job that dies while
  saving leaves the one before.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from attnfast.distributed._group import Group, contact, resolve
from attnfast.distributed.sharded_memory import ShardedMemory

_FINISHED = re.compile(r"step-(\d+)")
Result = TypeVar("Result")


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    keep: int = 2,
    group: Group | None = None,
) -> Path:
    """Save a model and its optimizer as ``folder/step-<step>``; all ranks of the group call it.

    Parameters
    ----------
    folder : path
        On a file system that all ranks see. It is made if need be.
    step : int
        How many steps are done, 0 or more; no checkpoint of this step may be there.
    model : nn.Module
        On its own, in ``DistributedDataParallel``, or with parameters that are DTensors (``fully_shard``,
        ``parallelize_module``). A `ShardedMemory` in it must be by rows and spread over the whole group.
    optimizer : torch.optim.Optimizer, optional
        Of parameters of the model.
    keep : int
        How many checkpoints stay, 1 or more; older ones are removed once this one is there.
    group : ProcessGroup, optional
        Default: all processes.

    Returns
    -------
    Path
        Of the checkpoint. It is complete, and on disk, when any rank returns.

    Raises
    ------
    ValueError
        An argument out of range, or a checkpoint of this step that is there.
    RuntimeError
        A rank that is gone, or a file that could not be written, on all ranks.
    """
    doing = "save_checkpoint"
    group, root = resolve(group), Path(folder)
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step: expected an integer >= 0, got {step!r}")
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ValueError(f"keep: expected an integer >= 1, got {keep!r}")
    finished = root / f"step-{step}"
    unfinished = root / f"step-{step}.unfinished"
    shards = _Shards(model, group)
    state = shards.of_model() | ({} if optimizer is None else shards.of_optimizer(optimizer))

    def begin() -> None:
        if finished.exists():
            raise FileExistsError(f"step: expected one without a checkpoint, got {step} and {finished}")
        for left_over in root.glob("step-*.unfinished"):  # of a job that died
            shutil.rmtree(left_over)
        unfinished.mkdir(parents=True)

    def end() -> None:
        unfinished.rename(finished)
        descriptor = os.open(root, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        for old in sorted(_checkpoints(root))[:-keep]:
            shutil.rmtree(root / f"step-{old}")

    _on_first(group, doing, begin)
    with contact(group, doing):
        # What every rank has, buffers of a batch norm say, may differ between them: rank 0's count, as for DDP.
        planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        dcp.save(state, checkpoint_id=unfinished, planner=planner, process_group=group)
    _on_first(group, doing, end)
    return finished


def load_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int | None = None,
    group: Group | None = None,
) -> int | None:
    """Load the last checkpoint of `save_checkpoint`, whatever the number of ranks that saved it; all ranks call it.

    Parameters
    ----------
    folder, model, optimizer, group
        As in `save_checkpoint`. The model and the optimizer's groups must be those that were saved.
    step : int, optional
        Which one. Default: the last.

    Returns
    -------
    int or None
        The step of the checkpoint; None, and nothing changed, if `step` is None and there is no checkpoint.

    Raises
    ------
    ValueError
        A step without a checkpoint; parameters or sizes that are not those of the checkpoint.
    """
    doing = "load_checkpoint"
    group, root = resolve(group), Path(folder)

    def find() -> int:
        found = _checkpoints(root)
        if step is not None and step not in found:
            raise FileNotFoundError(f"step: expected one of {sorted(found)}, got {step}")
        return max(found, default=-1) if step is None else step

    chosen = _on_first(group, doing, find)
    if chosen < 0:
        return None
    path = root / f"step-{chosen}"
    metadata = dcp.FileSystemReader(path).read_metadata()
    shards = _Shards(model, group)
    state = shards.of_model() | ({} if optimizer is None else shards.template(optimizer, metadata))
    for name, value in state.items():
        there = metadata.state_dict_metadata.get(name)
        if there is None:
            raise ValueError(f"{name.partition('/')[0]}: expected {name.partition('/')[2]}, which {path} has not")
        if isinstance(value, Tensor) and isinstance(there, TensorStorageMetadata) and value.shape != there.size:
            raise ValueError(f"{name}: expected {list(there.size)}, as it was saved, got {list(value.shape)}")
    with contact(group, doing):
        dcp.load(state, checkpoint_id=path, process_group=group)
    shards.into_model(state)
    if optimizer is not None:
        shards.into_optimizer(optimizer, state)
    return chosen


def _checkpoints(root: Path) -> list[int]:
    names = (_FINISHED.fullmatch(path.name) for path in (root.iterdir() if root.is_dir() else ()))
    return [int(name[1]) for name in names if name]


def _on_first(group: Group, doing: str, action: Callable[[], Result]) -> Result:
    """Rank 0 acts, and all ranks have the result or the error."""
    found: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            found[1] = action()
        except OSError as error:
            found[0] = error
    with contact(group, doing):
        dist.broadcast_object_list(found, src=dist.get_global_rank(group, 0), group=group)
    failure, result = found
    if isinstance(failure, FileExistsError | FileNotFoundError):
        raise ValueError(str(failure)) from failure
    if failure is not None:
        raise RuntimeError(f"{doing}: {failure}") from failure
    return result


class _Shards:
    """What is saved of a model and its optimizer: by name, and what is a shard as a DTensor."""

    def __init__(self, model: nn.Module, group: Group) -> None:
        self.model: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self.tables: dict[str, tuple[ShardedMemory, tuple[int, ...]]] = {}  # names, and shapes of the whole
        for prefix, module in self.model.named_modules():
            if isinstance(module, ShardedMemory):
                if module.placement != "rows":  # its columns are not dealt out as Shard(1) would
                    raise ValueError(f"{prefix or 'model'}: expected a memory by rows, got by {module.placement}")
                if module.ranks != dist.get_world_size(group):
                    raise ValueError(f"group: expected the {module.ranks} ranks of {prefix or 'the memory'}")
                for name in ("keys", "values", "valid"):
                    shape = (module.capacity, *getattr(module, name).shape[1:])
                    self.tables[f"{prefix}.{name}" if prefix else name] = module, shape

    def _whole(self, name: str, x: Any) -> Any:
        """A shard of a table, or of what an optimizer has for each of its elements, as a part of the whole."""
        memory, shape = self.tables[name]
        mesh = DeviceMesh.from_group(memory.group, x.device.type)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(x, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)

    def of_model(self) -> dict[str, Any]:
        """``model/<name>``: the tensors share the model's memory."""
        state = self.model.state_dict()
        return {f"model/{name}": self._whole(name, x) if name in self.tables else x for name, x in state.items()}

    def into_model(self, state: dict[str, Any]) -> None:
        loaded = {name: state[f"model/{name}"] for name in self.model.state_dict()}
        self.model.load_state_dict({name: _local(x) if name in self.tables else x for name, x in loaded.items()})

    def _names(self, optimizer: torch.optim.Optimizer) -> list[list[tuple[str, Tensor]]]:
        """The parameters of each group, with their names."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups = [group["params"] for group in optimizer.param_groups]
        if any(id(parameter) not in names for group in groups for parameter in group):
            raise ValueError("optimizer: expected parameters of the model alone, got another one")
        return [[(names[id(parameter)], parameter) for parameter in group] for group in groups]

    def of_optimizer(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """``optimizer/<parameter>/<what>``, and ``options/<number of the group>/<option>``."""
        state: dict[str, Any] = {}
        for at, (group, parameters) in enumerate(zip(optimizer.param_groups, self._names(optimizer), strict=True)):
            state |= {f"options/{at}/{option}": value for option, value in group.items() if option != "params"}
            state[f"options/{at}/params"] = [name for name, _ in parameters]
            for name, parameter in parameters:
                for what, x in optimizer.state.get(parameter, {}).items():
                    shard = name in self.tables and isinstance(x, Tensor) and x.shape == parameter.shape
                    if x is not None:
                        state[f"optimizer/{name}/{what}"] = self._whole(name, x) if shard else x
        return state

    def template(self, optimizer: torch.optim.Optimizer, metadata: Metadata) -> dict[str, Any]:
        """What :meth:`of_optimizer` gave when the checkpoint was saved, with other values."""
        state: dict[str, Any] = {}
        parameters: dict[str, Tensor] = {}
        for at, (group, named) in enumerate(zip(optimizer.param_groups, self._names(optimizer), strict=True)):
            # Of options the names count; parameters themselves would be taken for tensors to load.
            state |= {f"options/{at}/{name}": x.clone() if isinstance(x, Tensor) else 0 for name, x in group.items()}
            parameters |= dict(named)
        groups = len(optimizer.param_groups)
        if f"options/{groups}/params" in metadata.state_dict_metadata:
            raise ValueError(f"optimizer: expected as many groups of parameters as were saved, got {groups}")
        for key, there in metadata.state_dict_metadata.items():
            kind, _, rest = key.partition("/")
            name = rest.partition("/")[0]
            if kind != "optimizer" or name not in parameters:
                continue
            if not isinstance(there, TensorStorageMetadata):
                state[key] = 0
                continue
            parameter, dtype = parameters[name], there.properties.dtype
            if name in self.tables and there.size == self.tables[name][1]:
                state[key] = self._whole(name, torch.zeros_like(parameter, dtype=dtype).detach())
            elif isinstance(parameter, DTensor) and there.size == parameter.shape:
                state[key] = torch.zeros_like(parameter, dtype=dtype).detach()
            else:
                state[key] = torch.zeros(there.size, dtype=dtype)
        return state

    def into_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        groups, states, count = [], {}, 0
        for at, (group, named) in enumerate(zip(optimizer.param_groups, self._names(optimizer), strict=True)):
            names = [name for name, _ in named]
            if state[f"options/{at}/params"] != names:
                raise ValueError(f"optimizer: expected {state[f'options/{at}/params']} in group {at}, got {names}")
            indices = list(range(count, count + len(names)))
            count += len(names)
            options = {option: state[f"options/{at}/{option}"] for option in group if option != "params"}
            groups.append({**options, "params": indices})
            for index, name in zip(indices, names, strict=True):
                start = f"optimizer/{name}/"
                own = {key.removeprefix(start): x for key, x in state.items() if key.startswith(start)}
                if own:
                    states[index] = {what: _local(x) if name in self.tables else x for what, x in own.items()}
        optimizer.load_state_dict({"state": states, "param_groups": groups})


def _local(x: Any) -> Any:
    return x.to_local() if isinstance(x, DTensor) else x
