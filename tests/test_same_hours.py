"""The recipes' script that trains another system on a prepared corpus, in so much time of one processor."""

import importlib.util
import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn

from tests.conftest import RECIPES, speech_like
from wavedistill.corpus.utterances import Manifest, Utterance
from wavedistill.recipe.sections import Audio
from wavedistill.speech import audio

HOP, FRAMES, HEARD = 200, 60, 50
"""Of the made-up corpus: samples in a hop, hops in an utterance, and in a clip that was evaluated."""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("same_hours", RECIPES / "same_hours.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """What the script reads of an experiment: the prepared corpus, and clips that were evaluated."""
    utterances = []
    (tmp_path / "audio").mkdir()
    (tmp_path / "samples" / "recorded").mkdir(parents=True)
    for number, split in enumerate(("train", "train", "test")):
        name = f"{number}_voice"
        samples, f0 = tmp_path / "audio" / f"{name}.wav", tmp_path / "audio" / f"{name}.f0.npy"
        audio.write(samples, speech_like(FRAMES * HOP, number), 16000)
        np.save(f0, np.zeros(FRAMES, np.float32))
        parts = {key: (path.name, 0, path.stat().st_size) for key, path in (("audio", samples), ("f0", f0))}
        about = {"source": name, "split": split, "frames": FRAMES, "gain": 1.0, "sha256": ""}
        utterances.append(Utterance.model_validate({"name": name, **parts, **about}))
        if split == "test":
            audio.write(tmp_path / "samples" / "recorded" / samples.name, speech_like(HEARD * HOP, number), 16000)
    units = Audio(sample_rate=16000, hop_length=HOP, n_fft=1024, n_mels=80, f_min=0, f_max=8000)
    (tmp_path / "manifest.json").write_text(Manifest(audio=units, utterances=utterances).model_dump_json())
    return tmp_path


class Amplifier(nn.Module):
    """The least that the script trains: a sample is a sum of bands, and what tells it from a recording is a factor."""

    rate, betas = 0.01, (0.8, 0.9)

    def __init__(self, units: Audio) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.ConvTranspose1d(units.n_mels, 1, HOP, HOP), nn.Flatten())
        self.discriminators = nn.Linear(1, 1)
        self.heard: list[float] = []

    def mel_loss(self, real: Tensor, made: Tensor) -> Tensor:
        self.heard.append(float(real.sum()))
        return (real - made).square().mean()

    def generator_loss(self, real: Tensor, made: Tensor) -> Tensor:
        return self.mel_loss(real, made) - self.discriminators(made[..., None]).mean()

    def discriminator_loss(self, real: Tensor, made: Tensor) -> Tensor:
        return self.discriminators(made[..., None]).mean() - self.discriminators(real[..., None]).mean()


@pytest.fixture
def made(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Amplifier]:
    """The systems that were made: amplifiers, each of whose steps takes a second."""
    systems: list[Amplifier] = []

    def build(units: Audio) -> Amplifier:
        systems.append(Amplifier(units))
        return systems[-1]

    ticks = itertools.count()
    monkeypatch.setattr(script.time, "process_time", lambda: next(ticks))
    monkeypatch.setitem(script.SYSTEMS, "vocos", build)
    return systems


def left(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a mark leaves: a word on it, and the generator."""
    return json.loads((folder / "about.json").read_text()), torch.load(folder / "generator.pt", weights_only=True)


def test_a_training_that_is_interrupted_at_a_mark_goes_on_as_if_it_had_not_been(
    script: ModuleType, experiment: Path, made: list[Amplifier]
) -> None:
    command = [str(experiment), "vocos", "--steps", "3", "4"]
    at_once, in_two = experiment / "at_once", experiment / "in_two"
    script.main([*command, "--cpu-minutes", "1", "--out", str(at_once)])
    script.main([*command, "--cpu-minutes", "0.05", "--out", str(in_two)])
    script.main([*command, "--cpu-minutes", "0.05", "1", "--out", str(in_two)])
    (first, early), (then, late), (_, whole) = map(left, (in_two / "0.05min", in_two / "1min", at_once / "1min"))
    assert (first["step"], then["step"], then["minutes"]) == (3, 7, 7 / 60)
    assert all(torch.equal(late[key], whole[key]) for key in whole)
    assert not torch.equal(early["0.weight"], late["0.weight"])
    straight, before, after = (system.heard for system in made)
    assert before + after == straight
    assert len(set(straight)) == 7, "the same segments again"


def test_how_many_steps_fit_is_measured(script: ModuleType, experiment: Path, made: list[Amplifier]) -> None:
    script.main([str(experiment), "vocos", "--cpu-minutes", "0.1", "0.5", "--mel-first", "0.2"])
    plan = {"alone": 6, "both": 24, "mel_first": 0.2}
    for mark, step in (("0.1min", 6), ("0.5min", 30)):
        about, _ = left(experiment / "same_hours" / "vocos" / mark)
        assert (about["step"], about["minutes"], about["plan"]) == (step, step / 60, plan)


def test_clips_are_those_that_were_evaluated(
    script: ModuleType, experiment: Path, made: list[Amplifier], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(experiment), "vocos", "--steps", "1", "1", "--cpu-minutes", "1", "--out"]
    script.main([*command, str(experiment / "out")])
    (clip,) = (experiment / "out" / "1min").glob("*.wav")
    assert (clip.name, soundfile.info(clip).frames) == ("2_voice.wav", HEARD * HOP)
    (experiment / "samples" / "recorded" / clip.name).unlink()
    with pytest.raises(SystemExit, match="1"):
        script.main([*command, str(experiment / "other")])
    assert "samples: no recorded clips: run `wavedistill evaluate` first" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vocos", "hifigan_v2"])
def test_the_systems_train(script: ModuleType, experiment: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    needed = {"vocos": "vocos", "hifigan_v2": "speechbrain"}[name]
    pytest.importorskip(needed, reason=f"{needed} is not installed: recipes/same_hours.py says how")
    monkeypatch.setattr(script, "FRAMES", 12)
    monkeypatch.setitem(
        script.SYSTEMS, "vocos", lambda units: script.Vocos(units, dim=8, intermediate_dim=16, num_layers=1)
    )
    out = experiment / "out"
    script.main([str(experiment), name, "--steps", "1", "1", "--cpu-minutes", "1000", "--out", str(out)])
    assert left(out / "1000min")[0]["step"] == 2
    wave, _ = soundfile.read(out / "1000min" / "2_voice.wav")
    assert len(wave) == HEARD * HOP
    assert np.abs(wave).max() > 0
