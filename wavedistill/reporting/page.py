"""The page itself: what is embedded in it, and in which order."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import groupby
from typing import Any, NamedTuple

import jinja2
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wavedistill import __version__
from wavedistill.benchmarking.words import counted
from wavedistill.evaluation.verdict import in_words
from wavedistill.recipe.recipe import Recipe
from wavedistill.reporting import words
from wavedistill.reporting.plots import crossover_plot, svg, ways_plot
from wavedistill.reporting.spectrogram import HEIGHT, WIDTH, ticks
from wavedistill.reporting.words import Table


class Version(NamedTuple):
    """A clip as a system has it: a FLAC file, and its spectrogram as a WebP image."""

    sound: bytes
    picture: bytes


class Clip(NamedTuple):
    """A recording of the test split, and what systems made of its log-mel.

    Attributes:
        origin: what a person would call the recording.
        seconds: its length.
        systems: by name; each as it is heard, and as it was drawn where that is another sound.
    """

    origin: str
    seconds: float
    systems: Mapping[str, Sequence[Version]]


def templates() -> dict[str, str]:
    """The page before it is filled in, its style and its script, by file name."""
    folder = resources.files("wavedistill.reporting") / "templates"
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def render(
    recipe: Recipe,
    found: dict[str, Any],
    benchmark: Table,
    full: Table,
    train: Table,
    *,
    licence: str | None,
    stale: Sequence[str],
    losses: Mapping[str, Mapping[str, Figure]],
    clips: Sequence[Clip],
) -> str:
    """The page of an experiment.

    Args:
        recipe: of the experiment.
        found: the densities and scores, as their file has them.
        benchmark: the quick table of the benchmark.
        full: the long one.
        train: the pace of the trainings.
        licence: of the recordings behind its models, one a line.
        stale: names of tables that are left out, because they are of something else.
        losses: of each training, a plot for each of its terms; none where its log is gone.
        clips: to be heard.
    """
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(templates()), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    passes = found["recipe"]["consistency"]["passes"]
    systems = words.systems(found)
    return environment.get_template("report.html.j2").render(
        name=recipe.name,
        version=__version__,
        rate=recipe.audio.sample_rate,
        licence=licence,
        recipe=json.dumps(found["recipe"], indent=1),
        answers=[
            {
                "model": model,
                "sentence": words.answer(found, benchmark, model),
                "tiles": words.tiles(found, benchmark, model),
                "checks": words.checks(found, model) if model in found["gates"] else [],
            }
            for model in found["gates"] or recipe.training
        ],
        compared={name: _compared(found, name) for name in found["gates"]},
        density=found["density"],
        synthesis=found["synthesis"],
        as_drawn={name: scores for name, scores in found["as_drawn"].items() if passes and name != "recorded"},
        nearest=nearest(found["synthesis"]),
        passes=passes,
        pitch=found["pitch_from_mel"],
        about=found["about"],
        systems=systems,
        heard_first=next(iter(found["gates"]), "recorded"),
        scores=words.SCORES,
        samplers=words.SAMPLERS,
        benchmark=benchmark,
        bars=bars(benchmark["rows"]) if benchmark else [],
        tables=[table for table in (benchmark, full) if table],
        stale=stale,
        training_speed=train,
        crossover=_crossover(full),
        ways=_ways(found, benchmark),
        losses={
            name: [(words.TERMS.get(term, words.Named(term, "")), svg(plot)) for term, plot in plots.items()]
            for name, plots in losses.items()
        },
        clips=[(clip, [float(time) for time in MaxNLocator(6).tick_values(0, clip.seconds)]) for clip in clips],
        hz=ticks(recipe.audio),
        pixels=(WIDTH, HEIGHT),
    )


def bars(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float, list[tuple[dict[str, Any], float]]]]:
    """Rows of trained models in groups that compare, with how long their bars are in percent, logarithmically.

    Returns:
        For each group what its rows have in common, where real time is, and the rows with their bars.
    """
    trained = [row for row in rows if row["trained"]]
    speeds = [1.0, *(row["times_real_time"] for row in trained)]
    low, high = math.log(min(speeds) / 2), math.log(max(speeds))

    def length(speed: float) -> float:
        return 100 * (math.log(speed) - low) / (high - low)

    def of(row: dict[str, Any]) -> tuple[str, int, int]:
        return row["device"], row["threads"], row["batch_size"]

    found = []
    for (device, threads, batch), group in groupby(sorted(trained, key=of), of):
        place = counted(threads) if device == "cpu" else device
        title = f"{place}{f', {batch} sounds at a time' if batch > 1 else ''}"
        found.append((title, length(1), [(row, length(row["times_real_time"])) for row in group]))
    return found


def _compared(found: dict[str, Any], model: str) -> str:
    """A model's scores beside those of the best system without training."""
    against = found["against_untrained"][model]
    return in_words({k: {**score, "system": words.BASELINES[score["system"]].title} for k, score in against.items()})


def nearest(synthesis: Mapping[str, Mapping[str, float | None]]) -> dict[str, set[str]]:
    """For each score the systems that come nearest to the recordings, as far as the digits that are shown tell."""
    nearest = {}
    for key, score in words.SCORES.items():
        recorded = synthesis["recorded"][key]
        distances = {
            system: abs(round(value, score.digits) - round(recorded, score.digits))
            for system, scores in synthesis.items()
            if system != "recorded" and recorded is not None and (value := scores[key]) is not None
        }
        best = {system for system in distances if math.isclose(distances[system], min(distances.values()))}
        nearest[key] = best if len(best) < len(distances) else set()
    return nearest


def _crossover(full: Table) -> str | None:
    """The speed of students of several sizes, where it was measured."""
    rows = full["rows"] if full else []
    return svg(crossover_plot(rows)) if any(not row["trained"] for row in rows) else None


def _ways(found: dict[str, Any], benchmark: Table) -> str | None:
    """What several models give, at what speed, where there is PESQ; two are compared in words."""
    rows = benchmark["rows"] if benchmark else []
    several = len({row["model"] for row in rows} & found["synthesis"].keys()) > 2
    return svg(ways_plot(found, rows)) if several and found["synthesis"]["recorded"]["pesq_wb"] is not None else None
