"""A training for torchrun, whose ranks may die: ``torchrun ... elastic_job.py FOLDER PACKAGE [die]``.

With ``die`` two ranks kill themselves, once each: rank 1 when it has made a step that is not saved yet, and rank 0 when
a checkpoint is written but has not got its name. What each rank did is appended to ``FOLDER/log-RANK``, and what came
of it goes to ``FOLDER/result-RANK``. tests/test_elastic.py starts it.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import checkpointed
import torch
import torch.distributed as dist

import attnfast
from attnfast.distributed import load_checkpoint, save_checkpoint

STEPS, UNSAVED, UNNAMED = 5, 2, 4  # steps at which rank 1 and rank 0 die


def die_once(marker: Path) -> None:
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, note: Callable[[str], None], die: bool = False) -> str:
    """All steps, from the last checkpoint on; a digest of this rank's parameters, buffers and optimizer state."""
    model, wrapped, optimizer = checkpointed.build()
    done = load_checkpoint(folder / "checkpoints", wrapped, optimizer) or 0
    note(f"from {done}")
    for step in range(done + 1, STEPS + 1):
        checkpointed.train(wrapped, optimizer, step)
        if die and step == UNSAVED and dist.get_rank() == 1:
            die_once(folder / "died-unsaved")
        save_checkpoint(folder / "checkpoints", step, wrapped, optimizer)
        note(f"saved {step}")
    digest = hashlib.sha256()
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main(folder: Path, package: str, die: bool) -> None:
    assert attnfast.__file__ == package, f"the job imported {attnfast.__file__}, the test {package}"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    if die and rank == 0:
        rename = Path.rename

        def dying(self: Path, target: str | os.PathLike[str]) -> Path:
            if Path(target).name == f"step-{UNNAMED}":
                die_once(folder / "died-unnamed")
            return rename(self, target)

        Path.rename = dying  # type: ignore[method-assign]

    def note(line: str) -> None:
        with (folder / f"log-{rank}").open("a") as file:
            file.write(line + "\n")

    result = train(folder, note, die)
    (folder / f"result-{rank}").write_text(result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:] == ["die"])
