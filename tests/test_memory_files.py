"""The file of a store: what comes back, mapped or read; damaged, foreign and newer files; kills at every point."""

from __future__ import annotations

import builtins
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attnfast
from attnfast.memory import MemoryFileError, MemoryStore, files

pytest.importorskip("safetensors")
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(attnfast.__file__).resolve().parents[1]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8)


def filled(dtype: torch.dtype = torch.float32, policy: str = "lru") -> MemoryStore:
    store = MemoryStore(12, 4, 3, dtype, policy)
    store.write(torch.randn(12, 4), torch.randn(12, 3))
    store.delete(torch.tensor([3, 9]))
    store.read(torch.randn(5, 4), 2)
    return store


def assert_same(a: MemoryStore, b: MemoryStore) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys() and a.policy == b.policy
    for name, x in ours.items():
        assert theirs[name].dtype is x.dtype and torch.equal(theirs[name], x), name


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("policy", ["ring", "lru", "lfu", "least_used"])
def test_a_loaded_store_goes_on_where_the_saved_one_stopped(
    tmp_path: Path, mmap: bool, dtype: torch.dtype, policy: str
) -> None:
    store = filled(dtype, policy)
    store.save(tmp_path / "memory.safetensors")
    other = MemoryStore.load(tmp_path / "memory.safetensors", mmap=mmap)
    assert_same(store, other)
    for _ in range(5):
        rows = torch.randn(4, 4), torch.randn(4, 3)
        assert torch.equal(store.write(*rows), other.write(*rows))
        query = torch.randn(3, 4)
        assert torch.equal(store.read(query, 3), other.read(query, 3))
    assert_same(store, other)


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    """Any reader of safetensors gets the tables by name."""
    store = filled(torch.int8)
    store.save(tmp_path / "memory")
    loaded = load_file(tmp_path / "memory")
    assert loaded.keys() == store.state_dict().keys()
    with safe_open(tmp_path / "memory", "pt") as file:
        described = json.loads(file.metadata()["attnfast"])
    assert described == {"kind": "MemoryStore", "version": 1, "policy": "lru"}


def test_writes_to_a_mapped_store_do_not_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    filled().save(path)
    before = path.read_bytes()
    store, neighbour = MemoryStore.load(path), MemoryStore.load(path)
    fresh = neighbour.keys.clone()
    store.write(torch.randn(12, 4), torch.randn(12, 3))
    store.delete(torch.tensor([0]))
    assert path.read_bytes() == before
    assert torch.equal(neighbour.keys, fresh)


def test_a_store_mapped_from_a_path_may_be_saved_there(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    filled().save(path)
    store, neighbour = MemoryStore.load(path), MemoryStore.load(path)
    fresh = neighbour.keys.clone()
    store.write(torch.randn(5, 4), torch.randn(5, 3))
    store.save(path)
    assert_same(store, MemoryStore.load(path))
    assert torch.equal(neighbour.keys, fresh)  # mapped before: still the file of then


_MEASURE = """
import os, sys, torch
from attnfast.memory import MemoryStore
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
MemoryStore.load(sys.argv[2])  # imports
before = resident()
store = MemoryStore.load(sys.argv[1], mmap=sys.argv[3] == "map")
loaded = resident() - before
store.read(torch.ones(1, 1024), 1, candidates=(torch.tensor([0, 2]), torch.tensor([10, 40000])))
store.update(torch.tensor([7]), torch.ones(1, 1024))
print(loaded, resident() - before)
"""


def test_mapping_does_not_read_the_tables(tmp_path: Path) -> None:
    """192 MiB of tables: mapped, they take next to nothing, even when a few rows are read and written."""
    store = MemoryStore(1 << 16, 1024, 512, torch.bfloat16)
    store.valid[:] = True
    store.clock += 1
    store.save(tmp_path / "large")
    filled().save(tmp_path / "small")
    taken = {}
    for how in ("map", "read"):
        command = [sys.executable, "-c", _MEASURE, str(tmp_path / "large"), str(tmp_path / "small"), how]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        taken[how] = [int(size) >> 20 for size in done.stdout.split()]
    assert taken["read"][0] > 180
    assert taken["map"][0] < 24 and taken["map"][1] < 40, taken


# -------------------------------------------------------------------------------------------------------- damaged files


def edited(source: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    """Write the file again with other tensors or metadata."""
    with safe_open(source, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, source, metadata=metadata)


def describe(**changes: Any) -> Callable[[dict[str, Any], dict[str, str]], None]:
    def change(_: Any, metadata: dict[str, str]) -> None:
        metadata["attnfast"] = json.dumps({**json.loads(metadata["attnfast"]), **changes})

    return change


DAMAGE: dict[str, tuple[Callable[[dict[str, Any], dict[str, str]], Any], str]] = {
    "newer": (describe(version=2), r"written by a newer attnfast \(layout 2, this one reads up to 1\)"),
    "version-text": (describe(version="1"), "damaged: layout version '1'"),
    "version-zero": (describe(version=0), "damaged: layout version 0"),
    "kind": (describe(kind="Other"), "expected a MemoryStore, got a Other"),
    "policy": (describe(policy="fifo"), "damaged: policy 'fifo'"),
    "foreign": (lambda t, m: m.clear(), "a safetensors file, but not one of attnfast's"),
    "not-json": (lambda t, m: m.update(attnfast="{"), "not one of attnfast's"),
    "json-list": (lambda t, m: m.update(attnfast="[]"), "not one of attnfast's"),
    "no-values": (lambda t, m: t.pop("values"), "damaged: values is missing"),
    "no-counter": (lambda t, m: t.pop("usage"), "damaged: usage is missing"),
    "keys-1d": (lambda t, m: t.update(keys=t["keys"].flatten()), "damaged: keys: expected a table"),
    "keys-dtype": (lambda t, m: t.update(keys=t["keys"].long()), "damaged: keys: expected a table"),
    "short-values": (lambda t, m: t.update(values=t["values"][:5].clone()), "damaged: values: expected 12 rows"),
    "mixed": (lambda t, m: t.update(values=t["values"].double()), "damaged: values: expected 12 rows of"),
    "short-valid": (lambda t, m: t.update(valid=t["valid"][:5].clone()), r"damaged: valid: expected \[12\]"),
    "usage-dtype": (lambda t, m: t.update(usage=t["usage"].int()), "damaged: usage: expected"),
    "scales": (lambda t, m: t.update(key_scale=torch.ones(12)), "damaged: key_scale"),
    "codes": (lambda t, m: t.update(keys=t["keys"].char(), values=t["values"].char()), "damaged: key_scale is missing"),
    "future": (lambda t, m: t["written"].fill_(10**6), "damaged: written: expected stamps"),
    "negative": (lambda t, m: t["usage"].fill_(-1), "damaged: usage: expected numbers >= 0"),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("mmap", [True, False])
def test_a_file_that_is_no_store_gets_one_clear_error(tmp_path: Path, name: str, mmap: bool) -> None:
    path = tmp_path / "memory"
    filled().save(path)
    change, pattern = DAMAGE[name]
    edited(path, change)
    with pytest.raises(MemoryFileError, match=pattern) as caught:
        MemoryStore.load(path, mmap=mmap)
    assert str(path) in str(caught.value)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path, cut = tmp_path / "memory", tmp_path / "cut"
    filled().save(path)
    whole = path.read_bytes()
    for size in {*range(0, len(whole), 37), *range(16), len(whole) - 1}:
        cut.write_bytes(whole[:size])
        with pytest.raises(MemoryFileError, match="not a whole safetensors file"):
            MemoryStore.load(cut)
    cut.write_bytes(whole + b"\0")
    with pytest.raises(MemoryFileError, match="not a whole safetensors file"):
        MemoryStore.load(cut)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04" + b"\0" * 100,
        b"hello" * 100,
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
    ],
    ids=["empty", "zip", "text", "huge-header", "list"],
)
def test_other_files_get_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(MemoryFileError, match="not a whole safetensors file"):
        MemoryStore.load(tmp_path / "other")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        MemoryStore.load(tmp_path / "nothing")
    with pytest.raises(OSError):
        MemoryStore.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        filled().save(tmp_path / "no" / "folder")


def test_without_safetensors_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("safetensors"):
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    for call in (lambda: filled().save(tmp_path / "a"), lambda: MemoryStore.load(tmp_path / "a")):
        with pytest.raises(ImportError, match=r"pip install 'attnfast\[memory\]'"):
            call()
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------- whole or not


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("point", ["write", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    path = tmp_path / "memory"
    old = filled()
    old.save(path)
    before = path.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if point == "write":
            patch.setattr("safetensors.torch.serialize_file", fail)
        else:
            patch.setattr(os, point, fail)
        with pytest.raises(OSError, match="No space left"):
            filled().save(path)
    assert path.read_bytes() == before and names(tmp_path) == ["memory"]
    assert_same(MemoryStore.load(path), old)


def test_a_save_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that a power cut cannot break: the file's bytes, the rename, the folder."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        where = os.readlink(f"/proc/self/fd/{descriptor}")
        size = os.fstat(descriptor).st_size
        events.append("folder" if where == str(tmp_path) else f"file of {size > 500}")
        fsync(descriptor)

    def note_replace(source: Any, target: Any) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    filled().save(tmp_path / "memory")
    assert events == ["file of True", "rename", "folder"]


def test_a_saved_file_has_the_rights_of_any_other(tmp_path: Path) -> None:
    filled().save(tmp_path / "memory")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "memory").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_link_leads_to_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "memory", tmp_path / "memory"
    filled().save(target)
    link.symlink_to(target)
    store = filled()
    store.save(link)
    assert link.is_symlink()
    assert_same(MemoryStore.load(target), store)


def test_remains_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    target = tmp_path / "memory"
    dead = tmp_path / ".memory.0123456789abcdef.tmp"
    others = [tmp_path / ".memory2.0123456789abcdef.tmp", tmp_path / "memory.tmp"]
    living, descriptor = files._create_locked(target)
    for path in (dead, *others, living):
        path.mkdir(exist_ok=True)
        (path / ".tmpAbCdEf").write_bytes(b"half")
    filled().save(target)
    assert not dead.exists() and (living / ".tmpAbCdEf").exists()
    assert all(path.exists() for path in others)
    os.close(descriptor)
    filled().save(target)
    assert not living.exists()


def test_readers_go_on_while_a_store_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And writers wait: the file is one state."""
    store = filled()
    saving, go_on = threading.Event(), threading.Event()
    write = files.write

    def slowly(*args: Any) -> None:
        saving.set()
        assert go_on.wait(10)
        write(*args)

    monkeypatch.setattr(files, "write", slowly)
    saver = threading.Thread(target=lambda: store.save(tmp_path / "memory"))
    saver.start()
    assert saving.wait(10)
    clock, keys = int(store.clock), store.keys.clone()
    reader = threading.Thread(target=lambda: store.read(torch.randn(2, 4), 2))
    reader.start()
    reader.join(10)
    assert not reader.is_alive()
    writer = threading.Thread(target=lambda: store.write(torch.randn(12, 4), torch.randn(12, 3)))
    writer.start()
    writer.join(0.2)
    assert writer.is_alive() and torch.equal(store.keys, keys)
    go_on.set()
    for thread in (saver, writer):
        thread.join(10)
        assert not thread.is_alive()
    loaded = MemoryStore.load(tmp_path / "memory")
    assert torch.equal(loaded.keys, keys) and int(loaded.clock) == clock


# -------------------------------------------------------------------------------------------------------------- kill -9

# One process forks a child for every kill: the child saves generation after generation (all rows of generation n hold
# n) and dies; the parent reports what was acknowledged before, and what the file holds after.
_KILLS = """
import json, os, signal, sys, time, torch
import attnfast.memory.files as files
from attnfast.memory import MemoryStore

torch.set_num_threads(1)

def save(store, path, number):
    rows = torch.full((store.capacity, 64), float(number))
    slots = torch.arange(store.capacity)
    store.update(slots, rows, rows) if len(store) else store.write(rows, rows)
    store.save(path)

def held(path):
    store = MemoryStore.load(path, mmap=False)
    numbers = torch.cat([store.keys, store.values]).unique().tolist()
    assert len(store) == store.capacity and len(numbers) == 1, numbers
    return int(numbers[0])

def at_line(path, line):
    seen = 0
    def trace(frame, event, argument):
        nonlocal seen
        if frame.f_code.co_filename != files.__file__:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    store = MemoryStore(16, 64, 64)
    save(store, path, 1)
    child = os.fork()
    if not child:
        sys.settrace(trace)
        save(store, path, 2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), held(path)

def at_time(path, seconds):
    store = MemoryStore(1 << 14, 64, 64)
    save(store, path, 1)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        for number in range(2, 1000):
            save(store, path, number)
            os.write(writer, b"*")
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(writer)
    said = 1 + len(os.read(reader, 1 << 16))
    os.close(reader)
    return code, said, held(path)

path = sys.argv[1]
lines = []
while not lines or lines[-1][0]:
    lines.append(at_line(path, len(lines) + 1))
times = [at_time(path, 0.002 + 0.0037 * attempt) for attempt in range(40)]
print(json.dumps({"lines": lines, "times": times}))
"""


def test_a_kill_never_loses_the_previous_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _KILLS, str(tmp_path / "memory")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    # A kill before every line of the code that saves, until one save comes to its end.
    *killed, (code, last) = results["lines"]
    assert code == 0 and last == 2 and len(killed) > 25
    assert {code for code, _ in killed} == {-signal.SIGKILL}
    numbers = [number for _, number in killed]
    assert set(numbers) == {1, 2} and numbers == sorted(numbers)
    # A kill wherever it happens to be, most often while 8 MiB are written.
    for code, said, number in results["times"]:
        assert code == -signal.SIGKILL
        assert number in (said, said + 1), "what save() returned for is there, or what came after it"
    assert max(said for _, said, _ in results["times"]) > 2
    # The remains of the dead went with the saves that followed, and the last one's with this.
    filled().save(tmp_path / "memory")
    assert names(tmp_path) == ["memory"]
