"""Monotonic rational-quadratic splines, as an elementwise bijection: in torch, and as a step of compiled code."""

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

BOUND = 5.0
"""A spline bends values between minus this and this, in deviations of its affine part, and leaves others alone."""
LEAST_SHARE, LEAST_SLOPE = 1e-3, 1e-3
"""Of the range in the width or height of a piece, and of the slope at a knot."""
UNIT_SLOPE = math.log(math.expm1(1 - LEAST_SLOPE))
"""What is added to an output of 0, so that the slope it stands for is 1."""


class RationalQuadraticSpline(Elementwise):
    r"""An affine function, bent by K rational-quadratic pieces (Durkan et al. 2019, *Neural spline flows*).

    .. math:: x = \mu + \sigma u, \qquad z = g(u), \qquad
              g(u) = y_k + \frac{h_k (s_k \theta^2 + d_k \theta (1 - \theta))}
                                {s_k + (d_{k+1} + d_k - 2 s_k) \theta (1 - \theta)}

    in the piece from (u_k, y_k) of width w_k and height h_k, with s_k = h_k / w_k and theta = (u - u_k) / w_k, where
    d_k are the slopes at its ends; beyond the bound, g is the identity. Both directions are closed forms: the inverse
    is the root of a quadratic equation. Outputs of zero make g the identity, so that it starts as `Affine` does.

    The parameters are shift and log_scale, and the knots u, y and slopes d, (..., K + 1) each.

    Args:
        bins: the number K of pieces.
        min_log_scale: what a network's log_scale is bounded by, see `bounded`.
    """

    recordable = True

    def __init__(self, bins: int, min_log_scale: float) -> None:
        self.bins, self.min_log_scale = bins, min_log_scale
        self.outputs = 3 * bins + 1

    def parameters(self, raw: Tensor) -> Parameters:
        shift, log_scale, widths, heights, slopes = raw.split([1, 1, self.bins, self.bins, self.bins - 1], -1)
        d = F.pad(LEAST_SLOPE + F.softplus(slopes + UNIT_SLOPE), (1, 1), value=1.0)
        return shift[..., 0], bounded(log_scale[..., 0], self.min_log_scale), _knots(widths), _knots(heights), d

    def start(self, std: float) -> Tensor:
        return F.pad(torch.tensor([0.0, -math.log(std)]), (0, self.outputs - 2))

    def step(self, to_x: bool) -> StepConstants:
        return SplineStep(self.min_log_scale, to_x)

    def to_z(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale, *knots = parameters
        z, slope = _bend((x - shift) * (-log_scale).exp(), *knots)
        return z, slope - log_scale

    def to_x(self, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale, *knots = parameters
        u, slope = _unbend(z, *knots)
        return shift + log_scale.exp() * u, log_scale - slope


def _knots(raw: Tensor) -> Tensor:
    """Knots (..., K + 1) from -BOUND to BOUND, from what stands for the widths between them."""
    bins = raw.shape[-1]
    shares = LEAST_SHARE + (1 - LEAST_SHARE * bins) * raw.softmax(-1)
    inner = BOUND * (2 * shares[..., : bins - 1].cumsum(-1) - 1)
    return torch.cat([F.pad(inner, (1, 0), value=-BOUND), torch.full_like(raw[..., :1], BOUND)], -1)


class _Piece(NamedTuple):
    """Of each value, the piece that it is in: its corner, width and height, and the slopes at its ends."""

    u: Tensor
    y: Tensor
    width: Tensor
    height: Tensor
    first: Tensor
    last: Tensor

    @property
    def steep(self) -> Tensor:
        return self.height / self.width

    @property
    def excess(self) -> Tensor:
        return self.first + self.last - 2 * self.steep


def _piece(value: Tensor, along: Tensor, u: Tensor, y: Tensor, d: Tensor) -> _Piece:
    """The pieces of values (...) along their knots, which may have fewer leading dimensions; the nearest one beyond."""
    bins = along.shape[-1] - 1
    index = (value.detach().unsqueeze(-1) >= along[..., 1:]).sum(-1, keepdim=True).clamp_max(bins - 1)

    def at(knots: Tensor, index: Tensor) -> Tensor:
        return knots.expand(*value.shape, -1).gather(-1, index)[..., 0]

    left, right = at(u, index), at(u, index + 1)
    low, high = at(y, index), at(y, index + 1)
    return _Piece(left, low, right - left, high - low, at(d, index), at(d, index + 1))


def _bend(u: Tensor, *knots: Tensor) -> tuple[Tensor, Tensor]:
    """z = g(u), and log g'(u)."""
    piece = _piece(u, knots[0], *knots)
    theta = ((u - piece.u) / piece.width).clamp(0, 1)
    return _within(u, piece.y + _height(piece, theta)), _log_slope(piece, theta)


def _unbend(z: Tensor, *knots: Tensor) -> tuple[Tensor, Tensor]:
    """u where z = g(u), and log g'(u)."""
    piece = _piece(z, knots[1], *knots)
    rise = (z - piece.y).clamp_min(0).minimum(piece.height)
    a = piece.height * (piece.steep - piece.first) + rise * piece.excess
    b = piece.height * piece.first - rise * piece.excess
    c = -piece.steep * rise
    theta = (2 * c / (-b - (b.square() - 4 * a * c).clamp_min(0).sqrt())).clamp(0, 1)
    return _within(z, piece.u + theta * piece.width), _log_slope(piece, theta)


def _height(piece: _Piece, theta: Tensor) -> Tensor:
    both = theta * (1 - theta)
    return piece.height * (piece.steep * theta.square() + piece.first * both) / (piece.steep + piece.excess * both)


def _log_slope(piece: _Piece, theta: Tensor) -> Tensor:
    both = theta * (1 - theta)
    top = piece.last * theta.square() + 2 * piece.steep * both + piece.first * (1 - theta).square()
    return 2 * piece.steep.log() + top.log() - 2 * (piece.steep + piece.excess * both).log()


def _within(value: Tensor, bent: Tensor) -> Tensor:
    """What is bent where a value lies within the bound, and the value itself beyond, where slopes are 1 either way."""
    return bent.where(value.abs() < BOUND, value)


class SplineStep(NamedTuple):
    """A spline's step in compiled code."""

    min_log_scale: float
    to_x: bool


@overload(solve_step)
def _solve_spline(raw: Any, given: Any, constants: Any) -> Callable[..., Any] | None:
    """As `RationalQuadraticSpline`, for one value, in float64."""
    if not is_step(constants, SplineStep):
        return None

    def solve(raw: Any, given: Any, constants: Any) -> Any:
        bins = (len(raw) - 1) // 3
        u, y = _knots_of(raw[2 : 2 + bins]), _knots_of(raw[2 + bins : 2 + 2 * bins])
        log_scale = constants.min_log_scale + softplus(raw[1] - constants.min_log_scale)
        value = given if constants.to_x else (given - raw[0]) * math.exp(-log_scale)
        if abs(value) < BOUND:
            along = y if constants.to_x else u
            k = 0
            while k < bins - 1 and value >= along[k + 1]:
                k += 1
            first = _slope_of(raw[1 + 2 * bins + k]) if k > 0 else 1.0
            last = _slope_of(raw[2 + 2 * bins + k]) if k < bins - 1 else 1.0
            width, height = u[k + 1] - u[k], y[k + 1] - y[k]
            steep = height / width
            excess = first + last - 2 * steep
            if constants.to_x:
                rise = value - y[k]
                b = height * first - rise * excess
                square = b * b + 4 * (height * (steep - first) + rise * excess) * steep * rise
                theta = 2 * steep * rise / (b + math.sqrt(max(square, 0.0)))
                value = u[k] + theta * width
            else:
                theta = (value - u[k]) / width
                both = theta * (1 - theta)
                value = y[k] + height * (steep * theta * theta + first * both) / (steep + excess * both)
        return raw[0] + math.exp(log_scale) * value if constants.to_x else value

    return solve


@numba.njit(cache=True)
def _slope_of(raw: float) -> float:
    return LEAST_SLOPE + softplus(raw + UNIT_SLOPE)


@numba.njit(cache=True)
def _knots_of(raw: np.ndarray) -> np.ndarray:
    """As `_knots`."""
    knots = np.empty(len(raw) + 1)
    highest, total = raw.max(), 0.0
    for i in range(len(raw)):
        knots[i + 1] = math.exp(raw[i] - highest)
        total += knots[i + 1]
    done = 0.0
    for i in range(len(raw)):
        done += LEAST_SHARE + (1 - LEAST_SHARE * len(raw)) * knots[i + 1] / total
        knots[i + 1] = BOUND * (2 * done - 1)
    knots[0], knots[-1] = -BOUND, BOUND
    return knots
