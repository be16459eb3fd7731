"""Parallel WaveNet distillation: an autoregressive-flow teacher and the parallel student that samples like it."""

from importlib.metadata import version

from wavedistill.caching import cache_compiled_code

__version__ = version("wavedistill")
cache_compiled_code()
