"""The densities that bijections and noise define, as a whole and step by step."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wavedistill.flows.bases import Base
from wavedistill.flows.elementwise import Affine, Elementwise, Parameters
from wavedistill.flows.transforms import Autoregressive, Bound, SequentialDirectionError


class Conditionals(NamedTuple):
    """The density of each x_t given what came before it: that of an elementwise function of base noise."""

    base: Base
    elementwise: Elementwise
    parameters: Parameters

    def log_prob_steps(self, x: Tensor) -> Tensor:
        """Log density of x (..., B, T), each step given the past of the sequence that the parameters come from."""
        z, ladj = self.elementwise.to_z(x, *self.parameters)
        return self.base.log_prob(z) + ladj

    def log_prob(self, x: Tensor) -> Tensor:
        """The sum (..., B) of `log_prob_steps`."""
        return self.log_prob_steps(x).sum(-1)

    def noise(self, x: Tensor) -> Tensor:
        """The base noise (..., B, T) that x is a draw of."""
        return self.elementwise.to_z(x, *self.parameters)[0]

    def rsample(self, noise: Tensor) -> Tensor:
        """A draw of every step on its own from base noise (..., B, T); without gradient where it is a mixture."""
        return self.elementwise.to_x(noise, *self.parameters)[0]

    @property
    def affine(self) -> tuple[Tensor, Tensor]:
        """Shift and log_scale (B, T).

        Raises:
            ValueError: if the function is not affine.
        """
        if not isinstance(self.elementwise, Affine):
            raise ValueError(f"{type(self.elementwise).__name__} is more than a shift and a log_scale")
        shift, log_scale = self.parameters
        return shift, log_scale


class FlowDistribution:
    r"""The density of x = f(z) where z is drawn from the base distribution, and f is one transform after another.

    .. math:: \log p(x) = \sum_t \log p_{base}(z_t) - \log|\det \partial x / \partial z|

    K affine flows compose to an affine function of the noise (van den Oord et al. 2018, eq. 9):

    .. math:: \mu_{tot} = \sum_i \mu_i \prod_{j>i} \sigma_j, \qquad \sigma_{tot} = \prod_i \sigma_i

    Args:
        base: of the noise.
        steps: the transforms from z to x, each with its context.
    """

    def __init__(self, base: Base, steps: Sequence[Bound]) -> None:
        self.base, self.steps = base, steps

    def __repr__(self) -> str:
        parts = [f"z of {type(self.base).__name__}", *(step.transform.summary() for step in self.steps), "x"]
        return f"{type(self).__name__}({' -> '.join(parts)})"

    def to_x(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x = f(z) and log|dx/dz|, (B, T) each, from noise z (B, T).

        Raises:
            SequentialDirectionError: for a masked autoregressive flow, which samples step by step.
        """
        total = torch.zeros_like(z)
        for step in self.steps:
            z, ladj = step.forward(z)
            total = total + ladj
        return z, total

    def to_z(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z = f^-1(x) and log|dz/dx|, (B, T) each, of a signal x (B, T).

        Raises:
            SequentialDirectionError: for an inverse autoregressive flow, which is inverted step by step.
        """
        total = torch.zeros_like(x)
        for step in reversed(self.steps):
            x, ladj = step.inverse(x)
            total = total + ladj
        return x, total

    def log_prob_steps(self, x: Tensor) -> Tensor:
        """Per-step terms (B, T) of the log density of x (B, T), in nats.

        Raises:
            SequentialDirectionError: for an inverse autoregressive flow: it knows the density of its own samples only.
        """
        z, ladj = self.to_z(x)
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
        x, ladj = self.to_x(noise)
        return x, self.base.log_prob(noise) - ladj

    def conditionals(self, x: Tensor) -> Conditionals:
        """The density of each step of x (B, T) given the steps before it, for one masked autoregressive flow.

        Raises:
            SequentialDirectionError: for any other transform.
        """
        match self.steps:
            case [Bound(Autoregressive(reads="x") as flow, context)]:
                return Conditionals(self.base, flow.elementwise, flow.step_parameters(x, context))
        raise SequentialDirectionError("only a single masked autoregressive flow has its conditionals at hand")

    def rsample_and_conditionals(self, noise: Tensor) -> tuple[Tensor, Conditionals]:
        """The sample x (B, T) of the noise (B, T), and the density of each x_t given the noise before t.

        Raises:
            ValueError: if a flow is not affine; only then is their composition.
        """
        flows = [step.transform for step in self.steps if isinstance(step.transform, Autoregressive)]
        affine = [flow.elementwise for flow in flows if isinstance(flow.elementwise, Affine)]
        if not affine or len(affine) < len(self.steps):
            raise ValueError("only affine flows compose to an affine function of the noise")
        x, log_scale = self.to_x(noise)
        return x, Conditionals(self.base, affine[-1], (x - log_scale.exp() * noise, log_scale))

    def rsample_and_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The sample x (B, T) that the base noise (B, T) maps to, and its log density (B,)."""
        x, log_q = self.rsample_and_log_prob_steps(noise)
        return x, log_q.sum(-1)
