"""How the process takes memory from the system and gives it back."""

import ctypes
import sys

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
