"""Show the experiment on one self-contained page: sound, spectrograms, losses, speed and scores."""

import json
from pathlib import Path
from typing import Any

import soundfile
import torch
from matplotlib.figure import Figure

from wavedistill import __version__
from wavedistill.experiment.folder import Experiment, measured_on
from wavedistill.experiment.stage import Stage
from wavedistill.experiment.starts import joined, licence_in
from wavedistill.reporting.page import render, template, titles
from wavedistill.reporting.plots import log_mel_plot, loss_plot
from wavedistill.tools.files import replacing

SHOWN_CLIPS = 3


def run(experiment: Experiment) -> str:
    """Write `report.html`; returns a line of result."""
    found = json.loads(experiment.metrics.read_text())
    tables = {path: _current(experiment, path) for path in _tables(experiment)}
    names = sorted(path.name for path in (experiment.samples / "recorded").glob("*.wav"))  # every system has them
    trained = [licence_in(experiment.checkpoint(name)) for name in experiment.recipe.training]
    page = render(
        experiment.recipe,
        found,
        *tables.values(),
        licence=joined(experiment.recipe.corpus.licence, *trained),
        stale=[path.name for path, table in tables.items() if path.exists() and not table],
        losses={name: loss_plot(experiment.training(name) / "tensorboard") for name in experiment.recipe.training},
        clips=[
            (name, [(title, *_clip(experiment, system, name)) for system, title in titles(found).items()])
            for name in names[:SHOWN_CLIPS]
        ],
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


def _clip(experiment: Experiment, system: str, name: str) -> tuple[bytes, Figure]:
    """A system's clip: its wav file, and a picture of its log-mel."""
    path = experiment.samples / system / name
    samples, _ = soundfile.read(path, dtype="float32")
    return path.read_bytes(), log_mel_plot(torch.from_numpy(samples), experiment.recipe.audio)


def settings(experiment: Experiment) -> Any:
    """What the page depends on besides files, as plain values."""
    return [experiment.recipe.model_dump(mode="json"), measured_on(experiment), template()]


def inputs(experiment: Experiment) -> list[Path]:
    """The files that the page shows."""
    tables = [path for path in _tables(experiment) if path.exists()]
    return [experiment.metrics, *tables, *sorted(experiment.samples.glob("*/*.wav"))]


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
