"""Reduced precision is the networks' own affair: densities and losses stay in float32, whatever the networks do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import margin, noise
from tests.test_audio import corpus
from tests.test_flows import constant_flow
from wavedistill.corpus.utterances import Manifest
from wavedistill.flows.bases import BASES
from wavedistill.flows.distributions import FlowDistribution
from wavedistill.flows.transforms import Bound
from wavedistill.models import checkpoint
from wavedistill.models.waveform import WaveformModel
from wavedistill.networks.wavenet import WaveNet
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech.audio import LogMel
from wavedistill.speech.conditioning import Conditioning
from wavedistill.speech.linear_prediction import LinearPrediction, LinearPredictionFromMel
from wavedistill.training.distillation import log_mel_filters
from wavedistill.training.likelihood import likelihood_task
from wavedistill.training.loop import fit
from wavedistill.training.losses import log_mel_distance, spectral_distance
from wavedistill.training.state import saved_states

FRAMES = 8


def lowered() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture
def speech(tiny: Recipe) -> tuple[Tensor, Tensor]:
    """Audio (2, T), and its log-mel with the context that the models want."""
    audio = 0.1 * noise(2, FRAMES * tiny.audio.hop_length).float()
    return audio, LogMel(tiny.audio).of_file(audio, margin(tiny))


def moved(model: WaveformModel) -> WaveformModel:
    """A model that no longer starts from zero, so that its networks matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for network in model.networks:
            network.head.weight.copy_(0.1 * torch.randn(network.head.weight.shape, generator=generator))
    return model


def layer_types(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, torch.dtype]]:
    """Fills up with whether a gradient is wanted, and what each layer of any network computes in."""
    found: list[tuple[bool, torch.dtype]] = []
    layer = WaveNet._layer

    def noted(net: WaveNet, i: int, y: Tensor, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        found.append((torch.is_grad_enabled(), y.dtype))
        return layer(net, i, y, h, skip)

    monkeypatch.setattr(WaveNet, "_layer", noted)
    return found


@pytest.mark.parametrize("base", BASES)
def test_a_density_does_not_follow_autocast(tiny: Recipe, speech: tuple[Tensor, Tensor], base: str) -> None:
    """Neither its type nor a single bit of its value: linear prediction, flow and base, without a network."""
    audio, mel = speech
    envelope = LinearPredictionFromMel(tiny.audio, 24)
    inner = mel[..., margin(tiny) : -margin(tiny)]
    flow, shared = constant_flow("x", 0.3, -0.7), LinearPrediction(tiny.audio.hop_length)

    def log_prob() -> Tensor:
        return FlowDistribution(BASES[base], [Bound(flow), Bound(shared, envelope(inner))]).log_prob_steps(audio)

    with lowered():
        found = log_prob()
    assert found.dtype == torch.float32
    assert torch.equal(found, log_prob())


def test_losses_of_the_waveform_do_not_follow_autocast(tiny: Recipe, speech: tuple[Tensor, Tensor]) -> None:
    audio, _ = speech
    filters = log_mel_filters(tiny, (512, 1024), audio.device)

    def distances() -> Tensor:
        return torch.stack(
            [
                log_mel_distance(audio, audio.roll(1, 0), filters),
                spectral_distance(audio, audio.roll(1, 0), list(filters)),
            ]
        )

    with lowered():
        found = distances()
    assert found.dtype == torch.float32
    assert torch.equal(found, distances())


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_of_a_model_only_the_networks_follow_autocast(
    tiny_model: Callable[[str], WaveformModel],
    speech: tuple[Tensor, Tensor],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    audio, mel = speech
    model = moved(tiny_model(kind)).requires_grad_(False)
    context = model.margin
    types = layer_types(monkeypatch)

    def densities() -> Tensor:
        density = model(Conditioning(mel, context))
        return density.log_prob_steps(audio) if kind == "teacher" else density.rsample_and_log_prob_steps(audio)[1]

    full = densities()
    assert {kind for _, kind in types} == {torch.float32}
    types.clear()
    with lowered():
        found = densities()
        residual, ladj = model.analyse(audio, Conditioning(mel, context).within(0))
    assert {kind for _, kind in types} == {torch.bfloat16}
    assert found.dtype == residual.dtype == ladj.dtype == torch.float32
    assert 0 < (found - full).abs().mean() < 0.02, "as precise as bfloat16 lets the networks be"

    if kind == "teacher":
        # The value is the float32 density of what the networks gave.
        with lowered():
            conditionals = model.residual(Conditioning(mel, context)).conditionals(audio)
            inside = conditionals.log_prob_steps(audio)
        assert all(parameter.dtype == torch.float32 for parameter in conditionals.parameters)
        assert torch.equal(inside, conditionals.log_prob_steps(audio))


@pytest.mark.slow
def test_a_training_in_bfloat16_follows_that_in_float32(
    tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks in bfloat16; weights, average, optimizer and validation in float32."""
    manifest = corpus(tmp_path / "audio", tiny, [20, 20])
    first, second = manifest.utterances
    both = Manifest(audio=tiny.audio, utterances=[first, second.model_copy(update={"split": "valid"})])
    types = layer_types(monkeypatch)
    values = {}
    for precision, trained in (("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)):
        types.clear()
        settings = tiny.training["teacher"].model_copy(
            update={"precision": precision, "steps": 30, "validate_every": 30, "segment_frames": 10}
        )
        folder = tmp_path / precision
        values[precision] = fit(
            likelihood_task(tiny, "teacher")._replace(settings=settings, sample=lambda model, batch: batch.audio),
            both,
            tmp_path / "audio",
            recipe=tiny,
            folder=folder,
            fingerprint="a",
            device=torch.device("cpu"),
        ).valid["nll"]
        assert set(types) == {(True, trained), (False, torch.float32)}, "a step, and a validation"
        tensors, _ = checkpoint.load(saved_states(folder)[0])
        assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert abs(values["bf16-mixed"] - values["32-true"]) < 0.01
