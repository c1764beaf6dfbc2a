"""What a run ran on: enough to say what a figure was measured with."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rarefy import kernels


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def native_isa() -> str:
    """The best instruction set that the native kernels run with here; "pytorch" without the library."""
    return next((kernel.isa for kernel in kernels.table() if kernel.supported), "pytorch")


def describe() -> dict[str, Any]:
    """Versions, processor, threads, GPU."""
    return {
        "rarefy": version("rarefy"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "native_isa": native_isa(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def environment(processes: int, device: str) -> dict[str, Any]:
    """:func:`describe`, and the command, the date, the device and the number of processes of this run."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {**describe(), "device": device, "processes": processes, "command": command, "date": date}
