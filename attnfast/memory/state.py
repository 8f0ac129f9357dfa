"""The state of a store: its buffers, how they are checkpointed, copied, saved and loaded.

The state is buffers, and nothing but buffers: the tables, the mask of valid slots and the counters. The order in which
slots are given up follows from them; the `SlotBook` that is kept beside them for speed is made again after a load.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from attnfast import _validate as check
from attnfast._memory_read import whole
from attnfast.memory import files
from attnfast.memory.files import COUNTERS, TABLES, find_problem
from attnfast.memory.locks import ReadWriteLock
from attnfast.memory.policies import POLICIES, Marks, SlotBook

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8)
# What a change of dtype (store.half(), store.to(torch.bfloat16)) leaves alone.
_EXACT = ("key_scale", "value_scale", "read_weight")
Self = TypeVar("Self", bound="StoreState")


class StoreState(nn.Module):
    """Buffers and their keeping; see `MemoryStore`."""

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None
    valid: Tensor
    usage: Tensor
    read_weight: Tensor
    written: Tensor
    last_used: Tensor
    clock: Tensor

    def __init__(
        self,
        capacity: int,
        key_size: int,
        value_size: int,
        dtype: torch.dtype = torch.float32,
        policy: str = "ring",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.capacity = whole("capacity", capacity)
        self.key_size, self.value_size = whole("key_size", key_size), whole("value_size", value_size)
        if dtype not in DTYPES:
            names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
            raise TypeError(f"dtype: expected one of {names}, got {dtype}")
        self.policy = check.choice("policy", policy, POLICIES)
        for name, size in (("keys", key_size), ("values", value_size)):
            self.register_buffer(name, torch.zeros(capacity, size, dtype=dtype, device=device))
        for name in ("key_scale", "value_scale"):
            self.register_buffer(name, torch.zeros(capacity, device=device) if dtype is torch.int8 else None)
        self.register_buffer("valid", torch.zeros(capacity, dtype=torch.bool, device=device))
        self.register_buffer("read_weight", torch.zeros(capacity, dtype=torch.float64, device=device))
        for name in ("usage", "written", "last_used"):
            self.register_buffer(name, torch.zeros(capacity, dtype=torch.int64, device=device))
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64, device=device))
        self._make_helpers()

    def _make_helpers(self) -> None:
        self._lock = ReadWriteLock()
        self._counting = Lock()  # reads that run beside each other count one after another
        self._book: SlotBook | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the tables."""
        return self.keys.dtype

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the store to one file, whole or not at all.

        The file is a safetensors file with the buffers by their names. It is written beside `path`, brought to the disk
        and then renamed, so whatever happens (a full disk, a kill, a power cut), `path` is either the old file or the
        new one, and so it is to anybody who has it open or mapped. Reads go on meanwhile, writes wait.

        Raises
        ------
        ImportError
            Without the package safetensors.
        OSError
            Where the file cannot be written.
        """
        with self._lock.reading():
            with self._counting:
                # Reads go on and count; the file has the counters of this moment.
                counters = {name: getattr(self, name).clone() for name in COUNTERS}
            tables = {name: table for name in TABLES if (table := getattr(self, name)) is not None}
            files.write(path, {**tables, **counters}, self.policy)

    @classmethod
    def load(
        cls: type[Self], path: str | os.PathLike[str], mmap: bool = True, *, device: torch.device | str | None = None
    ) -> Self:
        """A store as it was saved: the same rows in the same slots, and the same evictions from here on.

        Parameters
        ----------
        path : str or os.PathLike
            What :meth:`save` wrote.
        mmap : bool
            Map the tables into memory instead of reading them: loading takes no time, and parts that are never read
            take no memory. The mapping is copy-on-write: the store can be written like any other, pages that are
            written are copied, and the file changes with :meth:`save` only. Replace a mapped file by renaming another
            over it (as `save` does); cutting it short in place would crash whoever has it mapped. False: read it all.
        device : torch.device, optional
            Where the store goes; default: the host. Elsewhere the tables are copied.

        Raises
        ------
        MemoryFileError
            A file that is truncated, of another kind, inconsistent, or of a newer layout; a ValueError.
        ImportError
            Without the package safetensors.
        OSError
            Where the file cannot be opened.
        """
        tensors, policy = files.read(path, mmap)
        (capacity, key_size), value_size = tensors["keys"].shape, tensors["values"].shape[1]
        store = cls(capacity, key_size, value_size, tensors["keys"].dtype, policy, device="meta")
        store._buffers.update(tensors)
        return store if device is None else store.to(device)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """All or nothing: a state that does not fit leaves the store as it is. The policy stays that of the store."""
        wanted = [name for name, buffer in self._buffers.items() if buffer is not None]
        given = {name: state_dict[prefix + name] for name in (*TABLES, *COUNTERS) if prefix + name in state_dict}
        missing = [prefix + name for name in wanted if name not in given]
        if any(prefix + name in missing for name in ("keys", "values", *COUNTERS)):
            missing_keys += missing
            return
        problem: str | None = None
        for name in ("keys", "values"):
            table, own = given[name], getattr(self, name)
            if problem is None and (table.dtype is torch.int8) != (own.dtype is torch.int8):
                problem = f"{name}: expected dtype {own.dtype}, got {table.dtype}; write the rows instead"
            if problem is None and table.shape != own.shape:
                problem = f"{name}: expected {check.shape_text(own.shape)}, got {check.shape_text(table.shape)}"
        problem = problem or find_problem(given)
        if problem is not None:
            error_msgs.append(f'memory store "{prefix.removesuffix(".")}": {problem}')
            return
        with self._lock.writing():
            self._book = None
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoreState:
        """What .to(), .half() and the like call: scales and sums of weights keep their dtype."""
        with self._lock.writing():
            exact = {name: buffer for name in _EXACT if (buffer := self._buffers[name]) is not None}
            super()._apply(fn, recurse)
            for name, before in exact.items():
                after = self._buffers[name]
                if after is not None and after.dtype is not before.dtype:
                    self._buffers[name] = before.to(after.device)
            self._book = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: locks stay behind, and what is kept for speed is made again."""
        return {name: x for name, x in self.__dict__.items() if name not in ("_lock", "_counting", "_book")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._make_helpers()

    # --- parts ------------------------------------------------------------------------------------------------------

    def _marks(self) -> Marks:
        return Marks(self.valid, self.usage, self.read_weight, self.written, self.last_used)

    def _current_book(self) -> SlotBook:
        """A lock is held; readers may come here together."""
        with self._counting:
            if self._book is None:
                self._book = SlotBook(self.policy, self._marks())
            return self._book

    @contextmanager
    def _changing(self) -> Iterator[SlotBook]:
        """The write lock is held. The book is put back if all went well; else it is made anew from the buffers."""
        book = self._current_book()
        self._book = None
        yield book
        self._book = book

    def _ticks(self, count: int) -> Tensor:
        """The next `count` values of the clock."""
        ticks = self.clock + torch.arange(1, count + 1, device=self.clock.device)
        self.clock += count
        return ticks
