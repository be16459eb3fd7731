"""Parallel WaveNet distillation: an autoregressive-flow teacher and the parallel student that samples like it."""

from importlib.metadata import version

__version__ = version("wavedistill")
