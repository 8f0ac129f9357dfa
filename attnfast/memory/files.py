"""The file of a store: a safetensors file with its buffers by name, and the layout's version in the metadata.

    metadata  format "pt"; attnfast: JSON {"kind": "MemoryStore", "version": 1, "policy": ...}
    tensors   keys [N, D], values [N, D_v], with int8 key_scale [N] and value_scale [N]; valid, usage, read_weight,
              written, last_used [N]; clock []

A file is written in a folder of its own beside its place, brought to the disk, renamed, and the folder around it
brought to the disk: at every moment the name leads to a whole file. The folder is locked while it is in use, so a later
save can tell the remains of a killed process from the work of a living one, and removes them.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnfast.memory.policies import POLICIES

KIND, VERSION = "MemoryStore", 1
TABLES = ("keys", "values", "key_scale", "value_scale")
COUNTERS = ("valid", "usage", "read_weight", "written", "last_used", "clock")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DTYPES = {
    "key_scale": torch.float32,
    "value_scale": torch.float32,
    "valid": torch.bool,
    "usage": torch.int64,
    "read_weight": torch.float64,
    "written": torch.int64,
    "last_used": torch.int64,
    "clock": torch.int64,
}


class MemoryFileError(ValueError):
    """A file that is no store of this version: truncated, foreign, inconsistent, or newer."""


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("attnfast.memory saves and loads with safetensors: pip install 'attnfast[memory]'") from error
    return safetensors


def find_problem(tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the state of a store, in words; None where it is whole and consistent."""
    keys, values = tensors.get("keys"), tensors.get("values")
    for name, table in (("keys", keys), ("values", values)):
        if table is None:
            return f"{name} is missing"
        if table.dim() != 2 or table.dtype not in (*_FLOATS, torch.int8):
            return f"{name}: expected a table of two dimensions, got {list(table.shape)} of {table.dtype}"
    assert keys is not None and values is not None
    slots, coded = keys.shape[0], keys.dtype is torch.int8
    if values.shape[0] != slots or values.dtype is not keys.dtype:
        return f"values: expected {slots} rows of {keys.dtype} (keys'), got {values.shape[0]} of {values.dtype}"
    for name, dtype in _DTYPES.items():
        if name in TABLES and not coded:
            if name in tensors:
                return f"{name}: tables of {keys.dtype} have none"
            continue
        column = tensors.get(name)
        if column is None:
            return f"{name} is missing"
        shape = [] if name == "clock" else [slots]
        if list(column.shape) != shape or column.dtype is not dtype:
            return f"{name}: expected {shape} of {dtype}, got {list(column.shape)} of {column.dtype}"
    now = tensors["clock"]
    for name in ("usage", "read_weight", "written", "last_used"):
        column = tensors[name]
        if not bool((column >= 0).all()):
            return f"{name}: expected numbers >= 0"
        if name in ("written", "last_used") and bool((column > now).any()):
            return f"{name}: expected stamps up to the clock's {int(now)}, got {int(column.max())}"
    return None


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], policy: str) -> None:
    """Write the state of a store to `path`, whole or not at all."""
    save_file = _safetensors().torch.save_file
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = json.dumps({"kind": KIND, "version": VERSION, "policy": policy})
    replace_file(path, lambda name: save_file(whole, name, metadata={"format": "pt", "attnfast": described}))


def read(path: str | os.PathLike[str], mmap: bool) -> tuple[dict[str, Tensor], str]:
    """State and policy of the store in `path`; tables mapped copy-on-write or read."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            policy = _checked_header(path, file.metadata())
            names = set(file.keys())
            tensors = {name: file.get_tensor(name) for name in (*TABLES, *COUNTERS) if name in names}
    except safetensors.SafetensorError as error:
        raise MemoryFileError(f"{os.fspath(path)}: not a whole safetensors file ({error})") from None
    problem = find_problem(tensors)
    if problem is not None:
        raise MemoryFileError(f"{os.fspath(path)}: damaged: {problem}")
    # The counters change with every read: copy them now, and not page by page.
    return {name: x if mmap and name in TABLES else x.clone() for name, x in tensors.items()}, policy


def _checked_header(path: str | os.PathLike[str], metadata: Mapping[str, str] | None) -> str:
    """The policy; an error unless the metadata is that of a store in a layout that is known here."""
    try:
        described = json.loads((metadata or {})["attnfast"])
        kind, version, policy = described["kind"], described["version"], described.get("policy")
    except (KeyError, TypeError, ValueError):
        raise MemoryFileError(f"{os.fspath(path)}: a safetensors file, but not one of attnfast's") from None
    if kind != KIND:
        raise MemoryFileError(f"{os.fspath(path)}: expected a {KIND}, got a {kind}")
    if not isinstance(version, int) or version < 1:
        raise MemoryFileError(f"{os.fspath(path)}: damaged: layout version {version!r}")
    if version > VERSION:
        raise MemoryFileError(
            f"{os.fspath(path)}: written by a newer attnfast (layout {version}, this one reads up to {VERSION})"
        )
    if policy not in POLICIES:
        raise MemoryFileError(f"{os.fspath(path)}: damaged: policy {policy!r}")
    return str(policy)


# --- one whole file or the other ------------------------------------------------------------------------------------


def replace_file(path: str | os.PathLike[str], write_to: Callable[[str], None]) -> None:
    """Let `write_to` fill a file, then put it in the place of `path` in one step that survives a power cut."""
    target = Path(os.path.realpath(path))  # of a link, the file it leads to is replaced
    _remove_remains(target)
    # A folder of its own: safetensors writes under names that it makes up, and leaves those behind when it is killed.
    folder, lock = _create_locked(target)
    try:
        written = folder / target.name
        descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        mode = os.fstat(descriptor).st_mode & 0o777  # what an ordinary file gets here
        os.close(descriptor)
        write_to(str(written))
        os.chmod(written, mode)
        _to_disk(written)
        os.replace(written, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
    _to_disk(target.parent)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create_locked(target: Path) -> tuple[Path, int]:
    """A new folder beside `target`, locked while the descriptor is open."""
    while True:
        folder = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
        folder.mkdir()
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # taken for remains before it was locked
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if folder.exists():
            return folder, descriptor
        os.close(descriptor)


def _remove_remains(target: Path) -> None:
    for remains in target.parent.glob(f".{glob.escape(target.name)}.????????????????.tmp"):
        try:
            descriptor = os.open(remains, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # gone, or not ours
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(remains, ignore_errors=True)
        except BlockingIOError:
            pass  # somebody is writing there
        finally:
            os.close(descriptor)
