"""What figures are measured on."""

import datetime
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from wavedistill import __version__


def watch_others() -> Callable[[], float | None]:
    """A function that tells how many CPUs other programs have used, on average, since this call.

    None where the system does not say: from Linux's /proc/stat, with what a hypervisor took, less this process's own.
    """
    start, began = _seconds_of_others(), time.perf_counter()

    def so_far() -> float | None:
        now, elapsed = _seconds_of_others(), time.perf_counter() - began
        return None if start is None or now is None else max(0.0, (now - start) / elapsed)

    return so_far


def _seconds_of_others() -> float | None:
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, path.read_text().split(maxsplit=9)[1:9])
    everybody = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return everybody - sum(os.times()[:4])


def machine(device: torch.device) -> dict[str, Any]:
    """The machine, its system and the versions of what computes, with the date; plain values."""
    cpu_info = Path("/proc/cpuinfo")
    names = [line for line in cpu_info.read_text().splitlines() if "model name" in line] if cpu_info.exists() else []
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("torchaudio", "numpy", "numba")},
        "wavedistill": __version__,
        "date": datetime.date.today().isoformat(),
    }
