"""The pace of trainings."""

import statistics
from functools import partial
from typing import Any

import torch

from wavedistill.benchmarking.rows import matrix_product_ceiling, peak_memory, seconds_of, timed
from wavedistill.experiment.folder import Experiment
from wavedistill.experiment.tasks import task_of
from wavedistill.models.compiling import compile_networks
from wavedistill.models.kinds import build
from wavedistill.tools.engine import launch
from wavedistill.training.batches import Batches
from wavedistill.training.learner import Learner

WARMUP, STEPS = 5, 30


def measure(experiment: Experiment, name: str, threads: int) -> dict[str, Any]:
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

    setup = sum(seconds_of(partial(step, number), device) for number in range(WARMUP))
    times = timed(step, device, threads, lambda seconds: len(seconds) == STEPS)
    loading = [seconds_of(partial(batches.of_step, number), device) for number in range(STEPS)]
    peak = peak_memory(device)
    median = times["seconds_median"]
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
        **times,
        "samples_per_second": speed,
        "setup_seconds": max(0.0, setup - WARMUP * median),
        "share_of_loading": statistics.median(loading) / median,
        "flops_per_sample": flops,
        "ceiling_flops_per_second": ceiling,
        "share_of_ceiling": speed * flops / ceiling,
        "peak_memory_bytes": peak,
    }
