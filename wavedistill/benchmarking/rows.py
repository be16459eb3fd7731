"""One row of a table: its times, whether they are to be trusted, and what the machine could do at most."""

import functools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from wavedistill.models.waveform import WaveformModel
from wavedistill.networks.products import product
from wavedistill.tools.machine import watch_others
from wavedistill.tools.memory import keep_freed_memory

CEILING_REPEATS = 20
SQUARES = {"cpu": (1024,), "cuda": (2048, 4096, 8192)}
"""Sizes of the square products that a ceiling is sought with."""
MOST_SPREAD = 1.3
"""Of the upper over the lower quartile of the runs of a row that agree."""
MOST_OTHERS, MOST_LOAD = 0.25, 0.75
"""CPUs that other programs may use during a row; or else the share of all CPUs that they and the row may use."""


def steady(measure: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """A row, measured once more if it was disturbed; of two that were, the one whose runs differ less."""
    row = alone(measure, *args)
    if row["disturbed"]:
        again = alone(measure, *args)
        row = min((row, again), key=lambda each: (each["disturbed"] is not None, _spread(each["seconds_quartiles"])))
    return row


def alone(call: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """The result of a call in a process of its own, which inherits no memory, threads or caches."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=keep_freed_memory) as pool:
        return pool.submit(call, *args).result()


def disturbance(quartiles: list[float], others: float | None, threads: int) -> str | None:
    """Why the runs of a row are not to be trusted, in words; None if they agree, and had the CPUs to themselves."""
    if others is not None and others > MOST_OTHERS and threads + others > MOST_LOAD * (os.cpu_count() or 1):
        return f"other programs used {others:.1f} CPUs"
    if _spread(quartiles) > MOST_SPREAD:
        return f"half of the runs lie {_spread(quartiles):.1f} times apart"
    return None


def timed(
    call: Callable[[int], object], device: torch.device, threads: int, enough: Callable[[list[float]], bool]
) -> dict[str, Any]:
    """How long a call of a number, from 0 on, takes until its times are enough, and whether they are to be trusted."""
    seconds: list[float] = []
    others = watch_others()
    while not enough(seconds):
        seconds.append(seconds_of(functools.partial(call, len(seconds)), device))
    used_by_others = others()
    return {
        "seconds_median": statistics.median(seconds),
        "seconds_quartiles": quartiles(seconds),
        "seconds_all": seconds,
        "cpus_used_by_others": used_by_others,
        "disturbed": disturbance(quartiles(seconds), used_by_others, threads),
    }


def quartiles(seconds: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * seconds


def _spread(quartiles: list[float]) -> float:
    return quartiles[2] / quartiles[0]


def matrix_product_ceiling(model: WaveformModel, device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations per second of the best matrix product: of the model's widths, or large and square.

    Large enough to fill a GPU, and of the type that the model computes in.
    """
    nets = model.networks
    shapes = {(8192, net.kernel_size * net.channels, 2 * net.channels) for net in nets}
    shapes |= {(size, size, size) for size in SQUARES[device.type]}
    best = 0.0
    for m, k, n in shapes:
        a, weight = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
        ways = [functools.partial(torch.mm, a, weight.t()), functools.partial(product, a, weight)]
        with torch.no_grad():
            seconds = min(seconds_of(way, device) for way in ways for _ in range(CEILING_REPEATS))
        best = max(best, 2 * m * k * n / seconds)
    return best


def copy_ceiling(device: torch.device) -> float:
    """Bytes per second that a copy of 64 MiB reads, and writes as many."""
    a, b = (torch.zeros(2**24, device=device) for _ in range(2))
    return a.nbytes / min(seconds_of(functools.partial(b.copy_, a), device) for _ in range(CEILING_REPEATS))


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, with the device idle before and after."""
    _synchronise(device)
    start = time.perf_counter()
    found = call()
    _synchronise(device)
    seconds = time.perf_counter() - start
    del found  # whose end, a stream's for instance, is not timed
    return seconds


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the most: what torch allocated on a GPU, else what the process held; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux's high-water mark of this very process; what the resource module tells is inherited from its parent.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
