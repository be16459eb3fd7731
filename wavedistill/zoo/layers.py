r"""Bijections that neither `flows/` nor zuko has, small and exact, from a point x to noise z.

Each gives z and log|det dz/dx| (B,) of points x (B, D) in closed form, and is inverted as far as needed by a search
that cannot fail: bisection of an increasing function, or the fixed point of a contraction.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALVINGS = 40
"""Of an interval that holds a root: to a millionth of a millionth."""
LIPSCHITZ = 0.95
"""Of a residual block's network, below 1."""
NEARNESS = 1e-6
"""Of two points of a fixed-point iteration that ends."""


class Layer(nn.Module):
    """A bijection of points (B, D)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, D) and log|det dz/dx| (B,) of x (B, D)."""
        raise NotImplementedError

    def invert(self, z: Tensor) -> Tensor:
        """x (B, D) of z (B, D), without gradient."""
        raise NotImplementedError


class Bend(nn.Module):
    """tanh and its derivative; a module, so that its evaluations are counted as those of a network are."""

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """In the shape of s (any)."""
        bent = torch.tanh(s)
        return bent, 1 - bent.square()


def root(increasing: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Where an increasing function, of any shape, is zero between two bounds."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        above = increasing(middle) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


class Planar(Layer):
    r"""A fold along a plane (Rezende and Mohamed 2015, eq. 10-12).

    .. math:: z = x + u \tanh(w^T x + b), \qquad \log|\det J| = \log\big(1 + u^T w \tanh'(w^T x + b)\big)

    u is corrected so that w^T u > -1, which makes it invertible; the inverse is the root of one scalar equation.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.w, self.raw_u = nn.Parameter(torch.randn(features)), nn.Parameter(0.1 * torch.randn(features))
        self.b, self.bend = nn.Parameter(torch.randn(())), Bend()

    @property
    def u(self) -> Tensor:
        """(D,), with w^T u > -1."""
        along = self.w @ self.raw_u
        return self.raw_u + (F.softplus(along) - 1 - along) * self.w / self.w.square().sum()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        bent, slope = self.bend(x @ self.w + self.b)
        return x + bent[:, None] * self.u, torch.log1p(self.w @ self.u * slope)

    def invert(self, z: Tensor) -> Tensor:
        along, found = self.w @ self.u, z @ self.w + self.b
        s = root(lambda s: s + along * self.bend(s)[0] - found, found - along.abs(), found + along.abs())
        return z - self.bend(s)[0][:, None] * self.u


class Radial(Layer):
    r"""A swelling or shrinking around a point (Rezende and Mohamed 2015, eq. 14).

    .. math:: z = x + \frac{\beta (x - c)}{\alpha + r}, \quad r = |x - c|, \qquad \log|\det J| =
              (D - 1) \log\Big(1 + \frac{\beta}{\alpha + r}\Big) + \log\Big(1 + \frac{\alpha \beta}{(\alpha + r)^2}\Big)

    with beta > -alpha; r, given the distance of z, is the root of a quadratic equation.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.centre = nn.Parameter(1.5 * torch.randn(features))
        self.raw_alpha = nn.Parameter(torch.zeros(()))
        self.raw_beta = nn.Parameter(torch.tensor(math.log(math.e - 1)) + 0.1 * torch.randn(()))

    def _shape(self) -> tuple[Tensor, Tensor]:
        alpha = self.raw_alpha.exp()
        return alpha, alpha * (F.softplus(self.raw_beta) - 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha, beta = self._shape()
        away = x - self.centre
        out = alpha + away.square().sum(1).add(1e-12).sqrt()  # whose gradient is finite at the centre
        ladj = (x.shape[1] - 1) * torch.log1p(beta / out) + torch.log1p(alpha * beta / out.square())
        return x + beta * away / out[:, None], ladj

    def invert(self, z: Tensor) -> Tensor:
        alpha, beta = self._shape()
        away = z - self.centre
        distance = away.norm(dim=1)
        b = alpha + beta - distance
        r = (torch.sqrt(b.square() + 4 * alpha * distance) - b) / 2
        return self.centre + away / (1 + beta / (alpha + r))[:, None]


class Sylvester(Layer):
    r"""As many folds at once as there are values (van den Berg et al. 2018, *Sylvester normalizing flows*).

    .. math:: z = x + Q R \tanh(\tilde R Q^T x + b), \qquad
              \log|\det J| = \sum_i \log\big(1 + R_{ii} \tilde R_{ii} \tanh'_i\big)

    with Q orthogonal, R and R~ upper triangular and R_ii R~_ii > -1; in the coordinates Q^T x the map is triangular,
    and is inverted one value after another.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.randn(features, features))
        self.raw_r, self.raw_second = (nn.Parameter(0.1 * torch.randn(features, features)) for _ in range(2))
        self.product = nn.Parameter(torch.full((features,), math.log(math.e - 1)))
        self.b, self.bend = nn.Parameter(torch.randn(features)), Bend()

    def _matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q, R and R~ (D, D)."""
        second = self.raw_second.diagonal().exp()
        first = (F.softplus(self.product) - 1) / second
        q = torch.linalg.matrix_exp(self.turn - self.turn.T)
        return q, self.raw_r.triu(1) + first.diag(), self.raw_second.triu(1) + second.diag()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, r, second = self._matrices()
        bent, slope = self.bend(x @ q @ second.T + self.b)
        return x + bent @ r.T @ q.T, torch.log1p(r.diagonal() * second.diagonal() * slope).sum(1)

    def invert(self, z: Tensor) -> Tensor:
        q, r, second = self._matrices()
        turned = z @ q
        v, bent = torch.zeros_like(z), torch.zeros_like(z)
        for i in reversed(range(z.shape[1])):
            wanted, inner = turned[:, i] - bent @ r[i], v @ second[i] + self.b[i]
            own, scale = r[i, i], second[i, i]
            beyond = partial(self._beyond, own, scale, inner, wanted)
            v[:, i] = root(beyond, wanted - own.abs(), wanted + own.abs())
            bent[:, i] = self.bend(scale * v[:, i] + inner)[0]
        return v @ q.T

    def _beyond(self, own: Tensor, scale: Tensor, inner: Tensor, wanted: Tensor, value: Tensor) -> Tensor:
        """How far beyond what is wanted one of the values (B,) in the coordinates Q^T x leads."""
        return value + own * self.bend(scale * value + inner)[0] - wanted


class Contraction(nn.Module):
    r"""A perceptron of a Lipschitz constant below 1, with its Jacobian.

    .. math:: g(x) = c V \tanh(W x + b) + d, \qquad c = L / \max(L, \|V\|_2 \|W\|_2)

    as slopes of tanh are within 1. More layers bound it no better, and bend less within the same bound.
    """

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(features, hidden), nn.Linear(hidden, features)
        with torch.no_grad():  # folds of different places and directions to begin with
            self.first.weight.mul_(2)
            self.first.bias.mul_(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """g(x) (B, D) and dg/dx (B, D, D), of which the first index is that of g."""
        largest = torch.linalg.matrix_norm(self.first.weight, 2) * torch.linalg.matrix_norm(self.last.weight, 2)
        last = self.last.weight * (LIPSCHITZ / largest.clamp_min(LIPSCHITZ))
        bent = torch.tanh(self.first(x))
        return F.linear(bent, last, self.last.bias), last @ ((1 - bent.square())[..., None] * self.first.weight)


class Residual(Layer):
    r"""x plus a contraction of x (Behrmann et al. 2019, *Invertible residual networks*; Chen et al. 2019).

    .. math:: z = x + g(x), \qquad \log|\det J| = \log|\det(1 + dg/dx)|, \qquad x \leftarrow z - g(x)

    The papers estimate the determinant, whose cost grows with D^3; of so few values it is computed.
    """

    def __init__(self, features: int, hidden: int = 32) -> None:
        super().__init__()
        self.g = Contraction(features, hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        g, jacobian = self.g(x)
        return x + g, torch.linalg.slogdet(torch.eye(x.shape[1]).to(x) + jacobian).logabsdet

    def invert(self, z: Tensor) -> Tensor:
        x, change = z, math.inf
        while change > NEARNESS * max(1.0, float(z.abs().max())):
            previous, x = x, z - self.g(x)[0]
            change = float((x - previous).abs().max())
        return x


class MaskedConvolution(Layer):
    r"""Two causal convolutions over the values of a point, which see the value itself (Song et al. 2019, *MintNet*).

    .. math:: z_i = t x_i + \sum_c (w'_c * a)_i, \quad a_c = \tanh(w_c * x + b_c), \qquad
              \log|\det J| = \sum_i \log\Big(t + \sum_c w'_{c0} \tanh'_{ci} w_{c0}\Big)

    The taps w_c0 and w'_c0 at the value itself are positive, and so is t, so that z_i increases with x_i, and what
    stands before it is given: a root is found for one value after another.

    Args:
        features: D.
        channels: of the convolution in between.
        reverse: whether values see those after, rather than before them.
    """

    def __init__(self, features: int, channels: int = 32, reverse: bool = False) -> None:
        super().__init__()
        self.reverse, self.bend = reverse, Bend()
        size = min(features, 3)
        self.taps = nn.Parameter(2 * torch.randn(channels, size))  # the last is that of the value itself
        self.taps_out = nn.Parameter(torch.randn(channels, size))
        self.bias, self.bias_out = nn.Parameter(3 * torch.randn(channels)), nn.Parameter(torch.zeros(()))
        self.log_t = nn.Parameter(torch.tensor(-0.7))  # so that slopes are about 1 at first

    def _taps_out(self) -> Tensor:
        return _positive_at_last(self.taps_out) / len(self.taps_out)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flip(1) if self.reverse else x
        taps, taps_out = _positive_at_last(self.taps), self._taps_out()
        size = taps.shape[1]
        seen = F.pad(x, (size - 1, 0)).unfold(1, size, 1)  # (B, D, size)
        bent, slope = self.bend(seen @ taps.T + self.bias)  # (B, D, C)
        parts = F.pad(bent @ taps_out, (0, 0, size - 1, 0))  # of each place, to where each tap sees it
        out = torch.stack([parts[:, k : k + x.shape[1], k] for k in range(size)]).sum(0)
        own = taps[:, size - 1] * taps_out[:, size - 1]
        ladj = torch.log(self.log_t.exp() + slope @ own).sum(1)
        z = self.log_t.exp() * x + out + self.bias_out
        return (z.flip(1) if self.reverse else z), ladj

    def invert(self, z: Tensor) -> Tensor:
        most = self._taps_out().abs().sum() * (-self.log_t).exp()
        x, middle = torch.zeros_like(z), (z - self.bias_out) * (-self.log_t).exp()
        order = range(z.shape[1])
        for i in reversed(order) if self.reverse else order:

            def above(value: Tensor, i: int = i) -> Tensor:
                tried = x.clone()
                tried[:, i] = value
                return self(tried)[0][:, i] - z[:, i]

            x[:, i] = root(above, middle[:, i] - most, middle[:, i] + most)
        return x


def _positive_at_last(taps: Tensor) -> Tensor:
    """Taps (C, size) of which the last are positive."""
    *others, own = taps.unbind(1)
    return torch.stack([*others, F.softplus(own)], 1)
