"""The densities that bijections of noise define."""

from typing import NamedTuple

from torch import Tensor

from wavedistill.flows.bases import Base
from wavedistill.flows.elementwise import Affine, Elementwise, Parameters
from wavedistill.flows.transforms import Autoregressive, Composition, Context, SequentialDirectionError, Transform


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
            raise ValueError("a mixture has no shift and log_scale of its own")
        shift, log_scale = self.parameters
        return shift, log_scale


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

    def conditionals(self, x: Tensor) -> Conditionals:
        """The density of each step of x (B, T) given the steps before it, for one masked autoregressive flow.

        Raises:
            SequentialDirectionError: for any other transform.
        """
        conditioned = [(self.transform, self.context)]
        if isinstance(self.transform, Composition):
            conditioned = self.transform.conditioned(self.context)
        match conditioned:
            case [(Autoregressive(reads="x") as flow, own)]:
                return Conditionals(self.base, flow.elementwise, flow.conditioner(x, own))
        raise SequentialDirectionError("only a single masked autoregressive flow has its conditionals at hand")

    def rsample_and_conditionals(self, noise: Tensor) -> tuple[Tensor, Conditionals]:
        """The sample x (B, T) of the noise (B, T), and the density of each x_t given the noise before t.

        Raises:
            ValueError: if a flow is not affine; only then is their composition (see `Composition`).
        """
        flows = self.transform.parts if isinstance(self.transform, Composition) else [self.transform]
        if not all(isinstance(flow, Autoregressive) and isinstance(flow.elementwise, Affine) for flow in flows):
            raise ValueError("only affine flows compose to an affine function of the noise")
        x, log_scale = self.transform(noise, self.context)
        return x, Conditionals(self.base, Affine(), (x - log_scale.exp() * noise, log_scale))

    def rsample_and_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The sample x (B, T) that the base noise (B, T) maps to, and its log density (B,)."""
        x, log_q = self.rsample_and_log_prob_steps(noise)
        return x, log_q.sum(-1)
