"""The front door: a trained model in a few names."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import wavedistill
from tests.conftest import HEARD, REPOSITORY, speech_like
from wavedistill.flows.transforms import SequentialDirectionError
from wavedistill.models.checkpoint import save_model
from wavedistill.models.kinds import build
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech.audio import LogMel


@pytest.fixture
def voices(tmp_path: Path, tiny: Recipe) -> dict[str, wavedistill.Vocoder]:
    found = {}
    for name in tiny.models:
        path = tmp_path / f"{name}.safetensors"
        save_model(path, name, tiny, 1, HEARD, build(tiny, name, 0).state_dict())
        found[name] = wavedistill.load(str(path) if name == "teacher" else path)
    return found


def test_a_recording_and_its_log_mel_are_vocoded(voices: dict[str, wavedistill.Vocoder], tmp_path: Path) -> None:
    wave, voice = speech_like(4100), voices["student"]
    mel = voice.log_mel(wave)
    assert mel.shape == (40, 21)
    whole = torch.nn.functional.pad(wave, (0, 100))
    assert torch.equal(mel, LogMel(voice.recipe.audio).of_file(whole[None])[0])
    drawn = voice.vocode(mel, seed=3)
    assert drawn.shape == (4200,)
    sampled = voice.sample(mel, seed=3)
    torch.testing.assert_close(drawn, voice.consistency(sampled[None], mel[None])[0], rtol=0, atol=1e-5)
    assert (voice.log_mel(drawn) - mel).abs().mean() < 0.5 * (voice.log_mel(sampled) - mel).abs().mean()
    assert not torch.equal(sampled, voice.sample(mel, seed=4))
    assert voice.sample(mel, temperature=0.0).square().mean() < drawn.square().mean()
    soundfile.write(tmp_path / "a.wav", wave.numpy(), 16000)
    for given in (tmp_path / "a.wav", str(tmp_path / "a.wav")):
        assert voice.vocode(given).shape == (4200,)


def test_passes_are_the_recipes_or_those_asked_for(voices: dict[str, wavedistill.Vocoder], tmp_path: Path) -> None:
    mel = voices["student"].log_mel(speech_like(2000))
    assert voices["student"].consistency.passes == 4
    path = tmp_path / "student.safetensors"
    plain = wavedistill.load(path, passes=0)
    torch.testing.assert_close(plain.vocode(mel), plain.sample(mel), rtol=0, atol=1e-5)


def test_a_file_is_vocoded_as_its_log_mel_is(voices: dict[str, wavedistill.Vocoder], tmp_path: Path) -> None:
    """Block by block or whole, with the same passes."""
    for voice in voices.values():
        mel = voice.log_mel(speech_like(2000))
        mel[:5] = -15.0  # below the floor of `LogMel`, as other programs' may be
        np.save(tmp_path / "m.npy", mel.numpy())
        torch.testing.assert_close(voice.vocode(tmp_path / "m.npy"), voice.vocode(mel), rtol=0, atol=1e-5)


def test_a_density_is_asked_of_whom_it_takes_one_pass(voices: dict[str, wavedistill.Vocoder]) -> None:
    wave = 0.1 * speech_like(4000)
    teacher = voices["teacher"]
    found = teacher.log_prob(wave)
    assert torch.equal(found, teacher.given(teacher.log_mel(wave)).log_prob(wave[None])[0])
    assert teacher.log_prob(wave, teacher.log_mel(wave)) == found
    with pytest.raises(SequentialDirectionError):
        voices["student"].log_prob(wave)


def test_it_says_what_it_is(voices: dict[str, wavedistill.Vocoder]) -> None:
    assert repr(voices["student"]) == "Vocoder(student of tiny: 40 mel bands every 200 samples at 16000 Hz, one pass)"
    assert "sample by sample" in repr(voices["teacher"])


def test_importing_costs_no_torch_until_it_is_used() -> None:
    script = "import sys, wavedistill; assert 'torch' not in sys.modules; wavedistill.load('a.pt')"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert "CheckpointError: a.pt: no such checkpoint" in done.stderr
    assert not hasattr(wavedistill, "lode")
