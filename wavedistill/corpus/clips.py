"""From a recording to its clips: trimmed, cut, brought to one level and written with their F0; on many cores."""

import json
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wavedistill.corpus import given, recordings
from wavedistill.corpus.sources import Source
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech import audio
from wavedistill.speech.pitch import track_f0
from wavedistill.tools.errors import AudioError, CorpusError
from wavedistill.tools.files import replacing, sha256, write_json
from wavedistill.tools.memory import free_memory
from wavedistill.tools.progress import note

FEW = 24
"""Recordings that are done sooner than more processes have started."""
WORKER_BYTES, SAMPLE_BYTES = 2**29, 16
"""What a process that prepares takes, and for each sample of its recording."""


class Clip(NamedTuple):
    """A prepared utterance, before it has a split."""

    name: str
    source: str
    frames: int
    gain: float
    sha256: str


class Result(NamedTuple):
    """What became of one recording: its clips, or why it has none."""

    clips: list[Clip]
    fault: str | None


class Files(NamedTuple):
    """What a clip is written to: its audio, its F0, and the log-mel that was given for it, if one was."""

    audio: Path
    f0: Path
    mel: Path

    def there(self) -> dict[str, Path]:
        """Those that were written, by what is in them."""
        return {what: path for what, path in self._asdict().items() if path.is_file()}


def files_of(folder: Path, name: str, recipe: Recipe) -> Files:
    """The files of a clip."""
    suffix = "wav" if recipe.prepare.storage == "wav" else "flac"
    return Files(*(folder / f"{name}.{ending}" for ending in (suffix, "f0.npy", "mel.npy")))


def prepared(sources: list[Source], recipe: Recipe, folder: Path) -> Iterator[Result]:
    """The result of each recording, in order, computed on many cores; those of few recordings in this process.

    Raises:
        CorpusError: if a process that prepares is killed, for want of memory for instance.
    """
    one = partial(_prepare, recipe=recipe, folder=folder)
    if len(sources) < FEW:
        yield from map(one, sources)
        return
    count = _workers([source.path for source in sources if source.path], recipe.audio.sample_rate)
    note(f"prepare: starting {count} processes")
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_worker) as pool:
        try:
            yield from pool.map(one, sources, chunksize=4)
        except BrokenProcessPool as error:
            raise CorpusError(
                f"{folder}: a process that prepared recordings was killed, perhaps for want of memory: run the prepare "
                "stage again, it goes on where it stopped"
            ) from error


def _workers(paths: Sequence[Path], sample_rate: int) -> int:
    """How many processes prepare: one a core, but no more than have room if each has the longest recording."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    longest = max(map(recordings.seconds, paths), default=0.0)
    return max(1, min(cores, int(free_memory() / (WORKER_BYTES + SAMPLE_BYTES * longest * sample_rate))))


def _worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    torch.set_num_threads(1)


def _prepare(source: Source, recipe: Recipe, folder: Path) -> Result:
    """Write the clips of one recording, or read what an earlier call noted of them; what failed may not fail again."""
    record = folder / "records" / f"{source.name}.json"
    if record.is_file():
        return Result([Clip(*clip) for clip in json.loads(record.read_text())], None)
    try:
        clips = _clips(source, recipe, folder)
    except AudioError as error:
        return Result([], str(error))
    write_json(record, clips)
    return Result(clips, None)


def _clips(source: Source, recipe: Recipe, folder: Path) -> list[Clip]:
    """Write the clips of one recording.

    Raises:
        AudioError: if it has none.
    """
    samples = source.read(recipe.audio.sample_rate)
    if not samples.any():
        raise AudioError(f"{source.origin}: is silent from end to end; remove it or record it again")
    mel, hop = source.mel and source.mel(samples, recipe.audio), recipe.audio.hop_length
    if mel is None:
        pieces, gain = recordings.speech(samples, recipe)
    else:  # cut at whole hops, so that its frames stay those of the same samples
        samples = samples[: mel.shape[1] * hop]
        pieces, gain = recordings.speech(samples, recipe, grain=hop)
    gain_db, most = 20 * math.log10(gain), recipe.prepare.max_gain_db
    if gain_db > most:
        raise AudioError(
            f"{source.origin}: is so soft that it would be amplified by {gain_db:.0f} dB, and prepare.max_gain_db = "
            f"{most:g}: its noise would be learnt; remove it, or record it again, closer"
        )
    clips = []
    for number, piece in enumerate(pieces):
        if piece.stop - piece.start < recipe.prepare.min_seconds * recipe.audio.sample_rate:
            continue
        whole = audio.pad_to_hops(samples[piece] * gain, hop)
        frames = len(whole) // hop
        name = source.name if len(pieces) == 1 else f"{source.name}_{number:03d}"
        files = files_of(folder, name, recipe)
        audio.write(files.audio, whole, recipe.audio.sample_rate)
        _save(files.f0, track_f0(whole, recipe.audio))
        if mel is not None:
            first = piece.start // hop
            _save(files.mel, given.louder(mel[:, first : first + frames], gain))
        clips.append(Clip(name, source.origin, frames, gain, sha256(files.audio)))
    if not clips:
        longest = max(piece.stop - piece.start for piece in pieces) / recipe.audio.sample_rate
        raise AudioError(
            f"{source.origin}: is too short: {longest:.2f} s without its silence, less than prepare.min_seconds = "
            f"{recipe.prepare.min_seconds}"
        )
    return clips


def _save(path: Path, values: Tensor) -> None:
    with replacing(path) as file:
        np.save(file, values.numpy())
