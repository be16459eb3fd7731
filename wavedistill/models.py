"""Teacher and student: the only place where a network meets a flow."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedistill.config import Network, Recipe
from wavedistill.flows import BASES, AutoregressiveAffine, Base, Composition, FlowDistribution, Scale, Transform
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

    Args:
        encoder: log-mel -> conditioning features.
        transform: the bijection between noise and waveform.
        base: the distribution of the noise.
    """

    def __init__(self, encoder: MelEncoder, transform: Composition, base: Base) -> None:
        super().__init__()
        self.encoder, self.transform, self.base = encoder, transform, base

    def forward(self, mel: Tensor) -> FlowDistribution:
        """The density of waveforms (B, F * hop_length) given log-mel (B, n_mels, F + 2 context)."""
        return FlowDistribution(self.transform, self.base, self.encoder(mel))


def teacher(recipe: Recipe) -> WaveformModel:
    """The autoregressive teacher of a recipe: a masked autoregressive flow at unit variance, then the data's scale."""
    settings = recipe.teacher
    flow = AutoregressiveAffine(_conditioner(recipe, settings.network, settings.layers, settings.min_log_scale), "x")
    return _model(recipe, settings.base, [flow])


def student(recipe: Recipe) -> WaveformModel:
    """The parallel student of a recipe: K inverse autoregressive flows at unit variance, then the data's scale."""
    settings = recipe.student
    flows = [
        AutoregressiveAffine(_conditioner(recipe, settings.network, layers, settings.min_log_scale), "z")
        for layers in settings.flow_layers
    ]
    return _model(recipe, settings.base, flows)


def build(kind: str, recipe: Recipe, seed: int) -> WaveformModel:
    """The untrained model of a kind, "teacher" or "student", with weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {"teacher": teacher, "student": student}[kind](recipe)


def _model(recipe: Recipe, base: str, flows: list[AutoregressiveAffine]) -> WaveformModel:
    encoder = MelEncoder(
        recipe.audio.n_mels,
        recipe.conditioning.channels,
        recipe.conditioning.context,
        recipe.conditioning.upsample,
    )
    # `prepare` brings every utterance to this level, so it is the data's standard deviation.
    parts: list[Transform] = [*flows, Scale(10 ** (recipe.audio.level_db / 20))]
    return WaveformModel(encoder, Composition(parts), BASES[base])


def _conditioner(recipe: Recipe, network: Network, layers: int, min_log_scale: float) -> AffineWaveNet:
    wavenet = WaveNet(
        layers=layers,
        dilation_cycle=network.dilation_cycle,
        kernel_size=network.kernel_size,
        channels=network.channels,
        skip_channels=network.skip_channels,
        out_channels=2,
        feature_channels=recipe.conditioning.channels,
        repeat=recipe.conditioning.upsample[-1],
    )
    return AffineWaveNet(wavenet, min_log_scale)
