"""What figures are measured on."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from wavedistill import __version__


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
