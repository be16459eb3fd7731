"""Turn a corpus into mono, resampled, trimmed, level-normalised utterances with train, valid and test splits."""

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import librosa
import numpy as np
import torch
from torch import Tensor

from wavedistill import audio, corpora
from wavedistill.config import Prepare, Recipe
from wavedistill.corpora import Source
from wavedistill.data import Manifest, Part, Split, Utterance
from wavedistill.errors import AudioError, CorpusError
from wavedistill.experiment import Experiment, Stage, fingerprint, sha256, write_json
from wavedistill.files import replacing
from wavedistill.pitch import track_f0
from wavedistill.progress import note, progress

READS = {"seed", "corpus", "audio", "prepare"}
SAYS = {"corpus": {"licence"}}
"""What is known of a corpus, and does not change it."""
FEW = 24
"""Recordings that are done sooner than more processes have started."""
SHARD_BYTES = 2**28
"""Of an archive of prepared clips, about: large enough for an object store, small enough to be one of many."""
SHOWN = 10
"""Recordings left out that are named; a file names them all."""


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


def run(experiment: Experiment) -> str:
    """Write the utterances, their manifest, and what was left out; returns a line of result."""
    recipe = experiment.recipe
    fresh = experiment.root / "audio.partial"
    records = fresh / "records"
    # A call that left out too many may go on where it stopped, with more allowed.
    made_by = recipe.model_dump(mode="json", include=READS, exclude={"prepare": {"max_skipped"}, **SAYS})
    _begin(fresh, fingerprint([made_by, corpora.state(recipe.corpus)], []))
    sources = corpora.sources(recipe.corpus)

    clips: list[Clip] = []
    faults: list[str] = []
    first: dict[str, str] = {}  # origin of each sound
    results = _prepared(sources, recipe, fresh)
    bar = progress(iterable=results, desc="prepare", unit="file", total=len(sources))
    for source, result in zip(sources, bar, strict=True):
        known = [first.setdefault(clip.sha256, source.origin) for clip in result.clips]
        new = [clip for clip, origin in zip(result.clips, known, strict=True) if origin == source.origin]
        for clip in set(result.clips) - set(new):
            for path in _files(fresh, clip.name, recipe):
                path.unlink(missing_ok=True)
        clips += new
        if not new:
            faults.append(result.fault or f"{source.origin}: holds the same sound as {known[0]}; remove either")
    report = experiment.root / "prepare.json"
    write_json(report, {"recordings": len(sources), "utterances": len(clips), "left_out": faults})
    _judge(faults, len(sources), recipe, report)
    if len(clips) < 3:
        raise CorpusError(
            f"{len(clips)} utterance{'s' * (len(clips) != 1)}: a corpus needs 3, one each to train, validate and test"
        )

    split = splits(clips, recipe)
    files = {clip.name: _files(fresh, clip.name, recipe) for clip in clips}
    finished = fresh
    if recipe.prepare.storage == "shards":
        finished = fresh / "shards"
        by_split = {part: [files[name] for name in split if split[name] == part] for part in get_args(Split)}
        parts = _pack(by_split, finished)
    else:
        parts = {path: Part(path.name, 0, path.stat().st_size) for pair in files.values() for path in pair}
    utterances = [
        Utterance(**clip._asdict(), split=split[clip.name], audio=parts[samples], f0=parts[f0])
        for clip in clips
        for samples, f0 in [files[clip.name]]
    ]
    manifest = Manifest(audio=recipe.audio, utterances=utterances)
    shutil.rmtree(records)
    shutil.rmtree(experiment.audio, ignore_errors=True)
    finished.rename(experiment.audio)
    shutil.rmtree(fresh, ignore_errors=True)
    write_json(experiment.manifest, manifest.model_dump(mode="json"))
    minutes = ", ".join(f"{manifest.seconds(part) / 60:.1f} min {part}" for part in ("train", "valid", "test"))
    left_out = f"; {len(faults)} of {len(sources)} recordings left out: {report}" if faults else ""
    return f"{len(clips)} utterances ({minutes}{left_out}): {experiment.manifest}"


def _begin(folder: Path, current: str) -> None:
    """Make the folder to prepare into, with what an interrupted call of the same settings has left there."""
    mark = folder / "records" / "fingerprint"
    if mark.is_file() and mark.read_text() == current:
        return
    shutil.rmtree(folder, ignore_errors=True)
    mark.parent.mkdir(parents=True)
    mark.write_text(current)


def _prepared(sources: list[Source], recipe: Recipe, folder: Path) -> Iterator[Result]:
    """The result of each recording, in order, computed on all cores; those of few recordings in this process."""
    one = partial(_prepare, recipe=recipe, folder=folder)
    if len(sources) < FEW:
        yield from map(one, sources)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # What librosa compiles on its first use is cached here, before several processes would write that cache at once and
    # break it: numba issue 10128, which ends in a segmentation fault.
    list(utterances(torch.ones(recipe.audio.sample_rate), recipe))
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"), initializer=_worker) as pool:
        try:
            yield from pool.map(one, sources, chunksize=4)
        except BrokenProcessPool as error:
            raise CorpusError(
                f"{folder}: a process that prepared recordings was killed, perhaps for want of memory: run the prepare "
                "stage again, it goes on where it stopped"
            ) from error


def _worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    torch.set_num_threads(1)


def _prepare(source: Source, recipe: Recipe, folder: Path) -> Result:
    """Write the clips of one recording, or read what an earlier call noted of it."""
    record = folder / "records" / f"{source.name}.json"
    if record.is_file():
        clips, fault = json.loads(record.read_text())
        return Result([Clip(*clip) for clip in clips], fault)
    try:
        result = Result(_clips(source, recipe, folder), None)
    except AudioError as error:
        result = Result([], str(error))
    write_json(record, result)
    return result


def _clips(source: Source, recipe: Recipe, folder: Path) -> list[Clip]:
    """Write the clips of one recording.

    Raises:
        AudioError: if it has none.
    """
    samples = source.read(recipe.audio.sample_rate)
    if not samples.any():
        raise AudioError(f"{source.origin}: is silent from end to end; remove it or record it again")
    pieces = list(utterances(samples, recipe))
    gain = audio.level_gain(torch.cat(pieces), recipe.audio.level_db)
    clips = []
    for number, piece in enumerate(pieces):
        if len(piece) < recipe.prepare.min_seconds * recipe.audio.sample_rate:
            continue
        whole = audio.pad_to_hops(piece * gain, recipe.audio.hop_length)
        name = source.name if len(pieces) == 1 else f"{source.name}_{number:03d}"
        samples_path, f0_path = _files(folder, name, recipe)
        audio.write(samples_path, whole, recipe.audio.sample_rate)
        with replacing(f0_path) as file:
            np.save(file, track_f0(whole, recipe.audio).numpy())
        clips.append(Clip(name, source.origin, len(whole) // recipe.audio.hop_length, gain, sha256(samples_path)))
    if not clips:
        longest = max(map(len, pieces)) / recipe.audio.sample_rate
        raise AudioError(
            f"{source.origin}: is too short: {longest:.2f} s without its silence, less than prepare.min_seconds = "
            f"{recipe.prepare.min_seconds}"
        )
    return clips


def utterances(samples: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """Cut a recording (T,) at quiet places into pieces of at most `max_seconds`, each without silence at its ends.

    What counts as silence is the same for all pieces, so that a long pause leaves an empty one, not amplified noise.
    """
    loudest = float(librosa.feature.rms(y=samples.numpy()).max())

    def trim(piece: Tensor) -> Tensor:
        return torch.from_numpy(librosa.effects.trim(piece.numpy(), top_db=recipe.prepare.trim_db, ref=loudest)[0])

    rest = trim(samples)
    longest = int(recipe.prepare.max_seconds * recipe.audio.sample_rate)
    while len(rest) > longest:
        cut = _quietest(rest[longest // 2 : longest], recipe.audio.sample_rate) + longest // 2
        yield trim(rest[:cut])
        rest = rest[cut:]
    yield trim(rest)


def splits(clips: list[Clip], recipe: Recipe) -> dict[str, Split]:
    """The split of each clip: by recording, so that no recording is in two, or by clip if there are too few of them."""
    settings: Prepare = recipe.prepare
    by_recording = len({clip.source for clip in clips}) >= 3
    group = {clip.name: clip.source if by_recording else clip.name for clip in clips}
    # Ranked by a hash, so that the order of files says nothing about their split.
    ranked = sorted(set(group.values()), key=lambda g: hashlib.sha256(f"{recipe.seed} {g}".encode()).digest())
    test, valid = (
        max(1, math.floor(fraction * len(ranked))) for fraction in (settings.test_fraction, settings.valid_fraction)
    )
    part: dict[str, Split] = {
        g: "test" if rank < test else "valid" if rank < test + valid else "train" for rank, g in enumerate(ranked)
    }
    return {name: part[g] for name, g in group.items()}


def _files(folder: Path, name: str, recipe: Recipe) -> tuple[Path, Path]:
    """The files that a clip's audio and its F0 are written to."""
    suffix = "wav" if recipe.prepare.storage == "wav" else "flac"
    return folder / f"{name}.{suffix}", folder / f"{name}.f0.npy"


def _pack(clips: Mapping[Split, list[tuple[Path, Path]]], folder: Path) -> dict[Path, Part]:
    """Pack the files of each split's clips into tar archives; returns where each file is.

    As webdataset reads them: what belongs to one clip lies together, and has one name up to the first dot.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    found = {}
    for split, pairs in clips.items():
        for number, shard in enumerate(_shards(pairs)):
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


def _shards(pairs: list[tuple[Path, Path]]) -> Iterator[list[Path]]:
    """Files in groups of about `SHARD_BYTES`, no pair divided."""
    shard: list[Path] = []
    size = 0
    for pair in pairs:
        shard += pair
        size += sum(path.stat().st_size for path in pair)
        if size >= SHARD_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _quietest(samples: Tensor, rate: int) -> int:
    """The middle of the quietest 50 ms of samples (T,)."""
    width = rate // 20
    energy = np.convolve(samples.numpy() ** 2, np.ones(width), mode="valid")
    return int(energy.argmin()) + width // 2


def _judge(faults: list[str], recordings: int, recipe: Recipe, report: Path) -> None:
    allowed = recipe.prepare.max_skipped
    for fault in faults[:SHOWN]:
        note(f"left out: {fault}")
    if len(faults) > SHOWN:
        note(f"left out: {len(faults) - SHOWN} more: {report}")
    if len(faults) > allowed * recordings:
        raise CorpusError(
            f"{faults[0]}; {len(faults)} of {recordings} recordings cannot be used ({report} has them all), and "
            f"prepare.max_skipped = {allowed:g}: mend or remove them, or raise it to "
            f"{_share(len(faults), recordings):g}"
        )


def _share(part: int, whole: int) -> float:
    """A share of a whole, rounded up to hundredths."""
    return math.ceil(100 * part / whole) / 100


def _settings(experiment: Experiment) -> list[Any]:
    settings = experiment.recipe.model_dump(mode="json", include=READS, exclude=SAYS)
    return [settings, corpora.state(experiment.recipe.corpus)]


def _outputs(experiment: Experiment) -> list[Path]:
    try:
        utterances = Manifest.read(experiment.manifest).utterances
    except CorpusError:  # damaged, or not there: made again
        return [experiment.root / "no manifest"]
    return sorted(
        {experiment.audio / part.file for utterance in utterances for part in (utterance.audio, utterance.f0)}
    )


stage = Stage(
    name="prepare",
    summary=__doc__,
    needs=(),
    settings=_settings,
    inputs=lambda experiment: [],
    outputs=_outputs,
    run=run,
)
