"""What the page says: names of systems, scores and samplers with a sentence on each, and its answer in one sentence."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from wavedistill.benchmarking.words import PARALLEL, counted
from wavedistill.evaluation.verdict import against_untrained

Table = dict[str, Any] | None
"""Of a benchmark, as its file has it; None where it was not measured."""


class Named(NamedTuple):
    """A name, and what it means in a few words."""

    title: str
    hint: str


class Score(NamedTuple):
    """How a score is called and shown, and what it tells."""

    title: str
    meaning: str
    digits: int


class Gate(NamedTuple):
    """What a gate looks at, and how its value and threshold are said."""

    title: str
    value: str
    threshold: str


class Tile(NamedTuple):
    """One figure that matters, and what it says."""

    value: str
    label: str
    meaning: str


BASELINES = {
    "griffin_lim": Named("Griffin-Lim", "no training"),
    "source_filter": Named("Pulses and noise", "no training"),
    "whisper": Named("Filtered noise", "no training"),
}
SCORES = {
    "pesq_wb": Score("PESQ, wide band", "Predicts how good listeners find the sound, from 1 to 4.64.", 2),
    "stoi": Score("STOI", "Predicts how much of the words can be understood; 1 is all.", 3),
    "mcd_db": Score("Mel-cepstral distortion, dB", "How far the colour of the sound is off; 0 is exact.", 2),
    "lsd_db": Score("Log-spectral distance, dB", "How far the fine spectrum is off; 0 is exact.", 2),
    "f0_rmse_cents": Score("Pitch error, cents", "How far the melody is off; 100 cents are a semitone.", 0),
    "vuv_f1": Score("Voicing, F1", "Whether the voice sets in and stops where it should; 1 is exact.", 2),
    "periodicity_rmse": Score("Error of voicing", "How far the certainty that there is a voice is off; 0 is exact.", 2),
    "periodicity": Score("Periodicity", "How regular the vibration of voiced sounds is; a whisper is near 0.", 2),
    "level_difference_db": Score("Level difference, dB", "Too loud is above 0, too soft below.", 2),
    "tilt_difference_db": Score("Tilt difference, dB", "Too bright is above 0, too dull below.", 2),
    "aperiodicity_db": Score("Aperiodicity error, dB", "How far the noise in voiced sounds is off; 0 is exact.", 1),
    "aperiodicity_bias_db": Score("Aperiodicity bias, dB", "Too breathy is above 0, a buzz below.", 1),
    "teacher_log_likelihood": Score(
        "Log-likelihood, nats a sample", "How probable the sound is to the model that can tell.", 2
    ),
}
GATES = {
    "level_db": Gate("As loud", "off by {:.1f} dB", "{:g} dB allowed"),
    "tilt_db": Gate("As bright", "highs against lows off by {:.1f} dB", "{:g} dB allowed"),
    "aperiodicity_db": Gate("As clear", "noise in voiced sounds off by {:.1f} dB", "{:g} dB allowed"),
    "aperiodicity_bias_db": Gate("Neither breath nor buzz", "{:.1f} dB to one side", "{:g} dB allowed"),
    "vuv_f1": Gate("Voiced where it should be", "F1 {:.2f}, 1 is exact", "{:g} required"),
    "periodicity": Gate("A voice, not a whisper", "{:.0%} as regular as the recordings", "{:.0%} required"),
    "better_scores": Gate("Worth its training", "better than all without it in {:.0f} scores", "{:g} required"),
}
SAMPLERS = {
    "naive": "computes all the past anew for each sample",
    "cached": "sample by sample, remembers the past",
    "compiled": "sample by sample, in machine code",
    "graphed": "sample by sample, recorded for the GPU",
    "parallel": "all samples in one pass",
    "streamed": "block by block",
}
TERMS = {
    "nll": Named("Negative log-likelihood, nats a sample", "How much real speech surprises the model."),
    "pitch": Named("Pitch", "How far the pitch that is read off the spectrogram is off."),
    "kl": Named("KL, nats a sample", "How far the model's distribution is from its teacher's."),
    "spectral": Named("Spectral distance", "How far its short-time spectra are from the recording's."),
    "log_mel": Named("Log-mel distance", "How far its log-mel spectrogram is from the recording's."),
    "drawn_log_mel": Named("Log-mel distance as drawn", "The same before mel consistency."),
    "log_scale": Named("Distance of log-scales", "How far its spreads are from its teacher's."),
    "contrastive": Named("Contrast", "How much worse its sound fits another place's spectrogram, taken negative."),
    "x_reconstruction": Named("Reconstruction of sound", "Through the teacher to noise and back."),
    "z_reconstruction": Named("Reconstruction of noise", "Through the model to sound and back."),
}


def systems(found: Mapping[str, Any]) -> dict[str, Named]:
    """The systems that were scored: the recordings, the models by name, what needs no training, and other systems."""
    also = found["about"]["also"]
    models = {
        name: Named(
            f"{name[0].upper()}{name[1:]}".replace("_", " "),
            "all at once" if name in found["gates"] else "sample by sample",
        )
        for name in found["synthesis"]
        if name not in ("recorded", *BASELINES, *also)
    }
    untrained = {name: named for name, named in BASELINES.items() if name in found["synthesis"]}
    others = {name: Named(name, "another system") for name in also}
    return {"recorded": Named("Recorded", "the original"), **models, **untrained, **others}


def checks(found: Mapping[str, Any], model: str) -> list[dict[str, Any]]:
    """The gates of a model in words, each with whether it passed."""
    said = []
    for name, (title, value, threshold) in GATES.items():
        gate = found["gates"][model][name]
        measured = "not measurable" if gate["value"] is None else value.format(gate["value"])
        said.append(
            {
                "title": title,
                "words": f"{measured}; {threshold.format(gate['threshold'])}".replace("%", " %"),
                "passed": gate["passed"],
            }
        )
    return said


def answer(found: Mapping[str, Any], benchmark: Table, model: str) -> str:
    """How fast and how good a model is, in plain words."""
    parts = []
    if row := fastest(benchmark, model):
        times = row["times_real_time"]
        parts.append(
            f"speaks {_rounded(times)} times as fast as real time"
            if times >= 1
            else f"takes {_rounded(1 / times)} times as long as its speech lasts"
        )
    if compared := against_untrained(found["synthesis"], model):
        better = sum(score["gain"] > 0 for score in compared.values())
        count = "every score" if better == len(compared) else f"{better} of {len(compared)} scores"
        parts.append(
            f"is closer to the recordings than any method without training in {count}"
            if better
            else "is no closer to the recordings than methods without training"
        )
    said = ", and ".join(parts) or "is trained, and neither its speed nor its sound is measured"
    failed = sum(not gate["passed"] for gate in found["gates"].get(model, {}).values())
    if failed:
        return f"The {model} is not to be called good: it fails {failed} of {len(GATES)} quality checks. It {said}."
    return f"The {model} {said}."


def tiles(found: Mapping[str, Any], benchmark: Table, model: str) -> list[Tile]:
    """The figures that matter most of a model, as far as they were measured."""
    tiles = []
    if row := fastest(benchmark, model):
        rival = max(_sequential(benchmark), key=lambda other: other["times_real_time"], default=None)
        against = ""
        if rival and rival is not row:
            factor = row["times_real_time"] / rival["times_real_time"]
            against = f"; {_rounded(factor)} times the {rival['model']} at its fastest"
        how = f"{SAMPLERS[row['sampler']]}, {_place(row, benchmark)}{against}"
        tiles.append(Tile(f"{_rounded(row['times_real_time'])} \N{MULTIPLICATION SIGN}", "real time", _sentence(how)))
        first = min(_of(benchmark, model), key=lambda other: other["first_samples_seconds"])
        how = f"{SAMPLERS[first['sampler']]}, {_place(first, benchmark)}, once its log-mel is known"
        tiles.append(Tile(f"{1000 * first['first_samples_seconds']:.0f} ms", "to the first sound", _sentence(how)))
    own, recorded = (found["synthesis"][system]["pesq_wb"] for system in (model, "recorded"))
    if own is not None and recorded is not None:
        best = against_untrained(found["synthesis"], model).get("pesq_wb")
        beside = f"; the best without training, {best['best']:.2f}" if best else ""
        meaning = f"PESQ, where a recording has {recorded:.2f}{beside}"
        tiles.append(Tile(f"{own:.2f}", "predicted quality", _sentence(meaning)))
    density = found["density"]["models"].get(model, {})
    if "kl" in density:
        meaning = (
            f"KL divergence a sample, 0 if both were the same; {density['kl_before_training']:.2f} before training"
        )
        tiles.append(Tile(f"{density['kl']:.3f}", f"nats from the {density['kl_from']}", _sentence(meaning)))
    if "nll" in density:
        meaning = "negative log-likelihood of the test recordings; lower is better"
        tiles.append(Tile(f"{density['nll']:.2f}".replace("-", "\N{MINUS SIGN}"), "nats a sample", _sentence(meaning)))
    return tiles


def fastest(benchmark: Table, model: str) -> dict[str, Any] | None:
    """The row of a model's fastest way to draw one sound."""
    return max(_of(benchmark, model), key=lambda row: row["times_real_time"], default=None)


def _of(benchmark: Table, model: str) -> list[dict[str, Any]]:
    return [row for row in _single(benchmark) if row["model"] == model]


def _sequential(benchmark: Table) -> list[dict[str, Any]]:
    return [row for row in _single(benchmark) if row["sampler"] not in PARALLEL]


def _single(benchmark: Table) -> list[dict[str, Any]]:
    return [row for row in (benchmark["rows"] if benchmark else []) if row["trained"] and row["batch_size"] == 1]


def _place(row: dict[str, Any], benchmark: Table) -> str:
    """What a row was measured on."""
    machine = benchmark["machine"] if benchmark else {}
    return f"{counted(row['threads'])} of {machine['cpu']}" if row["device"] == "cpu" else str(machine["gpu"])


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."
