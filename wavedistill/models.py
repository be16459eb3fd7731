"""Teacher and student: the only place where a network meets a flow."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedistill.config import Recipe, Student, Teacher
from wavedistill.flows import (
    BASES,
    AutoregressiveAffine,
    Base,
    Composition,
    Context,
    FlowDistribution,
    Scale,
    Transform,
)
from wavedistill.linear_prediction import LinearPrediction, LinearPredictionFromMel
from wavedistill.wavenet import MelEncoder, WaveNet, WaveNetState


class AffineWaveNet(nn.Module):
    r"""A WaveNet whose two outputs are the shift and the log_scale of an affine transform.

    The log-scale is bounded below by a softplus, whose gradient never vanishes:
    :math:`\log\sigma = b + softplus(r - b)`, which is r where r is well above the bound b.
    """

    def __init__(self, wavenet: WaveNet, min_log_scale: float) -> None:
        super().__init__()
        self.wavenet, self.min_log_scale = wavenet, min_log_scale

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Shift and log_scale (B, T) at every t, from x (B, T) before t."""
        return self._affine(self.wavenet(x, context))

    def initial_state(self, batch_size: int, context: Tensor | None = None) -> WaveNetState:
        """The state before the first `step`."""
        return self.wavenet.initial_state(batch_size, context)

    def step(self, previous: Tensor, state: WaveNetState) -> tuple[Tensor, Tensor, WaveNetState]:
        """Shift and log_scale (B,) at the next t, from x_{t-1} (B,)."""
        out, state = self.wavenet.step(previous, state)
        return *self._affine(out), state

    def _affine(self, out: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = out.unbind(-1)
        return shift, self.min_log_scale + F.softplus(raw - self.min_log_scale)


class WaveformModel(nn.Module):
    """A conditional density of waveforms: applied to a log-mel it *is* a distribution.

    Its last transform, from a residual of unit variance to the waveform, is a function of the log-mel alone: linear
    prediction, or a fixed scale. Teacher and student share it, so that their KL is that of their residuals' densities.

    Args:
        encoder: log-mel -> conditioning features.
        flows: the bijection between noise and residual.
        shared: the bijection between residual and waveform.
        envelope: log-mel -> the context of linear prediction, or None where `shared` needs none.
        base: the distribution of the noise.
        margin: frames of log-mel needed on either side, the context of the conditioning.
    """

    def __init__(
        self,
        encoder: MelEncoder,
        flows: Iterable[AutoregressiveAffine],
        shared: Transform,
        envelope: LinearPredictionFromMel | None,
        base: Base,
        margin: int,
    ) -> None:
        super().__init__()
        self.encoder, self.envelope, self.base, self.margin = encoder, envelope, base, margin
        self.flows, self.shared = Composition(flows), shared

    def forward(self, mel: Tensor) -> FlowDistribution:
        """The density of waveforms (B, F * hop_length) given log-mel (B, n_mels, F + 2 context)."""
        residual = self.residual(mel)
        transform = Composition([self.flows, self.shared])
        return FlowDistribution(transform, self.base, [residual.context, self.shared_context(mel)])

    def residual(self, mel: Tensor) -> FlowDistribution:
        """The density of residuals (B, F * hop_length) given log-mel (B, n_mels, F + 2 context)."""
        return FlowDistribution(self.flows, self.base, [self.encoder(mel)] * len(self.flows.parts))

    def shared_context(self, mel: Tensor) -> Context:
        """What the last transform is conditioned on, for the middle F frames of log-mel (B, n_mels, F + 2 context)."""
        return self._envelope(mel[..., self.margin : mel.shape[-1] - self.margin])

    def analyse(self, audio: Tensor, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Residual and its per-step ladj (B, F * hop) of the middle of audio (B, (F + 2 context) * hop).

        The margins give the first samples their true past; so do zeros, where the audio starts.
        """
        residual, ladj = self.shared.inverse(audio, self._envelope(mel))
        cut = audio.shape[1] // mel.shape[-1] * self.margin
        return residual[:, cut : audio.shape[1] - cut], ladj[:, cut : audio.shape[1] - cut]

    def _envelope(self, mel: Tensor) -> Context:
        return None if self.envelope is None else self.envelope(mel)


def teacher(recipe: Recipe) -> WaveformModel:
    """The autoregressive teacher of a recipe: a masked autoregressive flow, then linear prediction."""
    settings = recipe.teacher
    return _model(recipe, settings.base, [_flow(recipe, settings, settings.layers, "x")])


def student(recipe: Recipe) -> WaveformModel:
    """The parallel student of a recipe: K inverse autoregressive flows, then linear prediction."""
    settings = recipe.student
    return _model(recipe, settings.base, [_flow(recipe, settings, layers, "z") for layers in settings.flow_layers])


def build(kind: str, recipe: Recipe, seed: int) -> WaveformModel:
    """The untrained model of a kind, "teacher" or "student", with weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {"teacher": teacher, "student": student}[kind](recipe)


def _model(recipe: Recipe, base: str, flows: list[AutoregressiveAffine]) -> WaveformModel:
    conditioning, order = recipe.conditioning, recipe.linear_prediction.order
    # `prepare` brings every recording to this level: without linear prediction, the start is noise as loud as the data.
    scale = 10 ** (recipe.audio.level_db / 20)
    # What the flows give before the first step has unit variance, whatever the base.
    with torch.no_grad():
        flows[-1].conditioner.wavenet.head.bias[1] = -math.log(BASES[base].std)  # type: ignore[attr-defined]
    return WaveformModel(
        MelEncoder(recipe.audio.n_mels, conditioning.channels, conditioning.context, conditioning.upsample),
        flows,
        LinearPrediction(recipe.audio.hop_length) if order else Scale(scale),
        LinearPredictionFromMel(recipe.audio, order) if order else None,
        BASES[base],
        conditioning.context,
    )


def _flow(recipe: Recipe, settings: Teacher | Student, layers: int, reads: Literal["x", "z"]) -> AutoregressiveAffine:
    wavenet = WaveNet(
        layers=layers,
        dilation_cycle=settings.network.dilation_cycle,
        kernel_size=settings.network.kernel_size,
        channels=settings.network.channels,
        skip_channels=settings.network.skip_channels,
        out_channels=2,
        feature_channels=recipe.conditioning.channels,
        repeat=recipe.conditioning.upsample[-1],
    )
    return AutoregressiveAffine(AffineWaveNet(wavenet, settings.min_log_scale), reads)
