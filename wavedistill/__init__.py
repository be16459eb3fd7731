"""Parallel WaveNet distillation: an autoregressive-flow teacher and the parallel student that samples like it.

`load` gives a trained model, ready to speak; everything else is in the rooms below. Nothing is imported before its use.
"""

import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from wavedistill.tools.caching import cache_compiled_code

if TYPE_CHECKING:
    from wavedistill.speech.mels import mel_format
    from wavedistill.vocoder.vocoder import Vocoder, load

__all__ = ["Vocoder", "__version__", "load", "mel_format"]

# Read when torch is loaded, so it is said before: threads that wait by spinning come to a halt beside other work, see
# `wavedistill.networks.threads`.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = version("wavedistill")
cache_compiled_code()


def __getattr__(name: str) -> Any:
    if name in ("load", "Vocoder"):
        from wavedistill.vocoder import vocoder

        return getattr(vocoder, name)
    if name == "mel_format":
        from wavedistill.speech.mels import mel_format

        return mel_format
    raise AttributeError(f"module 'wavedistill' has no attribute {name!r}")
