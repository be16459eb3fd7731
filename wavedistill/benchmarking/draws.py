"""The speed of the samplers: which are measured, and how."""

import functools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from wavedistill.benchmarking.rows import copy_ceiling, matrix_product_ceiling, peak_memory, seconds_of, timed
from wavedistill.benchmarking.words import PARALLEL
from wavedistill.corpus.utterances import read_samples
from wavedistill.experiment.folder import Experiment
from wavedistill.models.kinds import build
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.models import Coupling, Iaf, Maf
from wavedistill.recipe.recipe import Recipe
from wavedistill.sampling import sequential
from wavedistill.sampling.streaming import stream
from wavedistill.speech.audio import LogMel
from wavedistill.speech.conditioning import Conditioning
from wavedistill.speech.consistency import MelConsistency
from wavedistill.tools.random import random_stream

SOLVERS: dict[str, sequential.Solver] = {
    "cached": sequential.cached,
    "compiled": sequential.compiled,
    "graphed": sequential.graphed,
}
"""Of sequential models, but for the naive one."""
MOST_CACHED_SECONDS = 1
"""Of sound drawn by the cached sampler, whose cost a sample does not depend on the length."""
CROSSOVER = (0.25, 0.5, 1, 1.5, 2, 3, 6)
"""Layers of untrained students, as multiples of the teacher's."""
CROSSOVER_SECONDS = 2
WARMUP = 100
"""Samples that a sequential sampler draws before it is timed."""
PIECE = 512
"""Frames of log-mel that a stream is given at a time, more than a block takes, unless networks are much squeezed."""
MIN_SECONDS, MAX_SECONDS = 1.0, 20.0
"""A short draw is repeated until its runs add up to the one, a long one no more once they add up to the other."""
Sequential = Literal["naive", "cached", "compiled", "graphed"]


class Job(NamedTuple):
    """One row to measure; `layers` asks for an untrained student of so many in place of a trained model."""

    model: str
    sampler: Literal["naive", "cached", "compiled", "graphed", "parallel", "streamed"]
    threads: int
    batch_size: int
    num_samples: int
    layers: int | None = None


def jobs(recipe: Recipe, device: torch.device, lengths: Iterable[tuple[int, float]]) -> list[Job]:
    """Every sampler of every trained model, for batch sizes and seconds."""
    found: list[Job] = []
    for count in threads_of(recipe, device):
        for name, kind in recipe.models.items():
            if isinstance(kind, Iaf | Coupling):
                samplers: list[Any] = ["parallel", *(["streamed"] if isinstance(kind, Iaf) else [])]
                found += [
                    Job(name, sampler, count, batch_size, _samples(recipe, seconds))
                    for batch_size, seconds in lengths
                    for sampler in samplers
                ]
            elif isinstance(kind, Maf):
                graphed: Sequential | None = "graphed" if kind.recordable else None
                fast: Sequential | None = "compiled" if device.type == "cpu" else graphed
                found.append(Job(name, "naive", count, 1, recipe.benchmark.naive_samples))
                for batch_size, seconds in lengths:
                    few = _samples(recipe, min(seconds, MOST_CACHED_SECONDS))
                    cached = Job(name, "cached", count, batch_size, few)
                    if cached not in found:
                        found.append(cached)
                    if fast:
                        found.append(Job(name, fast, count, batch_size, _samples(recipe, seconds)))
    return found


def sized_jobs(recipe: Recipe, device: torch.device) -> list[Job]:
    """Untrained students of several sizes, for the point where they are as fast as their teacher's best sampler."""
    for name in recipe.training:
        student, teacher = recipe.models[name], recipe.models.get(str(recipe.teacher_of(name)))
        if isinstance(student, Iaf) and isinstance(teacher, Maf):
            sizes = [max(1, round(share * teacher.layers)) for share in CROSSOVER]
            counts, length = threads_of(recipe, device), _samples(recipe, CROSSOVER_SECONDS)
            return [Job(name, "streamed", threads, 1, length, layers) for threads in counts for layers in sizes]
    return []


def measure(experiment: Experiment, job: Job) -> dict[str, Any]:
    """One row: set up, warm up, then time several draws, with the device idle before and after each.

    The ceilings are what the same process, device and threads reach: with products of large matrices, and with a copy
    in memory. A row's share of the former counts each conditioner once a sample: what the naive sampler computes again
    is waste. A sequential step reads all weights, which a parallel pass does once a block; hence its
    `weight_bytes_per_sample`, and the samples/s that memory would allow if they had to come from there.

    The peak memory is what PyTorch allocated on a GPU, and on a CPU the resident memory of the process, which includes
    the interpreter and its libraries; None where the system does not tell.
    """
    recipe, device = experiment.recipe, experiment.device
    torch.set_num_threads(job.threads)
    model = _model(experiment, job)
    draw = _sampler(experiment, model, job)
    # The first call compiles or loads what is compiled, and warms up.
    setup, later = (seconds_of(functools.partial(draw, WARMUP), device) for _ in range(2))

    def enough(seconds: list[float]) -> bool:
        several = len(seconds) >= recipe.benchmark.repeats and sum(seconds) >= MIN_SECONDS
        return bool(seconds) and (several or sum(seconds) >= MAX_SECONDS)

    times = timed(lambda _: draw(), device, job.threads, enough)
    peak, median = peak_memory(device), times["seconds_median"]  # before the ceilings, which take memory too
    # A pass has no first samples before its last.
    begin, repeats = functools.partial(draw, 1), 0 if job.sampler == "parallel" else recipe.benchmark.repeats
    first = statistics.median([seconds_of(begin, device) for _ in range(repeats)] or [median])
    drawn = job.batch_size * job.num_samples
    speed, ceiling = drawn / median, matrix_product_ceiling(model, device)
    row = {
        "model": job.model,
        "sampler": job.sampler,
        "device": str(device),
        "threads": job.threads,
        "batch_size": job.batch_size,
        "num_samples": job.num_samples,
        "trained": job.layers is None,
        "passes": recipe.consistency.passes if job.sampler in PARALLEL else 0,
        **times,
        "samples_per_second": speed,
        "times_real_time": speed / recipe.audio.sample_rate,
        "setup_seconds": max(0.0, setup - later),
        "first_samples_seconds": first,
        "flops_per_sample": model.flops_per_sample,
        "ceiling_flops_per_second": ceiling,
        "share_of_ceiling": speed * model.flops_per_sample / ceiling,
        "copy_bytes_per_second": copy_ceiling(device),
        "peak_memory_bytes": peak,
    }
    if job.sampler not in PARALLEL:
        weights = [weight for net in model.networks for weight in net.parameters()]
        row["weight_bytes_per_sample"] = sum(weight.nbytes for weight in weights) / job.batch_size
    if job.sampler == "naive":
        row["note"] = (
            f"timed {job.num_samples} samples only, past the first receptive field, where the cost is constant"
        )
    return row


def threads_of(recipe: Recipe, device: torch.device) -> Sequence[int]:
    """The host's threads do not set the pace of a GPU."""
    return recipe.benchmark.threads if device.type == "cpu" else recipe.benchmark.threads[:1]


def _samples(recipe: Recipe, seconds: float) -> int:
    hop = recipe.audio.hop_length
    return max(1, round(seconds * recipe.audio.sample_rate / hop)) * hop


def _model(experiment: Experiment, job: Job) -> WaveformModel:
    """The trained model of a job, or an untrained one of as many layers as the job asks for."""
    if job.layers is None:
        return experiment.model(job.model)
    recipe, kind = experiment.recipe, experiment.recipe.models[job.model]
    assert isinstance(kind, Iaf)
    cycle = kind.network.dilation_cycle
    flow_layers = tuple(min(cycle, job.layers - done) for done in range(0, job.layers, cycle))
    models = {
        **recipe.models,
        job.model: kind.model_copy(update={"flow_layers": flow_layers, "squeeze": kind.squeeze[:1]}),
    }
    return build(recipe.model_copy(update={"models": models}), job.model, recipe.seed).to(experiment.device)


def _sampler(experiment: Experiment, model: WaveformModel, job: Job) -> Callable[..., object]:
    """A call that draws a job's samples, or the first few only, for the log-mel of a recording over and over."""
    recipe, device = experiment.recipe, experiment.device
    length, solver = job.num_samples, SOLVERS.get(job.sampler, sequential.fastest)
    if job.sampler == "naive":
        past = max(net.receptive_field for net in model.networks)
        solver, length = functools.partial(sequential.naive, start=past), past + length
    hop = recipe.audio.hop_length
    if job.sampler == "parallel":
        length = -(-length // hop) * hop
    utterance = max(experiment.corpus().of("test"), key=lambda u: u.frames)
    recorded = LogMel(recipe.audio).of_file(read_samples(experiment.audio, utterance)[None]).to(device)
    recorded = recorded.expand(job.batch_size, -1, -1)
    consistency = MelConsistency(recipe.audio, recipe.consistency.passes).to(device)
    frames = -(-length // hop) + 2 * model.margin

    def pieces() -> Iterator[Conditioning]:
        for first in range(0, frames, PIECE):
            wanted = range(first, min(first + PIECE, frames))
            yield Conditioning(recorded[..., [frame % recorded.shape[-1] for frame in wanted]], 0)

    def random(count: int, generator: torch.Generator) -> Tensor:
        return model.base.noise((job.batch_size, count), generator).to(device)

    if job.sampler == "streamed":

        def draw_blocks(first: int | None = None) -> Iterator[Tensor]:
            noise = functools.partial(random, generator=random_stream(recipe.seed))
            blocks = stream(model, pieces(), noise, consistency=consistency, threads=job.threads)
            for wave in blocks:
                if first is not None:
                    break
                del wave
            return blocks  # which has not to end before the clock stops

        return draw_blocks

    told = Conditioning(torch.cat([piece.mel for piece in pieces()], -1), model.margin)
    noise = random(length, random_stream(recipe.seed))

    @torch.inference_mode()
    def draw(first: int | None = None) -> None:
        end = length if first is None or job.sampler == "parallel" else length - job.num_samples + first
        wave = sequential.sample(model(told), noise[:, :end], solver)
        if job.sampler == "parallel":
            consistency(wave, told.within(0).mel)

    return draw
