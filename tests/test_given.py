"""Log-mels that are given for recordings: they keep their place and their level, and models learn from them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from tests.conftest import speech_like
from wavedistill.corpus.segments import Batch, Segments
from wavedistill.corpus.utterances import Manifest, read_mel, read_samples
from wavedistill.evaluation.excerpts import Excerpt, excerpts
from wavedistill.evaluation.systems import SourceFilter, consistent, synthesise
from wavedistill.experiment.folder import Experiment
from wavedistill.experiment.stage import run_stage
from wavedistill.models.checkpoint import load_model
from wavedistill.models.kinds import build
from wavedistill.recipe.loading import validate_recipe
from wavedistill.recipe.sections import Audio
from wavedistill.speech.audio import LOG_MEL_FLOOR, LogMel, pad_to_hops, rms_db
from wavedistill.speech.heard import Heard
from wavedistill.stages import stages_of
from wavedistill.tools.errors import CorpusError, RecipeError
from wavedistill.tools.random import random_stream

RATE = 16000
Prepare = Callable[..., Experiment]


@pytest.fixture
def voice(tmp_path: Path) -> Path:
    """Four recordings of several levels with silence around their words, whose positions are no whole hops."""
    folder = tmp_path / "voice"
    (folder / "deeper").mkdir(parents=True)
    for i in range(4):
        words = [speech_like(RATE + 777 * i, 7 * i + word) for word in range(2)]
        silence = torch.zeros(4000 + 333 * i)
        parts = [silence, words[0] - words[0].mean(), silence, words[1] - words[1].mean(), silence]
        place = folder / ("deeper" if i == 3 else "") / f"{i}.wav"
        soundfile.write(place, (torch.cat(parts) * (0.5 - 0.05 * i)).numpy(), RATE, subtype="FLOAT")
    return folder


def write_mels(voice: Path, folder: Path, settings: Audio, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """The log-mels of the recordings, changed, as an acoustic model would leave them beside."""
    for path in voice.rglob("*.wav"):
        samples, _ = soundfile.read(path, dtype="float32")
        own = LogMel(settings).of_file(pad_to_hops(torch.from_numpy(samples), settings.hop_length)[None])[0]
        target = folder / path.relative_to(voice).with_suffix(".npy")
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, change(own.numpy()))
    return folder


@pytest.fixture
def prepare(tmp_path: Path, tiny_data: dict[str, Any], voice: Path) -> Prepare:
    """Prepare the recordings with log-mels in a folder, with settings of `audio` and `prepare` changed."""

    def run(name: str, mels: Path | None, hop: int = 200, **changes: Any) -> Experiment:
        data = tiny_data | {
            "corpus": {"kind": "folder", "path": str(voice), "mels": str(mels) if mels else None},
            "audio": tiny_data["audio"] | units(hop),
            "prepare": tiny_data["prepare"] | changes,
            "conditioning": tiny_data["conditioning"] | {"upsample": (hop // 50, 50) if hop % 50 == 0 else (4, 64)},
        }
        experiment = Experiment(validate_recipe(data, "mine.toml"), tmp_path / name, torch.device("cpu"))
        run_stage(stages_of(experiment.recipe)["prepare"], experiment)
        return experiment

    return run


def units(hop: int) -> dict[str, int]:
    return {"hop_length": hop, "n_fft": 4 * hop, "n_mels": 40}


@pytest.fixture
def mels(voice: Path, tmp_path: Path) -> Path:
    return write_mels(voice, tmp_path / "mels", Audio(**units(200)), lambda mel: mel)


def drawn(experiment: Experiment, count: int = 30) -> Batch:
    segments = Segments(Manifest.read(experiment.manifest), experiment.audio, "train", frames=20, margin=6)
    return segments.draw([random_stream(0, item) for item in range(count)])


def alike(given: torch.Tensor, own: torch.Tensor) -> bool:
    """But for what 16 bits, and the floor, make of what is nearly silent."""
    return bool((given - own).abs()[torch.maximum(given, own) > -9].max() < 5e-3)


def test_given_log_mels_that_are_the_recordings_own_give_the_batches_of_before(
    voice: Path, tmp_path: Path, prepare: Prepare
) -> None:
    """Trimmed and levelled, at a hop at whose multiples trimming cuts anyway; in every kind of storage."""
    mels = write_mels(voice, tmp_path / "mels", Audio(**units(256)), lambda mel: mel)
    plain = drawn(experiment := prepare("plain", None, 256))
    manifest = Manifest.read(experiment.manifest)
    assert '"mel"' not in experiment.manifest.read_text()
    assert min(np.log(u.gain) for u in manifest.utterances) > 0.4, "so that a level left as it was is seen"
    for storage in ("wav", "flac", "shards"):
        batch = drawn(prepare(storage, mels, 256, storage=storage))
        assert torch.equal(batch.audio, plain.audio)
        assert torch.equal(batch.with_margins, plain.with_margins)
        assert batch.conditioning.f0 is not None
        assert plain.conditioning.f0 is not None
        assert torch.equal(batch.conditioning.f0, plain.conditioning.f0)
        assert alike(batch.conditioning.mel, plain.conditioning.mel)


def test_frames_stay_those_of_their_samples_in_every_piece(mels: Path, prepare: Prepare) -> None:
    """Of long recordings too, at a hop that neither trimming nor cutting heeds by itself."""
    experiment = prepare("cut", mels, max_seconds=2)
    utterances = Manifest.read(experiment.manifest).utterances
    assert len(utterances) == 8
    for utterance in utterances:
        assert utterance.mel is not None
        own = LogMel(experiment.recipe.audio).of_file(read_samples(experiment.audio, utterance)[None])[0]
        given = read_mel(experiment.audio, utterance, LogMel(experiment.recipe.audio))
        assert alike(given, own)


@pytest.mark.parametrize("frames", [-2, 2])
def test_a_log_mel_may_be_two_frames_longer_or_shorter(
    voice: Path, tmp_path: Path, prepare: Prepare, frames: int
) -> None:
    """No sample is kept that has no frame, and a file may be (frames, bands), of another kind, in half precision."""

    def change(mel: np.ndarray) -> np.ndarray:
        padded = np.pad(mel, ((0, 0), (0, 2)), mode="edge")
        return padded[:, : mel.shape[1] + frames].T.astype(np.float16)

    folder = write_mels(voice, tmp_path / "mels", Audio(**units(200)), change)
    torch.save(torch.from_numpy(np.load(folder / "0.npy")), folder / "0.pt")
    (folder / "0.npy").unlink()
    experiment = prepare("padded", folder, trim_db=200)
    for utterance in Manifest.read(experiment.manifest).utterances:
        recorded = soundfile.info(voice / utterance.source).frames
        assert utterance.frames == -(-recorded // 200) + min(frames, 0)
        read_mel(experiment.audio, utterance, LogMel(experiment.recipe.audio))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"deeper/3\.wav: has no log-mel: .*mels/deeper/3\.npy is not there"),
        (
            lambda mel: mel[:30],
            r"deeper/3\.npy: has shape \(30, \d+\), and audio\.n_mels = 40: expected \(40, frames\)",
        ),
        (lambda mel: mel[:, ::2], r"deeper/3\.npy: has \d+ frames, and its recording is \d+\.\d long, .* = 200"),
        (lambda mel: mel[:, 4:], r"deeper/3\.npy: has \d+ frames, and its recording"),
        (lambda mel: mel / np.log(10), r"deeper/3\.npy: looks like log10 of amplitudes; expected the natural log"),
        (lambda mel: (mel - mel.mean(1)[:, None]) / mel.std(1)[:, None], r"deeper/3\.npy: looks like a log-mel normal"),
        (lambda mel: mel + 1.2, r"deeper/3\.npy: is 10 dB louder than its recording"),
        (lambda mel: mel * np.nan, r"deeper/3\.npy: holds values that are not finite"),
    ],
)
def test_a_log_mel_that_does_not_fit_is_named(
    mels: Path, prepare: Prepare, change: Callable[[np.ndarray], np.ndarray] | None, message: str
) -> None:
    path = mels / "deeper" / "3.npy"
    mel = np.load(path)
    path.unlink() if change is None else np.save(path, change(mel))
    with pytest.raises(CorpusError, match=message):
        prepare("bad", mels)
    np.save(path, mel)
    prepare("bad", mels)


def test_a_folder_that_is_not_there_and_what_cannot_be_played_faster_are_refused(
    mels: Path, prepare: Prepare, tiny_data: dict[str, Any]
) -> None:
    with pytest.raises(CorpusError, match=re.escape("elsewhere': no such folder; give that of the recordings'")):
        prepare("none", mels.with_name("elsewhere"))
    part = {"speeds": (1, 1.2), "corpus": {"kind": "folder", "path": "a", "mels": "b"}}
    with pytest.raises(RecipeError, match="speeds must be \\[1\\]"):
        validate_recipe(tiny_data | {"corpus": {"kind": "several", "parts": (part,)}}, "mine.toml")


def test_systems_speak_from_the_log_mels_that_are_given(voice: Path, tmp_path: Path, prepare: Prepare) -> None:
    """Which are half as loud here, and so is what all of them make; what they are compared with stays as it is."""
    softer = write_mels(voice, tmp_path / "softer", Audio(**units(200)), lambda mel: mel - np.log(2))
    experiment = prepare("softer", softer)
    recipe, utterances = experiment.recipe, Manifest.read(experiment.manifest).of("test")[:1]
    (given,) = excerpts(experiment.audio, utterances, recipe.audio, 60)
    own = Excerpt.of(given.audio, recipe.audio)
    assert given.mel.shape == own.mel.shape == (40, 60)
    assert alike(given.mel[:, :-3], (own.mel - np.log(2)).clamp_min(LOG_MEL_FLOOR)[:, :-3])
    models = {"student": build(recipe, "student", 0)}
    drawn = [
        synthesise(recipe, models, SourceFilter(recipe, models, [each]), [each], torch.device("cpu"))
        for each in (given, own)
    ]
    soft, loud = drawn
    assert torch.equal(soft.pop("recorded")[0], given.audio)
    assert set(soft) == {"student", "griffin_lim", "source_filter", "whisper"}
    for system, (wave,) in soft.items():
        assert 4 < rms_db(loud[system][0]) - rms_db(wave) < 8, system
    assert 4 < rms_db(given.audio) - rms_db(consistent(recipe, [given.audio], [given])[0]) < 8


@pytest.mark.usefixtures("blank_pictures")
def test_models_learn_from_the_log_mels_that_are_given(voice: Path, tmp_path: Path, prepare: Prepare) -> None:
    """Whoever uses the model is told that it heard these; new ones are prepared anew."""
    quieter = write_mels(voice, tmp_path / "quieter", Audio(**units(200)), lambda mel: mel - 0.5)
    experiment = prepare("trained", quieter)
    stages = stages_of(experiment.recipe)
    assert run_stage(stages["prepare"], experiment) == "prepare: up to date"
    data = experiment.recipe.model_dump(mode="json")
    for training in data["training"].values():
        training.update(steps=2, validate_every=2, validate_batches=1, warmup_steps=1)
    trained = Experiment(validate_recipe(data, "mine.toml"), experiment.root, experiment.device)
    for training in data["training"]:
        run_stage(stages_of(trained.recipe)[training], trained)
    heard = torch.tensor(load_model(trained.checkpoint("student")).heard.mel_mean)
    own = drawn(prepare("own", None), 100).conditioning
    assert own.f0 is not None
    torch.testing.assert_close(heard, torch.tensor(Heard.of(own.mel, own.f0).mel_mean) - 0.5, atol=0.2, rtol=0)
    np.save(quieter / "0.npy", np.load(quieter / "0.npy") + 0.1)
    assert "utterances" in run_stage(stages["prepare"], experiment)
