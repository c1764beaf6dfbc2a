"""What a run ran on: enough to say what a figure was measured with."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rarefy import kernels

#: What /proc/cpuinfo calls the features that matter to the kernels and to PyTorch.
_FEATURES = (
    *("avx", "avx2", "fma", "f16c", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512_vbmi2", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_bf16", "amx_int8", "asimd", "asimdhp", "asimddp", "i8mm", "sve", "sve2", "bf16"),
)

#: What a row of a table of measurements says of where they were made.
_COLUMNS = ("cpu", "native_isa", "torch", "rarefy", "python", "threads", "date")


def _cpu_information() -> dict[str, str]:
    """What the system tells of its first processor; empty where there is no /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    pairs = [line.partition(":") for line in text.partition("\n\n")[0].splitlines()]
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    """Return the processor's own name where the system tells it."""
    return _cpu_information().get("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Return the vector extensions of the processor; empty where the system does not tell."""
    about = _cpu_information()
    present = set((about.get("flags") or about.get("Features") or "").split())
    return [feature for feature in _FEATURES if feature in present]


def native_kernels() -> dict[str, str]:
    """List the native kernels that run here, each with its instruction set: the best there is, or the one asked for."""
    return {name: kernel.isa for name, kernel in kernels.in_use().items()}


def native_isa() -> str:
    """Return the instruction set that the native kernels run with here; "pytorch" where they do not run."""
    return next(iter(native_kernels().values()), "pytorch")


def describe() -> dict[str, Any]:
    """Versions, processor, the instruction set that the kernels use of it, threads, GPU."""
    return {
        "rarefy": version("rarefy"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "threads": torch.get_num_threads(),
        "native_isa": native_isa(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def provenance(command: str, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Give the columns that every row of a table of measurements ends with: machine, versions, date, command.

    They are of a run by what it wrote about itself (:func:`environment`), otherwise of this process, today.
    """
    today = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    known = {**describe(), "date": today} if about is None else {**about, "date": str(about["date"])[:10]}
    return {**{key: known[key] for key in _COLUMNS}, "command": command}


def environment(processes: int, device: str) -> dict[str, Any]:
    """:func:`describe`, and the command, the date, the device and the number of processes of this run."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {**describe(), "device": device, "processes": processes, "command": command, "date": date}
