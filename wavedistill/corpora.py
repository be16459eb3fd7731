"""Where speech comes from: each kind of corpus as a list of sources that can be read one by one."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchaudio
from torch import Tensor

from wavedistill import audio
from wavedistill.config import Corpus, DebianCorpus, FolderCorpus, NanottsCorpus
from wavedistill.errors import CorpusError

NANOTTS_SAMPLE_RATE = 16000
MOST_CLIPPED = 0.001
"""Share of a recording's samples; a clipped peak now and then does no harm."""


class Source(NamedTuple):
    """One recording of a corpus.

    Attributes:
        name: unique in the corpus, fit for a file name.
        origin: what a person would call it, for messages and the manifest.
        read: gives its mono audio (T,) in [-1, 1] at a sample rate in Hz, or raises `AudioError`.
    """

    name: str
    origin: str
    read: Callable[[int], Tensor]


def sources(corpus: Corpus) -> list[Source]:
    """All recordings of a corpus, in a fixed order.

    Raises:
        CorpusError: if there are none, or what makes them is missing.
    """
    if isinstance(corpus, NanottsCorpus):
        found = _nanotts(corpus)
    else:
        found = _folder(_unpacked(corpus) if isinstance(corpus, DebianCorpus) else corpus)
    return found[: corpus.limit]


def state(corpus: Corpus) -> list[str]:
    """What must not change for a prepared corpus to stay current: text, digest, or each file's path, size and time."""
    if isinstance(corpus, NanottsCorpus):
        return _sentences(corpus)
    if isinstance(corpus, DebianCorpus):
        return [corpus.sha256]
    return [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in _files(corpus)]


def _nanotts(corpus: NanottsCorpus) -> list[Source]:
    if find_spec("py_nanotts") is None:
        raise CorpusError("corpus.kind = 'nanotts' needs the package py-nanotts: pip install 'wavedistill[demo]'")
    return [
        Source(f"{line:05d}", f"{corpus.text}, sentence {line}", partial(_speak, sentence, corpus.voice))
        for line, sentence in enumerate(_sentences(corpus), 1)
    ]


def _speak(sentence: str, voice: str, sample_rate: int) -> Tensor:
    # What the synthesiser says depends on what its process said and did before, so each sentence has one of its own.
    # Half the default volume: at full volume it clips.
    script = (
        "import sys; from py_nanotts import NanoTTS; sys.stdout.buffer.write("
        "NanoTTS().speak(sys.stdin.buffer.read().decode(), voice=sys.argv[1], volume=0.5))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, voice],
        input=sentence.encode(),
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        check=False,
    )
    if done.returncode:
        raise CorpusError(f"py-nanotts cannot speak {sentence!r}: {done.stderr.decode().strip()}")
    samples = torch.from_numpy(np.frombuffer(done.stdout, "<i2").astype(np.float32) / audio.PCM16_STEPS)
    return torchaudio.functional.resample(samples, NANOTTS_SAMPLE_RATE, sample_rate)


def _sentences(corpus: NanottsCorpus) -> list[str]:
    path = Path(corpus.text)
    try:
        sentences = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"corpus.text = {corpus.text!r}: cannot be read as UTF-8 text: {error}") from error
    if not sentences:
        raise CorpusError(f"corpus.text = {corpus.text!r}: holds no sentences; write one a line")
    return sentences


def _folder(corpus: FolderCorpus) -> list[Source]:
    root = Path(corpus.path)
    return [
        Source(_name(index, path), str(path.relative_to(root)), partial(audio.read, path, most_clipped=MOST_CLIPPED))
        for index, path in enumerate(_files(corpus), 1)
    ]


def _unpacked(corpus: DebianCorpus) -> FolderCorpus:
    """The folder of a package's files, fetched and unpacked if they are not there yet.

    Raises:
        CorpusError: if the package cannot be fetched or unpacked, or is not the one that the recipe means.
    """
    root = Path(corpus.path)
    unpacked, page = root / corpus.sha256, f"https://packages.debian.org/{corpus.package}"
    if not unpacked.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        if not list(root.glob(f"{corpus.package}_*.deb")):
            _command(["apt-get", "download", corpus.package], root, f"put the package into {root} yourself: {page}")
        package, *others = sorted(root.glob(f"{corpus.package}_*.deb"))
        if others:
            raise CorpusError(f"{root}: holds several packages {corpus.package}: keep the one with the right sha256")
        with package.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != corpus.sha256:
            raise CorpusError(f"{package}: its sha256 is {digest}, not corpus.sha256; get the right version: {page}")
        fresh = unpacked.with_suffix(".partial")
        shutil.rmtree(fresh, ignore_errors=True)
        _command(["dpkg-deb", "-x", package.name, fresh.name], root, f"remove {package} and fetch it again")
        fresh.rename(unpacked)
    return FolderCorpus(kind="folder", path=str(unpacked), limit=corpus.limit)


def _command(command: list[str], folder: Path, advice: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise CorpusError(
            f"corpus.kind = 'debian' needs {command[0]}, a part of Debian and Ubuntu; {advice}"
        ) from error
    if done.returncode:
        # Warnings come first, the reason last.
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        raise CorpusError(f"{' '.join(command)}: {said[-1]}; {advice}")


def _name(index: int, path: Path) -> str:
    """A unique name that still shows where it comes from: two folders may hold files of one name."""
    return f"{index:05d}_{''.join(c if c.isalnum() or c in '-_' else '_' for c in path.stem)}"


def _files(corpus: FolderCorpus) -> Sequence[Path]:
    root = Path(corpus.path)
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else f"does not exist (looked at {root.absolute()})"
        raise CorpusError(f"corpus.path = {corpus.path!r}: {problem}; give the folder that holds your recordings")
    # Names with a leading dot are other programs' own, for instance macOS's "._take1.wav".
    files = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in audio.AUDIO_SUFFIXES and path.is_file() and not path.name.startswith(".")
    )
    if not files:
        kinds = ", ".join(sorted(audio.AUDIO_SUFFIXES))
        raise CorpusError(f"corpus.path = {corpus.path!r}: holds no audio file ({kinds}), nor do its subfolders")
    return files
