"""The C library's allocator."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from wavedistill.tools.memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.zeros(2**24)
before = faults()
for _ in range(5):
    torch.zeros(2**24)
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told to keep freed memory")
def test_freed_memory_is_used_again_without_new_pages() -> None:
    """64 MiB taken and freed five times: as many page faults as pages by default, next to none when kept."""
    default, kept = (
        int(subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, check=True).stdout)
        for how in ("default", "kept")
    )
    assert kept < default / 10
