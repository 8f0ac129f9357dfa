"""Where a result comes from: the columns that every row carries."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch


def cpu_name() -> str:
    """Vendor's name of the processor, with family and model where the name alone is generic."""
    try:
        fields = dict(
            (part.strip() for part in line.split(":", 1))
            for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
            if ":" in line
        )
    except OSError:
        return platform.processor() or platform.machine()
    name = " ".join(fields.get("model name", platform.machine()).split())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    return name


def commit() -> str:
    """Short hash of the checkout this file lies in, with "-dirty" for uncommitted changes; empty outside of one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def environment(device: str = "cpu") -> dict[str, str]:
    """Machine, versions, commit and date as text, by column. On a GPU it is the processor of the row."""
    import attnfast
    from attnfast._ext import _C

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB",
        "cpu": cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
        "isa": str(_C.get_isa()) if device == "cpu" else "sm_{}{}".format(*torch.cuda.get_device_capability()),
        "attnfast": attnfast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
