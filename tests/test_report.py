"""What the report says: only what belongs to the models and settings of its recipe, in words that fit the figures."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from matplotlib.figure import Figure

from tests.test_benchmark import row
from wavedistill.evaluation.verdict import against_untrained, gates
from wavedistill.experiment.folder import AS_DRAWN, Experiment, measured_on
from wavedistill.recipe.recipe import Recipe
from wavedistill.recipe.sections import Audio, Gates
from wavedistill.reporting import words
from wavedistill.reporting.page import _ways, nearest
from wavedistill.reporting.plots import SERIES, svg, ways_plot
from wavedistill.reporting.spectrogram import HEIGHT, RANGE_DB, picture, spectrogram_db, ticks
from wavedistill.speech import audio
from wavedistill.stages.report import _clip, _current

RECORDED = {
    **dict.fromkeys(words.SCORES, 0.0),
    **{"pesq_wb": 4.64, "stoi": 1.0, "vuv_f1": 1.0, "periodicity": 0.9, "teacher_log_likelihood": 5.6},
}
STUDENT = {**RECORDED, "pesq_wb": 3.3, "stoi": 0.98, "mcd_db": 0.9, "teacher_log_likelihood": 5.4}
GRIFFIN_LIM = {**STUDENT, "pesq_wb": 2.6, "stoi": 0.99, "mcd_db": 1.2}


def scored(recipe: Recipe, **student: float | None) -> dict[str, Any]:
    """What `evaluate` finds of a teacher and a student whose scores are these."""
    synthesis = {"recorded": RECORDED, "student": {**STUDENT, **student}, "griffin_lim": GRIFFIN_LIM}
    compared = against_untrained(synthesis, "student")
    judged = gates([synthesis["student"]], [RECORDED], compared, Gates())
    return {
        "recipe": recipe.model_dump(mode="json"),
        "synthesis": synthesis,
        "as_drawn": {**synthesis, "student": {**STUDENT, "pesq_wb": 2.1}},
        "against_untrained": {"student": compared},
        "gates": {"student": judged},
        "density": {
            "models": {
                "teacher": {"nll": -5.6, "nll_shuffled_conditioning": -5.2, "bits_per_sample_given_log_mel": 6.9},
                "student": {"kl": 0.1, "kl_before_training": 0.3, "kl_standard_error": 0.01, "kl_from": "teacher"},
            },
            "level_gaussian_nll": -1.2,
            "test_seconds": 27.0,
        },
        "pitch_from_mel": {"teacher": {"f0_rmse_cents": 57.0, "vuv_f1": 0.95}},
        "about": {
            "also": {},
            "clips": 2,
            "seconds_a_clip": 1.0,
            "temperature": 1,
            "seed": 1,
            "source_filter": {"share": 0.95, "chosen_by": "pesq_wb", "f0": "predicted"},
            "teacher_log_likelihood": "teacher",
            "implementations": {"pystoi": "pystoi 0.4.1"},
            "machine": {"cpu": "a CPU", "torch": "2", "date": "2026-01-01"},
        },
    }


def timed(*rows: dict[str, Any]) -> dict[str, Any]:
    """A table of the benchmark."""
    more = {
        "seconds_median": 0.1,
        "seconds_quartiles": [0.1, 0.1, 0.1],
        "first_samples_seconds": 0.04,
        "setup_seconds": 1.0,
        "share_of_ceiling": 0.2,
        "ceiling_flops_per_second": 1e11,
        "peak_memory_bytes": None,
    }
    machine = {"cpu": "a CPU", "cpu_count": 2, "gpu": None, "system": "Linux", "python": "3", "torch": "2", "date": "d"}
    return {"machine": machine, "rows": [{**more, **each} for each in rows], "summary": ["A line."]}


@pytest.fixture
def experiment(tmp_path: Path, tiny: Recipe) -> Experiment:
    found = Experiment(tiny, tmp_path, torch.device("cpu"))
    for path in (found.manifest, *found.checkpoints):
        path.parent.mkdir(exist_ok=True)
        path.write_text(path.name)
    return found


def changed(experiment: Experiment, **settings: Any) -> Experiment:
    return Experiment(experiment.recipe.model_copy(update=settings), experiment.root, experiment.device)


def test_a_table_is_of_the_very_models_settings_and_version(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = experiment.benchmark_of("full")
    assert _current(experiment, path) is None
    of = measured_on(experiment)
    path.write_text(json.dumps({"rows": [{"of": of}, {"of": of}]}))
    assert _current(experiment, path) is not None
    assert _current(changed(experiment, name="other"), path) is not None
    assert _current(changed(experiment, seed=7), path) is None
    experiment.checkpoint("student").write_text("trained again")
    assert _current(experiment, path) is None
    of = measured_on(experiment)
    path.write_text(json.dumps({"rows": [{"of": of}, {"of": "another student's"}]}))
    assert _current(experiment, path) is None, "every row"
    path.write_text(json.dumps({"rows": [{"of": of}]}))
    monkeypatch.setattr("wavedistill.experiment.folder.__version__", "99")
    assert _current(experiment, path) is None


@pytest.mark.parametrize(
    ("student", "speeds", "said"),
    [
        (
            {},
            [224000],
            "The student speaks 14 times as fast as real time, and is closer to the recordings than any",
        ),
        ({}, [32000, 20000], "The student speaks 2 times as fast as real time, and"),
        ({}, [8000], "The student takes 2 times as long as its speech lasts, and"),
        ({}, [], "The student is closer to the recordings than any method without training in 2 of 3 scores."),
        ({"stoi": 0.995}, [], "without training in every score."),
        ({"pesq_wb": None}, [], "without training in 1 of 2 scores."),
        ({"pesq_wb": 1.0, "stoi": 0.5, "mcd_db": 9.0}, [], "It is no closer to the recordings than methods without"),
        ({"vuv_f1": 0.1}, [224000], "The student is not to be called good: it fails 1 of 7 quality checks. It speaks"),
    ],
)
def test_the_answer_says_how_fast_and_how_good(
    tiny: Recipe, student: dict[str, float | None], speeds: list[float], said: str
) -> None:
    """Of the fastest way to draw one sound; what fails is said first."""
    rows = [row("parallel", speed) for speed in speeds]
    table = timed(*rows, row("compiled", 9e6), row("streamed", 9e6, batch_size=16)) if rows else None
    assert said in words.answer(scored(tiny, **student), table, "student")


def test_tiles_hold_what_was_measured(tiny: Recipe) -> None:
    table = timed(row("parallel", 160000), row("streamed", 32000, first_samples_seconds=0.01), row("compiled", 80000))
    tiles = words.tiles(scored(tiny), table, "student")
    assert [tile.value for tile in tiles] == ["10 \N{MULTIPLICATION SIGN}", "10 ms", "3.30", "0.100"]
    assert "2 times the teacher at its fastest" in tiles[0].meaning
    assert "the best without training, 2.60" in tiles[2].meaning
    assert [tile.label for tile in words.tiles(scored(tiny, pesq_wb=None), None, "student")] == [
        "nats from the teacher"
    ]


def test_checks_say_what_was_measured_and_what_is_allowed(tiny: Recipe) -> None:
    checks = words.checks(scored(tiny, level_difference_db=-4.0, periodicity=None), "student")
    said = {check["title"]: check for check in checks}
    assert len(said) == len(Gates.model_fields) == len(checks)
    assert (said["As loud"]["words"], said["As loud"]["passed"]) == ("off by 4.0 dB; 3 dB allowed", False)
    assert said["A voice, not a whisper"]["words"].startswith("not measurable; ")
    assert not said["A voice, not a whisper"]["passed"]


def test_what_looks_alike_is_equally_near(tiny: Recipe) -> None:
    """Log-likelihoods too are best where they are those of the recordings; what all share is nobody's."""
    close = scored(tiny, stoi=0.9899, teacher_log_likelihood=6.0)["synthesis"]
    found = nearest(close)
    assert found["pesq_wb"] == {"student"}
    assert found["stoi"] == set(), "shared by all"
    assert found["teacher_log_likelihood"] == {"griffin_lim"}
    three = {**close, "whisper": {**close["griffin_lim"], "stoi": 0.5}}
    assert nearest(three)["stoi"] == {"student", "griffin_lim"}


def test_a_tone_lies_where_the_axis_says(tiny: Recipe) -> None:
    """And a picture's brightest pixels are those at its top level."""
    for settings in (tiny.audio, Audio(sample_rate=44100, f_min=50, f_max=20000)):
        marked = {label: at for label, at in ticks(settings)}
        assert list(marked) == sorted(marked, key=marked.__getitem__)
        for label, frequency in (("1 kHz", 1000), ("4 kHz", 4000)):
            time = np.arange(settings.sample_rate // 2) / settings.sample_rate
            decibels = spectrogram_db(np.sin(2 * np.pi * frequency * time).astype(np.float32), settings)
            assert decibels.shape[0] == HEIGHT
            assert abs(decibels.mean(1).argmax() / HEIGHT - marked[label]) < 0.02
    pictures = {picture(decibels, float(decibels.max()) + above) for above in (0, 10)}
    assert len(pictures) == 2
    assert len(picture(decibels, float(decibels.max()) + 2 * RANGE_DB)) < min(map(len, pictures)), "nothing but black"


def test_plots_wear_the_colours_of_the_page() -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], color=SERIES[0])
    axes.set(xlabel="step")
    drawn = svg(figure)
    assert drawn.startswith("<svg")
    assert ">step<" in drawn, "text is text"
    assert "var(--series-1)" in drawn
    assert "currentColor" in drawn
    assert not [word for word in ("#000000", SERIES[0], "http") if word in drawn]
    assert drawn == svg(figure)


def test_several_models_are_drawn_at_their_speed_and_likelihood_and_a_pair_is_not(tiny: Recipe) -> None:
    found = scored(tiny)
    for part, score in (("synthesis", 3.0), ("as_drawn", 2.0)):
        found[part] |= {name: {**STUDENT, "pesq_wb": score} for name in ("teacher", "glow")}
    found["density"]["models"]["glow"] = {"nll": -5.5}
    pair = [row("naive", 100), row("compiled", 80_000), row("parallel", 160_000)]
    drawn = [
        *pair,
        {**row("parallel", 90_000), "model": "glow"},
        {**row("parallel", 120_000, threads=2), "model": "glow"},
    ]
    left, right = ways_plot(found, drawn).axes
    points = {line.get_label(): line.get_xydata().tolist() for line in left.get_lines()}
    assert points["teacher"] == [[80_000, 3.0]], "by its fastest sampler"
    assert points["glow"] == [[90_000, 3.0]], "on the fewest threads"
    tell = [line.get_xydata().tolist() for line in right.get_lines()]
    assert tell == [[[-5.6, 2.0], [-5.6, 3.0]], [[-5.6, 3.0]], [[-5.5, 2.0], [-5.5, 3.0]], [[-5.5, 3.0]]]
    assert _ways(found, timed(*drawn)) is not None
    assert _ways(found, timed(*pair)) is None
    assert _ways(found, None) is None
    found["synthesis"]["recorded"] = {**RECORDED, "pesq_wb": None}
    assert _ways(found, timed(*drawn)) is None


def test_a_clip_is_heard_first_and_as_drawn_where_that_was_kept(experiment: Experiment) -> None:
    """Without loss; an experiment of before has no sound as drawn."""
    heard, drawn, old = (0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(n)) for n in range(3))
    waves = {"recorded": heard, "student": heard, f"{AS_DRAWN}/student": drawn, "whisper": old}
    for folder, wave in waves.items():
        (experiment.samples / folder).mkdir(parents=True, exist_ok=True)
        audio.write(experiment.samples / folder / "a.wav", wave, 16000)
    clip = _clip(experiment, ["recorded", "student", "whisper"], "a.wav", "a recording")
    assert clip.seconds == 0.5
    assert {name: len(versions) for name, versions in clip.systems.items()} == {
        "recorded": 1,
        "student": 2,
        "whisper": 1,
    }
    for version, wave in zip(clip.systems["student"], (heard, drawn), strict=True):
        samples, rate = soundfile.read(io.BytesIO(version.sound), dtype="int16")
        assert rate == 16000
        np.testing.assert_array_equal(samples, audio.to_pcm16(wave))
    assert (
        clip.systems["student"][0].picture == clip.systems["recorded"][0].picture != clip.systems["student"][1].picture
    )
