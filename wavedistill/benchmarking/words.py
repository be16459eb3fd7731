"""What the rows of a benchmark mean, in words."""

import itertools
import math
from typing import Any

PARALLEL = ("parallel", "streamed")
"""Samplers of models that draw in one pass."""


def summarise(rows: list[dict[str, Any]]) -> list[str]:
    """What the rows mean, in words: what is how many times as fast as what, and where the student loses."""
    lines = []
    pair = [row for row in rows if row["trained"]]
    for row in pair:
        if row["sampler"] not in PARALLEL:
            continue
        factors = []
        for other in pair:
            if other["sampler"] in PARALLEL or any(other[key] != row[key] for key in ("threads", "batch_size")):
                continue
            if other["sampler"] == "naive" or other["num_samples"] == row["num_samples"]:
                factor = row["samples_per_second"] / other["samples_per_second"]
                shown = f"{factor:,.0f}" if factor >= 10 else f"{factor:.2f}"
                factors.append(
                    f"{shown} times as fast as the {other['model']}'s {other['sampler']} sampler{caution(other)}"
                )
        against = f", {_listed(factors)}" if factors else ""
        lines.append(
            f"{_place(row)}: the {row['sampler']} {row['model']} draws {row['samples_per_second']:,.0f} samples/s, "
            f"{row['times_real_time']:.3g} x real time{against}.{caution(row)}"
        )
    for threads, ratio in crossovers(rows).items():
        lines.append(
            f"{counted(threads)}: a student wins against the fastest sequential sampler of its teacher up to "
            f"{ratio:.2g} times the teacher's operations a sample, and loses beyond."
        )
    return lines


def of_trainings(rows: list[dict[str, Any]]) -> list[str]:
    """What the rows of trainings mean, in words."""
    return [
        f"{counted(row['threads'])}: the training of the {row['model']} takes {row['samples_per_second']:,.0f} "
        f"samples/s, {100 * row['share_of_ceiling']:.0f} % of the ceiling; {100 * row['share_of_loading']:.1f} % of "
        f"its time loads data.{caution(row)}"
        for row in rows
    ]


def caution(row: dict[str, Any]) -> str:
    """What is to be said beside a disturbed row."""
    return f" (disturbed: {row['disturbed']})" if row["disturbed"] else ""


def crossovers(rows: list[dict[str, Any]]) -> dict[int, float]:
    """For each number of threads, the ratio of operations (student over teacher) at which both draw equally fast.

    Interpolated between the untrained students of several sizes, on logarithmic scales; only where the fastest
    sequential sampler of the teacher lies between the slowest and the fastest of them.
    """
    found = {}
    for threads in sorted({row["threads"] for row in rows}):
        single = [row for row in rows if row["threads"] == threads and row["batch_size"] == 1]
        sequential = [row for row in single if row["sampler"] not in PARALLEL]
        sizes = sorted((row["flops_per_sample"], row["samples_per_second"]) for row in single if not row["trained"])
        fastest = max((row["samples_per_second"] for row in sequential), default=math.inf)
        for (less, faster), (more, slower) in itertools.pairwise(sizes):
            if slower <= fastest <= faster:
                share = math.log(faster / fastest) / math.log(faster / slower) if faster > slower else 0.0
                found[threads] = less * (more / less) ** share / sequential[0]["flops_per_sample"]
    return found


def _place(row: dict[str, Any]) -> str:
    batch = "" if row["batch_size"] == 1 else f" x {row['batch_size']}"
    return f"{row['num_samples']:,}{batch} samples, {row['device']}, {counted(row['threads'])}"


def counted(count: int) -> str:
    """A number of threads, in words."""
    return f"{count} thread{'s' if count > 1 else ''}"


def _listed(parts: list[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last
