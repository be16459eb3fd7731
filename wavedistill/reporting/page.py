"""The page itself: what its tables are called, its words, and what is embedded in it."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from matplotlib.figure import Figure

from wavedistill import __version__
from wavedistill.evaluation.verdict import in_words
from wavedistill.recipe.recipe import Recipe
from wavedistill.reporting.plots import crossover_plot, speed_plot

BASELINES = {
    "griffin_lim": "Griffin-Lim (no model)",
    "source_filter": "Pulses and noise through linear prediction (no model)",
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
    "aperiodicity_db": ("Aperiodicity error, dB RMS", "lower is better", 1),
    "aperiodicity_bias_db": ("Aperiodicity bias, dB", "a buzz is below 0, a whisper above", 1),
    "teacher_log_likelihood": ("Log-likelihood under the teacher, nats/sample", "near that of the recordings", 2),
}
GATES = {
    "level_db": "Level difference, dB, at most",
    "tilt_db": "Tilt difference, dB, at most",
    "vuv_f1": "Voicing, F1, at least",
    "periodicity": "Periodicity of voiced parts, share of the recordings' own, at least",
    "aperiodicity_db": "Aperiodicity error in voiced parts, dB RMS, at most",
    "aperiodicity_bias_db": "Aperiodicity bias in voiced parts, dB either way, at most",
    "better_scores": "Scores better than any system without training (PESQ-wb, STOI, cepstral distortion), at least",
}
Table = dict[str, Any] | None
"""Of a benchmark, as its file has it; None where it was not measured."""


def template() -> str:
    """The page before it is filled in."""
    return (resources.files("wavedistill.reporting") / "templates" / "report.html.j2").read_text()


def render(
    recipe: Recipe,
    found: dict[str, Any],
    benchmark: Table,
    full: Table,
    train: Table,
    *,
    licence: str | None,
    stale: Sequence[str],
    losses: Mapping[str, Figure | None],
    clips: Sequence[tuple[str, Sequence[tuple[str, bytes, Figure]]]],
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
        losses: a plot for each training whose log is there.
        clips: by name; each as every system has it: what that is called, a wav file, and its log-mel.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    passes = found["recipe"]["consistency"]["passes"]
    sized = [row for row in (full["rows"] if full else []) if not row["trained"]]
    return environment.from_string(template()).render(
        name=recipe.name,
        version=__version__,
        licence=licence,
        recipe=json.dumps(found["recipe"], indent=1),
        density=found["density"],
        synthesis=found["synthesis"],
        as_drawn=found["as_drawn"] if passes else {},
        passes=passes,
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
        systems=titles(found),
        scores=SCORES,
        benchmark=benchmark,
        tables=[table for table in (benchmark, full) if table],
        stale=stale,
        training_speed=train,
        crossover_plot=_png(crossover_plot(full["rows"])) if full and sized else None,
        speed_plot=_png(speed_plot(benchmark["rows"], recipe.audio.sample_rate)) if benchmark else None,
        losses=[(name, plot and _png(plot)) for name, plot in losses.items()],
        clips=[(clip, [(title, _text(wav), _png(mel)) for title, wav, mel in systems]) for clip, systems in clips],
    )


def titles(found: dict[str, Any]) -> dict[str, str]:
    """What the systems that were scored are called: the recordings, the models by name, and what needs no training.

    Other systems come last, under their own names.
    """
    also = found["about"]["also"]
    models = [name for name in found["synthesis"] if name not in ("recorded", *BASELINES, *also)]
    parallel = {name: "parallel" if name in found["gates"] else "sequential" for name in models}
    shown = {name: f"{name[0].upper()}{name[1:]} ({parallel[name]})" for name in models}
    untrained = {k: v for k, v in BASELINES.items() if k in found["synthesis"]}
    return {"recorded": "Recorded", **shown, **untrained, **{name: f"{name} (another system)" for name in also}}


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


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return _text(buffer.getvalue())


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
