"""Parallel WaveNet distillation: an autoregressive-flow teacher and the parallel student that samples like it."""

import os
from importlib.metadata import version

from wavedistill.tools.caching import cache_compiled_code

# Read when torch is loaded, so it is said before: threads that wait by spinning come to a halt beside other work, see
# `wavedistill.networks.threads`.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = version("wavedistill")
cache_compiled_code()
