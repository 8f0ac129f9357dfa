"""A job under torchrun whose ranks are killed: it starts again from the last checkpoint, and no saved step is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import elastic_job
import ranks as processes

import attnfast

TESTS = Path(__file__).resolve().parent


def undisturbed(rank: int, ranks: int, folder: Path) -> tuple[list[str], str]:
    lines: list[str] = []
    return lines, elastic_job.train(folder, lines.append)


def test_ranks_that_are_killed_lose_no_saved_step(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = processes.run(2, undisturbed, tmp_path / "whole")
    assert [lines for lines, _ in whole] == 2 * [["from 0", *(f"saved {n}" for n in range(1, elastic_job.STEPS + 1))]]

    folder = tmp_path / "killed"
    folder.mkdir()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
        str(TESTS / "elastic_job.py"), str(folder), str(attnfast.__file__), "die",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        # Otherwise ranks that start again find the addresses of the dead ones in torchrun's store (torch issue 135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    assert sorted(path.name for path in folder.glob("died-*")) == ["died-unnamed", "died-unsaved"]
    # What was made and not saved, and what was written and had no name, is made again; nothing else is.
    wanted = ["from 0", "saved 1", "from 1", "saved 2", "saved 3", "from 3", "saved 4", "saved 5"]
    for rank in range(2):
        assert (folder / f"log-{rank}").read_text().splitlines() == wanted, f"rank {rank}"
        assert (folder / f"result-{rank}").read_text() == whole[rank][1], f"rank {rank} has other bits"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-4", "step-5"]
