"""What the benchmark measures, and what it says about it."""

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from wavedistill.benchmarking import rows as rows_of
from wavedistill.benchmarking.draws import jobs, sized_jobs
from wavedistill.benchmarking.rows import disturbance, quartiles
from wavedistill.benchmarking.words import crossovers, summarise
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.loading import validate_recipe
from wavedistill.recipe.recipe import Recipe
from wavedistill.reporting.page import bars
from wavedistill.reporting.plots import crossover_plot
from wavedistill.tools.machine import watch_others

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
        "times_real_time": speed / 16000,
        "disturbed": None,
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
        *["cached", "compiled"] * 3,
        *["parallel", "streamed"] * 3,
    ]
    assert {(job.batch_size, job.num_samples) for job in found if job.sampler == "streamed"} == {
        (1, 8000),
        (1, 60 * 16000),
        (16, 2 * 16000),
    }
    assert max(job.num_samples for job in found if job.sampler == "cached") == 16000, "more would take minutes"
    sized = sized_jobs(tiny, CPU)
    assert {job.sampler for job in sized} == {"streamed"}
    assert len({job.layers for job in sized}) > 4


def test_a_gpu_has_a_recorded_sampler_and_one_number_of_threads(tiny_data: dict[str, Any]) -> None:
    tiny_data["benchmark"]["threads"] = [1, 2]
    gpu = torch.device("cuda")
    found = jobs(validate_recipe(tiny_data, "tiny.toml"), gpu, [(1, 1)])
    assert [job.sampler for job in found] == ["naive", "cached", "graphed", "parallel", "streamed"]
    tiny_data["models"]["teacher"]["components"] = 3  # whose inverse is found by a search
    tiny_data["training"]["student"]["loss"]["kl_estimator"] = "mc-k"
    found = jobs(validate_recipe(tiny_data, "tiny.toml"), gpu, [(1, 1)])
    assert "graphed" not in {job.sampler for job in found}


def test_plots_show_every_row_once() -> None:
    groups = bars(ROWS)
    assert [title for title, _, _ in groups] == ["1 thread", "2 threads"]
    assert sum(len(rows) for _, _, rows in groups) == sum(row["trained"] for row in ROWS) == 6
    for _, real_time, rows in groups:
        for row, length in rows:
            assert 0 < length <= 100
            assert (length > real_time) == (row["times_real_time"] > 1)
    (line, _) = crossover_plot(ROWS).axes[0].lines
    assert list(line.get_xdata()) == [1, 2, 4]


@pytest.mark.parametrize(
    ("seconds", "others", "threads", "cpus", "said"),
    [
        ([0.13, 0.84, 1.12], 0.0, 2, 2, "half of the runs lie 2.0 times apart"),
        ([0.50, 0.51, 0.52], 0.02, 2, 2, None),
        ([0.50, 0.51, 0.52], None, 2, 2, None),
        ([0.50, 0.51, 0.52], 1.0, 1, 2, "other programs used 1.0 CPUs"),
        ([0.50, 0.51, 0.52], 0.6, 2, 2, "other programs used 0.6 CPUs"),
        ([0.50, 0.51, 0.52], 20.0, 2, 64, None),
        ([0.50], 0.0, 1, 2, None),
    ],
)
def test_a_disturbed_row_is_known_by_its_runs_or_by_what_others_did(
    seconds: list[float],
    others: float | None,
    threads: int,
    cpus: int,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one whose runs agree because all were slowed alike; on many CPUs, others may do what they like."""
    monkeypatch.setattr("os.cpu_count", lambda: cpus)
    assert disturbance(quartiles(seconds), others, threads) == said


def test_what_others_use_is_seen_and_what_we_use_is_not() -> None:
    so_far = watch_others()
    if so_far() is None:
        pytest.skip("the system does not say what others use")

    def work(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    alone, beside = [], []
    for _ in range(3):
        so_far = watch_others()
        work(0.5)
        alone.append(so_far())
        neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        time.sleep(0.2)
        so_far = watch_others()
        work(0.5)
        beside.append(so_far())
        neighbour.kill()
        neighbour.wait()
    if max(alone) > 0.5:
        pytest.skip("other programs are at work already, and one more makes no difference")
    assert min(beside) - min(alone) > 0.3


def test_a_disturbed_row_is_measured_again_and_the_better_one_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []

    def give(*found: tuple[str | None, float]) -> dict[str, Any]:
        rows[:] = [{"disturbed": why, "seconds_quartiles": [1.0, 1.0, spread]} for why, spread in found]
        monkeypatch.setattr(rows_of, "alone", lambda measure, *args: rows.pop(0))
        return rows_of.steady(lambda: {})

    assert give((None, 1.2), ("never asked for", 9))["seconds_quartiles"][2] == 1.2
    assert len(rows) == 1
    assert give(("runs", 2.0), (None, 1.25))["disturbed"] is None
    assert give(("runs", 2.0), ("runs", 1.5))["seconds_quartiles"][2] == 1.5
    assert give(("runs", 1.5), ("runs", 2.0))["seconds_quartiles"][2] == 1.5


def test_a_disturbed_row_is_marked_wherever_it_is_shown() -> None:
    marked = [{**each, "disturbed": "others" if each["sampler"] in ("compiled", "streamed") else None} for each in ROWS]
    lines = summarise(marked)
    assert "compiled sampler (disturbed: others)" in lines[0]
    assert lines[1].endswith("(disturbed: others)")


def test_a_ceiling_is_of_the_type_that_the_model_computes_in(
    tiny_model: Callable[[str], WaveformModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: (seen.add((a.dtype, len(a))), product(a, b))[1])
    monkeypatch.setattr(rows_of, "CEILING_REPEATS", 1)
    model = tiny_model("student")
    assert rows_of.matrix_product_ceiling(model, CPU, torch.bfloat16) > 0
    assert {kind for kind, _ in seen} == {torch.bfloat16}
    assert max(rows_of.SQUARES["cuda"]) > max(rows_of.SQUARES["cpu"])
