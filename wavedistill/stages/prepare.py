"""Turn a corpus into mono, resampled, trimmed, level-normalised utterances with train, valid and test splits."""

import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch

from wavedistill.corpus import recordings
from wavedistill.corpus import sources as corpora
from wavedistill.corpus.sources import Source
from wavedistill.corpus.utterances import Manifest, Part, Split, Utterance
from wavedistill.experiment.folder import Experiment
from wavedistill.experiment.stage import Stage
from wavedistill.recipe.recipe import Recipe
from wavedistill.recipe.sections import Prepare
from wavedistill.speech import audio
from wavedistill.speech.pitch import track_f0
from wavedistill.tools.errors import AudioError, CorpusError
from wavedistill.tools.files import fingerprint, replacing, sha256, write_json
from wavedistill.tools.memory import free_memory
from wavedistill.tools.progress import note, progress

READS = {"seed", "corpus", "audio", "prepare"}
SAYS = {"corpus": {"licence"}}
"""What is known of a corpus, and does not change it."""
FEW = 24
"""Recordings that are done sooner than more processes have started."""
SHARD_BYTES = 2**28
"""Of an archive of prepared clips, about: large enough for an object store, small enough to be one of many."""
SHOWN = 10
"""Recordings left out that are named; a file names them all."""
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
    report, unused = experiment.root / "prepare.json", corpora.unused(recipe.corpus)
    about = {"recordings": len(sources), "utterances": len(clips), "left_out": faults, "not_used": unused}
    write_json(report, about)
    _name("not used", unused, report)
    _name("left out", faults, report)
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
    """The result of each recording, in order, computed on many cores; those of few recordings in this process."""
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
    pieces, gain = recordings.speech(samples, recipe)
    gain_db, most = 20 * math.log10(gain), recipe.prepare.max_gain_db
    if gain_db > most:
        raise AudioError(
            f"{source.origin}: is so soft that it would be amplified by {gain_db:.0f} dB, and prepare.max_gain_db = "
            f"{most:g}: its noise would be learnt; remove it, or record it again, closer"
        )
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


def splits(clips: list[Clip], recipe: Recipe) -> dict[str, Split]:
    """The split of each clip, as shares of the duration: no group of recordings is in two.

    A group is one recording, or all that `prepare.together` says; with fewer than three recordings, one clip. Test
    takes, and then valid, the groups that fit into its share, or the shortest if none does, and leaves some.

    Raises:
        CorpusError: if `prepare.together` makes fewer than three groups.
    """
    settings: Prepare = recipe.prepare
    group = {clip.name: _group(clip.source, settings.together) for clip in clips}
    if (count := len(set(group.values()))) < 3:
        if settings.together:
            raise CorpusError(
                f"prepare.together = {settings.together!r} leaves {count} groups of recordings, and 3 are needed, one "
                "each to train, validate and test: change it, or remove it"
            )
        group = {clip.name: clip.name for clip in clips}
    frames: dict[str, int] = dict.fromkeys(group.values(), 0)
    for clip in clips:
        frames[group[clip.name]] += clip.frames
    # Ranked by a hash, so that the order of files says nothing about their split.
    rest = sorted(frames, key=lambda g: hashlib.sha256(f"{recipe.seed} {g}".encode()).digest())
    part: dict[str, Split] = dict.fromkeys(rest, "train")
    shares: list[tuple[Split, float, int]] = [
        ("test", settings.test_fraction, 2),
        ("valid", settings.valid_fraction, 1),
    ]
    for split, fraction, left in shares:
        budget = fraction * sum(frames.values()) + 1e-6
        taken: list[str] = []
        for g in rest:
            if frames[g] <= budget and len(rest) - len(taken) > left:
                taken.append(g)
                budget -= frames[g]
        taken = taken or [min(rest, key=frames.__getitem__)]
        rest = [g for g in rest if g not in taken]
        part.update(dict.fromkeys(taken, split))
    return {name: part[g] for name, g in group.items()}


def _group(source: str, together: str | None) -> str:
    """What a recording belongs to: what a pattern finds in its name, or its first group; else the name itself."""
    found = re.search(together, source) if together else None
    return source if found is None else (found[1] if found.re.groups else found[0]) or source


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


def _name(what: str, reasons: list[str], report: Path) -> None:
    for reason in reasons[:SHOWN]:
        note(f"{what}: {reason}")
    if len(reasons) > SHOWN:
        note(f"{what}: {len(reasons) - SHOWN} more: {report}")


def _judge(faults: list[str], recordings: int, recipe: Recipe, report: Path) -> None:
    allowed = recipe.prepare.max_skipped
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
    return [settings, corpora.state(experiment.recipe.corpus), corpora.unreadable(experiment.recipe.corpus)]


def _outputs(experiment: Experiment) -> list[Path]:
    try:
        utterances = Manifest.read(experiment.manifest).utterances
    except CorpusError:  # damaged, or not there: made again
        return [experiment.root / "no manifest"]
    return sorted(
        {experiment.audio / part.file for utterance in utterances for part in (utterance.audio, utterance.f0)}
    )


def stage() -> Stage:
    """The stage of any recipe."""
    return Stage(
        name="prepare",
        needs=(),
        settings=_settings,
        inputs=lambda experiment: [],
        outputs=_outputs,
        run=run,
    )
