"""Waveforms from a checkpoint: at the level of the recording they are made from."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.conftest import HEARD, speech_like
from wavedistill.cli import main
from wavedistill.models.checkpoint import save_model
from wavedistill.models.kinds import build
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech.audio import LogMel


@pytest.fixture
def student(tmp_path: Path, tiny: Recipe) -> Path:
    """The file of an untrained student: noise of the level and the envelope of what it is given."""
    path = tmp_path / "checkpoint.safetensors"
    save_model(path, "student", tiny, 1, HEARD, build(tiny, "student", 0).state_dict())
    return path


def drawn(student: Path, *words: str | Path) -> dict[str, np.ndarray]:
    out = student.parent / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["wavedistill", "generate", *map(str, [student, *words]), "--out", str(out)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code
    return {path.stem: soundfile.read(path)[0] for path in out.iterdir()}


def rms(wave: np.ndarray) -> float:
    return float(np.sqrt(np.square(wave).mean()))


def test_a_waveform_is_as_loud_as_the_recording_it_is_made_from(student: Path, tmp_path: Path) -> None:
    """The model works at the level of the training; its gain is undone."""
    for name, gain in (("loud", 4.0), ("soft", 0.1)):
        soundfile.write(tmp_path / f"{name}.wav", gain * speech_like(16000).numpy(), 16000, subtype="FLOAT")
    found = drawn(student, tmp_path / "loud.wav", tmp_path / "soft.wav")
    for name, gain in (("loud", 4.0), ("soft", 0.1)):
        assert rms(found[name]) == pytest.approx(gain * rms(speech_like(16000).numpy()), rel=0.3)


def test_a_log_mel_is_drawn_at_its_own_level(student: Path, tmp_path: Path, tiny: Recipe) -> None:
    sound = 0.5 * speech_like(16000)
    np.save(tmp_path / "mel.npy", LogMel(tiny.audio).of_file(sound[None])[0].numpy())
    assert rms(drawn(student, tmp_path / "mel.npy")["mel"]) == pytest.approx(rms(sound.numpy()), rel=0.3)
