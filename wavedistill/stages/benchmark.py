"""Time the samplers of a recipe's models: naive, cached, compiled or graphed; parallel, streamed, fused."""

import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from wavedistill import __version__
from wavedistill.benchmarking.draws import Job, jobs, measure, sized_jobs, threads_of
from wavedistill.benchmarking.rows import (
    disturbance,
    matrix_product_ceiling,
    peak_memory,
    quartiles,
    seconds_of,
    steady,
)
from wavedistill.benchmarking.words import caution, counted, summarise
from wavedistill.experiment.folder import Experiment, measured_on, speed_settings
from wavedistill.experiment.stage import Stage
from wavedistill.experiment.tasks import task_of
from wavedistill.models.compiling import compile_networks
from wavedistill.models.kinds import build
from wavedistill.tools.engine import launch
from wavedistill.tools.files import write_json
from wavedistill.tools.machine import machine, watch_others
from wavedistill.tools.progress import progress
from wavedistill.training.batches import Batches
from wavedistill.training.learner import Learner

FULL_SECONDS, FULL_BATCH_SIZES = (0.5, 2, 10, 60), (1, 16)
MOST_SECONDS = 60
"""Of sound in one draw, over its batch."""
TRAIN_WARMUP, TRAIN_STEPS = 5, 30


def run(experiment: Experiment) -> str:
    """Write `benchmark.json`, a quick table of the trained models; returns a line of result."""
    lengths = [(1, seconds) for seconds in experiment.recipe.benchmark.seconds]
    return _time(experiment, experiment.benchmark, "benchmark", jobs(experiment.recipe, experiment.device, lengths))


def run_full(experiment: Experiment) -> str:
    """Write `benchmark_full.json`: durations, batches, and students of several sizes; returns a line of result."""
    recipe, device = experiment.recipe, experiment.device
    lengths = [
        (batch, length) for batch in FULL_BATCH_SIZES for length in FULL_SECONDS if batch * length <= MOST_SECONDS
    ]
    every = [*jobs(recipe, device, lengths), *sized_jobs(recipe, device)]
    return _time(experiment, experiment.benchmark_of("full"), "full benchmark", every)


def run_train(experiment: Experiment) -> str:
    """Write `benchmark_train.json`, the pace of the trainings; returns a line of result."""
    each = [
        (name, threads)
        for threads in threads_of(experiment.recipe, experiment.device)
        for name in experiment.recipe.training
    ]
    rows = [steady(measure_training, experiment, *job) for job in progress(iterable=each, desc="training", unit="row")]
    summary = [
        f"{counted(row['threads'])}: the training of the {row['model']} takes {row['samples_per_second']:,.0f} "
        f"samples/s, {100 * row['share_of_ceiling']:.0f} % of the ceiling; {100 * row['share_of_loading']:.1f} % of "
        f"its time loads data.{caution(row)}"
        for row in rows
    ]
    path = experiment.benchmark_of("train")
    _write(experiment, path, rows, summary)
    return f"{' '.join(summary)} {path}"


def measure_training(experiment: Experiment, name: str, threads: int) -> dict[str, Any]:
    """The pace of one training: the median step, as the recipe has it, once all is compiled and warm.

    Its operations are counted as three forward passes of what is trained (one forward, two backward), and, of a
    teacher that is distilled, two (one forward, one backward to the student's sample), unless it is not ours.
    """
    recipe, device = experiment.recipe, experiment.device
    torch.set_num_threads(threads)
    task = task_of(experiment, name)
    settings, teacher = task.settings, recipe.teacher_of(name)
    flops = 0.0 if teacher is None else 2 * build(recipe, teacher, recipe.seed).flops_per_sample
    fabric = launch(device)
    learner = Learner(task, recipe, fabric)
    batches = Batches(task, experiment.corpus(), experiment.audio, recipe, fabric, learner.model.margin)
    flops += 3 * learner.model.flops_per_sample
    if settings.compile:
        compile_networks(learner.model)

    def step(number: int) -> None:
        learner.step(batches.of_step(number), number)

    def load(number: int) -> None:
        list(batches.of_step(number))

    setup = sum(seconds_of(functools.partial(step, number), device) for number in range(TRAIN_WARMUP))
    others = watch_others()
    seconds = [seconds_of(functools.partial(step, number), device) for number in range(TRAIN_STEPS)]
    used_by_others = others()
    loading = [seconds_of(functools.partial(load, number), device) for number in range(TRAIN_STEPS)]
    peak = peak_memory(device)
    median = statistics.median(seconds)
    speed = settings.batch_size * settings.segment_frames * recipe.audio.hop_length / median
    lowered = settings.precision == "bf16-mixed"
    ceiling = matrix_product_ceiling(learner.model, device, torch.bfloat16 if lowered else torch.float32)
    return {
        "model": name,
        "device": str(device),
        "threads": threads,
        "batch_size": settings.batch_size,
        "compiled": settings.compile,
        "precision": settings.precision,
        "seconds_median": median,
        "seconds_quartiles": quartiles(seconds),
        "seconds_all": seconds,
        "cpus_used_by_others": used_by_others,
        "disturbed": disturbance(quartiles(seconds), used_by_others, threads),
        "samples_per_second": speed,
        "setup_seconds": max(0.0, setup - TRAIN_WARMUP * median),
        "share_of_loading": statistics.median(loading) / median,
        "flops_per_sample": flops,
        "ceiling_flops_per_second": ceiling,
        "share_of_ceiling": speed * flops / ceiling,
        "peak_memory_bytes": peak,
    }


def _time(experiment: Experiment, path: Path, label: str, jobs: list[Job]) -> str:
    """Measure the samplers' rows and write them; returns the last line of their summary."""
    rows = [steady(measure, experiment, job) for job in progress(iterable=jobs, desc=label, unit="row")]
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
