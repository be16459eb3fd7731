"""Increasing functions of one variable, whose parameters a conditioner computes for every step."""

from typing import Protocol

import torch
from torch import Tensor

from wavedistill.flows.bases import Base

Parameters = tuple[Tensor, ...]
"""What an elementwise bijection is given for every step: tensors of shape (B, T), or (B, T, K) for K components."""


class Elementwise(Protocol):
    """An increasing function of one variable, given its parameters, and its inverse."""

    def to_x(self, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """x and log dx/dz, in the shape of z."""

    def to_z(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """z and log dz/dx, in the shape of x."""


class Affine:
    r""":math:`x = \mu + \sigma z`; the parameters are the shift and the log_scale."""

    def to_x(self, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = parameters
        return shift + log_scale.exp() * z, log_scale

    def to_z(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = parameters
        return (x - shift) * (-log_scale).exp(), -log_scale


class MixtureCdf:
    r"""Turns standard logistic noise into a mixture of K scaled and shifted bases, through its distribution function.

    .. math:: z = \operatorname{logit} F(x), \qquad F(x) = \sum_k \pi_k F_k\Big(\frac{x - \mu_k}{\sigma_k}\Big), \qquad
              \frac{dz}{dx} = \frac{f(x)}{F(x) (1 - F(x))}

    so that the density of x is the mixture's (Ho et al. 2019, *Flow++*). Both tails are computed as logarithms, so that
    neither they nor small scales lose the gradient. The inverse is found by Newton's method inside a bracket, to
    rounding, and has no gradient; noise beyond 80, which nobody draws, overflows in float32. The parameters are
    unnormalised log weights, shifts and log_scales, (..., K) each.

    Args:
        component: the base whose copies are mixed.
    """

    ITERATIONS = 100
    """At most; about ten are usual."""
    LOOK_EVERY = 8
    """Iterations on a GPU between two looks at whether all has settled."""

    def __init__(self, component: Base) -> None:
        self.component = component

    def to_z(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        weights, shift, log_scale = parameters
        log_weights = weights.log_softmax(-1)
        u = (x.unsqueeze(-1) - shift) * (-log_scale).exp()
        below = (log_weights + self.component.log_cdf(u)).logsumexp(-1)
        above = (log_weights + self.component.log_cdf(-u)).logsumexp(-1)
        log_density = (log_weights + self.component.log_prob(u) - log_scale).logsumexp(-1)
        return below - above, log_density - below - above

    @torch.no_grad()
    def to_x(self, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        _, shift, log_scale = parameters
        # Where each component alone would have it: the mixture lies between the outermost.
        alone = shift + log_scale.exp() * self.component.quantile(z).unsqueeze(-1)
        low, high = alone.amin(-1), alone.amax(-1)
        x = (low + high) / 2
        for i in range(1, self.ITERATIONS + 1):
            found, slope = self.to_z(x, *parameters)
            low, high = torch.where(found < z, x, low), torch.where(found < z, high, x)
            step, eps = (found - z) * (-slope).exp(), torch.finfo(x.dtype).eps
            settled = (step.abs() <= 2 * eps * x.abs()) | ((found - z).abs() <= 4 * eps * (1 + z.abs()))
            inside = (x - step > low) & (x - step < high)
            x = torch.where(settled | inside, x - step, (low + high) / 2)
            # To look at a value stops a GPU until it is there; once settled, further steps change nothing.
            if (x.device.type == "cpu" or i % self.LOOK_EVERY == 0) and settled.all():
                break
        return x, -self.to_z(x, *parameters)[1]

    def by_component(self, choice: Tensor, noise: Tensor, *parameters: Tensor) -> Tensor:
        """Draws of the same density without the inverse, as two draws: uniform in [0, 1), and from the component."""
        weights, shift, log_scale = parameters
        borders = weights.softmax(-1).cumsum(-1)
        k = (choice.unsqueeze(-1) > borders).sum(-1, keepdim=True).clamp_max(weights.shape[-1] - 1)
        return (shift.gather(-1, k) + log_scale.gather(-1, k).exp() * noise.unsqueeze(-1)).squeeze(-1)
