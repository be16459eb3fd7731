"""Small models and recipes that the tests share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from wavedistill.flows.bases import StandardNormal
from wavedistill.flows.distributions import FlowDistribution
from wavedistill.flows.elementwise import Affine
from wavedistill.flows.transforms import Autoregressive
from wavedistill.models.kinds import build
from wavedistill.models.waveform import WaveformModel
from wavedistill.networks.encoder import MelEncoder
from wavedistill.networks.wavenet import WaveNet
from wavedistill.recipe.loading import load_recipe, validate_recipe
from wavedistill.recipe.recipe import Recipe
from wavedistill.recipe.sections import Audio
from wavedistill.speech.conditioning import Conditioning
from wavedistill.speech.heard import Heard
from wavedistill.speech.linear_prediction import LinearPrediction, LinearPredictionFromMel
from wavedistill.speech.pitch import PITCH_CHANNELS, PITCH_CONTEXT, SOURCE_CHANNELS, PeriodicSource, PitchPredictor
from wavedistill.training.losses import Density, one_draw_kl

# Threads are not measured: the fastest of one moment need not be that of the next, and results are compared bit by bit.
os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
REPOSITORY = Path(__file__).parents[1]
RECIPES = REPOSITORY / "recipes"
SMALL_AUDIO = Audio(
    sample_rate=400, hop_length=8, n_fft=32, n_mels=5, f_min=0, f_max=200, f0_min=40, f0_max=100, level_db=-20
)

HEARD = Heard(mel_mean=(-5.0,) * 40, mel_std=(2.0,) * 40, f0_low=80.0, f0_high=200.0)
"""What the models of the tiny recipe might have been trained on."""


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random value, so that zero-initialised layers hide nothing, and compute in float64."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    for parameter in module.parameters():
        fan_in = parameter.shape[-1] if parameter.ndim > 1 else 16
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return module


def small_wavenet(**changes: Any) -> WaveNet:
    settings = {
        "layers": 4,
        "dilation_cycle": 3,
        "kernel_size": 2,
        "channels": 6,
        "skip_channels": 5,
        "out_channels": 2,
        "feature_channels": 3,
        "repeat": 4,
    }
    return randomise(WaveNet(**{**settings, **changes}))


def small_flow(reads: str, seed: int = 0, **changes: Any) -> Autoregressive:
    return randomise(Autoregressive(small_wavenet(**changes), reads, Affine(-5.0)), seed)


def small_model(kind: str, *, pitch: bool = True) -> WaveformModel:
    """A teacher of one flow, or a student of three with a periodic source, or a squeezed one, then linear prediction.

    5 mel bands, a hop of 8, context 1; F0 is predicted, so it is made up but the same for both.
    """
    source = kind != "teacher" and pitch
    flows = [small_flow("x")]
    if kind != "teacher":
        groups = [(1, 0)] * 3 if kind == "student" else [(4, 0), (4, 3), (2, 1)]
        channels = SOURCE_CHANNELS if source else 0
        flows = [
            small_flow("z", seed, source_channels=channels, squeeze=squeeze, border=border)
            for seed, (squeeze, border) in enumerate(groups)
        ]
    model = WaveformModel(
        MelEncoder(5, 3, 1, (2, 4), others=PITCH_CHANNELS if pitch else 0),
        flows,
        LinearPrediction(8),
        LinearPredictionFromMel(SMALL_AUDIO, 4),
        StandardNormal(),
        pitch=PitchPredictor(SMALL_AUDIO, channels=4) if pitch else None,
        source=PeriodicSource(SMALL_AUDIO, 0 if kind == "student" else 3) if source else None,
    )
    return randomise(model, seed=7)


def small_mel(batch: int, frames: int, seed: int = 0) -> Conditioning:
    """What `small_model` speaks from: a log-mel (batch, 5, frames + 2 * 5)."""
    generator = torch.Generator().manual_seed(seed)
    mel = torch.randn(batch, 5, frames + 10, generator=generator, dtype=torch.float64) * 3 - 5
    return Conditioning(mel, 5)


def changed(recipe: Recipe, path: str, **values: Any) -> Recipe:
    """A recipe with some values of the table at a path, "training.student.loss" for instance, changed."""

    def within(table: Any, keys: list[str]) -> Any:
        if not keys:
            return table.model_copy(update=values)
        key, *rest = keys
        if isinstance(table, dict):
            return {**table, key: within(table[key], rest)}
        return table.model_copy(update={key: within(getattr(table, key), rest)})

    return within(recipe, path.split("."))


def told(recipe: Recipe, mel: torch.Tensor, f0: torch.Tensor | None = None) -> Conditioning:
    """What a recipe's models speak from: a log-mel (B, n_mels, F + 2 margin), and F0 if it is known."""
    return Conditioning(mel, margin(recipe), f0)


def margin(recipe: Recipe) -> int:
    """Frames around that a recipe's models need."""
    return recipe.conditioning.context + (PITCH_CONTEXT if recipe.conditioning.pitch else 0)


def one_draw(q: FlowDistribution, p: Density, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The one-draw KL (B,) of q from p, and the draw that noise (B, T) maps to."""
    x, log_q = q.rsample_and_log_prob(z)
    return one_draw_kl(log_q, p, x), x


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def speech_like(samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed)).cumsum(0).sin()


def write_voice(folder: Path, count: int) -> Path:
    """A folder of so many recordings of a second."""
    folder.mkdir()
    for number in range(count):
        soundfile.write(folder / f"{number}.wav", speech_like(16000, number).numpy(), 16000)
    return folder


@pytest.fixture
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spectrograms of trainings without anything on them, which are drawn in no time."""
    monkeypatch.setattr("wavedistill.training.log.spectrogram", lambda *args: np.zeros((2, 2, 3), np.uint8))


@pytest.fixture
def tiny_data() -> dict[str, Any]:
    """The tiny recipe as nested dictionaries, free to change."""
    return load_recipe(RECIPES / "tiny.toml").model_dump(mode="json")


@pytest.fixture
def tiny(tiny_data: dict[str, Any]) -> Recipe:
    return validate_recipe(tiny_data, "tiny.toml")


@pytest.fixture
def tiny_model(tiny: Recipe) -> Callable[[str], WaveformModel]:
    """The untrained teacher or student of the tiny recipe."""
    return lambda kind: build(tiny, kind, tiny.seed)
