"""What needs no training and what others made: pulses and noise, clips from folders, and gates that hear a buzz."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import torchaudio
import typer
from torch import Tensor

from tests.conftest import HEARD, REPOSITORY, changed
from tests.test_audio import corpus
from tests.test_metrics import RATE, buzz, hiss
from wavedistill.cli.arguments import also_of
from wavedistill.corpus.utterances import Manifest
from wavedistill.evaluation import metrics, others
from wavedistill.evaluation.excerpts import Excerpt
from wavedistill.evaluation.systems import SHARES, SourceFilter, consistent
from wavedistill.evaluation.verdict import Scores, gates
from wavedistill.experiment.folder import AS_DRAWN, Experiment
from wavedistill.models.checkpoint import save_model
from wavedistill.models.kinds import build
from wavedistill.recipe.recipe import Recipe
from wavedistill.recipe.sections import Gates
from wavedistill.speech.audio import level_gain, pad_to_hops, rms_db
from wavedistill.stages import evaluate
from wavedistill.tools.errors import AudioError, UserError
from wavedistill.tools.files import fingerprint

LJSPEECH = REPOSITORY.parent / "shared" / "data" / "LJSpeech-1.1" / "wavs"


@pytest.fixture
def without_f0(tiny: Recipe) -> Recipe:
    """A recipe no model of which reads F0 in the log-mel."""
    recipe = changed(tiny, "models.student", periodic_source=False)
    return changed(recipe, "conditioning", pitch=False)


def baseline(recipe: Recipe, clips: Sequence[Tensor]) -> SourceFilter:
    return SourceFilter(recipe, {"student": build(recipe, "student", 0)}, told(clips, recipe))


def told(clips: Sequence[Tensor], recipe: Recipe) -> list[Excerpt]:
    return [Excerpt.of(clip, recipe.audio) for clip in clips]


def test_pulses_and_noise_have_the_f0_and_the_level_of_the_recording(without_f0: Recipe) -> None:
    """Tracked in it, where no model predicts it; and noise alone has none."""
    voice = buzz(1.5, 130) + 0.02 * hiss(1.5)
    made = baseline(without_f0, [voice])
    assert made.about["f0"] == "tracked in the recording"
    scorer = metrics.Scorer(voice, without_f0.audio)
    for share, voiced in ((0.9, True), (0.0, False)):
        (drawn,) = made(told([voice], without_f0), share)
        assert abs(rms_db(drawn) - rms_db(voice)) < 3
        scores = scorer(drawn)
        if voiced:
            (after,) = consistent(without_f0, [drawn], told([voice], without_f0))
            assert abs(rms_db(after) - rms_db(voice)) < 1
            assert scores["f0_rmse_cents"] is not None
            assert scores["f0_rmse_cents"] < 20
            assert scores["vuv_f1"] > 0.95
        else:
            assert scores["vuv_f1"] < 0.5


def test_f0_is_that_which_the_parallel_model_reads_in_the_log_mel(tiny: Recipe) -> None:
    models = {name: build(tiny, name, 0) for name in ("teacher", "student")}
    for name, hertz in (("teacher", 100.0), ("student", 180.0)):
        pitch = models[name].pitch
        assert pitch is not None
        pitch.forward = lambda mel, hertz=hertz: torch.full((len(mel), mel.shape[-1] - 8), hertz)
    voice = buzz(1.0, 130)
    made = SourceFilter(tiny, models, told([voice], tiny))
    assert made.about["f0"] == "predicted from the log-mel"
    scores = metrics.Scorer(buzz(1.0, 180), tiny.audio)(made(told([voice], tiny), 0.95)[0])
    assert scores["f0_rmse_cents"] is not None
    assert scores["f0_rmse_cents"] < 20


@pytest.mark.parametrize(
    ("found", "share", "name"),
    [
        ({"pesq_wb": (1, 2, 3, 4, 2), "stoi": (5, 1, 1, 1, 1)}, 0.9, "pesq_wb"),
        ({"stoi": (0.1, 0.9, 0.2, 0.3, 0.4), "mcd_db": (1, 2, 3, 4, 5)}, 0.65, "stoi"),
        ({"mcd_db": (3, 2, 1, 2, 3)}, 0.8, "mcd_db"),
    ],
)
def test_the_share_of_pulses_is_the_one_that_scores_best(
    without_f0: Recipe, found: dict[str, tuple[float, ...]], share: float, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the first score that can be measured; less of the distortion is better."""
    each = iter(range(len(SHARES)))

    def likeness(*_: Any) -> Scores:
        i = next(each)
        return {score: found[score][i] if score in found else None for score in ("pesq_wb", "stoi", "mcd_db")}

    monkeypatch.setattr(metrics, "likeness", likeness)
    about = baseline(without_f0, [buzz(0.5)]).about
    assert (about["share"], about["chosen_by"]) == (share, name)


def human(count: int, recipe: Recipe) -> list[Tensor]:
    """Clips of a human reader, two to five seconds in."""
    paths = sorted(LJSPEECH.glob("*.wav"))[:count]
    if not paths:
        pytest.skip("LJSpeech clips beside the repository are not there")
    clips = []
    for path in paths:
        samples, rate = soundfile.read(path, dtype="float32")
        clip = torchaudio.functional.resample(torch.from_numpy(samples), rate, RATE)[: 3 * RATE]
        clips.append(pad_to_hops(clip * level_gain(clip, recipe.audio.level_db), recipe.audio.hop_length))
    return clips


def test_gates_hear_a_buzz_and_a_whisper_and_let_a_voice_pass(without_f0: Recipe) -> None:
    """On a human voice and its own log-mels: all pulses, no pulses, and a share between them."""
    recipe = changed(without_f0, "audio", n_fft=1024, n_mels=80)
    clips = human(2, recipe)
    made = baseline(recipe, clips[:1])
    scorers = [metrics.Scorer(clip, recipe.audio) for clip in clips]
    recorded = [scorer(clip) for scorer, clip in zip(scorers, clips, strict=True)]
    failed = {}
    for share in (0.95, 0.8, 0.0):
        waves = consistent(recipe, made(told(clips, recipe), share), told(clips, recipe))
        scores = [scorer(wave) for scorer, wave in zip(scorers, waves, strict=True)]
        found = gates(scores, recorded, {}, Gates(better_scores=0))
        failed[share] = {name for name, gate in found.items() if not gate["passed"]}
    assert "aperiodicity_bias_db" in failed[0.95], "a buzz"
    assert "aperiodicity_bias_db" in failed[0.0], "a whisper"
    assert not failed[0.8]


def test_a_recording_and_a_draw_without_passes_stay_as_they_are(tiny: Recipe) -> None:
    voice, drawn = buzz(0.5), hiss(0.5)
    given = told([voice], tiny)
    (kept,) = consistent(tiny, [voice], given)
    torch.testing.assert_close(kept, voice, rtol=0, atol=1e-5)
    (same,) = consistent(changed(tiny, "consistency", passes=0), [drawn], given)
    assert torch.equal(same, drawn)
    (other,) = consistent(tiny, [drawn], given)
    assert not torch.equal(other, drawn)


@pytest.fixture
def experiment(tiny: Recipe, tmp_path: Path) -> Experiment:
    """Untrained models, with clips of half a second to be heard."""
    found = Experiment(changed(tiny, "evaluate", clips=1, kl_draws=1), tmp_path / "exp", torch.device("cpu"), 1)
    manifest = corpus(found.audio, tiny, [60, 60, 60])
    parts = ("train", "valid", "test")
    made = [u.model_copy(update={"split": s}) for u, s in zip(manifest.utterances, parts, strict=True)]
    found.manifest.write_text(Manifest(audio=tiny.audio, utterances=made).model_dump_json())
    for name in tiny.training:
        model = build(tiny, name, 0)
        save_model(found.checkpoint(name), name, tiny, 1, HEARD, model.state_dict())
    return found


def test_scores_as_drawn_are_those_that_are_heard_without_passes(experiment: Experiment) -> None:
    """And with passes they are others, but for the recording; another system's copy is scored beside."""
    evaluate.run(experiment, {})
    scored = json.loads(experiment.metrics.read_text())
    assert scored["about"]["source_filter"]["share"] in SHARES
    assert scored["about"]["teacher_log_likelihood"] == "teacher"
    assert set(scored["as_drawn"]) == set(scored["synthesis"])
    same = {name for name, values in scored["synthesis"].items() if values == scored["as_drawn"][name]}
    assert same == {"recorded"}
    heard, drawn = (folder / "student" / "2.wav" for folder in (experiment.samples, experiment.samples / AS_DRAWN))
    assert heard.read_bytes() != drawn.read_bytes()
    assert not (experiment.samples / AS_DRAWN / "recorded").exists(), "which no pass moves"
    as_drawn = drawn.read_bytes()
    copies = experiment.samples.rename(experiment.root / "copies") / "recorded"
    recipe = changed(experiment.recipe, "consistency", passes=0)
    evaluate.run(Experiment(recipe, experiment.root, experiment.device, 1), {"copy": copies})
    unmoved = json.loads(experiment.metrics.read_text())
    assert unmoved["as_drawn"] == unmoved["synthesis"]
    assert not (experiment.samples / AS_DRAWN).exists()
    assert (experiment.samples / "student" / "2.wav").read_bytes() == as_drawn
    assert unmoved["synthesis"]["student"] == scored["as_drawn"]["student"]
    assert unmoved["synthesis"]["copy"]["lsd_db"] < 1 < unmoved["synthesis"]["student"]["lsd_db"]
    assert (experiment.samples / "copy" / "2.wav").is_file()
    assert set(unmoved["gates"]) == {"student"}


def test_a_result_is_of_the_very_clips_of_another_system(experiment: Experiment, tmp_path: Path) -> None:
    (tmp_path / "2.wav").write_bytes(b"one")

    def now(**also: Path) -> str:
        stage = evaluate.stage(["teacher", "student"], also)
        return fingerprint(stage.settings(experiment), stage.inputs(experiment))

    alone, first, renamed = now(), now(vocos=tmp_path), now(other=tmp_path)
    (tmp_path / "2.wav").write_bytes(b"two")
    assert len({alone, first, renamed, now(vocos=tmp_path)}) == 4
    with pytest.raises(UserError, match=r"nowhere/2\.wav: no such file"):
        now(vocos=tmp_path / "nowhere")


def test_clips_of_another_system_are_taken_as_they_are(
    tiny: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Filled up or cut by some hops, brought to the recipe's rate with a word, and refused where they are others."""
    clip, path = buzz(0.5), tmp_path / "a.wav"
    soundfile.write(path, 0.5 * clip[:-300].numpy(), RATE, subtype="FLOAT")
    (wave,) = others.read([path], [clip], tiny.audio)
    assert len(wave) == len(clip)
    assert not wave[-300:].any()
    torch.testing.assert_close(wave[:-300], 0.5 * clip[:-300], rtol=0, atol=1e-3)
    assert "Hz" not in capsys.readouterr().err
    soundfile.write(path, torchaudio.functional.resample(clip, RATE, 22050).numpy(), 22050)
    (wave,) = others.read([path], [clip], tiny.audio)
    assert metrics.log_spectral_distance_db(wave, clip) < 3
    assert f"{tmp_path}: brought from 22050 Hz to 16000" in capsys.readouterr().err
    soundfile.write(path, clip[:-1000].numpy(), RATE)
    with pytest.raises(AudioError, match=r"a\.wav: has 7000 samples at 16000 Hz, and the clip 8000"):
        others.read([path], [clip], tiny.audio)
    path.write_bytes(b"words")
    with pytest.raises(AudioError, match=r"a\.wav: not readable as audio"):
        others.read([path], [clip], tiny.audio)
    with pytest.raises(UserError, match=r"b\.wav: no such file; .*lacks 1 of 2"):
        others.files(tmp_path, ["a", "b"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vocos"], "give NAME=FOLDER"),
        (["=x"], "give NAME=FOLDER"),
        (["a/b=x"], "give NAME=FOLDER"),
        (["student={folder}"], "there is a student already"),
        (["whisper={folder}"], "there is a whisper already"),
        (["recorded={folder}"], "there is a recorded already"),
        (["a={folder}", "a={folder}"], "there is a a already"),
        (["a={folder}/nowhere"], "nowhere is no folder"),
    ],
)
def test_names_and_folders_of_other_systems_are_checked_at_once(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        also_of([word.format(folder=tmp_path) for word in words], ["teacher", "student"])
    assert also_of([f"vocos={tmp_path}"], ["student"]) == {"vocos": tmp_path}
