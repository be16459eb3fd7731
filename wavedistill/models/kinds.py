"""The kinds of models that a recipe knows, and how its tables become one."""

from collections.abc import Sequence

import torch

from wavedistill.flows.bases import BASES, Base
from wavedistill.flows.coupling import ActNorm, CouplingLayer, Flip, InvertibleConv
from wavedistill.flows.elementwise import Affine, Elementwise, MixtureCdf, Shift
from wavedistill.flows.polynomials import SumOfSquares
from wavedistill.flows.splines import RationalQuadraticSpline
from wavedistill.flows.transforms import Autoregressive, Scale, Transform
from wavedistill.models.waveform import WaveformModel
from wavedistill.networks.around import WaveNetAround
from wavedistill.networks.encoder import MelEncoder
from wavedistill.networks.wavenet import WaveNet
from wavedistill.recipe.models import Coupling, Iaf, Maf
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech.linear_prediction import LinearPrediction, LinearPredictionFromMel, Preemphasis
from wavedistill.speech.pitch import PITCH_CHANNELS, SOURCE_CHANNELS, PeriodicSource, PitchPredictor
from wavedistill.tools.imports import imported


def build(recipe: Recipe, name: str, seed: int) -> WaveformModel:
    """The untrained model of a recipe that has a name, with weights drawn from the seed.

    Raises:
        RecipeError: if it is of a kind of the user's own, which cannot be imported.
    """
    settings = recipe.models[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(settings, Maf):
            return maf(settings, recipe)
        if isinstance(settings, Iaf):
            return iaf(settings, recipe)
        if isinstance(settings, Coupling):
            return coupling(settings, recipe)
        return imported(settings.kind, f"models.{name}.kind")(settings, recipe)


def maf(settings: Maf, recipe: Recipe) -> WaveformModel:
    """A masked autoregressive flow, then the last transform of the recipe."""
    elementwise: Elementwise = Affine(settings.min_log_scale)
    if settings.components > 1:
        elementwise = MixtureCdf(BASES[settings.base], settings.components, settings.min_log_scale)
    if settings.elementwise == "spline":
        elementwise = RationalQuadraticSpline(settings.bins, settings.min_log_scale)
    elif settings.elementwise == "sos":
        elementwise = SumOfSquares(settings.polynomials, settings.degree, settings.min_log_scale)
    base = BASES[settings.noise]
    network = _network(recipe, settings, settings.layers, elementwise)
    network.start_from(elementwise.start(base.std))
    return around([Autoregressive(network, "x", elementwise)], base, recipe, source=False)


def iaf(settings: Iaf, recipe: Recipe) -> WaveformModel:
    """K inverse autoregressive flows, then the last transform of the recipe."""
    base, elementwise = BASES[settings.base], Affine(settings.min_log_scale)
    groups = zip(settings.flow_layers, settings.squeezes, settings.borders, strict=True)
    networks = [
        _network(recipe, settings, layers, elementwise, settings.periodic_source, squeeze, border)
        for layers, squeeze, border in groups
    ]
    networks[-1].start_from(elementwise.start(base.std))
    flows = [Autoregressive(network, "z", elementwise) for network in networks]
    return around(flows, base, recipe, source=settings.periodic_source)


def coupling(settings: Coupling, recipe: Recipe) -> WaveformModel:
    """Steps of normalisation, mixing and coupling, then the last transform of the recipe."""
    bijections: dict[str, Elementwise] = {
        "affine": Affine(settings.min_log_scale),
        "additive": Shift(),
        "spline": RationalQuadraticSpline(settings.bins, settings.min_log_scale),
    }
    mixing = {"conv1x1": InvertibleConv, "flip": Flip}[settings.mixing]
    elementwise = bijections[settings.coupling]
    flows: list[Transform] = []
    for left in settings.left:  # from residual to noise
        kept = left + (settings.squeeze - left) // 2
        network = WaveNetAround(
            layers=settings.layers,
            **settings.network.model_dump(),
            in_channels=kept,
            out_channels=(settings.squeeze - kept) * elementwise.outputs,
            feature_channels=recipe.conditioning.channels,
            repeat=recipe.conditioning.upsample[-1],
            squeeze=settings.squeeze,
            source_channels=SOURCE_CHANNELS if settings.periodic_source else 0,
        )
        flows += [ActNorm(settings.squeeze, left)] if settings.actnorm else []
        flows.append(mixing(settings.squeeze, left))
        flows.append(CouplingLayer(network, settings.squeeze, kept, elementwise))
    return around(list(reversed(flows)), BASES["normal"], recipe, source=settings.periodic_source)


def around(flows: Sequence[Transform], base: Base, recipe: Recipe, *, source: bool) -> WaveformModel:
    """A model of a recipe's units: flows between its conditioning and its last transform.

    Args:
        flows: from noise to residual.
        base: the distribution of the noise.
        recipe: the experiment.
        source: whether the flows' networks read a periodic source.
    """
    conditioning, prediction = recipe.conditioning, recipe.linear_prediction
    # `prepare` brings every recording to this level: without linear prediction, the start is noise as loud as the data.
    level = 10 ** (recipe.audio.level_db / 20)
    envelope: LinearPredictionFromMel | Preemphasis | None = None
    if prediction.order:
        envelope = LinearPredictionFromMel(recipe.audio, prediction.order)
    elif prediction.preemphasis:
        envelope = Preemphasis(prediction.preemphasis, level)
    # A group that begins before a border between blocks of a stream ends after it.
    nets = [module for flow in flows for module in flow.modules() if isinstance(module, WaveNet)]
    ahead = max((net.border for net in nets), default=0)
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
        PeriodicSource(recipe.audio, ahead) if source else None,
    )


def _network(
    recipe: Recipe,
    settings: Maf | Iaf,
    layers: int,
    elementwise: Elementwise,
    source: bool = False,
    squeeze: int = 1,
    border: int = 0,
) -> WaveNet:
    return WaveNet(
        layers=layers,
        **settings.network.model_dump(),
        out_channels=elementwise.outputs,
        feature_channels=recipe.conditioning.channels,
        repeat=recipe.conditioning.upsample[-1],
        source_channels=SOURCE_CHANNELS if source else 0,
        squeeze=squeeze,
        border=border,
    )
