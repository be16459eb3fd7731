"""Turn a corpus into mono, resampled, trimmed, level-normalised utterances with train, valid and test splits."""

import math
import shutil
from pathlib import Path
from typing import Any, get_args

from wavedistill.corpus import sources as corpora
from wavedistill.corpus.clips import Clip, files_of, prepared
from wavedistill.corpus.splits import splits
from wavedistill.corpus.storage import pack
from wavedistill.corpus.utterances import Manifest, Part, Split, Utterance
from wavedistill.experiment.folder import Experiment
from wavedistill.experiment.stage import Stage
from wavedistill.recipe.recipe import Recipe
from wavedistill.tools.errors import CorpusError
from wavedistill.tools.files import fingerprint, write_json
from wavedistill.tools.progress import note, progress

READS = {"seed", "corpus", "audio", "prepare"}
SAYS = {"corpus": {"licence"}}
"""What is known of a corpus, and does not change it."""
SHOWN = 10
"""Recordings left out that are named; a file names them all."""


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
    results = prepared(sources, recipe, fresh)
    bar = progress(iterable=results, desc="prepare", unit="file", total=len(sources))
    for source, result in zip(sources, bar, strict=True):
        known = [first.setdefault(clip.sha256, source.origin) for clip in result.clips]
        new = [clip for clip, origin in zip(result.clips, known, strict=True) if origin == source.origin]
        for clip in set(result.clips) - set(new):
            for path in files_of(fresh, clip.name, recipe):
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
    files = {clip.name: files_of(fresh, clip.name, recipe).there() for clip in clips}
    finished = fresh
    if recipe.prepare.storage == "shards":
        finished = fresh / "shards"
        by_split = {
            part: [[*files[name].values()] for name in split if split[name] == part] for part in get_args(Split)
        }
        parts = pack(by_split, finished)
    else:
        parts = {path: Part(path.name, 0, path.stat().st_size) for each in files.values() for path in each.values()}
    utterances = [
        Utterance(
            **clip._asdict() | {what: parts[path] for what, path in files[clip.name].items()}, split=split[clip.name]
        )
        for clip in clips
    ]
    manifest = Manifest(audio=recipe.audio, utterances=utterances)
    shutil.rmtree(records)
    shutil.rmtree(experiment.audio, ignore_errors=True)
    finished.rename(experiment.audio)
    shutil.rmtree(fresh, ignore_errors=True)
    write_json(experiment.manifest, manifest.model_dump(mode="json", exclude_none=True))
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
            f"{math.ceil(100 * len(faults) / recordings) / 100:g}"
        )


def _settings(experiment: Experiment) -> list[Any]:
    settings = experiment.recipe.model_dump(mode="json", include=READS, exclude=SAYS)
    return [settings, corpora.state(experiment.recipe.corpus), corpora.unreadable(experiment.recipe.corpus)]


def _outputs(experiment: Experiment) -> list[Path]:
    try:
        return sorted(experiment.audio / file for file in Manifest.read(experiment.manifest).files())
    except CorpusError:  # damaged, or not there: made again
        return [experiment.root / "no manifest"]


def stage() -> Stage:
    """The stage of any recipe."""
    return Stage(name="prepare", needs=(), settings=_settings, inputs=lambda experiment: [], outputs=_outputs, run=run)
