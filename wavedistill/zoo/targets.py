"""What the zoo's models learn: eight densities of the plane, each known exactly, and a table of real measurements."""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from wavedistill.tools.random import random_stream

POINTS_ON_A_CURVE = 400
TABLE_COLUMNS = ("mean radius", "mean texture", "mean smoothness", "mean compactness", "mean symmetry")
TABLE_NOISE = 0.25
"""Deviations of the noise on every value of the table, without which a few hundred rows are points, not a density."""
TABLE_HELD_OUT = 5
"""Every row of this number is kept for tests."""


class Target(Protocol):
    """A density to learn.

    Attributes:
        features: values in a point, D.
    """

    features: int

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Points (count, D) to fit a model by."""

    def held_out(self, count: int, generator: torch.Generator) -> Tensor:
        """Points (at most count, D) that no fit sees."""


class KnownDensity(Target):
    """A density of the plane whose value is known, so that it may be all that a fit is given."""

    features = 2

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density (B,) at points x (B, 2), in nats."""
        raise NotImplementedError

    def held_out(self, count: int, generator: torch.Generator) -> Tensor:
        return self.sample(count, generator)


class Mixture(KnownDensity):
    r"""Equally many Gaussians around each of K centres, of which a curve of noise is made, too.

    .. math:: p(x) = \frac{1}{K} \sum_k N(x; c_k, \sigma^2)

    Args:
        centres: (K, 2); on a curve they stand closer than the deviation.
        deviation: of each Gaussian.
    """

    def __init__(self, centres: Tensor, deviation: float) -> None:
        self.centres, self.deviation = centres, deviation

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self.centres), (count,), generator=generator)
        return self.centres[chosen] + self.deviation * torch.randn(count, 2, generator=generator)

    def log_prob(self, x: Tensor) -> Tensor:
        squares = (x[:, None] - self.centres.to(x)).square().sum(-1) / self.deviation**2
        scale = math.log(2 * math.pi * self.deviation**2 * len(self.centres))
        return torch.logsumexp(-0.5 * squares, 1) - scale


class Checkerboard(KnownDensity):
    """Uniform on the eight dark squares of a board of sixteen, which goes from -2.4 to 2.4."""

    side = 1.2

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        row = torch.randint(4, (count,), generator=generator)
        column = 2 * torch.randint(2, (count,), generator=generator) + row % 2
        return self.side * (torch.stack([column, row], 1) - 2 + torch.rand(count, 2, generator=generator))

    def log_prob(self, x: Tensor) -> Tensor:
        cell = (x / self.side + 2).floor()
        dark = ((cell >= 0) & (cell < 4)).all(1) & (cell.sum(1) % 2 == 0)
        return torch.where(dark, -math.log(8 * self.side**2), -math.inf).to(x)


class Pinwheel(KnownDensity):
    """Five Gaussians in a star, turned the more the farther out, which keeps areas and hence densities."""

    arms, out, along, across, turn = 5, 1.5, 0.5, 0.16, 0.5

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        arm = torch.randint(self.arms, (count,), generator=generator)
        deviations = torch.tensor([self.along, self.across])
        straight = torch.tensor([self.out, 0.0]) + deviations * torch.randn(count, 2, generator=generator)
        return _turned(straight, 2 * math.pi / self.arms * arm + self.turn * straight.norm(dim=1))

    def log_prob(self, x: Tensor) -> Tensor:
        deviations = x.new_tensor([self.along, self.across])
        angles = 2 * math.pi / self.arms * torch.arange(self.arms).to(x)
        back = -(angles[:, None] + self.turn * x.norm(dim=1))
        straight = _turned(x.expand(self.arms, -1, 2), back)
        squares = ((straight - x.new_tensor([self.out, 0.0])) / deviations).square().sum(-1)
        scale = math.log(2 * math.pi * self.along * self.across * self.arms)
        return torch.logsumexp(-0.5 * squares, 0) - scale


class Waves(KnownDensity):
    """A band around a sine wave (after Rezende and Mohamed 2015); a fit sees the density alone, and no samples."""

    deviation, height, spread = 1.2, 1.2, 0.35

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(count, 2, generator=generator)
        x = self.deviation * noise[:, 0]
        return torch.stack([x, self.height * torch.sin(2 * x) + self.spread * noise[:, 1]], 1)

    def log_prob(self, x: Tensor) -> Tensor:
        across = (x[:, 1] - self.height * torch.sin(2 * x[:, 0])) / self.spread
        scale = math.log(2 * math.pi * self.deviation * self.spread)
        return -0.5 * ((x[:, 0] / self.deviation).square() + across.square()) - scale


class Table(Target):
    """Five measurements of 569 breast tumours, standardised, with a little noise: scikit-learn's `breast_cancer`."""

    features = len(TABLE_COLUMNS)

    def __init__(self) -> None:
        from sklearn.datasets import load_breast_cancer

        found = load_breast_cancer()
        columns = [list(found.feature_names).index(name) for name in TABLE_COLUMNS]
        rows = torch.as_tensor(found.data[:, columns]).float()
        rows = (rows - rows.mean(0)) / rows.std(0)
        # Patients come in no order that matters, but the same rows are held out whatever the seed.
        rows = rows[torch.randperm(len(rows), generator=random_stream(0))]
        is_held_out = torch.arange(len(rows)) % TABLE_HELD_OUT == 0
        self._rows, self._held_out = rows[~is_held_out], rows[is_held_out]

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self._rows), (count,), generator=generator)
        return _noisy(self._rows[chosen], generator)

    def held_out(self, count: int, generator: torch.Generator) -> Tensor:
        return _noisy(self._held_out[:count], generator)


class Named(NamedTuple):
    """A target by the name that the command line knows, and a few words."""

    title: str
    make: Callable[[], Target]


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    """Points x (..., 2), turned by angles (...) in radians."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * x[..., 0] - sin * x[..., 1], sin * x[..., 0] + cos * x[..., 1]], -1)


def _noisy(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows + TABLE_NOISE * torch.randn(rows.shape, generator=generator)


def _circle(radius: float, count: int = POINTS_ON_A_CURVE, start: float = 0.0, part: float = 1.0) -> Tensor:
    """Points (count, 2) of a circle around zero, or of a part of it."""
    angle = start + 2 * math.pi * part * (torch.arange(count) + 0.5) / count
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


def _spiral(turns: float, inner: float, outer: float, start: float = 0.0) -> Tensor:
    """Points (POINTS_ON_A_CURVE, 2) of a spiral around zero, the same number on every piece of its length."""
    share = ((torch.arange(POINTS_ON_A_CURVE) + 0.5) / POINTS_ON_A_CURVE).sqrt()
    angle = start + 2 * math.pi * turns * share
    return (inner + (outer - inner) * share)[:, None] * torch.stack([angle.cos(), angle.sin()], 1)


def _moons() -> Target:
    upper = _circle(1.7, part=0.5) + torch.tensor([-0.85, -0.4])
    return Mixture(torch.cat([upper, -upper]), 0.15)


def _rings() -> Target:
    return Mixture(torch.cat([_circle(radius) for radius in (0.8, 1.6, 2.4)]), 0.12)


def _spirals() -> Target:
    return Mixture(torch.cat([_spiral(1.2, 0.3, 2.6, start) for start in (0.0, math.pi)]), 0.12)


TARGETS: dict[str, Named] = {
    "moons": Named("Two moons", _moons),
    "rings": Named("Three rings", _rings),
    "spirals": Named("Two spirals", _spirals),
    "checkerboard": Named("Checkerboard", Checkerboard),
    "gaussians": Named("Eight Gaussians", lambda: Mixture(_circle(2.2, 8), 0.25)),
    "pinwheel": Named("Pinwheel", Pinwheel),
    "swissroll": Named("Swiss roll", lambda: Mixture(_spiral(1.7, 0.3, 2.6), 0.14)),
    "waves": Named("Waves, known by their density alone", Waves),
    "table": Named("Five measurements of 569 tumours", Table),
}
