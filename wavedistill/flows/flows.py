r"""Bijections between noise z and signal x, and the densities they define; knows neither audio nor networks.

Throughout, z and x are (B, T), and `ladj` holds the per-step terms (B, T) of the log absolute determinant of the
Jacobian, so that a mask or a per-step estimator needs no second implementation; their sum over T is log|det J|.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Protocol, cast

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

    def log_cdf(self, z: Tensor) -> Tensor:
        """Log of the probability below each value; above it is that below its negative, for both are symmetric."""

    def quantile(self, logit: Tensor) -> Tensor:
        """The value below which lies the probability with a given log-odds."""

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw from the base distribution with the generator, on the generator's device."""


class StandardNormal:
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


class StandardLogistic:
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


Context = Any
"""What a transform is conditioned on: for a network, features; for a `Composition`, a sequence of one for each part."""


Parameters = tuple[Tensor, ...]
"""What an elementwise bijection is given for every step: tensors of shape (B, T), or (B, T, K) for K components."""


class Conditioner(Protocol):
    """A strictly causal function: the parameters at t see only the input before t."""

    def __call__(self, x: Tensor, /, context: Context) -> Parameters:
        """The parameters of an elementwise bijection at every t of the input (B, T)."""


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


class Transform(nn.Module):
    """A bijection: `forward` is z -> x, `inverse` is x -> z, each with its `ladj`, each at most one network call."""

    def forward(self, z: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """x = f(z) and log|dx/dz|, (B, T) each."""
        raise NotImplementedError

    def inverse(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """z = f^-1(x) and log|dz/dx|, (B, T) each."""
        raise NotImplementedError


class Autoregressive(Transform):
    r"""Elementwise bijections whose parameters a conditioner computes from the past of one of its two sides.

    .. math:: x_t = f(z_t; \theta_t), \qquad z_t = f^{-1}(x_t; \theta_t), \qquad
              \log|\det J| = \sum_t \log f'(z_t; \theta_t)

    With `reads="x"` it is a masked autoregressive flow (Papamakarios et al. 2017): theta_t = c(x_<t), density in
    parallel. With `reads="z"` it is an inverse autoregressive flow (Kingma et al. 2016): theta_t = c(z_<t), sampling in
    parallel. The other direction takes T steps and lives in `wavedistill.sampling.sampling`.

    Raises:
        SequentialDirectionError: when the direction asked for is the sequential one.
    """

    def __init__(self, conditioner: Conditioner, reads: Literal["x", "z"], elementwise: Elementwise) -> None:
        super().__init__()
        self.conditioner, self.reads, self.elementwise = conditioner, reads, elementwise

    def forward(self, z: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        if self.reads == "x":
            raise SequentialDirectionError(
                "x of a masked autoregressive flow is drawn step by step: wavedistill.sampling.sampling"
            )
        return self.elementwise.to_x(z, *self.conditioner(z, context))

    def inverse(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        if self.reads == "z":
            raise SequentialDirectionError(
                "z of an inverse autoregressive flow is found step by step: wavedistill.sampling.sampling"
            )
        return self.elementwise.to_z(x, *self.conditioner(x, context))


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


class Conditionals(NamedTuple):
    """The density of each x_t given what came before it: that of an elementwise function of base noise."""

    base: Base
    elementwise: Elementwise
    parameters: Parameters

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of x (..., B, T), each step given the past of the sequence that the parameters come from."""
        z, ladj = self.elementwise.to_z(x, *self.parameters)
        return self.base.log_prob(z) + ladj

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
