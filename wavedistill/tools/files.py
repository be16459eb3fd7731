"""Files that are written whole or not at all, their digests, and stretches of files that are read as files."""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

NAME_BYTES = 255
"""The longest name of a file that file systems take."""


def shown(path: Path | str) -> str:
    """A path as one line that can be printed and written as JSON, whatever bytes are in it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


def named(stem: str, suffix: str) -> str:
    """A name for a file: a stem, cut short where file systems would not take it, and a suffix."""
    while len(os.fsencode(stem + suffix)) > NAME_BYTES:
        stem = stem[: len(stem) - 1]
    return stem + suffix


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` once it is whole and safe on the disk; else nothing is left."""
    partial = path.with_name(named(path.name, ".partial"))
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        if partial.is_file():
            partial.unlink()
        if isinstance(error, OSError) and error.filename is None:  # of writing, which knows of no name
            error.filename = str(path)
        raise


def _sync_folder(folder: Path) -> None:
    """Make a renaming in a folder last through a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(settings: Any, inputs: Iterable[Path]) -> str:
    """A digest of plain values and of files' contents."""
    digests = [sha256(path) for path in inputs]
    return hashlib.sha256(json.dumps([settings, digests], sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """The digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write plain values as JSON, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


class Stretch(io.RawIOBase):
    """A stretch of an open file, as a file of its own to read from.

    Args:
        file: the file, which is closed with the stretch.
        offset: of the stretch in the file, in bytes.
        size: of the stretch, in bytes.
    """

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._offset + self._position)
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
