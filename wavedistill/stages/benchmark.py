"""Time the samplers of a recipe's models: naive, cached, compiled or graphed; parallel, streamed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from wavedistill import __version__
from wavedistill.benchmarking import draws, trainings
from wavedistill.benchmarking.rows import steady
from wavedistill.benchmarking.words import of_trainings, summarise
from wavedistill.experiment.folder import Experiment, measured_on, speed_settings
from wavedistill.experiment.stage import Stage
from wavedistill.tools.files import write_json
from wavedistill.tools.machine import machine
from wavedistill.tools.progress import progress

FULL_SECONDS, FULL_BATCH_SIZES = (0.5, 2, 10, 60), (1, 16)
MOST_SECONDS = 60
"""Of sound in one draw, over its batch."""


def run(experiment: Experiment) -> str:
    """Write `benchmark.json`, a quick table of the trained models; returns a line of result."""
    recipe, device = experiment.recipe, experiment.device
    lengths = [(1, seconds) for seconds in recipe.benchmark.seconds]
    return _time(experiment, experiment.benchmark, "benchmark", draws.jobs(recipe, device, lengths))


def run_full(experiment: Experiment) -> str:
    """Write `benchmark_full.json`: durations, batches, and students of several sizes; returns a line of result."""
    recipe, device = experiment.recipe, experiment.device
    lengths = [
        (batch, length) for batch in FULL_BATCH_SIZES for length in FULL_SECONDS if batch * length <= MOST_SECONDS
    ]
    every = [*draws.jobs(recipe, device, lengths), *draws.sized_jobs(recipe, device)]
    return _time(experiment, experiment.benchmark_of("full"), "full benchmark", every)


def run_train(experiment: Experiment) -> str:
    """Write `benchmark_train.json`, the pace of the trainings; returns a line of result."""
    recipe = experiment.recipe
    each = [(name, threads) for threads in draws.threads_of(recipe, experiment.device) for name in recipe.training]
    bar = progress(iterable=each, desc="training", unit="row")
    rows = [steady(trainings.measure, experiment, *job) for job in bar]
    summary = of_trainings(rows)
    path = experiment.benchmark_of("train")
    _write(experiment, path, rows, summary)
    return f"{' '.join(summary)} {path}"


def _time(experiment: Experiment, path: Path, label: str, jobs: list[draws.Job]) -> str:
    """Measure the samplers' rows and write them; returns the last line of their summary."""
    rows = [steady(draws.measure, experiment, job) for job in progress(iterable=jobs, desc=label, unit="row")]
    summary = summarise(rows) or [f"{len(rows)} rows"]
    _write(experiment, path, rows, summary)
    return f"{summary[-1]} {path}"


def _write(experiment: Experiment, path: Path, rows: list[dict[str, Any]], summary: list[str]) -> None:
    of = measured_on(experiment)
    rows = [{**row, "of": of} for row in rows]
    write_json(path, {"machine": machine(experiment.device), "rows": rows, "summary": summary})


def _settings(experiment: Experiment) -> Any:
    about = {k: v for k, v in machine(experiment.device).items() if k != "date"}
    return [speed_settings(experiment.recipe), about, str(experiment.device)]


def _stage(name: str, run: Callable[[Experiment], str], what: str | None, needs: list[str]) -> Stage:
    return Stage(
        name=name,
        needs=("prepare", *needs),
        settings=_settings,
        inputs=lambda experiment: [experiment.manifest, *experiment.checkpoints],
        outputs=lambda experiment: [experiment.benchmark_of(what) if what else experiment.benchmark],
        run=run,
        version=__version__,
    )


def stage(trainings: list[str]) -> Stage:
    """The stage of a recipe with these trainings."""
    return _stage("benchmark", run, None, trainings)


def full(trainings: list[str]) -> Stage:
    """As `stage`, for the long table."""
    return _stage("benchmark_full", run_full, "full", trainings)


def train(trainings: list[str]) -> Stage:
    """As `stage`, for the pace of the trainings."""
    return _stage("benchmark_train", run_train, "train", trainings)
