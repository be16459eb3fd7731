"""Whether an installation works: what it has, and whether a small model draws here what its equations say.

What might not be importable here is imported by the check that is about it.
"""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from wavedistill.models.compiling import compiler
from wavedistill.tools.machine import machine

EXTRAS = {
    "demo": {"py_nanotts": "the speech of `wavedistill run demo`", "pesq": "PESQ, one of the scores of speech"},
    "onnx": {
        "onnx": "`wavedistill export` to ONNX",
        "onnxscript": "`wavedistill export` to ONNX",
        "onnxruntime": "running what it exports",
    },
    "media": {"av": "recordings as m4a, mp4, webm"},
    "zoo": {"zuko": "`wavedistill zoo`", "sklearn": "`wavedistill zoo`", "torchflows": "tests against other flows"},
    "docs": {"sphinx": "the documents as a site"},
    "dev": {"pytest": "the tests", "ruff": "style", "mypy": "types"},
}
"""Packages that work can do without, by the extra that installs them, and what they are for."""
SECONDS = 1.0
"""Of sound that is synthesised."""


class Finding(NamedTuple):
    """The result of one check; `state` is "ok", "none" for something that is missing and may be, or "FAIL"."""

    state: str
    about: str
    words: str

    def __str__(self) -> str:
        return f"{self.state:5} {self.about}: {self.words}"


def examine(device: torch.device) -> Iterator[Finding]:
    """One check after another; none is left out because of another that failed.

    Args:
        device: where the models compute that are tried.
    """
    checks: dict[str, Callable[[], str]] = {
        "versions": _versions,
        "processor": lambda: _processor(device),
        "device": lambda: _device(device),
        **{f"cache of {name}": lambda folder=folder: _writable(folder()) for name, folder in CACHES.items()},  # type: ignore[misc]
        "exactness": lambda: _exactness(device),
        "synthesis": lambda: _synthesis(device),
    }
    for about, check in checks.items():
        try:
            yield Finding("ok", about, check())
        except Exception as error:  # whatever it is, it is what was asked for
            yield Finding("FAIL", about, f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}")
    yield from _extras()
    yield from _compilers()


def _versions() -> str:
    import torchaudio  # noqa: F401 (its last release fits some versions of torch only)

    names = ("wavedistill", "torch", "torchaudio", "numpy", "numba", "librosa", "soundfile")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])


def _processor(device: torch.device) -> str:
    about = machine(device)
    return f"{about['cpu']}, {about['cpu_count']} CPUs, {torch.get_num_threads()} threads; {about['system']}"


def _device(device: torch.device) -> str:
    product = torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
    if not bool((product == 8).all()):
        raise ArithmeticError(f"a product of ones on {device} is wrong")
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"{device}; CUDA GPUs here: {torch.cuda.device_count()}"


def _inductor() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


CACHES: dict[str, Callable[[], Path]] = {
    "numba, NUMBA_CACHE_DIR": lambda: Path(os.environ["NUMBA_CACHE_DIR"]),
    "torch.compile, TORCHINDUCTOR_CACHE_DIR": _inductor,
}
"""Where compiled code is kept, by what compiles it and the variable that says where."""


def _writable(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return str(folder)


def _exactness(device: torch.device) -> str:
    from wavedistill.checking.exactness import compared

    return compared(device)


def _synthesis(device: torch.device) -> str:
    """From a file of audio to a file of audio."""
    from wavedistill.checking.exactness import pair, voice_of
    from wavedistill.speech import audio

    voice = voice_of(pair(device)["student"])
    rate, hop = voice.sample_rate, voice.recipe.audio.hop_length
    length = round(SECONDS * rate / hop) * hop
    sound = 0.1 * torch.sin(2 * torch.pi * 150 / rate * torch.arange(length)).cumsum(0).sin()
    with tempfile.TemporaryDirectory() as folder:
        given, drawn = Path(folder) / "given.wav", Path(folder) / "drawn.wav"
        audio.write(given, sound, rate)
        began = time.perf_counter()
        wave, _ = voice.of_file(given)
        took = time.perf_counter() - began
        audio.write(drawn, wave, rate)
        written = drawn.stat().st_size
    if len(wave) != length or written < 2 * length or not 1e-4 < float(wave.std()) < 1:
        raise ArithmeticError(f"{len(wave)} samples of standard deviation {float(wave.std()):.2g} are no sound")
    return f"{SECONDS:g} s of sound by an untrained student of the recipe tiny, file to file, in {took:.2f} s"


def _extras() -> Iterator[Finding]:
    for extra, packages in EXTRAS.items():
        for name, purpose in packages.items():
            there = find_spec(name) is not None
            words = purpose if there else f'not installed; for {purpose}: pip install "wavedistill[{extra}]"'
            yield Finding("ok" if there else "none", f"extra {extra}, {name}", words)


def _compilers() -> Iterator[Finding]:
    c = next(filter(None, map(shutil.which, [os.environ.get("CC", "cc"), "gcc", "clang"])), None)
    for about, found, purpose in (("C", c, "installing pesq"), ("C++", compiler(), "training.compile")):
        yield Finding("ok" if found else "none", f"{about} compiler", f"{found or 'not found'}; for {purpose}")
