"""Show the experiment on one self-contained page: sound, spectrograms, losses, speed and scores."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from wavedistill import __version__
from wavedistill.experiment.folder import AS_DRAWN, Experiment, measured_on
from wavedistill.experiment.stage import Stage
from wavedistill.experiment.starts import joined, licence_in
from wavedistill.reporting.page import Clip, Version, render, templates
from wavedistill.reporting.plots import loss_plots
from wavedistill.reporting.spectrogram import picture, spectrogram_db
from wavedistill.reporting.words import systems
from wavedistill.speech.audio import PCM16_STEPS
from wavedistill.tools.files import replacing

SHOWN_CLIPS = 3


def run(experiment: Experiment) -> str:
    """Write `report.html`; returns a line of result."""
    found = json.loads(experiment.metrics.read_text())
    tables = {path: _current(experiment, path) for path in _tables(experiment)}
    names = sorted(path.name for path in (experiment.samples / "recorded").glob("*.wav"))  # every system has them
    origins = {utterance.name: utterance.source for utterance in experiment.corpus().utterances}
    trained = [licence_in(experiment.checkpoint(name)) for name in experiment.recipe.training]
    page = render(
        experiment.recipe,
        found,
        *tables.values(),
        licence=joined(experiment.recipe.corpus.licence, *trained),
        stale=[path.name for path, table in tables.items() if path.exists() and not table],
        losses={name: loss_plots(experiment.training(name) / "tensorboard") for name in experiment.recipe.training},
        clips=[_clip(experiment, systems(found), name, origins[Path(name).stem]) for name in names[:SHOWN_CLIPS]],
    )
    with replacing(experiment.report) as file:
        file.write(page.encode())
    return f"{len(page) / 1e6:.1f} MB: {experiment.report}"


def _tables(experiment: Experiment) -> list[Path]:
    return [experiment.benchmark, experiment.benchmark_of("full"), experiment.benchmark_of("train")]


def _current(experiment: Experiment, path: Path) -> dict[str, Any] | None:
    """A table of the benchmark; None if there is none of these very models and settings."""
    table = json.loads(path.read_text()) if path.exists() else {"rows": []}
    of = measured_on(experiment)
    return table if table["rows"] and all(row["of"] == of for row in table["rows"]) else None


def _clip(experiment: Experiment, systems: Iterable[str], name: str, origin: str) -> Clip:
    """A clip as all systems have it."""
    settings = experiment.recipe.audio
    found: dict[str, list[np.ndarray]] = {}
    for system in systems:
        paths = [folder / system / name for folder in (experiment.samples, experiment.samples / AS_DRAWN)]
        found[system] = [soundfile.read(path, dtype="int16")[0] for path in paths if path.exists()]
    pictures = {
        system: [spectrogram_db(samples / np.float32(PCM16_STEPS), settings) for samples in versions]
        for system, versions in found.items()
    }
    top = float(pictures["recorded"][0].max())
    return Clip(
        origin,
        len(found["recorded"][0]) / settings.sample_rate,
        {
            system: [
                Version(_flac(samples, settings.sample_rate), picture(decibels, top))
                for samples, decibels in zip(versions, pictures[system], strict=True)
            ]
            for system, versions in found.items()
        },
    )


def _flac(samples: np.ndarray, sample_rate: int) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, samples, sample_rate, format="FLAC")
    return content.getvalue()


def settings(experiment: Experiment) -> Any:
    """What the page depends on besides files, as plain values."""
    return [experiment.recipe.model_dump(mode="json"), measured_on(experiment), templates()]


def inputs(experiment: Experiment) -> list[Path]:
    """The files that the page shows."""
    tables = [path for path in _tables(experiment) if path.exists()]
    return [experiment.metrics, *tables, *sorted(experiment.samples.rglob("*.wav"))]


def stage(trainings: list[str]) -> Stage:
    """The stage of a recipe with these trainings."""
    return Stage(
        name="report",
        needs=("prepare", *trainings, "evaluate"),
        settings=settings,
        inputs=inputs,
        outputs=lambda experiment: [experiment.report],
        run=run,
        version=__version__,
    )
