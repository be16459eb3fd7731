"""Time the samplers of one teacher-student pair: naive, cached, compiled or graphed; parallel, streamed, fused."""

import functools
import itertools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from wavedistill import __version__
from wavedistill.corpus.data import random_stream, read_samples
from wavedistill.experiment.experiment import SPEED, Experiment, Stage, measured_on, write_json
from wavedistill.flows.flows import Autoregressive
from wavedistill.models.checkpoint import Kind
from wavedistill.models.models import WaveformModel, build, compile_networks, compiler
from wavedistill.recipe.config import Recipe
from wavedistill.sampling import sampling
from wavedistill.speech.audio import LogMel
from wavedistill.tools.engine import launch
from wavedistill.tools.machine import machine, watch_others
from wavedistill.tools.memory import keep_freed_memory
from wavedistill.tools.progress import progress
from wavedistill.training.tasks import student_task, teacher_task
from wavedistill.training.training import Batches, Learner

SOLVERS: dict[str, sampling.Solver] = {
    "cached": sampling.cached,
    "compiled": sampling.compiled,
    "graphed": sampling.graphed,
}
"""Of the teacher, but for the naive one."""
FULL_SECONDS, FULL_BATCH_SIZES = (0.5, 2, 10, 60), (1, 16)
MOST_SECONDS = 60
"""Of sound in one draw, over its batch."""
MOST_CACHED_SECONDS = 1
"""Of sound drawn by the cached sampler, whose cost a sample does not depend on the length."""
CROSSOVER = (0.25, 0.5, 1, 1.5, 2, 3, 6)
"""Layers of untrained students, as multiples of the teacher's."""
CROSSOVER_SECONDS = 2
WARMUP = 100
"""Samples that a sequential sampler draws before it is timed."""
PIECE = 512
"""Frames of log-mel that a stream is given at a time, more than a block takes."""
TRAIN_WARMUP, TRAIN_STEPS = 5, 30
CEILING_REPEATS = 20
SQUARES = {"cpu": (1024,), "cuda": (2048, 4096, 8192)}
"""Sizes of the square products that a ceiling is sought with."""
MIN_SECONDS, MAX_SECONDS = 1.0, 20.0
"""A short draw is repeated until its runs add up to the one, a long one no more once they add up to the other."""
MOST_SPREAD = 1.3
"""Of the upper over the lower quartile of the runs of a row that agree."""
MOST_OTHERS, MOST_LOAD = 0.25, 0.75
"""CPUs that other programs may use during a row; or else the share of all CPUs that they and the row may use."""


class Job(NamedTuple):
    """One row to measure; `layers` asks for an untrained student of so many in place of the trained one."""

    model: Kind
    sampler: Literal["naive", "cached", "compiled", "graphed", "parallel", "streamed", "fused"]
    threads: int
    batch_size: int
    num_samples: int
    layers: int | None = None


def run(experiment: Experiment) -> str:
    """Write `benchmark.json`, a quick table of the trained pair; returns a line of result."""
    settings = experiment.recipe.benchmark
    lengths = [(1, seconds) for seconds in settings.seconds]
    return _time(experiment, experiment.benchmark, "benchmark", jobs(experiment.recipe, experiment.device, lengths))


def run_full(experiment: Experiment) -> str:
    """Write `benchmark_full.json`: durations, batches, and students of several sizes; returns a line of result."""
    recipe, device = experiment.recipe, experiment.device
    lengths = [
        (batch, length) for batch in FULL_BATCH_SIZES for length in FULL_SECONDS if batch * length <= MOST_SECONDS
    ]
    sized = [] if recipe.student.teacher else sized_jobs(recipe, device)
    every = [*jobs(recipe, device, lengths), *sized]
    return _time(experiment, experiment.benchmark_of("full"), "full benchmark", every)


def run_train(experiment: Experiment) -> str:
    """Write `benchmark_train.json`, the pace of both trainings; returns a line of result."""
    each: list[tuple[Kind, int]] = [
        (kind, threads)
        for threads in _threads(experiment.recipe, experiment.device)
        for kind in get_args(Kind)
        if kind == "student" or not experiment.recipe.student.teacher
    ]
    rows = [_steady(measure_training, experiment, *job) for job in progress(iterable=each, desc="training", unit="row")]
    summary = [
        f"{_said(row['threads'])}: the training of the {row['model']} takes {row['samples_per_second']:,.0f} "
        f"samples/s, {100 * row['share_of_ceiling']:.0f} % of the ceiling; {100 * row['share_of_loading']:.1f} % of "
        f"its time loads data.{_caution(row)}"
        for row in rows
    ]
    path = experiment.benchmark_of("train")
    _write(experiment, path, rows, summary)
    return f"{' '.join(summary)} {path}"


def _steady(measure: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """A row, measured once more if it was disturbed; of two that were, the one whose runs differ less."""
    row = _alone(measure, *args)
    if row["disturbed"]:
        again = _alone(measure, *args)
        row = min((row, again), key=lambda each: (each["disturbed"] is not None, _spread(each["seconds_quartiles"])))
    return row


def disturbance(quartiles: list[float], others: float | None, threads: int) -> str | None:
    """Why the runs of a row are not to be trusted, in words; None if they agree, and had the CPUs to themselves."""
    if others is not None and others > MOST_OTHERS and threads + others > MOST_LOAD * (os.cpu_count() or 1):
        return f"other programs used {others:.1f} CPUs"
    if _spread(quartiles) > MOST_SPREAD:
        return f"half of the runs lie {_spread(quartiles):.1f} times apart"
    return None


def quartiles(seconds: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * seconds


def _spread(quartiles: list[float]) -> float:
    return quartiles[2] / quartiles[0]


def _time(experiment: Experiment, path: Path, label: str, jobs: list[Job]) -> str:
    """Measure the samplers' rows and write them; returns the last line of their summary."""
    rows = [_steady(measure, experiment, job) for job in progress(iterable=jobs, desc=label, unit="row")]
    summary = summarise(rows)
    _write(experiment, path, rows, summary)
    return f"{summary[-1]} {path}"


def _write(experiment: Experiment, path: Path, rows: list[dict[str, Any]], summary: list[str]) -> None:
    of = measured_on(experiment)
    rows = [{**row, "of": of} for row in rows]
    write_json(path, {"machine": machine(experiment.device), "rows": rows, "summary": summary})


def jobs(recipe: Recipe, device: torch.device, lengths: Iterable[tuple[int, float]]) -> list[Job]:
    """Every sampler of the trained pair, for batch sizes and seconds; fused is streamed by compiled networks."""
    sequential: Literal["compiled", "graphed"] | None
    sequential = "compiled" if device.type == "cpu" else "graphed" if recipe.teacher.components == 1 else None
    found = []
    for threads in _threads(recipe, device):
        found.append(Job("teacher", "naive", threads, 1, recipe.benchmark.naive_samples))
        for batch_size, seconds in lengths:
            samples = _samples(recipe, seconds)
            cached = Job("teacher", "cached", threads, batch_size, _samples(recipe, min(seconds, MOST_CACHED_SECONDS)))
            if cached not in found:
                found.append(cached)
            if sequential:
                found.append(Job("teacher", sequential, threads, batch_size, samples))
            found.append(Job("student", "parallel", threads, batch_size, samples))
            found.append(Job("student", "streamed", threads, batch_size, samples))
            if _fuses(device):
                found.append(Job("student", "fused", threads, batch_size, samples))
    # There is no sampler of a density of the user's own.
    return [job for job in found if job.model == "student" or not recipe.student.teacher]


def sized_jobs(recipe: Recipe, device: torch.device) -> list[Job]:
    """Untrained students of several sizes, for the point where they are as fast as the teacher's best sampler."""
    layers = [max(1, round(share * recipe.teacher.layers)) for share in CROSSOVER]
    samples = _samples(recipe, CROSSOVER_SECONDS)
    sampler: Literal["streamed", "fused"] = "fused" if _fuses(device) else "streamed"
    return [
        Job("student", sampler, threads, 1, samples, count) for threads in _threads(recipe, device) for count in layers
    ]


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
    setup, later = (_seconds(functools.partial(draw, WARMUP), device) for _ in range(2))
    seconds: list[float] = []
    others = watch_others()
    while not seconds or (
        sum(seconds) < MAX_SECONDS and (len(seconds) < recipe.benchmark.repeats or sum(seconds) < MIN_SECONDS)
    ):
        seconds.append(_seconds(draw, device))
    used_by_others = others()
    peak = _peak(device)  # before the ceilings, which take memory too
    median = statistics.median(seconds)
    # A pass has no first samples before its last.
    begin, times = functools.partial(draw, 1), 0 if job.sampler == "parallel" else recipe.benchmark.repeats
    first = statistics.median([_seconds(begin, device) for _ in range(times)] or [median])
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
        "seconds_median": median,
        "seconds_quartiles": quartiles(seconds),
        "seconds_all": seconds,
        "cpus_used_by_others": used_by_others,
        "disturbed": disturbance(quartiles(seconds), used_by_others, job.threads),
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
    if job.model == "teacher":
        row["weight_bytes_per_sample"] = _weight_bytes(model) / job.batch_size
    if job.sampler == "naive":
        row["note"] = (
            f"timed {job.num_samples} samples only, past the first receptive field, where the cost is constant"
        )
    return row


def measure_training(experiment: Experiment, kind: Kind, threads: int) -> dict[str, Any]:
    """The pace of one training: the median step, as the recipe has it, once all is compiled and warm.

    Its operations are counted as three forward passes of what is trained (one forward, two backward), and, of a
    teacher that is distilled, two (one forward, one backward to the student's sample), unless it is not ours.
    """
    recipe, device = experiment.recipe, experiment.device
    torch.set_num_threads(threads)
    flops = 0.0
    if kind == "teacher":
        task = teacher_task(recipe)
    else:
        teacher = experiment.teacher()
        if isinstance(teacher, WaveformModel):
            flops += 2 * teacher.flops_per_sample
            if recipe.student.training.compile:
                compile_networks(teacher)
        task = student_task(recipe, teacher, device)
    settings = task.settings
    fabric = launch(device)
    batches = Batches(task, experiment.corpus(), experiment.audio, recipe, fabric)
    learner = Learner(task, recipe, fabric)
    flops += 3 * learner.model.flops_per_sample
    if settings.compile:
        compile_networks(learner.model)

    def step(number: int) -> None:
        learner.step(batches.of_step(number), number)

    def load(number: int) -> None:
        list(batches.of_step(number))

    setup = sum(_seconds(functools.partial(step, number), device) for number in range(TRAIN_WARMUP))
    others = watch_others()
    seconds = [_seconds(functools.partial(step, number), device) for number in range(TRAIN_STEPS)]
    used_by_others = others()
    loading = [_seconds(functools.partial(load, number), device) for number in range(TRAIN_STEPS)]
    peak = _peak(device)
    median = statistics.median(seconds)
    speed = settings.batch_size * settings.segment_frames * recipe.audio.hop_length / median
    lowered = settings.precision == "bf16-mixed"
    ceiling = matrix_product_ceiling(learner.model, device, torch.bfloat16 if lowered else torch.float32)
    return {
        "model": kind,
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


def summarise(rows: list[dict[str, Any]]) -> list[str]:
    """What the rows mean, in words: what is how many times as fast as what, and where the student loses."""
    lines = []
    pair = [row for row in rows if row["trained"]]
    for row in pair:
        if row["model"] != "student":
            continue
        factors = []
        for other in pair:
            if other["model"] != "teacher" or any(other[key] != row[key] for key in ("threads", "batch_size")):
                continue
            if other["sampler"] == "naive" or other["num_samples"] == row["num_samples"]:
                factor = row["samples_per_second"] / other["samples_per_second"]
                shown = f"{factor:,.0f}" if factor >= 10 else f"{factor:.2f}"
                factors.append(f"{shown} times as fast as the teacher's {other['sampler']} sampler{_caution(other)}")
        against = f", {_listed(factors)}" if factors else ""
        lines.append(
            f"{_place(row)}: the {row['sampler']} student draws {row['samples_per_second']:,.0f} samples/s, "
            f"{row['times_real_time']:.3g} x real time{against}.{_caution(row)}"
        )
    for threads, ratio in crossovers(rows).items():
        lines.append(
            f"{_said(threads)}: a student wins against the fastest sequential sampler of its teacher up to "
            f"{ratio:.2g} times the teacher's operations a sample, and loses beyond."
        )
    return lines


def _caution(row: dict[str, Any]) -> str:
    return f" (disturbed: {row['disturbed']})" if row["disturbed"] else ""


def crossovers(rows: list[dict[str, Any]]) -> dict[int, float]:
    """For each number of threads, the ratio of operations (student over teacher) at which both draw equally fast.

    Interpolated between the untrained students of several sizes, on logarithmic scales; only where the fastest
    sequential sampler of the teacher lies between the slowest and the fastest of them.
    """
    found = {}
    for threads in sorted({row["threads"] for row in rows}):
        single = [row for row in rows if row["threads"] == threads and row["batch_size"] == 1]
        sequential = [row for row in single if row["model"] == "teacher"]
        sizes = sorted((row["flops_per_sample"], row["samples_per_second"]) for row in single if not row["trained"])
        fastest = max((row["samples_per_second"] for row in sequential), default=math.inf)
        for (less, faster), (more, slower) in itertools.pairwise(sizes):
            if slower <= fastest <= faster:
                share = math.log(faster / fastest) / math.log(faster / slower) if faster > slower else 0.0
                found[threads] = less * (more / less) ** share / sequential[0]["flops_per_sample"]
    return found


def matrix_product_ceiling(model: WaveformModel, device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations per second of the best matrix product: of the model's widths, or large and square.

    Large enough to fill a GPU, and of the type that the model computes in.
    """
    nets = model.networks
    shapes = {(8192, net.kernel_size * net.channels, 2 * net.channels) for net in nets}
    shapes |= {(size, size, size) for size in SQUARES[device.type]}
    best = 0.0
    for m, k, n in shapes:
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
        seconds = min(_seconds(functools.partial(torch.mm, a, b), device) for _ in range(CEILING_REPEATS))
        best = max(best, 2 * m * k * n / seconds)
    return best


def copy_ceiling(device: torch.device) -> float:
    """Bytes per second that a copy of 64 MiB reads, and writes as many."""
    a, b = (torch.zeros(2**24, device=device) for _ in range(2))
    return a.nbytes / min(_seconds(functools.partial(b.copy_, a), device) for _ in range(CEILING_REPEATS))


def _alone(call: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """The result of a call in a process of its own, which inherits no memory, threads or caches."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=keep_freed_memory) as pool:
        return pool.submit(call, *args).result()


def _fuses(device: torch.device) -> bool:
    """Whether a student's networks are compiled for its fastest sampler; on a GPU this has never been tried."""
    return device.type == "cpu" and compiler() is not None


def _threads(recipe: Recipe, device: torch.device) -> Sequence[int]:
    """The host's threads do not set the pace of a GPU."""
    return recipe.benchmark.threads if device.type == "cpu" else recipe.benchmark.threads[:1]


def _samples(recipe: Recipe, seconds: float) -> int:
    hop = recipe.audio.hop_length
    return max(1, round(seconds * recipe.audio.sample_rate / hop)) * hop


def _model(experiment: Experiment, job: Job) -> WaveformModel:
    """The trained model of a job, or an untrained student of as many layers as the job asks for."""
    if job.layers is None:
        return experiment.model(job.model)
    cycle = experiment.recipe.student.network.dilation_cycle
    flow_layers = tuple(min(cycle, job.layers - done) for done in range(0, job.layers, cycle))
    student = experiment.recipe.student.model_copy(update={"flow_layers": flow_layers})
    recipe = experiment.recipe.model_copy(update={"student": student})
    return build("student", recipe, recipe.seed).to(experiment.device)


def _sampler(experiment: Experiment, model: WaveformModel, job: Job) -> Callable[..., None]:
    """A call that draws a job's samples, or the first few only, for the log-mel of a recording over and over."""
    recipe, device = experiment.recipe, experiment.device
    length, solver = job.num_samples, SOLVERS.get(job.sampler, sampling.fastest)
    if job.sampler == "naive":
        ((flow, _),) = model.flows.conditioned(None)
        assert isinstance(flow, Autoregressive)
        past = sampling.conditioner_of(flow).wavenet.receptive_field
        solver, length = functools.partial(sampling.naive, start=past), past + length
    hop = recipe.audio.hop_length
    utterance = max(experiment.corpus().of("test"), key=lambda u: u.frames)
    recorded = LogMel(recipe.audio).of_file(read_samples(experiment.audio, utterance)[None]).to(device)
    recorded = recorded.expand(job.batch_size, -1, -1)
    frames = -(-length // hop) + 2 * model.margin

    def pieces() -> Iterator[Tensor]:
        for first in range(0, frames, PIECE):
            wanted = range(first, min(first + PIECE, frames))
            yield recorded[..., [frame % recorded.shape[-1] for frame in wanted]]

    def random(count: int, generator: torch.Generator) -> Tensor:
        return model.base.noise((job.batch_size, count), generator).to(device)

    if job.sampler in ("streamed", "fused"):
        fused = job.sampler == "fused"

        def stream(first: int | None = None) -> None:
            generator = random_stream(recipe.seed)
            for wave in sampling.stream(model, pieces(), lambda count: random(count, generator), compiled=fused):
                if first is not None:
                    break
                del wave

        return stream

    mel, noise = torch.cat(list(pieces()), -1), random(length, random_stream(recipe.seed))

    @torch.inference_mode()
    def draw(first: int | None = None) -> None:
        end = length if first is None or job.model == "student" else length - job.num_samples + first
        sampling.sample(model(mel), noise[:, :end], solver)

    return draw


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, with the device idle before and after."""
    _synchronise(device)
    start = time.perf_counter()
    call()
    _synchronise(device)
    return time.perf_counter() - start


def _weight_bytes(model: WaveformModel) -> int:
    return sum(weight.nbytes for net in model.networks for weight in net.parameters())


def _place(row: dict[str, Any]) -> str:
    batch = "" if row["batch_size"] == 1 else f" x {row['batch_size']}"
    return f"{row['num_samples']:,}{batch} samples, {row['device']}, {_said(row['threads'])}"


def _said(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _listed(parts: list[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last


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


def _stage(name: str, summary: str, run: Callable[[Experiment], str], written: Callable[[Experiment], Path]) -> Stage:
    return Stage(
        name=name,
        summary=summary,
        needs=("prepare", "teacher", "student"),
        settings=lambda experiment: [
            experiment.recipe.model_dump(mode="json", include=SPEED),
            {k: v for k, v in machine(experiment.device).items() if k != "date"},
            str(experiment.device),
        ],
        inputs=lambda experiment: [experiment.manifest, *experiment.checkpoints],
        outputs=lambda experiment: [written(experiment)],
        run=run,
        version=__version__,
    )


stage = _stage("benchmark", __doc__, run, lambda experiment: experiment.benchmark)
full = _stage("benchmark_full", run_full.__doc__ or "", run_full, lambda experiment: experiment.benchmark_of("full"))
train = _stage(
    "benchmark_train", run_train.__doc__ or "", run_train, lambda experiment: experiment.benchmark_of("train")
)
