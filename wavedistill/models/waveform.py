"""A density of waveforms: flows, and the transform that speech has at their end."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from wavedistill.flows.bases import Base
from wavedistill.flows.coupling import ActNorm, start_from_data
from wavedistill.flows.distributions import FlowDistribution
from wavedistill.flows.transforms import Autoregressive, Bound, Context, Transform
from wavedistill.networks.encoder import MelEncoder
from wavedistill.networks.network import Network
from wavedistill.speech.conditioning import Conditioning
from wavedistill.speech.linear_prediction import LinearPredictionFromMel, Preemphasis
from wavedistill.speech.pitch import PITCH_CONTEXT, PeriodicSource, PitchPredictor


class WaveformModel(nn.Module):
    """A conditional density of waveforms: applied to what is known of one, it *is* a distribution.

    Its last transform, from a residual of unit variance to the waveform, is a function of the log-mel alone: linear
    prediction, or a fixed scale. The models of a recipe share it, so that a KL is that of their residuals' densities.

    Args:
        encoder: log-mel and F0 -> conditioning features.
        flows: the bijection between noise and residual.
        shared: the bijection between residual and waveform.
        envelope: log-mel -> the context of linear prediction, or None where `shared` needs none.
        base: the distribution of the noise.
        pitch: log-mel -> F0, where none is given; None where the model is not conditioned on F0.
        source: F0 -> the signals that the flows' conditioners read beside the past, or None for none.

    Attributes:
        margin: frames of log-mel needed on either side: what the encoder looks at, and what F0 there is predicted from.
    """

    def __init__(
        self,
        encoder: MelEncoder,
        flows: Iterable[Transform],
        shared: Transform,
        envelope: LinearPredictionFromMel | Preemphasis | None,
        base: Base,
        pitch: PitchPredictor | None = None,
        source: PeriodicSource | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.envelope, self.base = encoder, envelope, base
        self.flows, self.shared = nn.ModuleList(flows), shared
        self.pitch, self.source = pitch, source
        self.margin = encoder.context + (0 if pitch is None else PITCH_CONTEXT)

    def forward(self, told: Conditioning) -> FlowDistribution:
        """The density of waveforms (B, F * hop_length) given F frames, with `margin` or more around them.

        A model that is conditioned on F0 predicts it from the log-mel where it is not given; others ignore it.
        """
        return self.synthesised(self.residual(told), told)

    def synthesised(self, residual: FlowDistribution, told: Conditioning) -> FlowDistribution:
        """The density of waveforms whose residuals have a given density, with the last transform of a log-mel."""
        return FlowDistribution(residual.base, [*residual.steps, Bound(self.shared, self.shared_context(told))])

    def residual(self, told: Conditioning) -> FlowDistribution:
        """The density of residuals (B, F * hop_length), with the conditioning as in `forward`."""
        context, _ = self.context(told)
        return FlowDistribution(self.base, [Bound(flow, context) for flow in cast(Iterable[Transform], self.flows)])

    @property
    def draws_in_parallel(self) -> bool:
        """Whether a waveform takes one pass of each network."""
        return all(not isinstance(flow, Autoregressive) or flow.reads == "z" for flow in self.flows)

    @property
    def density_in_parallel(self) -> bool:
        """Whether the density of any waveform takes one pass of each network."""
        return all(not isinstance(flow, Autoregressive) or flow.reads == "x" for flow in self.flows)

    @property
    def streams(self) -> bool:
        """Whether a waveform can be drawn block by block: by flows that need only what came before it."""
        return all(isinstance(flow, Autoregressive) and flow.reads == "z" for flow in self.flows)

    @property
    def starts_from_data(self) -> bool:
        """Whether a training has to begin with `start_from_data`, unless it begins with weights that are trained."""
        return any(isinstance(flow, ActNorm) for flow in self.flows)

    def start_from_data(self, audio: Tensor, told: Conditioning) -> None:
        """Set what starts from data, by audio (B, (F + 2 margin) * hop) as `analyse` is given it."""
        with torch.no_grad():
            residual, _ = self.analyse(audio, told)
            start_from_data(self.residual(told), residual)

    @property
    def flops_per_sample(self) -> float:
        """Floating-point operations of the conditioners for one sample; the rest is below a tenth of them."""
        return sum(net.flops_per_sample for net in self.networks)

    @property
    def networks(self) -> list[Network]:
        """The flows' networks."""
        return [module for module in self.modules() if isinstance(module, Network)]

    def shared_context(self, told: Conditioning) -> Context:
        """What the last transform is conditioned on, for the F frames themselves."""
        return self._envelope(told.within(0).mel)

    def analyse(self, audio: Tensor, told: Conditioning) -> tuple[Tensor, Tensor]:
        """Residual and its per-step ladj (B, F * hop) of the middle of audio (B, (F + 2 margin) * hop).

        The margins give the first samples their true past; so do zeros, where the audio starts.
        """
        residual, ladj = self.shared.inverse(audio, self._envelope(told.mel))
        cut = audio.shape[1] // told.mel.shape[-1] * told.margin
        return _inside(residual, cut), _inside(ladj, cut)

    def context(self, told: Conditioning, phase: Tensor | None = None) -> tuple[Context, Tensor | None]:
        """Features (B, F', C) and source (B, T, S), as conditioners take them, and the source's phase (B,) after them.

        Args:
            told: F frames, with `margin` or more around them.
            phase: of the source before them, as the call for the frames before gave it.
        """
        told = told.within(self.margin)
        if self.pitch is None:
            return (self.encoder(told.mel),), None
        f0 = self.pitch(told.mel) if told.f0 is None else _inside(told.f0, PITCH_CONTEXT)
        features = self.encoder(_inside(told.mel, PITCH_CONTEXT), self.pitch.features(f0))
        if self.source is None:
            return (features, None), None
        source, phase = self.source(_inside(f0, self.encoder.context - 1), phase)
        return (features, source), phase

    def _envelope(self, mel: Tensor) -> Context:
        return () if self.envelope is None else self.envelope(mel)


def _inside(whole: Tensor, cut: int) -> Tensor:
    """What is left of (..., T) without so many at either end."""
    return whole[..., cut : whole.shape[-1] - cut]
