"""Where speech comes from: each kind of corpus as a list of sources that can be read one by one."""

import os
import shutil
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from wavedistill.corpus import given, recordings
from wavedistill.recipe.sections import (
    Audio,
    Corpus,
    DebianCorpus,
    FolderCorpus,
    NanottsCorpus,
    Part,
    SeveralCorpora,
)
from wavedistill.speech.audio import PCM16_STEPS
from wavedistill.tools.errors import CorpusError
from wavedistill.tools.files import named, sha256, shown

NANOTTS_SAMPLE_RATE = 16000
LONGEST_SUFFIX = "_000000.f0.npy.partial"
"""Of what is written for a recording."""
MOST_CLIPPED = 0.001
"""Share of a recording's samples; a clipped peak now and then does no harm."""


class Source(NamedTuple):
    """One recording of a corpus.

    Attributes:
        name: unique in the corpus, fit for a file name.
        origin: what a person would call it, for messages and the manifest.
        read: gives its mono audio (T,) at a sample rate in Hz, or raises `AudioError`.
        path: the file it is in, if it is in one.
        mel: gives the log-mel (n_mels, F) that lies beside it, of its audio (T,) in units, or raises `AudioError`; None
            where models are told the recording's own.
    """

    name: str
    origin: str
    read: Callable[[int], Tensor]
    path: Path | None = None
    mel: Callable[[Tensor, Audio], Tensor] | None = None


def sources(corpus: Corpus) -> list[Source]:
    """All recordings of a corpus, in a fixed order.

    Raises:
        CorpusError: if there are none, or what makes them is missing.
    """
    if isinstance(corpus, SeveralCorpora):
        return [source for number, part in enumerate(corpus.parts, 1) for source in _part(number, part)]
    if isinstance(corpus, NanottsCorpus):
        found = _nanotts(corpus)
    else:
        found = _folder(_unpacked(corpus) if isinstance(corpus, DebianCorpus) else corpus)
    return found[: corpus.limit]


def state(corpus: Corpus) -> list[str]:
    """What must not change for a prepared corpus to stay current: text, digest, or each file's path, size and time."""
    if isinstance(corpus, SeveralCorpora):
        return [f"{number} {line}" for number, part in enumerate(corpus.parts) for line in state(part.corpus)]
    if isinstance(corpus, NanottsCorpus):
        return _sentences(corpus)
    if isinstance(corpus, DebianCorpus):
        return [corpus.sha256]
    return [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in _inputs(corpus)]


def unreadable(corpus: Corpus) -> list[str]:
    """The files of a folder that may not be read just now: one of them, once it may, makes a corpus another."""
    return [str(p) for each in _folders(corpus) for p in _inputs(each) if not os.access(p, os.R_OK)]


def unused(corpus: Corpus) -> list[str]:
    """What lies in a corpus's folder, looks like recordings, and is none of its sources; and why."""
    return [line for each in _folders(corpus) for line in _found(each).unused]


def _folders(corpus: Corpus) -> list[FolderCorpus]:
    """The folders of the user's own that a corpus names."""
    every = [part.corpus for part in corpus.parts] if isinstance(corpus, SeveralCorpora) else [corpus]
    return [each for each in every if isinstance(each, FolderCorpus)]


def _part(number: int, part: Part) -> list[Source]:
    """The recordings of one of several corpora, once for each speed; those of one recording share their origin."""
    return [
        Source(
            named(f"{number}_{round(100 * speed):03d}_{source.name}", LONGEST_SUFFIX).removesuffix(LONGEST_SUFFIX),
            f"{number}: {source.origin}",
            partial(_faster, source.read, speed),
            source.path,
            source.mel,
        )
        for source in sources(part.corpus)
        for speed in part.speeds
    ]


def _faster(read: Callable[[int], Tensor], speed: float, sample_rate: int) -> Tensor:
    # Fewer samples a second, taken for as many as ever.
    return read(round(sample_rate / speed))


def _nanotts(corpus: NanottsCorpus) -> list[Source]:
    if find_spec("py_nanotts") is None:
        raise CorpusError("corpus.kind = 'nanotts' needs the package py-nanotts: pip install 'wavedistill[demo]'")
    text = "/".join(Path(corpus.text).parts[-2:])  # the same wherever its folder lies, because splits follow from it
    return [
        Source(f"{line:05d}", f"{text}, sentence {line}", partial(_speak, sentence, corpus.voice))
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
    samples = np.frombuffer(done.stdout, "<i2").astype(np.float32) / PCM16_STEPS
    return recordings.resample(samples, NANOTTS_SAMPLE_RATE, sample_rate)


def _sentences(corpus: NanottsCorpus) -> list[str]:
    path = _own(corpus.text)
    try:
        sentences = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"corpus.text = {corpus.text!r}: cannot be read as UTF-8 text: {error}") from error
    if not sentences:
        raise CorpusError(f"corpus.text = {corpus.text!r}: holds no sentences; write one a line")
    return sentences


def _folder(corpus: FolderCorpus) -> list[Source]:
    root = _own(corpus.path)
    return [
        Source(
            _name(index, path),
            shown(path.relative_to(root)),
            partial(recordings.read, path, most_clipped=MOST_CLIPPED),
            path,
            partial(given.read, _own(corpus.mels), path.relative_to(root)) if corpus.mels else None,
        )
        for index, path in enumerate(_files(corpus), 1)
    ]


def _unpacked(corpus: DebianCorpus) -> FolderCorpus:
    """The folder of a package's files, fetched and unpacked if they are not there yet.

    Raises:
        CorpusError: if the package cannot be fetched or unpacked, or is not the one that the recipe means.
    """
    root = _own(corpus.path or f"~/.cache/wavedistill/{corpus.package}")
    unpacked, page = root / corpus.sha256, f"https://packages.debian.org/{corpus.package}"
    if not unpacked.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        if not list(root.glob(f"{corpus.package}_*.deb")):
            _command(["apt-get", "download", corpus.package], root, f"put the package into {root} yourself: {page}")
        package, *others = sorted(root.glob(f"{corpus.package}_*.deb"))
        if others:
            raise CorpusError(f"{root}: holds several packages {corpus.package}: keep the one with the right sha256")
        if (digest := sha256(package)) != corpus.sha256:
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
    stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in path.stem)
    return named(f"{index:05d}_{stem}", LONGEST_SUFFIX).removesuffix(LONGEST_SUFFIX)


def _own(path: str) -> Path:
    """A path as a person writes it, where ~ is home."""
    return Path(os.path.expanduser(path))


class Found(NamedTuple):
    """What a folder holds: files that are wanted, and what looks like some and is not used, with the reason."""

    files: list[Path]
    unused: list[str]


def _files(corpus: FolderCorpus) -> list[Path]:
    return _found(corpus).files


def _inputs(corpus: FolderCorpus) -> list[Path]:
    """The recordings below a corpus's folder, and the log-mels that are given for them."""
    files, root = _files(corpus), _own(corpus.path)
    beside = [given.find(_own(corpus.mels), path.relative_to(root)) for path in files] if corpus.mels else []
    return [*files, *(path for path in beside if path)]


def _found(corpus: FolderCorpus) -> Found:
    """The recordings below a corpus's folder.

    Raises:
        CorpusError: if there are none.
    """
    root, where = _own(corpus.path), f"corpus.path = {corpus.path!r}"
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else f"does not exist (looked at {shown(root.absolute())})"
        raise CorpusError(f"{where}: {problem}; give the folder that holds your recordings")
    found = below(root, recordings.READABLE)
    if not found.files:
        kinds = ", ".join(sorted(recordings.READABLE))
        others = f"; not used: {'; '.join(found.unused)}" if found.unused else ""
        raise CorpusError(f"{where}: holds no audio file ({kinds}), nor do its subfolders{others}")
    return found


def below(root: Path, kinds: frozenset[str]) -> Found:
    """What a folder and its subfolders hold, each visited once, and those behind links after all others.

    Args:
        root: the folder.
        kinds: the endings of the files that are wanted.
    """
    files, unused, others = [], [], []
    waiting, visited = deque([root]), set()
    while waiting:
        folder = waiting.popleft()
        if (real := folder.resolve()) in visited:
            continue
        visited.add(real)
        if not os.access(folder, os.R_OK | os.X_OK):
            unused.append(f"{shown(folder.relative_to(root))}, a folder: permission denied")
            continue
        for path in sorted(folder.iterdir()):
            hidden, suffix = path.name.startswith("."), path.suffix.lower()
            if path.is_dir():
                if not hidden:
                    waiting.append(path) if path.is_symlink() else waiting.appendleft(path)
                elif count := sum(inner.suffix.lower() in kinds for inner in path.rglob("[!.]*")):
                    unused.append(f"{shown(path.relative_to(root))}, a hidden folder: {count} recordings")
            elif hidden:
                continue  # other programs' own, for instance macOS's "._take1.wav"
            elif suffix in recordings.UNREADABLE:
                others.append(path)
            elif suffix in kinds:
                if path.is_file():
                    files.append(path)
                else:
                    unused.append(f"{shown(path.relative_to(root))}: not a file, or a link to nothing")
    for suffix, count in sorted(Counter(path.suffix.lower() for path in others).items()):
        first = min(path for path in others if path.suffix.lower() == suffix)
        unused.append(
            f"{count} {suffix} file{'s' * (count > 1)}, such as {shown(first.relative_to(root))}: need the package av: "
            "pip install 'wavedistill[media]', or convert to wav or flac"
        )
    return Found(sorted(files), unused)
