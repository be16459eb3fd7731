"""Turn a corpus into mono, resampled, trimmed, level-normalised utterances with train, valid and test splits."""

import hashlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import librosa
import numpy as np
import torch
from torch import Tensor

from wavedistill import audio, corpora
from wavedistill.config import FolderCorpus, Prepare, Recipe
from wavedistill.data import Manifest, Split, Utterance, f0_path
from wavedistill.errors import AudioError, CorpusError
from wavedistill.experiment import Experiment, Stage, sha256, write_json
from wavedistill.pitch import track_f0
from wavedistill.progress import note, progress

READS = {"seed", "corpus", "audio", "prepare"}


def run(experiment: Experiment) -> str:
    """Write the utterances and their manifest; returns a line of result."""
    recipe = experiment.recipe
    fresh = experiment.root / "audio.partial"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)

    clips: list[tuple[str, str, int, float]] = []  # name, origin, frames, gain
    faults: list[str] = []
    short = 0
    for source in progress(iterable=corpora.sources(recipe.corpus), desc="prepare", unit="file"):
        try:
            samples = source.read(recipe.audio.sample_rate)
            if not samples.any():
                raise AudioError(f"{source.origin}: is silent from end to end; remove it or record it again")
            pieces = list(utterances(samples, recipe))
        except AudioError as error:
            faults.append(str(error))
            continue
        gain = audio.level_gain(torch.cat(pieces), recipe.audio.level_db)
        for number, piece in enumerate(pieces):
            if len(piece) < recipe.prepare.min_seconds * recipe.audio.sample_rate:
                if len(pieces) == 1:
                    note(
                        f"{source.origin}: left out: {len(piece) / recipe.audio.sample_rate:.2f} s without its silence"
                    )
                short += 1
                continue
            whole = audio.pad_to_hops(piece * gain, recipe.audio.hop_length)
            name = source.name if len(pieces) == 1 else f"{source.name}_{number:03d}"
            audio.write(fresh / f"{name}.wav", whole, recipe.audio.sample_rate)
            np.save(f0_path(fresh, name), track_f0(whole, recipe.audio).numpy())
            clips.append((name, source.origin, len(whole) // recipe.audio.hop_length, gain))
    _judge(faults, recipe)
    if len(clips) < 3:
        raise CorpusError(
            f"{len(clips)} utterance{'s' * (len(clips) != 1)} of at least prepare.min_seconds = "
            f"{recipe.prepare.min_seconds} s ({short} shorter): a corpus needs 3, one each to train, validate and test"
        )

    split = splits(clips, recipe)
    manifest = Manifest(
        audio=recipe.audio,
        utterances=[
            Utterance(
                name=name,
                source=origin,
                split=split[name],
                frames=frames,
                gain=gain,
                sha256=sha256(fresh / f"{name}.wav"),
            )
            for name, origin, frames, gain in clips
        ],
    )
    shutil.rmtree(experiment.audio, ignore_errors=True)
    fresh.rename(experiment.audio)
    write_json(experiment.manifest, manifest.model_dump(mode="json"))
    minutes = ", ".join(f"{manifest.seconds(part) / 60:.1f} min {part}" for part in ("train", "valid", "test"))
    left_out = f", {short} too short and {len(faults)} unreadable left out" if short or faults else ""
    return f"{len(clips)} utterances ({minutes}{left_out}): {experiment.manifest}"


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


def splits(clips: list[tuple[str, str, int, float]], recipe: Recipe) -> dict[str, Split]:
    """The split of each clip: by recording, so that no recording is in two, or by clip if there are too few of them."""
    settings: Prepare = recipe.prepare
    by_recording = len({origin for _, origin, _, _ in clips}) >= 3
    group = {name: origin if by_recording else name for name, origin, _, _ in clips}
    # Ranked by a hash, so that the order of files says nothing about their split.
    ranked = sorted(set(group.values()), key=lambda g: hashlib.sha256(f"{recipe.seed} {g}".encode()).digest())
    test, valid = (
        max(1, math.floor(fraction * len(ranked))) for fraction in (settings.test_fraction, settings.valid_fraction)
    )
    part: dict[str, Split] = {
        g: "test" if rank < test else "valid" if rank < test + valid else "train" for rank, g in enumerate(ranked)
    }
    return {name: part[g] for name, g in group.items()}


def _quietest(samples: Tensor, rate: int) -> int:
    """The middle of the quietest 50 ms of samples (T,)."""
    width = rate // 20
    energy = np.convolve(samples.numpy() ** 2, np.ones(width), mode="valid")
    return int(energy.argmin()) + width // 2


def _judge(faults: list[str], recipe: Recipe) -> None:
    corpus = recipe.corpus
    if not faults:
        return
    if isinstance(corpus, FolderCorpus) and corpus.skip_unreadable:
        for fault in faults:
            note(f"left out: {fault}")
        return
    shown = "\n".join(faults[:10]) + (f"\n... and {len(faults) - 10} more" if len(faults) > 10 else "")
    advice = ", or leave out all such files with --set corpus.skip_unreadable=true"
    raise CorpusError(
        f"{shown}\n{len(faults)} file{'s' * (len(faults) != 1)} of the corpus cannot be used; mend or remove"
        f"{advice if isinstance(corpus, FolderCorpus) else ''}"
    )


def _outputs(experiment: Experiment) -> list[Path]:
    try:
        names = [utterance.name for utterance in Manifest.read(experiment.manifest).utterances]
    except CorpusError:  # damaged, or not there: made again
        return [experiment.root / "no manifest"]
    return [path for name in names for path in (experiment.audio / f"{name}.wav", f0_path(experiment.audio, name))]


stage = Stage(
    name="prepare",
    summary=__doc__,
    needs=(),
    settings=lambda experiment: [
        experiment.recipe.model_dump(mode="json", include=READS),
        corpora.state(experiment.recipe.corpus),
    ],
    inputs=lambda experiment: [],
    outputs=_outputs,
    run=run,
)
