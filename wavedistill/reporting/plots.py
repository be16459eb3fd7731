"""What the report shows as pictures."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from wavedistill.benchmarking.words import PARALLEL, counted
from wavedistill.recipe.sections import Audio
from wavedistill.speech.audio import LogMel

COLOURS = {
    "naive": "#b0b0b0",
    "cached": "#d08770",
    "compiled": "#a3567a",
    "graphed": "#a3567a",
    "parallel": "#3b6ea5",
    "streamed": "#5f9ed1",
    "fused": "#1f4e79",
}


def speed_plot(rows: list[dict[str, Any]], sample_rate: int) -> Figure:
    """Samples per second of the trained models' rows on a logarithmic scale, with real time marked."""
    rows = [row for row in rows if row["trained"]]
    figure = Figure(figsize=(8, 0.8 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels = [
        f"{row['sampler']}, {row['batch_size']} x {row['num_samples']:,} samples, threads: {row['threads']}"
        f"{' (disturbed)' if row['disturbed'] else ''}"
        for row in rows
    ]
    speeds = [row["samples_per_second"] for row in rows]
    bars = axes.barh(range(len(rows)), speeds, color=[COLOURS[row["sampler"]] for row in rows])
    axes.bar_label(bars, [f"{speed:,.0f}" for speed in speeds], padding=3)
    axes.axvline(sample_rate, color="black", linestyle="--", linewidth=1)
    axes.set_title("dashed: real time", fontsize="medium")
    axes.set(yticks=range(len(rows)), yticklabels=labels, xscale="log", xlabel="samples per second")
    axes.set_xlim(min(speeds) / 2, max(*speeds, sample_rate) * 4)
    axes.invert_yaxis()
    return figure


def crossover_plot(rows: list[dict[str, Any]]) -> Figure:
    """Speed of students over the teacher's fastest sequential sampler, against the ratio of their operations."""
    sized = [row for row in rows if not row["trained"]]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for threads in sorted({row["threads"] for row in sized}):
        own = [r for r in rows if r["threads"] == threads and r["batch_size"] == 1 and r["sampler"] not in PARALLEL]
        fastest = max(own, key=lambda row: row["samples_per_second"])
        points = sorted(
            (row["flops_per_sample"] / fastest["flops_per_sample"], row["samples_per_second"])
            for row in sized
            if row["threads"] == threads
        )
        axes.plot(
            [ratio for ratio, _ in points],
            [speed / fastest["samples_per_second"] for _, speed in points],
            marker="o",
            label=f"{counted(threads)}, against the {fastest['sampler']} sampler",
        )
    axes.axhline(1, color="black", linestyle="--", linewidth=1)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations a sample, student over teacher",
        ylabel=f"samples/s, {sized[0]['sampler']} student over teacher",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.legend()
    return figure


def loss_plot(folder: Path) -> Figure | None:
    """Every term of a training against its step, from a TensorBoard log; None where that is gone."""
    if not folder.is_dir():
        return None
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    log.Reload()
    tags = log.Tags()["scalars"]
    terms = [tag.removeprefix("valid/") for tag in tags if tag.startswith("valid/")]
    if not terms:
        return None
    figure = Figure(figsize=(4.5 * len(terms), 3), layout="constrained")
    for axes, term in zip(np.atleast_1d(figure.subplots(1, len(terms))), terms, strict=True):
        for tag, style in ((f"train/{term}", {"alpha": 0.35}), (f"valid/{term}", {"marker": "o", "markersize": 3})):
            events = log.Scalars(tag) if tag in tags else []
            axes.plot([e.step for e in events], [e.value for e in events], label=tag, color="#3b6ea5", **style)
        values = [event.value for event in log.Scalars(f"valid/{term}")]
        # A start far off would flatten all that follows.
        if min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        axes.set(xlabel="step", title=term)
        axes.legend()
    return figure


def log_mel_plot(samples: Tensor, settings: Audio) -> Figure:
    """The log-mel of audio (T,)."""
    figure = Figure(figsize=(4, 2), layout="constrained")
    axes = figure.subplots()
    extent = (0, len(samples) / settings.sample_rate, 0, settings.n_mels)
    mel = LogMel(settings).of_file(samples[None])[0].numpy()
    axes.imshow(mel, origin="lower", aspect="auto", vmin=-9, vmax=1, extent=extent)
    axes.set(xlabel="s", ylabel="mel band")
    return figure
