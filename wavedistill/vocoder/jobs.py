"""What `generate` is to do: which of the files that a person names become which."""

import glob
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from wavedistill.corpus import recordings
from wavedistill.corpus.sources import below
from wavedistill.speech.audio import comment_of
from wavedistill.speech.mels import SUFFIXES
from wavedistill.tools.errors import AudioError, UserError
from wavedistill.tools.files import named, shown
from wavedistill.tools.progress import note

OURS = "wavedistill generate "
"""With what a comment begins that says what a file was made of."""


class Job(NamedTuple):
    """A file to synthesise, and the one that it becomes."""

    source: Path
    target: Path


def found(words: Iterable[str], folder: Path) -> list[Job]:
    """The files that words stand for, in their order: files, folders with all in them, and patterns such as `a/*.wav`.

    What lies below a folder goes below the output folder alike; what lies in the output folder is no input.

    Raises:
        AudioError: if a folder or a pattern holds none.
    """
    jobs: dict[Job, None] = {}
    for word in words:
        path = Path(word).expanduser()
        matches = [path]
        if not os.path.lexists(path) and glob.has_magic(word):
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            if not matches:
                raise AudioError(f"{shown(word)}: there is no such file, nor does any file match it as a pattern")
        for match in matches:
            jobs |= dict.fromkeys(_in_folder(match, folder) if os.path.isdir(match) else [_job(match, folder)])
    return list(jobs)


def words_in(path: Path) -> list[str]:
    """The paths in a text file, one a line.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{shown(path)}: cannot be read as a list of files, UTF-8 text with one a line: {error}"
        ) from error
    return [line.strip() for line in lines if line.strip()]


def faults(jobs: Sequence[Job], check: Callable[[Path], None], *, overwrite: bool) -> list[str]:
    """All that stands against some jobs, one line each.

    Args:
        jobs: the jobs.
        check: raises an `AudioError` if a file cannot be synthesised.
        overwrite: whether files that others have made may be replaced.
    """
    said: list[str] = []
    targets: dict[Path, Path] = {}
    for source, target in jobs:
        if target in targets:
            said.append(
                f"{shown(source)}: another input of the same name, {shown(targets[target])}, would also become "
                f"{shown(target)}; run them one by one"
            )
            continue
        targets[target] = source
        if os.path.realpath(target) == os.path.realpath(source):
            said.append(
                f"{shown(source)}: --out {shown(target.parent)} would overwrite this input; give another folder"
            )
            continue
        if os.path.isdir(target):
            said.append(f"{shown(target)}: is a folder, where a file is to be written; give another --out")
        elif os.path.lexists(target) and not (overwrite or (comment_of(target) or "").startswith(OURS)):
            said.append(f"{shown(target)}: is there already, and not by `generate`; give another --out, or --overwrite")
        try:
            check(source)
        except AudioError as error:
            said.append(str(error))
    return said


def make_room(folder: Path) -> None:
    """Make a folder for what is to be written.

    Raises:
        UserError: if there cannot be one, or it is not ours to write to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "permission denied"
    except OSError as error:
        reason = "is a file" if folder.exists() else (error.strerror or str(error)).lower()
    if reason:
        raise UserError(f"--out {shown(folder)}: cannot be written to: {reason}; give another folder")


def _in_folder(root: Path, folder: Path) -> list[Job]:
    kinds = recordings.READABLE | SUFFIXES
    held = below(root, kinds)
    for unused in held.unused:
        note(f"{shown(root)}: not used: {unused}")
    files = [path for path in held.files if not path.resolve().is_relative_to(folder.resolve())]
    if not files:
        raise AudioError(f"{shown(root)}: holds no audio and no log-mel ({', '.join(sorted(kinds))})")
    return [_job(path, folder / path.relative_to(root).parent) for path in files]


def _job(source: Path, folder: Path) -> Job:
    return Job(source, folder / named(source.stem, ".wav"))
