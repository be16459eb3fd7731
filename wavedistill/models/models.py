"""Teacher and student: the only place where a network meets a flow."""

import logging
import math
import os
import shutil
import sys
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedistill.flows.flows import (
    BASES,
    Affine,
    Autoregressive,
    Base,
    Composition,
    Context,
    FlowDistribution,
    MixtureCdf,
    Parameters,
    Scale,
    Transform,
)
from wavedistill.networks.wavenet import MelEncoder, WaveNet, WaveNetState
from wavedistill.recipe.config import Recipe, Student, Teacher
from wavedistill.speech.linear_prediction import LinearPrediction, LinearPredictionFromMel, Preemphasis
from wavedistill.speech.pitch import PITCH_CHANNELS, PITCH_CONTEXT, SOURCE_CHANNELS, PeriodicSource, PitchPredictor
from wavedistill.tools.errors import RecipeError


class ConditionerNetwork(nn.Module):
    r"""A WaveNet whose outputs are the parameters of an elementwise bijection: of an affine one, or of a mixture.

    Every log-scale is bounded below by a softplus, whose gradient never vanishes:
    :math:`\log\sigma = b + softplus(r - b)`, which is r where r is well above the bound b.

    Args:
        wavenet: with 2 outputs for an affine bijection, 3 K for a mixture of K components.
        min_log_scale: the bound b.
    """

    def __init__(self, wavenet: WaveNet, min_log_scale: float) -> None:
        super().__init__()
        self.wavenet, self.min_log_scale = wavenet, min_log_scale

    def forward(
        self, x: Tensor, context: tuple[Tensor | None, ...] = (), state: WaveNetState | None = None
    ) -> Parameters:
        """The parameters at every t, from x (B, T) before t; context and state are what `WaveNet` takes."""
        return self._split(self.wavenet(x, *context, state=state))

    def step(
        self, previous: Tensor, state: WaveNetState, context: Tensor | None = None, source: Tensor | None = None
    ) -> Parameters:
        """The parameters at the next t, from x_{t-1} (B,), as `WaveNet.step`."""
        return self._split(self.wavenet.step(previous, state, context, source))

    def _split(self, out: Tensor) -> Parameters:
        if out.shape[-1] == 2:
            shift, raw = out.unbind(-1)
            return shift, self._log_scale(raw)
        weights, shift, raw = out.chunk(3, -1)
        return weights, shift, self._log_scale(raw)

    def _log_scale(self, raw: Tensor) -> Tensor:
        return self.min_log_scale + F.softplus(raw - self.min_log_scale)


class WaveformModel(nn.Module):
    """A conditional density of waveforms: applied to a log-mel it *is* a distribution.

    Its last transform, from a residual of unit variance to the waveform, is a function of the log-mel alone: linear
    prediction, or a fixed scale. Teacher and student share it, so that their KL is that of their residuals' densities.

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
        flows: Iterable[Autoregressive],
        shared: Transform,
        envelope: LinearPredictionFromMel | Preemphasis | None,
        base: Base,
        pitch: PitchPredictor | None = None,
        source: PeriodicSource | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.envelope, self.base = encoder, envelope, base
        self.flows, self.shared = Composition(flows), shared
        self.pitch, self.source = pitch, source
        self.margin = encoder.context + (0 if pitch is None else PITCH_CONTEXT)

    def forward(self, mel: Tensor, f0: Tensor | None = None) -> FlowDistribution:
        """The density of waveforms (B, F * hop_length) given log-mel (B, n_mels, F + 2 margin) and F0 in Hz, as long.

        A model that is conditioned on F0 predicts it from the log-mel where it is not given; others ignore it.
        """
        return self.synthesised(self.residual(mel, f0), mel)

    def synthesised(self, residual: FlowDistribution, mel: Tensor) -> FlowDistribution:
        """The density of waveforms whose residuals have a given density, with the last transform of a log-mel."""
        transform = Composition([self.flows, self.shared])
        return FlowDistribution(transform, self.base, [residual.context, self.shared_context(mel)])

    def residual(self, mel: Tensor, f0: Tensor | None = None) -> FlowDistribution:
        """The density of residuals (B, F * hop_length), with the conditioning as in `forward`."""
        context, _ = self.context(mel, f0)
        return FlowDistribution(self.flows, self.base, [context] * len(self.flows.parts))

    @property
    def flops_per_sample(self) -> float:
        """Floating-point operations of the conditioners for one sample; the rest is below a tenth of them."""
        return sum(net.flops_per_sample for net in self.networks)

    @property
    def networks(self) -> list[WaveNet]:
        """The flows' networks."""
        return [module for module in self.modules() if isinstance(module, WaveNet)]

    def shared_context(self, mel: Tensor) -> Context:
        """What the last transform is conditioned on, for the middle F frames of log-mel (B, n_mels, F + 2 margin)."""
        return self._envelope(_inside(mel, self.margin))

    def analyse(self, audio: Tensor, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Residual and its per-step ladj (B, F * hop) of the middle of audio (B, (F + 2 margin) * hop).

        The margins give the first samples their true past; so do zeros, where the audio starts.
        """
        residual, ladj = self.shared.inverse(audio, self._envelope(mel))
        cut = audio.shape[1] // mel.shape[-1] * self.margin
        return _inside(residual, cut), _inside(ladj, cut)

    def context(
        self, mel: Tensor, f0: Tensor | None = None, phase: Tensor | None = None
    ) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
        """Features and source, as every conditioner takes them, and the phase of the source after them.

        Args:
            mel: log-mel (B, n_mels, F + 2 margin).
            f0: (B, F + 2 margin) in Hz; predicted where it is not given.
            phase: of the source before them, as the call for the frames before gave it.
        """
        if self.pitch is None:
            return (self.encoder(mel),), None
        f0 = self.pitch(mel) if f0 is None else _inside(f0, PITCH_CONTEXT)
        features = self.encoder(_inside(mel, PITCH_CONTEXT), self.pitch.features(f0))
        if self.source is None:
            return (features, None), None
        source, phase = self.source(_inside(f0, self.encoder.context - 1), phase)
        return (features, source), phase

    def _envelope(self, mel: Tensor) -> Context:
        return None if self.envelope is None else self.envelope(mel)


def margin(recipe: Recipe) -> int:
    """The frames of log-mel that a recipe's models need on either side."""
    return recipe.conditioning.context + (PITCH_CONTEXT if recipe.conditioning.pitch else 0)


def _inside(whole: Tensor, cut: int) -> Tensor:
    """What is left of (..., T) without so many at either end."""
    return whole[..., cut : whole.shape[-1] - cut]


def teacher(recipe: Recipe) -> WaveformModel:
    """The autoregressive teacher of a recipe: a masked autoregressive flow, then linear prediction."""
    settings = recipe.teacher
    base, components = BASES[settings.base], settings.components
    if components == 1:
        network = _network(recipe, settings, settings.layers, outputs=2)
        _start_at_unit_variance(network, base)
        return _model(recipe, base, [Autoregressive(network, "x", Affine())], source=False)
    network = _network(recipe, settings, settings.layers, outputs=3 * components)
    with torch.no_grad():
        _, shift, log_scale = network.wavenet.head.bias.chunk(3)
        # Apart, so that they can go their own ways, and together of unit variance.
        shift.copy_(torch.linspace(-0.5, 0.5, components))
        log_scale.fill_(0.5 * math.log(1 - shift.square().mean()) - math.log(base.std))
    return _model(recipe, BASES["logistic"], [Autoregressive(network, "x", MixtureCdf(base))], source=False)


def student(recipe: Recipe) -> WaveformModel:
    """The parallel student of a recipe: K inverse autoregressive flows, then linear prediction."""
    settings = recipe.student
    networks = [
        _network(recipe, settings, layers, outputs=2, source=settings.periodic_source)
        for layers in settings.flow_layers
    ]
    _start_at_unit_variance(networks[-1], BASES[settings.base])
    flows = [Autoregressive(network, "z", Affine()) for network in networks]
    return _model(recipe, BASES[settings.base], flows, source=settings.periodic_source)


def build(kind: str, recipe: Recipe, seed: int) -> WaveformModel:
    """The untrained model of a kind, "teacher" or "student", with weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {"teacher": teacher, "student": student}[kind](recipe)


def compiler() -> str | None:
    """The C++ compiler that torch.compile uses on a CPU, None where there is none."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return name if shutil.which(name) else None


def require_compiler(device: torch.device) -> None:
    """Raise a `RecipeError` if compiling for a device needs a compiler that is not there."""
    if device.type == "cpu":
        if compiler() is None:
            raise RecipeError(
                "training.compile = true and --fused need a C++ compiler, g++ or the one that CXX names: install one, "
                "or do without"
            )
        logging.getLogger("torch.utils.cpp_extension").addFilter(_is_about_us)


def _is_about_us(record: logging.LogRecord) -> bool:
    """Whether a warning is of use to somebody without a GPU, as that of a CUDA without one is not."""
    return "No CUDA runtime is found" not in record.getMessage()


def compile_networks(model: nn.Module) -> None:
    """Compile the conditioners of a model in place, for training; its weights and their names stay the same.

    Raises:
        RecipeError: if the model is on the CPU, and there is no compiler.
    """
    require_compiler(next(model.parameters()).device)
    for module in model.modules():
        if isinstance(module, WaveNet):
            module.compile(dynamic=False)


def _model(recipe: Recipe, base: Base, flows: list[Autoregressive], *, source: bool) -> WaveformModel:
    conditioning, prediction = recipe.conditioning, recipe.linear_prediction
    # `prepare` brings every recording to this level: without linear prediction, the start is noise as loud as the data.
    level = 10 ** (recipe.audio.level_db / 20)
    envelope: LinearPredictionFromMel | Preemphasis | None = None
    if prediction.order:
        envelope = LinearPredictionFromMel(recipe.audio, prediction.order)
    elif prediction.preemphasis:
        envelope = Preemphasis(prediction.preemphasis, level)
    return WaveformModel(
        MelEncoder(
            recipe.audio.n_mels,
            conditioning.channels,
            conditioning.context,
            conditioning.upsample,
            others=PITCH_CHANNELS if conditioning.pitch else 0,
        ),
        flows,
        Scale(level) if envelope is None else LinearPrediction(recipe.audio.hop_length),
        envelope,
        base,
        PitchPredictor(recipe.audio) if conditioning.pitch else None,
        PeriodicSource(recipe.audio) if source else None,
    )


def _start_at_unit_variance(network: ConditionerNetwork, base: Base) -> None:
    with torch.no_grad():
        network.wavenet.head.bias[1] = -math.log(base.std)


def _network(
    recipe: Recipe, settings: Teacher | Student, layers: int, *, outputs: int, source: bool = False
) -> ConditionerNetwork:
    wavenet = WaveNet(
        layers=layers,
        dilation_cycle=settings.network.dilation_cycle,
        kernel_size=settings.network.kernel_size,
        channels=settings.network.channels,
        skip_channels=settings.network.skip_channels,
        out_channels=outputs,
        feature_channels=recipe.conditioning.channels,
        repeat=recipe.conditioning.upsample[-1],
        source_channels=SOURCE_CHANNELS if source else 0,
    )
    return ConditionerNetwork(wavenet, settings.min_log_scale)
