"""Integrals of sums of squared polynomials, as an elementwise bijection: in torch, and as a step of compiled code."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numba.extending import overload
from torch import Tensor

from wavedistill.flows.elementwise import Elementwise, Parameters, StepConstants, bounded, is_step, softplus, solve_step
from wavedistill.flows.roots import ITERATIONS, root

BOUND = 5.0
"""It bends values between minus this and this, in deviations of its affine part, and goes on in straight lines."""
LEAST_SLOPE = 1e-3


class SumOfSquares(Elementwise):
    r"""An affine function, bent by the integral of K squared polynomials of degree L (Jaini et al. 2019, *SOS flows*).

    .. math:: x = \mu + \sigma u, \qquad z = g(u) = \int_0^u s(v) dv, \qquad
              s(v) = \epsilon + \frac{1 - \epsilon}{K} \sum_k \Big(1 + \sum_{l=0}^L a_{kl} (v / b)^l\Big)^2

    up to the bound b; beyond, g goes on in straight lines of the slope that it has there. The integral is a Gauss sum
    of L + 1 points, which is exact for polynomials of degree 2 L + 1. The inverse is found by Newton's method inside a
    bracket, to rounding. Outputs of zero make g the identity, and so does its start: it starts as `Affine` does.

    The parameters are shift and log_scale, and the coefficients a, (..., K, L + 1).

    Args:
        polynomials: their number K; two are as general as more, since every polynomial that is never negative is the
            sum of two squares.
        degree: the degree L of each.
        min_log_scale: what a network's log_scale is bounded by, see `bounded`.
    """

    recordable = False  # its search ends where values say so

    def __init__(self, polynomials: int, degree: int, min_log_scale: float) -> None:
        self.polynomials, self.degree, self.min_log_scale = polynomials, degree, min_log_scale
        self.outputs = 2 + polynomials * (degree + 1)
        points, weights = np.polynomial.legendre.leggauss(degree + 1)
        self.points, self.weights = (points + 1) / 2, weights / 2  # from [-1, 1] to [0, 1]

    def parameters(self, raw: Tensor) -> Parameters:
        coefficients = raw[..., 2:].unflatten(-1, (self.polynomials, self.degree + 1))
        return raw[..., 0], bounded(raw[..., 1], self.min_log_scale), coefficients

    def start(self, std: float) -> Tensor:
        # Constants whose squares have the mean 1; they differ, so that the polynomials can go their own ways.
        constants = torch.arange(1.0, self.polynomials + 1)
        a = F.pad((constants / constants.square().mean().sqrt() - 1)[:, None], (0, self.degree))
        return torch.cat([torch.tensor([0.0, -math.log(std)]), a.flatten()])

    def step(self, to_x: bool) -> StepConstants:
        return PolynomialStep(self.min_log_scale, to_x, self.polynomials, self.points, self.weights)

    def to_z(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale, a = parameters
        z, slope = self._bend((x - shift) * (-log_scale).exp(), a)
        return z, slope - log_scale

    def to_x(self, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale, a = parameters
        high = torch.full_like(z, BOUND)
        (least, _), (most, _) = self._bend(-high, a), self._bend(high, a)
        u = root(lambda u: self._bend(u, a), z.maximum(least).minimum(most), -high, high)
        u = torch.where(z >= most, high, torch.where(z <= least, -high, u))
        # One step more, in which the gradient is, and which follows the straight lines that begin at the bound.
        found, slope = self._bend(u, a)
        u = u - (found - z) * (-slope).exp()
        return shift + log_scale.exp() * u, log_scale - self._bend(u, a)[1]

    def _bend(self, u: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """z = g(u), and log g'(u)."""
        inside = u.clamp(-BOUND, BOUND)
        slope = _slope(inside, a)
        # (...) -> (..., L + 1) -> (...)
        slopes = _slope(inside.unsqueeze(-1) * u.new_tensor(self.points), a.unsqueeze(-3))
        return inside * (slopes @ u.new_tensor(self.weights)) + slope * (u - inside), slope.log()


def _slope(v: Tensor, a: Tensor) -> Tensor:
    """s(v), in the shape of v, of coefficients (..., K, L + 1)."""
    share, (*lower, polynomial) = (v / BOUND).unsqueeze(-1), a.unbind(-1)
    for coefficient in reversed(lower):
        polynomial = polynomial * share + coefficient
    return LEAST_SLOPE + (1 - LEAST_SLOPE) * (1 + polynomial).square().mean(-1)


class PolynomialStep(NamedTuple):
    """A step of a sum of squares in compiled code, with the points and weights of its Gauss sum."""

    min_log_scale: float
    to_x: bool
    polynomials: int
    points: np.ndarray
    weights: np.ndarray


@overload(solve_step)
def _solve_polynomials(raw: Any, given: Any, constants: Any) -> Callable[..., Any] | None:
    """As `SumOfSquares`, for one value, in float64."""
    if not is_step(constants, PolynomialStep):
        return None

    def solve(raw: Any, given: Any, constants: Any) -> Any:
        scale = math.exp(constants.min_log_scale + softplus(raw[1] - constants.min_log_scale))
        a = raw[2:].astype(np.float64).reshape(constants.polynomials, len(constants.points))
        bend = (a, constants.points, constants.weights)
        if not constants.to_x:
            return _bend((given - raw[0]) / scale, *bend)[0]
        if given >= _bend(BOUND, *bend)[0]:
            u = BOUND
        elif given <= _bend(-BOUND, *bend)[0]:
            u = -BOUND
        else:
            low, high = -BOUND, BOUND
            u = (low + high) / 2
            for _ in range(ITERATIONS):
                found, slope = _bend(u, *bend)
                if found < given:
                    low = u
                else:
                    high = u
                step = (found - given) * math.exp(-slope)
                settled = abs(step) <= 4e-16 * abs(u) or abs(found - given) <= 1e-15 * (1 + abs(given))
                u = u - step if settled or low < u - step < high else (low + high) / 2
                if settled:
                    break
        found, slope = _bend(u, *bend)
        return raw[0] + scale * (u - (found - given) * math.exp(-slope))

    return solve


@numba.njit(cache=True)
def _bend(u: float, a: np.ndarray, points: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """As `SumOfSquares._bend`."""
    inside, total = min(max(u, -BOUND), BOUND), 0.0
    for i in range(len(points)):
        total += weights[i] * _slope_at(inside * points[i], a)
    slope = _slope_at(inside, a)
    return inside * total + slope * (u - inside), math.log(slope)


@numba.njit(cache=True)
def _slope_at(v: float, a: np.ndarray) -> float:
    """As `_slope`."""
    total, share = 0.0, v / BOUND
    for k in range(a.shape[0]):
        polynomial = 0.0
        for i in range(a.shape[1] - 1, -1, -1):
            polynomial = polynomial * share + a[k, i]
        total += (1 + polynomial) ** 2
    return LEAST_SLOPE + (1 - LEAST_SLOPE) * total / a.shape[0]
