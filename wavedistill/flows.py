r"""Bijections between noise z and signal x, and the densities they define; knows neither audio nor networks.

Throughout, z and x are (B, T), and `ladj` holds the per-step terms (B, T) of the log absolute determinant of the
Jacobian, so that a mask or a per-step estimator needs no second implementation; their sum over T is log|det J|.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SequentialDirectionError(RuntimeError):
    """Raised by the direction of an autoregressive bijection that one network call cannot compute."""


class Base(Protocol):
    """A distribution of independent noise, one value a step; `std` is its standard deviation."""

    std: float

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of each value in nats, in the shape of z."""

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw from the base distribution with the generator, on the generator's device."""


class StandardNormal:
    r"""Standard normal noise: :math:`\log p(z) = -\frac{1}{2} (z^2 + \log 2\pi)`."""

    std = 1.0

    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * (z.square() + math.log(2 * math.pi))

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)


class StandardLogistic:
    r"""Standard logistic noise: :math:`\log p(z) = -|z| - 2 \log(1 + e^{-|z|})`, the base of Parallel WaveNet."""

    std = math.pi / math.sqrt(3)

    def log_prob(self, z: Tensor) -> Tensor:
        return -z.abs() - 2 * F.softplus(-z.abs())

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        # The open interval: 0 would map to minus infinity.
        uniform = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
        return torch.logit(uniform, eps=1e-12).float()


BASES: dict[str, Base] = {"normal": StandardNormal(), "logistic": StandardLogistic()}


Context = Any
"""What a transform is conditioned on: for a network, features; for a `Composition`, a sequence of one for each part."""


class Conditioner(Protocol):
    """A strictly causal function: the parameters at t see only the input before t."""

    def __call__(self, x: Tensor, /, context: Context) -> tuple[Tensor, Tensor]:
        """Shift and log_scale at every t, (B, T) each, of the input (B, T)."""


class Transform(nn.Module):
    """A bijection: `forward` is z -> x, `inverse` is x -> z, each with its `ladj`, each at most one network call."""

    def forward(self, z: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """x = f(z) and log|dx/dz|, (B, T) each."""
        raise NotImplementedError

    def inverse(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """z = f^-1(x) and log|dz/dx|, (B, T) each."""
        raise NotImplementedError


class AutoregressiveAffine(Transform):
    r"""Affine autoregressive bijection whose conditioner reads the past of one of its two sides.

    .. math:: x_t = \mu_t + \sigma_t z_t, \quad z_t = (x_t - \mu_t) / \sigma_t, \quad \log|\det J| = \sum_t \log\sigma_t

    With `reads="x"` it is a masked autoregressive flow (Papamakarios et al. 2017): mu_t, sigma_t = c(x_<t), density in
    parallel. With `reads="z"` it is an inverse autoregressive flow (Kingma et al. 2016): mu_t, sigma_t = c(z_<t),
    sampling in parallel. The other direction takes T steps and lives in `wavedistill.sampling`.

    Raises:
        SequentialDirectionError: when the direction asked for is the sequential one.
    """

    def __init__(self, conditioner: Conditioner, reads: Literal["x", "z"]) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.reads = reads

    def forward(self, z: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        if self.reads == "x":
            raise SequentialDirectionError(
                "x of a masked autoregressive flow is drawn step by step: wavedistill.sampling"
            )
        return self.to_x(z, *self.conditioner(z, context))

    def inverse(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        if self.reads == "z":
            raise SequentialDirectionError(
                "z of an inverse autoregressive flow is found step by step: wavedistill.sampling"
            )
        return self.to_z(x, *self.conditioner(x, context))

    @staticmethod
    def to_x(z: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """x and log|dx/dz| from parameters already in hand, any shape."""
        return shift + log_scale.exp() * z, log_scale

    @staticmethod
    def to_z(x: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """z and log|dz/dx| from parameters already in hand, any shape."""
        return (x - shift) * (-log_scale).exp(), -log_scale


class Scale(Transform):
    r"""Fixed scaling :math:`x = s z`, which lets the flows before it work at unit variance."""

    log_scale: Tensor

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.register_buffer("log_scale", torch.tensor(math.log(scale)))

    def forward(self, z: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return z * self.log_scale.exp(), self.log_scale.expand_as(z)

    def inverse(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return x * (-self.log_scale).exp(), -self.log_scale.expand_as(x)


class Composition(Transform):
    r"""Transforms applied one after another, from z to x in the order given; their ladj terms add up.

    K affine flows of this kind compose to an affine function of the noise (van den Oord et al. 2018, eq. 9):

    .. math:: \mu_{tot} = \sum_i \mu_i \prod_{j>i} \sigma_j, \qquad \sigma_{tot} = \prod_i \sigma_i
    """

    def __init__(self, parts: Iterable[Transform]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def conditioned(self, context: Context) -> list[tuple[Transform, Context]]:
        """Each part with its own context, from z to x."""
        contexts = [None] * len(self.parts) if context is None else context
        return list(zip(cast(list[Transform], list(self.parts)), contexts, strict=True))

    def forward(self, z: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(z)
        for part, own in self.conditioned(context):
            z, ladj = part(z, own)
            total = total + ladj
        return z, total

    def inverse(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(x)
        for part, own in reversed(self.conditioned(context)):
            x, ladj = part.inverse(x, own)
            total = total + ladj
        return x, total


class FlowDistribution:
    r"""The density of x = f(z) where z is drawn from the base distribution.

    .. math:: \log p(x) = \sum_t \log p_{base}(z_t) - \log|\det \partial x / \partial z|
    """

    def __init__(self, transform: Transform, base: Base, context: Context = None) -> None:
        self.transform, self.base, self.context = transform, base, context

    def log_prob_steps(self, x: Tensor) -> Tensor:
        """Per-step terms (B, T) of the log density of x (B, T), in nats.

        Raises:
            SequentialDirectionError: for an inverse autoregressive flow: it knows the density of its own samples only.
        """
        z, ladj = self.transform.inverse(x, self.context)
        return self.base.log_prob(z) + ladj

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density (B,) of x (B, T), in nats."""
        return self.log_prob_steps(x).sum(-1)

    def rsample_and_log_prob_steps(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The sample x (B, T) that the base noise (B, T) maps to, and the per-step terms (B, T) of its log density.

        The noise is still in hand, so nothing is inverted, and the gradient flows through both.

        Raises:
            SequentialDirectionError: for a masked autoregressive flow, which samples step by step.
        """
        x, ladj = self.transform(noise, self.context)
        return x, self.base.log_prob(noise) - ladj

    def rsample_and_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The sample x (B, T) that the base noise (B, T) maps to, and its log density (B,)."""
        x, log_q = self.rsample_and_log_prob_steps(noise)
        return x, log_q.sum(-1)
