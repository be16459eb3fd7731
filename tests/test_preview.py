"""What one hears and sees of a training while it runs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.test_audio import corpus
from wavedistill.corpus.utterances import Manifest, read_samples
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech.audio import LogMel
from wavedistill.tools.engine import launch, tensorboard
from wavedistill.training.distillation import distillation_task
from wavedistill.training.likelihood import likelihood_task
from wavedistill.training.log import FIGURES, Log, spectrogram
from wavedistill.training.preview import SECONDS, Preview

CPU = torch.device("cpu")


class Kept:
    """In place of a log: what it is given."""

    def __init__(self) -> None:
        self.sounds: dict[str, tuple[Tensor, str]] = {}

    def sound(self, tag: str, wave: Tensor, sample_rate: int, about: str, step: int) -> None:
        self.sounds[tag] = (wave, about)


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_whole_utterances_are_heard_up_to_six_seconds(
    tmp_path: Path, tiny: Recipe, tiny_model: Callable[[str], WaveformModel], kind: str
) -> None:
    """After mel consistency, from the log-mel alone, as the recorded ones are; others of the corpus are not."""
    frames = [40, 30, SECONDS * 80 + 40, 35]
    every = corpus(tmp_path / "audio", tiny, frames).utterances
    split = ["train", "valid", "valid", "valid"]
    utterances = [u.model_copy(update={"split": s}) for u, s in zip(every, split, strict=True)]
    manifest = Manifest(audio=tiny.audio, utterances=utterances)
    model, log = tiny_model(kind), Kept()
    task = (
        likelihood_task(tiny, kind) if kind == "teacher" else distillation_task(tiny, kind, tiny_model("teacher"), CPU)
    )
    preview = Preview(task, manifest, tmp_path / "audio", tiny, model.margin, CPU)
    preview.recorded(log, 0)
    preview.generated(model, log, 0)
    assert sorted(log.sounds) == [f"utterance_{n}/{what}" for n in (1, 2) for what in ("generated", "recorded")]
    for number, length in ((1, 30), (2, SECONDS * 80)):
        recorded, about = log.sounds[f"utterance_{number}/recorded"]
        assert torch.equal(recorded, read_samples(tmp_path / "audio", utterances[number], 0, length * 200))
        assert about.startswith(f"{number}, of the validation split")
        spoken, about = log.sounds[f"utterance_{number}/generated"]
        assert spoken.shape == recorded.shape
        assert f"as the {kind} speaks it" in about
        drawn = task.sample(model, preview.utterances[str(number)])[0]
        mel, *others = (LogMel(tiny.audio).of_file(wave[None])[0] for wave in (recorded, spoken, drawn))
        near, far = ((other - mel).abs().mean() for other in others)
        assert near < 0.6 * far


def test_each_tag_says_what_it_shows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fabric = launch(CPU)
    with tensorboard(tmp_path, 0) as logger:
        log = Log(logger, fabric)
        log.figures("valid", {"kl": 0.25, "own": 1.0}, 3)
        log.sound("utterance_1/recorded", 0.1 * torch.ones(4000), 8000, "A voice.", 3)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert not caplog.messages, "what reads it for the report has nothing to complain of"
    assert [(event.step, event.value) for event in found.Scalars("valid/kl")] == [(3, 0.25)]
    (sound,), (picture,) = found.Audio("utterance_1/recorded"), found.Images("utterance_1/recorded")
    assert (sound.sample_rate, sound.length_frames) == (8000, 4000)
    assert picture.height >= 400
    said = {tag: found.SummaryMetadata(tag).summary_description for tag in ("valid/kl", "valid/own")}
    assert said == {"valid/kl": FIGURES["kl"], "valid/own": ""}
    assert found.SummaryMetadata("utterance_1/recorded").summary_description == "A voice."


def test_every_term_of_the_shipped_objectives_is_explained(tiny: Recipe) -> None:
    student = tiny.training["student"]
    assert set(student.loss.weights) | {"nll", "pitch"} <= set(FIGURES)  # type: ignore[attr-defined]


def test_a_spectrogram_shows_a_tone_at_its_frequency() -> None:
    """Low below, high above; also of digital silence, and of less than a window."""
    time = np.arange(16000, dtype=np.float32) / 16000

    def height(frequency: float) -> float:
        picture = spectrogram(0.5 * np.sin(2 * np.pi * frequency * time), 16000, "")
        bright = picture[60:390, 100:900].astype(float).sum((1, 2))
        return float(bright.argmax())

    low, high = height(1000), height(7000)
    assert low - high == pytest.approx(360 * 6000 / 8000, abs=6)
    assert spectrogram(np.zeros(16000, np.float32), 16000, "").shape == spectrogram(time[:100], 16000, "").shape
