"""Time the naive, cached, compiled and parallel samplers of one teacher-student pair."""

import datetime
import functools
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torchaudio
from torch import Tensor

from wavedistill import __version__, sampling
from wavedistill.audio import LogMel, pad_frames
from wavedistill.checkpoint import Kind
from wavedistill.data import random_stream, read_samples
from wavedistill.experiment import Experiment, Stage, write_json
from wavedistill.flows import Autoregressive
from wavedistill.models import WaveformModel
from wavedistill.progress import progress
from wavedistill.wavenet import WaveNet

READS = {"seed", "audio", "conditioning", "linear_prediction", "teacher", "student", "benchmark"}
SEQUENTIAL_WARMUP = 100
"""Samples drawn before the cached sampler is timed."""
CEILING_REPEATS = 20
MIN_SECONDS = 1.0
"""A short draw is repeated until its runs add up to this."""


class Job(NamedTuple):
    """One row to measure."""

    model: Kind
    sampler: Literal["naive", "cached", "compiled", "parallel"]
    threads: int
    num_samples: int


def run(experiment: Experiment) -> str:
    """Write `benchmark.json`; returns a line of result."""
    recipe, device = experiment.recipe, experiment.device
    settings, hop = recipe.benchmark, recipe.audio.hop_length
    lengths = [max(1, round(seconds * recipe.audio.sample_rate / hop)) * hop for seconds in settings.seconds]
    # The host's threads do not set the pace of a GPU.
    threads = settings.threads if device.type == "cpu" else settings.threads[:1]
    jobs = []
    for count in threads:
        jobs.append(Job("teacher", "naive", count, settings.naive_samples))
        for length in lengths:
            jobs.append(Job("teacher", "cached", count, length))
            if device.type == "cpu":
                jobs.append(Job("teacher", "compiled", count, length))
            jobs.append(Job("student", "parallel", count, length))
    rows = []
    for job in progress(iterable=jobs, desc="benchmark", unit="row"):
        # A process of its own, so that no row inherits another's memory, threads or caches.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(measure, experiment, job).result())
    write_json(experiment.benchmark, {"machine": machine(device), "rows": rows})
    speed = {row["sampler"]: row["samples_per_second"] for row in rows if row["threads"] == threads[-1]}
    parallel = speed.pop("parallel")
    ratios = ", ".join(f"{parallel / value:.1f} x {name}" for name, value in speed.items())
    return (
        f"parallel {parallel:,.0f} samples/s ({threads[-1]} threads), {parallel / recipe.audio.sample_rate:.1f} x real "
        f"time; {ratios}: {experiment.benchmark}"
    )


def measure(experiment: Experiment, job: Job) -> dict[str, Any]:
    """One row: warm up, then time several draws, with the device idle before and after each.

    The ceiling is what the same process, device and threads reach with products of large matrices. A row's share of it
    counts each conditioner once a sample: what the naive sampler computes again is waste.

    The peak memory is what PyTorch allocated on a GPU, and on a CPU the resident memory of the process, which includes
    the interpreter and its libraries; None where the system does not tell.
    """
    recipe, device = experiment.recipe, experiment.device
    torch.set_num_threads(job.threads)
    model = experiment.model(job.model)
    draw = _sampler(experiment, model, job)
    seconds: list[float] = []
    while len(seconds) < recipe.benchmark.repeats or sum(seconds) < MIN_SECONDS:
        _synchronise(device)
        start = time.perf_counter()
        draw()
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    speed, ceiling = job.num_samples / median, matrix_product_ceiling(model, device)
    row = {
        "model": job.model,
        "sampler": job.sampler,
        "device": str(device),
        "threads": job.threads,
        "batch_size": 1,
        "num_samples": job.num_samples,
        "seconds_median": median,
        "seconds_all": seconds,
        "samples_per_second": speed,
        "real_time_factor": speed / recipe.audio.sample_rate,
        "flops_per_sample": model.flops_per_sample,
        "ceiling_flops_per_second": ceiling,
        "share_of_ceiling": speed * model.flops_per_sample / ceiling,
        "peak_memory_bytes": _peak(device),
    }
    if job.sampler == "naive":
        row["note"] = (
            f"timed {job.num_samples} samples only, past the first receptive field, where the cost is constant"
        )
    return row


def matrix_product_ceiling(model: WaveformModel, device: torch.device) -> float:
    """Floating-point operations per second of the best matrix product: of the model's widths, or large and square."""
    nets = [module for module in model.modules() if isinstance(module, WaveNet)]
    shapes = {(8192, net.kernel_size * net.channels, 2 * net.channels) for net in nets} | {(1024, 1024, 1024)}
    best = 0.0
    for m, k, n in shapes:
        a, b = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
        for _ in range(CEILING_REPEATS):
            _synchronise(device)
            start = time.perf_counter()
            torch.mm(a, b)
            _synchronise(device)
            best = max(best, 2 * m * k * n / (time.perf_counter() - start))
    return best


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    cpu_info = Path("/proc/cpuinfo")
    names = [line for line in cpu_info.read_text().splitlines() if "model name" in line] if cpu_info.exists() else []
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchaudio": torchaudio.__version__,
        "wavedistill": __version__,
        "date": datetime.date.today().isoformat(),
    }


def _sampler(experiment: Experiment, model: WaveformModel, job: Job) -> Callable[[], Tensor]:
    """A warmed-up call that draws a job's samples, from the same log-mel and noise for every sampler."""
    recipe, device = experiment.recipe, experiment.device
    length = job.num_samples
    solver: sampling.Solver = sampling.compiled if job.sampler == "compiled" else sampling.cached
    if job.sampler == "naive":
        ((flow, _),) = model.flows.conditioned(None)
        assert isinstance(flow, Autoregressive)
        past = sampling.conditioner_of(flow).wavenet.receptive_field
        solver, length = functools.partial(sampling.naive, start=past), past + length
    frames = -(-length // recipe.audio.hop_length)
    utterance = max(experiment.corpus().of("test"), key=lambda u: u.frames)
    mel = LogMel(recipe.audio).of_file(read_samples(experiment.audio, utterance)[None])
    mel = mel.repeat(1, 1, -(-frames // mel.shape[-1]))[..., :frames]
    mel = pad_frames(mel, recipe.conditioning.context).to(device)
    noise = model.base.noise((1, length), random_stream(recipe.seed)).to(device)

    def draw(noise: Tensor) -> Tensor:
        with torch.inference_mode():
            return sampling.sample(model(mel), noise, solver)

    draw(noise[:, :SEQUENTIAL_WARMUP] if job.sampler == "cached" else noise)
    return lambda: draw(noise)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux's high-water mark of this very process; what the resource module tells is inherited from its parent.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


stage = Stage(
    name="benchmark",
    summary=__doc__,
    needs=("prepare", "teacher", "student"),
    settings=lambda experiment: [
        experiment.recipe.model_dump(mode="json", include=READS),
        {k: v for k, v in machine(experiment.device).items() if k != "date"},
        str(experiment.device),
    ],
    inputs=lambda experiment: [experiment.manifest, *experiment.checkpoints],
    outputs=lambda experiment: [experiment.benchmark],
    run=run,
)
