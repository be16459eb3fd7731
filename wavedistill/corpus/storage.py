"""Archives of prepared clips, as object stores and webdataset like them."""

import shutil
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from wavedistill.corpus.utterances import Part, Split
from wavedistill.tools.files import replacing

SHARD_BYTES = 2**28
"""Of an archive of prepared clips, about: large enough for an object store, small enough to be one of many."""


def pack(clips: Mapping[Split, list[list[Path]]], folder: Path) -> dict[Path, Part]:
    """Pack the files of each split's clips into tar archives; returns where each file is.

    As webdataset reads them: what belongs to one clip lies together, and has one name up to the first dot.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    found = {}
    for split, files in clips.items():
        for number, shard in enumerate(_shards(files)):
            archive = folder / f"{split}-{number:05d}.tar"
            with replacing(archive) as file, tarfile.open(fileobj=file, mode="w") as tar:
                for path in shard:
                    member = tarfile.TarInfo(path.name)
                    member.size = path.stat().st_size
                    with path.open("rb") as content:
                        tar.addfile(member, content)
            with tarfile.open(archive) as tar:
                for path, member in zip(shard, tar, strict=True):
                    found[path] = Part(archive.name, member.offset_data, member.size)
    return found


def _shards(clips: list[list[Path]]) -> Iterator[list[Path]]:
    """Files in groups of about `SHARD_BYTES`, those of no clip divided."""
    shard: list[Path] = []
    size = 0
    for clip in clips:
        shard += clip
        size += sum(path.stat().st_size for path in clip)
        if size >= SHARD_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard
