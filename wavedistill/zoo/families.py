"""The table of families: each of them one entry."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import zuko
from torch import nn
from zuko import flows as theirs
from zuko.lazy import Flow, UnconditionalDistribution, UnconditionalTransform

from wavedistill.zoo.layers import Bend, Contraction, MaskedConvolution, Planar, Radial, Residual, Sylvester
from wavedistill.zoo.made import Made
from wavedistill.zoo.teachers import Layers, Ours, Teacher, Vae, Zuko

HIDDEN = (64, 64)
NETWORKS = (zuko.nn.MLP, zuko.nn.MaskedMLP, Made, Bend, Radial, Contraction, nn.Sequential)
"""What counts as a call of a network, where it is not part of another."""


class Family(NamedTuple):
    """A family of densities.

    Attributes:
        title: what people call it.
        year: of its paper.
        formula: in a line, from point x to noise z.
        group: of the page's sections.
        density: how a density is found, in a few words.
        draws: how it draws.
        source: whose code it is.
        make: an untrained one, from the number of values in a point.
        own: the density that shows it best, beside those that all families have.
        pace: its steps, as a share of those of a cheap family.
        differentiable: whether its draws have a gradient, so that it may be fitted where only a density is known.
        drawn: points in its picture, and in what is measured from its draws: fewer where draws are slow.
    """

    title: str
    year: int
    formula: str
    group: str
    density: str
    draws: str
    source: str
    make: Callable[[int], Teacher]
    own: str
    pace: float = 1.0
    differentiable: bool = False
    drawn: int = 20000


ONE_PASS, ONE_EACH = "one pass", "a pass for each value"


def _stack(features: int, *layers: Any) -> Zuko:
    normal = UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(features), torch.ones(features), buffer=True
    )
    return Zuko(features, Flow(list(layers), normal))


def _coupled(features: int, number: int, **options: Any) -> Any:
    mask = torch.arange(features) % 2 == number % 2
    return theirs.coupling.GeneralCouplingTransform(features, mask=mask, hidden_features=HIDDEN, **options)


def _nice(features: int) -> Teacher:
    additive: dict[str, Any] = {"univariate": zuko.transforms.AdditiveTransform, "shapes": [()]}
    scale = theirs.gaussianization.ElementWiseTransform(features)
    return _stack(features, *(_coupled(features, i, **additive) for i in range(8)), scale)


def _real_nvp(features: int) -> Teacher:
    return _stack(features, *(_coupled(features, i) for i in range(8)))


def _glow(features: int) -> Teacher:
    layers: list[Any] = []
    for _ in range(8):
        start = torch.eye(features) + 0.3 * torch.randn(features, features)
        layers.append(UnconditionalTransform(zuko.transforms.LULinearTransform, start))
        layers.append(_coupled(features, 0))
    return _stack(features, *layers)


def _theirs(make: Callable[..., Any], features: int, **options: Any) -> Teacher:
    return Zuko(features, make(features, hidden_features=HIDDEN, **options))


def _layers(make: Callable[..., Any], count: int, features: int) -> Teacher:
    return Layers(features, [make(features) for _ in range(count)])


def _convolutions(features: int) -> Teacher:
    return Layers(features, [MaskedConvolution(features, reverse=i % 2 == 1) for i in range(8)])


SIMPLE, COUPLING, SEQUENTIAL = "Folds", "Coupling", "Autoregressive, by an affine function"
MONOTONIC, WHOLE, LATENT = "Autoregressive, by a monotonic function", "Residual and continuous", "With a latent"

FAMILIES: dict[str, Family] = {
    "planar": Family(
        "Planar",
        2015,
        "z = x + u tanh(wᵀx + b)",
        SIMPLE,
        ONE_PASS,
        "the root of one equation a layer",
        "ours",
        partial(_layers, Planar, 24),
        "rings",
    ),
    "radial": Family(
        "Radial",
        2015,
        "z = x + β (x − c) / (α + |x − c|)",
        SIMPLE,
        ONE_PASS,
        "a closed form",
        "ours",
        partial(_layers, Radial, 24),
        "gaussians",
    ),
    "sylvester": Family(
        "Sylvester",
        2018,
        "z = x + Q R tanh(R̃ Qᵀx + b)",
        SIMPLE,
        ONE_PASS,
        "the root of one equation a value and layer",
        "ours",
        partial(_layers, Sylvester, 12),
        "pinwheel",
    ),
    "nice": Family(
        "NICE",
        2014,
        "z_b = x_b + m(x_a)",
        COUPLING,
        ONE_PASS,
        ONE_PASS,
        "zuko",
        _nice,
        "pinwheel",
        differentiable=True,
    ),
    "realnvp": Family(
        "Real-NVP",
        2016,
        "z_b = x_b · exp s(x_a) + m(x_a)",
        COUPLING,
        ONE_PASS,
        ONE_PASS,
        "zuko",
        _real_nvp,
        "checkerboard",
        differentiable=True,
    ),
    "glow": Family(
        "Glow",
        2018,
        "Real-NVP, with x ← L U x between its steps",
        COUPLING,
        ONE_PASS,
        ONE_PASS,
        "zuko",
        _glow,
        "waves",
        differentiable=True,
    ),
    "maf": Family(
        "MAF, by MADE",
        2017,
        "z_t = (x_t − μ(x_<t)) / σ(x_<t)",
        SEQUENTIAL,
        ONE_PASS,
        ONE_EACH,
        "ours",
        partial(Ours, reads="x"),
        "gaussians",
        differentiable=True,
    ),
    "iaf": Family(
        "IAF",
        2016,
        "x_t = μ(z_<t) + σ(z_<t) z_t",
        SEQUENTIAL,
        ONE_EACH,
        ONE_PASS,
        "ours",
        partial(Ours, reads="z"),
        "waves",
        differentiable=True,
    ),
    "naf": Family(
        "NAF",
        2018,
        "z_t = a monotonic network of x_t, told by x_<t",
        MONOTONIC,
        ONE_PASS,
        "a search for each value",
        "zuko",
        partial(_theirs, theirs.NAF, transforms=2, network={"hidden_features": (32, 32)}),
        "checkerboard",
        drawn=2000,
    ),
    "sos": Family(
        "Sum of squares",
        2019,
        "z_t = c + ∫₀^x_t Σ_k p_k(u; x_<t)² du",
        MONOTONIC,
        ONE_PASS,
        "a search for each value",
        "zuko",
        partial(_theirs, theirs.SOSPF, transforms=3),
        "rings",
        drawn=2000,
    ),
    "umnn": Family(
        "UMNN",
        2019,
        "z_t = c(x_<t) + ∫₀^x_t g(u; x_<t) du, g > 0",
        MONOTONIC,
        "32 network calls for an integral",
        "a search for each value",
        "zuko",
        partial(_theirs, theirs.UNAF, transforms=1, signal=8, network={"hidden_features": (16, 16)}),
        "gaussians",
        pace=0.5,
        drawn=400,
    ),
    "spline": Family(
        "Neural spline",
        2019,
        "z_t = a rational-quadratic spline of x_t, told by x_<t",
        MONOTONIC,
        ONE_PASS,
        ONE_EACH,
        "zuko",
        partial(_theirs, theirs.NSF, transforms=3),
        "spirals",
        pace=0.7,
        differentiable=True,
    ),
    "residual": Family(
        "i-ResNet, residual flow",
        2019,
        "z = x + g(x), Lip g < 1",
        WHOLE,
        ONE_PASS,
        "x ← z − g(x), until it stands",
        "ours",
        partial(_layers, Residual, 12),
        "swissroll",
    ),
    "ffjord": Family(
        "FFJORD",
        2019,
        "dx/dt = f(x, t)",
        WHOLE,
        "an equation solved in time",
        "the same, backwards",
        "zuko",
        partial(_theirs, theirs.CNF, atol=1e-3, rtol=1e-3),
        "spirals",
        pace=0.3,
    ),
    "mintnet": Family(
        "MintNet, masked convolution",
        2019,
        "z = t x + w′ * tanh(w * x + b), both causal",
        WHOLE,
        ONE_PASS,
        "a search for each value",
        "ours",
        _convolutions,
        "rings",
        drawn=2000,
    ),
    "vae": Family(
        "VAE, its posterior an IAF",
        2016,
        "p(x) = ∫ p(x | h) p(h) dh",
        LATENT,
        "a bound only, from draws of the latent",
        ONE_PASS,
        "ours",
        Vae,
        "swissroll",
        pace=1.5,
    ),
}
