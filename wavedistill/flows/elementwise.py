"""Increasing functions of one variable: what a flow does to each value, given the parameters of its step.

Each comes twice: in torch, for all steps at once and with gradients, and as an overload of `solve_step`, for one value
in compiled code. A new one is a class, the constants of its step, and an overload that answers for their class.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import overload
from torch import Tensor

from wavedistill.flows.bases import Base, StandardNormal
from wavedistill.flows.roots import ITERATIONS, root

Parameters = tuple[Tensor, ...]
"""What an elementwise bijection is given for every step: tensors of shape (B, T), or (B, T, K) for K components."""
StepConstants = tuple[Any, ...]
"""What a step in compiled code depends on beside its data: a `NamedTuple`, by whose class `solve_step` is chosen."""


class Elementwise(Protocol):
    """An increasing function of one variable, given its parameters, and its inverse.

    Attributes:
        outputs: what a network gives for each step, in numbers.
        recordable: whether neither direction looks at a value, so that a CUDA graph of it can be recorded.
    """

    outputs: int
    recordable: bool

    def parameters(self, raw: Tensor) -> Parameters:
        """The parameters that a network's outputs (..., outputs) stand for."""

    def start(self, std: float) -> Tensor:
        """Outputs (outputs,) of which x has zero mean and unit variance, where the noise has a standard deviation."""

    def step(self, to_x: bool) -> StepConstants:
        """The constants of one step to x, or to z, in compiled code."""

    def to_x(self, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """x and log dx/dz, in the shape of z."""

    def to_z(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """z and log dz/dx, in the shape of x."""


def bounded(raw: Tensor, bound: float) -> Tensor:
    r"""A log-scale above a bound, by a softplus, whose gradient does not end at it: :math:`b + softplus(r - b)`.

    It is r where r (any shape) is well above the bound b.
    """
    # softplus(d) = (d + |d|) / 2 - log sigmoid |d|: without overflow, in a fifth of the time of torch's own.
    above = raw - bound
    distance = above.abs()
    return bound + 0.5 * (above + distance) - distance.sigmoid().log()


@numba.njit(cache=True)
def softplus(x: float) -> float:
    """For one value, in compiled code."""
    return x if x > 20 else math.log1p(math.exp(x))  # as torch has it


def solve_step(raw: np.ndarray, given: float, constants: StepConstants) -> float:
    """The other side of one step, from a network's outputs (outputs,), the known side, and the step's constants."""
    raise NotImplementedError("compiled code only")


def is_step(kind: types.Type, constants: type) -> bool:
    """Whether a compiled step has constants of a class."""
    return isinstance(kind, types.NamedTuple | types.NamedUniTuple) and kind.instance_class is constants


class Affine(Elementwise):
    r""":math:`x = \mu + \sigma z`; the parameters are the shift and the log_scale.

    Args:
        min_log_scale: what a network's log_scale is bounded by, see `bounded`.
    """

    outputs = 2
    recordable = True

    def __init__(self, min_log_scale: float) -> None:
        self.min_log_scale = min_log_scale

    def parameters(self, raw: Tensor) -> Parameters:
        shift, log_scale = raw.unbind(-1)
        return shift, bounded(log_scale, self.min_log_scale)

    def start(self, std: float) -> Tensor:
        return torch.tensor([0.0, -math.log(std)])

    def step(self, to_x: bool) -> StepConstants:
        return AffineStep(self.min_log_scale, to_x)

    def to_x(self, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = parameters
        return shift + log_scale.exp() * z, log_scale

    def to_z(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = parameters
        return (x - shift) * (-log_scale).exp(), -log_scale


class AffineStep(NamedTuple):
    """An affine step in compiled code."""

    min_log_scale: float
    to_x: bool


# Division as in numpy: without a check for zero.
@overload(solve_step, jit_options={"error_model": "numpy", "fastmath": {"contract"}})
def _solve_affine(raw: Any, given: Any, constants: Any) -> Callable[..., Any] | None:
    if not is_step(constants, AffineStep):
        return None

    def solve(raw: Any, given: Any, constants: Any) -> Any:
        log_scale = constants.min_log_scale + softplus(raw[1] - constants.min_log_scale)
        scale = math.exp(log_scale)
        return raw[0] + scale * given if constants.to_x else (given - raw[0]) / scale

    return solve


class Shift(Elementwise):
    r""":math:`x = \mu + z`; the parameter is the shift, and nothing is scaled."""

    outputs = 1
    recordable = True

    def parameters(self, raw: Tensor) -> Parameters:
        return (raw.squeeze(-1),)

    def start(self, std: float) -> Tensor:
        """Zero (outputs,): x is as the noise is, whatever its deviation, for nothing here can scale it."""
        return torch.zeros(1)

    def step(self, to_x: bool) -> StepConstants:
        return ShiftStep(to_x)

    def to_x(self, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return z + parameters[0], torch.zeros_like(z)

    def to_z(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return x - parameters[0], torch.zeros_like(x)


class ShiftStep(NamedTuple):
    """An additive step in compiled code."""

    to_x: bool


@overload(solve_step)
def _solve_shift(raw: Any, given: Any, constants: Any) -> Callable[..., Any] | None:
    if not is_step(constants, ShiftStep):
        return None

    def solve(raw: Any, given: Any, constants: Any) -> Any:
        return given + raw[0] if constants.to_x else given - raw[0]

    return solve


class MixtureCdf(Elementwise):
    r"""Turns standard logistic noise into a mixture of K scaled and shifted bases, through its distribution function.

    .. math:: z = \operatorname{logit} F(x), \qquad F(x) = \sum_k \pi_k F_k\Big(\frac{x - \mu_k}{\sigma_k}\Big), \qquad
              \frac{dz}{dx} = \frac{f(x)}{F(x) (1 - F(x))}

    so that the density of x is the mixture's (Ho et al. 2019, *Flow++*). Both tails are computed as logarithms, so that
    neither they nor small scales lose the gradient. The inverse is found by Newton's method inside a bracket, to
    rounding, and has no gradient; noise beyond 80, which nobody draws, overflows in float32. The parameters are
    unnormalised log weights, shifts and log_scales, (..., K) each.

    Args:
        component: the base whose copies are mixed.
        components: their number K.
        min_log_scale: what a network's log_scales are bounded by, see `bounded`.
    """

    recordable = False  # its search ends where values say so

    def __init__(self, component: Base, components: int, min_log_scale: float) -> None:
        self.component, self.components, self.min_log_scale = component, components, min_log_scale
        self.outputs = 3 * components

    def parameters(self, raw: Tensor) -> Parameters:
        weights, shift, log_scale = raw.chunk(3, -1)
        return weights, shift, bounded(log_scale, self.min_log_scale)

    def start(self, std: float) -> Tensor:
        """Outputs (outputs,), whatever the noise's deviation: the density is that of the components."""
        # Apart, so that they can go their own ways, and together of unit variance; one alone is in the middle.
        shift = torch.linspace(-0.5, 0.5, self.components) if self.components > 1 else torch.zeros(1)
        log_scale = 0.5 * math.log(1 - shift.square().mean()) - math.log(self.component.std)
        return torch.cat([torch.zeros_like(shift), shift, torch.full_like(shift, log_scale)])

    def step(self, to_x: bool) -> StepConstants:
        return MixtureStep(self.min_log_scale, to_x, isinstance(self.component, StandardNormal))

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
        x = root(lambda x: self.to_z(x, *parameters), z, alone.amin(-1), alone.amax(-1))
        return x, -self.to_z(x, *parameters)[1]


class MixtureStep(NamedTuple):
    """A mixture's step in compiled code; the components are normal or else logistic."""

    min_log_scale: float
    to_x: bool
    normal: bool


@overload(solve_step)
def _solve_mixture(raw: Any, given: Any, constants: Any) -> Callable[..., Any] | None:
    """As `MixtureCdf`, for one value, in float64."""
    if not is_step(constants, MixtureStep):
        return None

    def solve(raw: Any, given: Any, constants: Any) -> Any:
        components = _components(raw, constants.min_log_scale)
        if not constants.to_x:
            return _mixture_to_z(given, components, constants.normal)[0]
        # A bracket that grows from the middle of the components until it holds the solution.
        middle, width = components[1].mean(), 1.0
        low, high = middle - width, middle + width
        while _mixture_to_z(low, components, constants.normal)[0] > given:
            width *= 2
            low -= width
        width = 1.0
        while _mixture_to_z(high, components, constants.normal)[0] < given:
            width *= 2
            high += width
        x = (low + high) / 2
        for _ in range(ITERATIONS):
            found, slope = _mixture_to_z(x, components, constants.normal)
            if found < given:
                low = x
            else:
                high = x
            step = (found - given) * math.exp(-slope)
            settled = abs(step) <= 4e-16 * abs(x) or abs(found - given) <= 1e-15 * (1 + abs(given))
            x = x - step if settled or low < x - step < high else (low + high) / 2
            if settled:
                break
        return x

    return solve


@numba.njit(cache=True)
def _log_cdf(u: float, normal: bool) -> float:
    """Of a standard normal or logistic; accurate in the lower tail."""
    if not normal:
        return min(u, 0.0) - math.log1p(math.exp(-abs(u)))
    if u > -37:
        return math.log(0.5 * math.erfc(-u / math.sqrt(2)))
    square = 1 / (u * u)
    tail = 1 - square * (1 - 3 * square * (1 - 5 * square))
    return -0.5 * u * u - math.log(-u * math.sqrt(2 * math.pi)) + math.log(tail)


@numba.njit(cache=True)
def _components(raw: np.ndarray, min_log_scale: float) -> np.ndarray:
    """Log weights, shifts, log scales and inverse scales (4, K) of a mixture whose parameters the network gave."""
    k = len(raw) // 3
    components = np.empty((4, k))
    components[0] = raw[:k]
    components[0] -= _log_sum(components[0])
    components[1] = raw[k : 2 * k]
    for i in range(k):
        components[2, i] = min_log_scale + softplus(raw[2 * k + i] - min_log_scale)
        components[3, i] = math.exp(-components[2, i])
    return components


@numba.njit(cache=True)
def _mixture_to_z(x: float, components: np.ndarray, normal: bool) -> tuple[float, float]:
    """z and log dz/dx of a mixture at x."""
    terms = np.empty((3, components.shape[1]))
    for i in range(components.shape[1]):
        log_weight, shift, log_scale, inverse_scale = components[:, i]
        u = (x - shift) * inverse_scale
        below, above = _log_cdf(u, normal), _log_cdf(-u, normal)
        # The logistic density is the product of its two tails.
        shape = -0.5 * u * u - 0.5 * math.log(2 * math.pi) if normal else below + above
        terms[0, i], terms[1, i], terms[2, i] = log_weight + below, log_weight + above, log_weight + shape - log_scale
    low, high = _log_sum(terms[0]), _log_sum(terms[1])
    return low - high, _log_sum(terms[2]) - low - high


@numba.njit(cache=True)
def _log_sum(values: np.ndarray) -> float:
    highest, total = values.max(), 0.0
    for value in values:
        total += math.exp(value - highest)
    return highest + math.log(total)
