"""The distributions of independent noise that a flow starts from."""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Base(Protocol):
    """A distribution of independent noise, one value a step; `std` is its standard deviation."""

    std: float

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of each value in nats, in the shape of z (any)."""

    def log_cdf(self, z: Tensor) -> Tensor:
        """Log of the probability below each value, in the shape of z (any); above it is that below its negative."""

    def quantile(self, logit: Tensor) -> Tensor:
        """The value below which lies the probability with a given log-odds, in their shape (any)."""

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draws (any shape) from the base distribution with the generator, on the generator's device, in float32."""


class StandardNormal(Base):
    r"""Standard normal noise: :math:`\log p(z) = -\frac{1}{2} (z^2 + \log 2\pi)`."""

    std = 1.0

    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * (z.square() + math.log(2 * math.pi))

    def log_cdf(self, z: Tensor) -> Tensor:
        return torch.special.log_ndtr(z)

    def quantile(self, logit: Tensor) -> Tensor:
        # From the nearer tail, whose probability does not round to one.
        return torch.special.ndtri(torch.sigmoid(-logit.abs())) * -logit.sign()

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)


class StandardLogistic(Base):
    r"""Standard logistic noise: :math:`\log p(z) = -|z| - 2 \log(1 + e^{-|z|})`, the base of Parallel WaveNet."""

    std = math.pi / math.sqrt(3)

    def log_prob(self, z: Tensor) -> Tensor:
        return -z.abs() - 2 * F.softplus(-z.abs())

    def log_cdf(self, z: Tensor) -> Tensor:
        return F.logsigmoid(z)

    def quantile(self, logit: Tensor) -> Tensor:
        return logit

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        # The open interval: 0 would map to minus infinity.
        uniform = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
        return torch.logit(uniform, eps=1e-12).float()


BASES: dict[str, Base] = {"normal": StandardNormal(), "logistic": StandardLogistic()}
