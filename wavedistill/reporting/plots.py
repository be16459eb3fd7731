"""What the report shows as plots, in the page's own colours."""

import io
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wavedistill.benchmarking.words import PARALLEL, counted

SERIES = ("#3b6ea5", "#a3567a", "#d08770", "#5f9ed1")
MARKERS = "os^DvP"
GRID = "#dddddd"
ON_THE_PAGE = {
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, 1)},
    GRID: "var(--line)",
    "#000000": "currentColor",
}
"""What the page's style sheet says instead of a plot's colours, so that they follow light and dark."""
UNNAMED = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def crossover_plot(rows: list[dict[str, Any]]) -> Figure:
    """Speed of students over the teacher's fastest sequential sampler, against the ratio of their operations."""
    sized = [row for row in rows if not row["trained"]]
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, threads in enumerate(sorted({row["threads"] for row in sized})):
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
            color=SERIES[number % len(SERIES)],
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
    axes.legend(frameon=False)
    return figure


def ways_plot(found: dict[str, Any], rows: list[dict[str, Any]]) -> Figure:
    """PESQ of models against their speed, and against the likelihood that they give to recordings, where they tell.

    Filled after mel consistency, hollow as drawn; the speed is that of each model's fastest sampler on the fewest
    threads, the figures those of the files of `evaluate` and `benchmark`.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    fewest = min(row["threads"] for row in rows)
    speeds: dict[str, float] = {}
    for row in rows:
        if row["trained"] and row["threads"] == fewest and row["batch_size"] == 1:
            speeds[row["model"]] = max(row["samples_per_second"], speeds.get(row["model"], 0))
    for number, (model, speed) in enumerate(speeds.items()):
        look = {"color": SERIES[number % len(SERIES)], "marker": MARKERS[number % len(MARKERS)], "linestyle": ":"}
        drawn, heard = (found[part][model]["pesq_wb"] for part in ("as_drawn", "synthesis"))
        for axes, at in ((left, speed), (right, found["density"]["models"].get(model, {}).get("nll"))):
            if at is not None:
                axes.plot([at, at], [drawn, heard], **look, fillstyle="none")
                axes.plot(at, heard, **look, label=model.replace("_", " "))
    left.set(xscale="log", xlabel=f"samples/s, {counted(fewest)}", ylabel="PESQ, wide band (hollow: as drawn)")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.xaxis.set_minor_formatter(NullFormatter())
    right.xaxis.set_major_locator(MaxNLocator(5))
    right.set(xlabel="negative log-likelihood, nats a sample")
    for axes in (left, right):
        axes.grid(color=GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def loss_plots(folder: Path) -> dict[str, Figure]:
    """Each term of a training against its step, by name, from a TensorBoard log; none where that is gone."""
    if not folder.is_dir():
        return {}
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    log.Reload()
    tags = log.Tags()["scalars"]
    return {
        tag.removeprefix("valid/"): _loss_plot(log, tag, tag.replace("valid/", "train/"))
        for tag in tags
        if tag.startswith("valid/")
    }


def _loss_plot(log: EventAccumulator, valid: str, train: str) -> Figure:
    figure = Figure(figsize=(3.6, 2.3), layout="constrained")
    axes = figure.subplots()
    for tag, style in ((train, {"alpha": 0.4}), (valid, {"marker": "o", "markersize": 4})):
        events = log.Scalars(tag) if tag in log.Tags()["scalars"] else []
        axes.plot([e.step for e in events], [e.value for e in events], label=tag, color=SERIES[0], **style)
    values = [event.value for event in log.Scalars(valid)]
    # A start far off would flatten all that follows.
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.set(xlabel="step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def svg(figure: Figure) -> str:
    """A figure as an element of an HTML page, with text as text, and colours that are the page's."""
    content = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "the same whenever it is drawn"}):
        figure.savefig(content, format="svg", transparent=True, metadata=UNNAMED)
    drawn = content.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    # Names of groups, which no element refers to, would repeat from plot to plot; a page needs no namespaces.
    drawn = re.sub(r' id="[\w.]+_\d+"| xmlns(:\w+)?="[^"]*"', "", drawn)
    for colour, own in ON_THE_PAGE.items():
        drawn = drawn.replace(colour, own)
    return drawn
