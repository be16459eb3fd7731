"""Time the naive, cached and parallel samplers of one teacher-student pair."""

import datetime
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchaudio
from torch import Tensor

from wavedistill import __version__, sampling
from wavedistill.audio import LogMel, pad_frames
from wavedistill.checkpoint import load_model
from wavedistill.data import Manifest, random_stream, read_samples
from wavedistill.experiment import Experiment, Stage, write_json
from wavedistill.flows import AutoregressiveAffine
from wavedistill.models import WaveformModel
from wavedistill.progress import progress

READS = {"seed", "audio", "conditioning", "teacher", "student", "benchmark"}
SEQUENTIAL_WARMUP = 100
"""Samples drawn before the cached sampler is timed."""


def run(experiment: Experiment) -> str:
    """Write `benchmark.json`; returns a line of result."""
    recipe, device = experiment.recipe, experiment.device
    teacher, student = (load_model(path, device).model for path in _checkpoints(experiment))
    settings, rate = recipe.benchmark, recipe.audio.sample_rate
    lengths = [max(1, round(s * rate / recipe.audio.hop_length)) * recipe.audio.hop_length for s in settings.seconds]
    # The host's threads do not set the pace of a GPU.
    threads = settings.threads if device.type == "cpu" else (torch.get_num_threads(),)
    jobs: list[tuple[str, str, int, int]] = []
    for count in threads:
        jobs.append(("teacher", "naive", count, settings.naive_samples))
        for length in lengths:
            jobs += [("teacher", "cached", count, length), ("student", "parallel", count, length)]

    models = {"teacher": teacher, "student": student}
    rows = []
    for kind, sampler, count, length in progress(iterable=jobs, desc="benchmark", unit="row"):
        with cpu_threads(count):
            draw = _sampler(experiment, models[kind], sampler, length)
            seconds, peak = measure(draw, settings.repeats, device)
        median = statistics.median(seconds)
        rows.append(
            {
                "model": kind,
                "sampler": sampler,
                "device": str(device),
                "threads": count,
                "batch_size": 1,
                "num_samples": length,
                "seconds_median": median,
                "seconds_all": seconds,
                "samples_per_second": length / median,
                "real_time_factor": length / rate / median,
                "peak_memory_bytes": peak,
            }
        )
        if sampler == "naive":
            rows[-1]["note"] = (
                f"timed {length} samples only, past the first receptive field, where the cost is constant"
            )
    write_json(experiment.benchmark, {"machine": machine(device), "rows": rows})
    speed = {row["sampler"]: row["samples_per_second"] for row in rows if row["threads"] == threads[-1]}
    return (
        f"{', '.join(f'{name} {value:.0f}' for name, value in speed.items())} samples/s ({threads[-1]} threads); "
        f"parallel / cached {speed['parallel'] / speed['cached']:.1f}, "
        f"cached / naive {speed['cached'] / speed['naive']:.1f}: {experiment.benchmark}"
    )


def measure(draw: Callable[[], Any], repeats: int, device: torch.device) -> tuple[list[float], int | None]:
    """Seconds of each of several calls, with the device idle before and after, and the peak memory in bytes.

    On a GPU the peak is what PyTorch allocated; on Linux it is the resident size of the process, which includes the
    interpreter and its libraries; elsewhere it is None.
    """
    _synchronise(device)
    _reset_peak(device)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        draw()
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
    return seconds, _peak(device)


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


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Within, PyTorch computes on so many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sampler(experiment: Experiment, model: WaveformModel, sampler: str, length: int) -> Callable[[], Tensor]:
    """A warmed-up call that draws `length` samples, from the same log-mel and noise for every sampler."""
    recipe, device = experiment.recipe, experiment.device
    solver: sampling.Solver = sampling.cached
    if sampler == "naive":
        (flow,) = (part for part in model.transform.parts if isinstance(part, AutoregressiveAffine))
        past = sampling.conditioner_of(flow).wavenet.receptive_field
        solver, length = functools.partial(sampling.naive, start=past), past + length
    frames = -(-length // recipe.audio.hop_length)
    utterance = max(Manifest.read(experiment.manifest).of("test"), key=lambda u: u.frames)
    mel = LogMel(recipe.audio).of_file(read_samples(experiment.audio, utterance)[None])
    mel = mel.repeat(1, 1, -(-frames // mel.shape[-1]))[..., :frames]
    mel = pad_frames(mel, recipe.conditioning.context).to(device)
    noise = model.base.noise((1, length), random_stream(recipe.seed)).to(device)

    def draw(noise: Tensor) -> Tensor:
        with torch.inference_mode():
            return sampling.sample(model(mel), noise, solver)

    draw(noise[:, :SEQUENTIAL_WARMUP] if sampler == "cached" else noise)
    return lambda: draw(noise)


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (reset := Path("/proc/self/clear_refs")).exists():
        reset.write_text("5")


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    peaks = [line.split() for line in status.read_text().splitlines() if "VmHWM" in line] if status.exists() else []
    return int(peaks[0][1]) * 1024 if device.type == "cpu" and peaks else None


def _checkpoints(experiment: Experiment) -> list[Path]:
    return [experiment.checkpoint("teacher"), experiment.checkpoint("student")]


stage = Stage(
    name="benchmark",
    summary=__doc__,
    settings=lambda experiment: [
        experiment.recipe.model_dump(mode="json", include=READS),
        {k: v for k, v in machine(experiment.device).items() if k != "date"},
        str(experiment.device),
    ],
    inputs=lambda experiment: [experiment.manifest, *_checkpoints(experiment)],
    outputs=lambda experiment: [experiment.benchmark],
    run=run,
)
