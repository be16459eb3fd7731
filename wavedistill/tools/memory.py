"""How the process takes memory from the system and gives it back, and how much there is."""

import ctypes
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""
KEPT_BYTES = 2**31 - 1


def keep_freed_memory() -> None:
    """Reuse memory that was freed, where the C library is glibc; elsewhere do nothing.

    By default, every large tensor on the CPU is mapped anew and its pages are cleared one fault at a time, which took
    up to a fifth of a training step; see mallopt(3).
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def free_memory() -> int:
    """Bytes that processes may still take, by Linux's word and that of a container's group; elsewhere any number."""
    if sys.platform != "linux":
        return sys.maxsize
    fields = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    free = next(1024 * int(size) for name, size, *_ in fields if name == "MemAvailable:")
    limit, held = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.stat")
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        anonymous = int(held.read_text().split()[1])  # its first line; the rest can be given back
        free = min(free, int(most) - anonymous)
    return free
