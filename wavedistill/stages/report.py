"""Show the experiment on one self-contained page: sound, spectrograms, losses, speed and scores."""

import base64
import io
import json
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import soundfile
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wavedistill import __version__
from wavedistill.benchmarking.words import PARALLEL
from wavedistill.evaluation.verdict import in_words
from wavedistill.experiment.folder import Experiment, measured_on
from wavedistill.experiment.stage import Stage
from wavedistill.speech.audio import LogMel
from wavedistill.tools.files import replacing

BASELINES = {
    "griffin_lim": "Griffin-Lim (no model)",
    "whisper": "Noise through linear prediction (a whisper)",
}
SCORES = {
    "pesq_wb": ("PESQ-wb", "1 to 4.6, higher is better", 2),
    "stoi": ("STOI", "0 to 1, higher is better", 3),
    "mcd_db": ("Mel-cepstral distortion, dB", "lower is better", 2),
    "lsd_db": ("Log-spectral distance, dB", "lower is better", 2),
    "f0_rmse_cents": ("F0 error, cents RMS", "lower is better", 0),
    "vuv_f1": ("Voicing, F1", "0 to 1, higher is better", 2),
    "periodicity_rmse": ("Error of voicing probability", "lower is better", 2),
    "periodicity": ("Periodicity of voiced parts", "a whisper is near 0, speech near 1", 2),
    "level_difference_db": ("Level difference, dB", "near 0", 2),
    "tilt_difference_db": ("Tilt difference, dB", "near 0", 2),
}
GATES = {
    "level_db": "Level difference, dB, at most",
    "tilt_db": "Tilt difference, dB, at most",
    "vuv_f1": "Voicing, F1, at least",
    "periodicity": "Periodicity of voiced parts, share of the recordings' own, at least",
    "better_scores": "Scores better than any system without training (PESQ-wb, STOI, cepstral distortion), at least",
}
COLOURS = {
    "naive": "#b0b0b0",
    "cached": "#d08770",
    "compiled": "#a3567a",
    "graphed": "#a3567a",
    "parallel": "#3b6ea5",
    "streamed": "#5f9ed1",
    "fused": "#1f4e79",
}
SHOWN_CLIPS = 3


def run(experiment: Experiment) -> str:
    """Write `report.html`; returns a line of result."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("wavedistill.stages"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    found = json.loads(experiment.metrics.read_text())
    recipe = experiment.recipe
    benchmark, full, train = (_current(experiment, path) for path in _tables(experiment))
    stale = [path.name for path in _tables(experiment) if path.exists() and not _current(experiment, path)]
    sized = [row for row in (full["rows"] if full else []) if not row["trained"]]
    systems = titles(found)
    page = environment.get_template("report.html.j2").render(
        name=recipe.name,
        version=__version__,
        licence=recipe.corpus.licence,
        recipe=json.dumps(found["recipe"], indent=1),
        density=found["density"],
        synthesis=found["synthesis"],
        judged=[
            {
                "name": name,
                "verdict": verdict(found, name),
                "against_untrained": in_words(found["against_untrained"][name]),
                "gates": [(label, gates[gate]) for gate, label in GATES.items()],
            }
            for name, gates in found["gates"].items()
        ],
        pitch=found["pitch_from_mel"],
        about=found["about"],
        systems=systems,
        scores=SCORES,
        benchmark=benchmark,
        tables=[table for table in (benchmark, full) if table],
        stale=stale,
        training_speed=train,
        crossover_plot=_png(crossover_plot(full["rows"])) if full and sized else None,
        speed_plot=_png(speed_plot(benchmark["rows"], recipe.audio.sample_rate)) if benchmark else None,
        losses=[(name, plot and _png(plot)) for name in recipe.training for plot in [loss_plot(experiment, name)]],
        clips=[
            (clip, [(title, *_listen(experiment, system, clip)) for system, title in systems.items()])
            for clip in _clips(experiment)[:SHOWN_CLIPS]
        ],
    )
    with replacing(experiment.report) as file:
        file.write(page.encode())
    return f"{len(page) / 1e6:.1f} MB: {experiment.report}"


def titles(found: dict[str, Any]) -> dict[str, str]:
    """What the systems that were scored are called: the recordings, the models by name, and what needs no training."""
    models = [name for name in found["synthesis"] if name != "recorded" and name not in BASELINES]
    parallel = {name: "parallel" if name in found["gates"] else "sequential" for name in models}
    shown = {name: f"{name[0].upper()}{name[1:]} ({parallel[name]})" for name in models}
    return {"recorded": "Recorded", **shown, **{k: v for k, v in BASELINES.items() if k in found["synthesis"]}}


def verdict(found: dict[str, Any], model: str) -> str:
    """Whether a model passes its gates."""
    failed = [GATES[name].split(",")[0].lower() for name, gate in found["gates"][model].items() if not gate["passed"]]
    if failed:
        return f"The {model} fails its gates ({'; '.join(failed)}): it is not to be called good."
    drawn, recorded = (found["synthesis"][system] for system in (model, "recorded"))
    return (
        f"The {model} speaks with a voice, and passes every gate: its voiced parts have a periodicity of "
        f"{drawn['periodicity']:.2f}, the recordings {recorded['periodicity']:.2f}."
    )


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
            label=f"{threads} thread{'s' if threads > 1 else ''}, against the {fastest['sampler']} sampler",
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


def loss_plot(experiment: Experiment, name: str) -> Figure | None:
    """Every term of a training against its step, training and validation; None where its log is gone."""
    folder = experiment.training(name) / "tensorboard"
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


def _tables(experiment: Experiment) -> list[Path]:
    return [experiment.benchmark, experiment.benchmark_of("full"), experiment.benchmark_of("train")]


def _current(experiment: Experiment, path: Path) -> dict[str, Any] | None:
    """A table of the benchmark; None if there is none of these very models and settings."""
    table = json.loads(path.read_text()) if path.exists() else {"rows": []}
    of = measured_on(experiment)
    return table if table["rows"] and all(row["of"] == of for row in table["rows"]) else None


def _clips(experiment: Experiment) -> list[str]:
    """The names of the clips; every system has them."""
    return sorted(path.name for path in (experiment.samples / "recorded").glob("*.wav"))


def _listen(experiment: Experiment, system: str, clip: str) -> tuple[str, str]:
    """A clip as base64 wav, and a picture of its log-mel as base64 PNG."""
    path = experiment.samples / system / clip
    samples, rate = soundfile.read(path, dtype="float32")
    audio = experiment.recipe.audio
    mel = LogMel(audio).of_file(torch.from_numpy(samples)[None])[0].numpy()
    figure = Figure(figsize=(4, 2), layout="constrained")
    axes = figure.subplots()
    axes.imshow(mel, origin="lower", aspect="auto", vmin=-9, vmax=1, extent=(0, len(samples) / rate, 0, audio.n_mels))
    axes.set(xlabel="s", ylabel="mel band")
    return _base64(path), _png(figure)


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def settings(experiment: Experiment) -> Any:
    """What the page depends on besides files, as plain values."""
    template = resources.files("wavedistill.stages") / "templates" / "report.html.j2"
    return [experiment.recipe.model_dump(mode="json"), measured_on(experiment), template.read_text()]


def inputs(experiment: Experiment) -> list[Path]:
    """The files that the page shows."""
    tables = [path for path in _tables(experiment) if path.exists()]
    return [experiment.metrics, *tables, *sorted(experiment.samples.glob("*/*.wav"))]


def stage(trainings: list[str]) -> Stage:
    """The stage of a recipe with these trainings."""
    return Stage(
        name="report",
        needs=("prepare", *trainings, "evaluate"),
        settings=settings,
        inputs=inputs,
        outputs=lambda experiment: [experiment.report],
        run=run,
        version=__version__,
    )
