"""What the benchmark measures, and what it says about it."""

from typing import Any

import pytest
import torch

from wavedistill.config import Recipe, validate_recipe
from wavedistill.models import compiler
from wavedistill.stages.benchmark import crossovers, jobs, sized_jobs, summarise
from wavedistill.stages.report import crossover_plot, speed_plot

CPU = torch.device("cpu")


def row(sampler: str, speed: float, flops: float = 1e6, **changes: Any) -> dict[str, Any]:
    return {
        "model": "student" if sampler in ("parallel", "streamed") else "teacher",
        "sampler": sampler,
        "device": "cpu",
        "threads": 1,
        "batch_size": 1,
        "num_samples": 16000,
        "trained": True,
        "samples_per_second": speed,
        "real_time_factor": speed / 16000,
        "flops_per_sample": flops,
        **changes,
    }


ROWS = [
    row("naive", 100, num_samples=20),
    row("naive", 150, num_samples=20, threads=2),
    row("cached", 1000),
    row("compiled", 40_000),
    row("parallel", 30_000, 3e6),
    row("streamed", 32_000, 3e6),
    *(row("streamed", 96e9 / flops, flops, trained=False) for flops in (1e6, 2e6, 4e6)),
]


def test_every_factor_names_its_baseline() -> None:
    lines = summarise(ROWS)
    assert lines[1] == (
        "16,000 samples, cpu, 1 thread: the streamed student draws 32,000 samples/s, 2 x real time, 320 times as fast "
        "as the teacher's naive sampler, 32 times as fast as the teacher's cached sampler and 0.80 times as fast as "
        "the teacher's compiled sampler."
    )


def test_crossover_is_where_both_draw_equally_fast() -> None:
    """A student of 96 GFLOP/s against 40,000 samples/s: 2.4 MFLOP a sample, where the teacher takes 1."""
    assert crossovers(ROWS) == {1: pytest.approx(2.4)}
    assert "up to 2.4 times the teacher's operations" in summarise(ROWS)[-1]
    assert not crossovers([row("compiled", 1e6), *ROWS]), "no student of these is faster"


def test_every_sampler_has_a_row_for_every_length(tiny: Recipe, tiny_data: dict[str, Any]) -> None:
    tiny_data["benchmark"]["threads"] = [1, 2]
    found = jobs(validate_recipe(tiny_data, "tiny.toml"), CPU, [(1, 0.5), (1, 60), (16, 2)])
    assert [job.sampler for job in found if job.threads == 2] == [
        "naive",
        *["cached", "compiled", "parallel", "streamed", *(["fused"] if compiler() else [])] * 3,
    ]
    assert {(job.batch_size, job.num_samples) for job in found if job.sampler == "streamed"} == {
        (1, 8000),
        (1, 60 * 16000),
        (16, 2 * 16000),
    }
    assert max(job.num_samples for job in found if job.sampler == "cached") == 16000, "more would take minutes"
    sized = sized_jobs(tiny, CPU)
    assert {job.sampler for job in sized} == {"fused" if compiler() else "streamed"}
    assert len({job.layers for job in sized}) > 4


def test_a_gpu_has_a_recorded_sampler_and_one_number_of_threads(tiny_data: dict[str, Any]) -> None:
    tiny_data["benchmark"]["threads"] = [1, 2]
    gpu = torch.device("cuda")
    found = jobs(validate_recipe(tiny_data, "tiny.toml"), gpu, [(1, 1)])
    assert [job.sampler for job in found] == ["naive", "cached", "graphed", "parallel", "streamed"]
    tiny_data["teacher"]["components"] = 3  # whose inverse is found by a search
    tiny_data["student"]["loss"]["kl_estimator"] = "mc-k"
    found = jobs(validate_recipe(tiny_data, "tiny.toml"), gpu, [(1, 1)])
    assert "graphed" not in {job.sampler for job in found}


def test_plots_show_every_row_once() -> None:
    (axes,) = speed_plot(ROWS, 16000).axes
    assert len(axes.patches) == 6
    (line, _) = crossover_plot(ROWS).axes[0].lines
    assert list(line.get_xdata()) == [1, 2, 4]
