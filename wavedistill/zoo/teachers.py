"""The densities that are distilled: flows of another library, ours, and a model with a latent."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedistill.flows.bases import StandardNormal
from wavedistill.flows.coupling import Flip
from wavedistill.flows.distributions import FlowDistribution
from wavedistill.flows.elementwise import Affine, Elementwise
from wavedistill.flows.splines import RationalQuadraticSpline
from wavedistill.flows.transforms import Autoregressive, Bound, Transform
from wavedistill.sampling.sequential import repeated
from wavedistill.zoo.layers import Layer
from wavedistill.zoo.made import Made

BASE = StandardNormal()
MIN_LOG_SCALE = -5.0
"""Of one affine step."""
DRAWS_TO_FIT, DRAWS_TO_DISTIL, DRAWS_TO_MEASURE = 1, 8, 64
"""Of the latent, for one bound of a VAE's likelihood."""


class Teacher(nn.Module):
    """A density of points (B, D), known by its value and its draws."""

    features: int

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density (B,) of x (B, D), in nats, differentiable in x."""
        raise NotImplementedError

    def to_x(self, noise: Tensor) -> Tensor:
        """The draws (B, D) that noise (B, D) maps to."""
        raise NotImplementedError

    def rsample_and_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draws (B, D) and their log density (B,), with gradient; for flows whose draws have one."""
        x = self.to_x(noise)
        return x, self.log_prob(x)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws (count, D), without gradient."""
        with torch.no_grad():
            return self.to_x(torch.randn(count, self.features, generator=generator))

    def loss(self, x: Tensor) -> Tensor:
        """What a fit to points x (B, D) lessens, in nats: a scalar."""
        return -self.log_prob(x).mean()


class Ours(Teacher):
    r"""Flows of this package: autoregressive steps with masked perceptrons, between which the order is reversed.

    They read x (a MAF, whose density takes one pass) or z (an IAF, whose draws take one); the other direction takes as
    many passes as there are values.

    Args:
        features: D.
        reads: "x" or "z".
        steps: the number of flows.
        bins: pieces of the splines that bend each value; 0 for affine steps.
    """

    def __init__(self, features: int, reads: Literal["x", "z"], steps: int = 8, bins: int = 0) -> None:
        super().__init__()
        self.features, self.reads = features, reads
        each: Elementwise = RationalQuadraticSpline(bins, MIN_LOG_SCALE) if bins else Affine(MIN_LOG_SCALE)
        flows: list[Transform] = []
        for _ in range(steps):
            flows += [Autoregressive(Made(features, each.outputs), reads, each), Flip(features, 0)]
        self.flows = nn.ModuleList(flows)

    def distribution(self) -> FlowDistribution:
        """As the rest of the package knows it."""
        return FlowDistribution(BASE, [Bound(flow) for flow in self.flows if isinstance(flow, Transform)])

    def log_prob(self, x: Tensor) -> Tensor:
        log_prob = torch.zeros_like(x)
        for flow, _ in reversed(self.distribution().steps):
            if isinstance(flow, Autoregressive) and flow.reads == "z":
                x, parameters = repeated(flow, x)
                log_prob = log_prob - flow.elementwise.to_x(x, *parameters)[1]
            else:
                x, ladj = flow.inverse(x)
                log_prob = log_prob + ladj
        return (log_prob + BASE.log_prob(x)).sum(-1)

    def to_x(self, noise: Tensor) -> Tensor:
        for flow, _ in self.distribution().steps:
            if isinstance(flow, Autoregressive) and flow.reads == "x":
                noise, _ = repeated(flow, noise)
            else:
                noise, _ = flow(noise)
        return noise

    def rsample_and_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        if self.reads == "x":
            return super().rsample_and_log_prob(noise)
        return self.distribution().rsample_and_log_prob(noise)


class Zuko(Teacher):
    """A flow of zuko, which maps x to noise."""

    def __init__(self, features: int, flow: Any) -> None:
        super().__init__()
        self.features, self.flow = features, flow

    def log_prob(self, x: Tensor) -> Tensor:
        log_prob: Tensor = self.flow().log_prob(x)
        return log_prob

    def to_x(self, noise: Tensor) -> Tensor:
        x: Tensor = self.flow().transform.inv(noise)
        return x


class Layers(Teacher):
    """Layers of `wavedistill.zoo.layers`, one after another from x to noise."""

    def __init__(self, features: int, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.features, self.layers = features, nn.ModuleList(layers)
        self.shift, self.log_scale = (nn.Parameter(torch.zeros(features)) for _ in range(2))

    def log_prob(self, x: Tensor) -> Tensor:
        x, total = (x - self.shift) * self.log_scale.exp(), self.log_scale.sum()
        for layer in self.layers:
            x, ladj = layer(x)
            total = total + ladj
        return BASE.log_prob(x).sum(-1) + total

    def to_x(self, noise: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            if isinstance(layer, Layer):
                noise = layer.invert(noise)
        return self.shift + noise * (-self.log_scale).exp()


class Vae(Teacher):
    r"""A latent h, and Gaussians of x given h; the posterior is an IAF (Kingma et al. 2016).

    .. math:: \log p(x) \ge E_{q(h^1 \dots h^K | x)} \log \frac{1}{K} \sum_k \frac{p(x | h^k) p(h^k)}{q(h^k | x)}

    With one draw it is the ELBO, by which it is fitted; more draws make it tighter (Burda et al. 2016). `log_prob` is
    this bound: unlike a flow, a VAE does not know its density. A KL from it is too large by what the bound lacks.

    Args:
        features: D, that of the latent, too.
        hidden: units of the encoder's and the decoder's layers.
        context: values that the encoder tells the posterior's flows.
        seed: of the latent's draws.
    """

    def __init__(self, features: int, hidden: int = 64, context: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.features = features
        self.encoder = _perceptron(features, hidden, 2 * features + context)
        self.decoder = _perceptron(features, hidden, 2 * features)
        affine = Affine(MIN_LOG_SCALE)
        made = [Made(features, affine.outputs, hidden // 2, context) for _ in range(2)]
        self.posterior = nn.ModuleList(Autoregressive(conditioner, "z", affine) for conditioner in made)
        self.generator = torch.Generator().manual_seed(seed)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.bound(
            x, DRAWS_TO_FIT if self.training else DRAWS_TO_DISTIL if x.requires_grad else DRAWS_TO_MEASURE
        )

    def bound(self, x: Tensor, draws: int) -> Tensor:
        """The bound (B,) of the log density of x (B, D), from so many draws of the latent."""
        told, x = self.encoder(x), x.repeat(draws, 1)
        shift, log_scale, context = told.repeat(draws, 1).tensor_split([self.features, 2 * self.features], 1)
        noise = torch.randn(x.shape, generator=self.generator).to(x)
        latent, ladj = shift + log_scale.exp() * noise, log_scale
        flip = Flip(self.features, 0)
        for flow in self.posterior:
            latent, _ = flip(latent)
            latent, more = flow(latent, (context,))
            ladj = flip(ladj)[0] + more
        log_q = BASE.log_prob(noise).sum(1) - ladj.sum(1)
        log_weight = self.log_joint(x, latent) - log_q
        return torch.logsumexp(log_weight.unflatten(0, (draws, -1)), 0) - math.log(draws)

    def log_joint(self, x: Tensor, latent: Tensor) -> Tensor:
        """Log density (B,) of x (B, D) and latents (B, D) together."""
        shift, log_scale = self._decoded(latent)
        given = BASE.log_prob((x - shift) * (-log_scale).exp()) - log_scale
        return (given + BASE.log_prob(latent)).sum(1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        latent, noise = torch.randn(2, count, self.features, generator=generator)
        with torch.no_grad():
            shift, log_scale = self._decoded(latent)
            return shift + log_scale.exp() * noise

    def _decoded(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.decoder(latent).tensor_split(2, 1)
        # A deviation of nothing would have a density without bounds; at first it is small, or the latent is ignored.
        return shift, -3 + F.softplus(log_scale + 1)


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, outputs)
    )
