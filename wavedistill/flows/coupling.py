r"""Coupling flows: bijections of groups of values, computed in one pass in either direction.

A group is G values that follow each other, z_{nG} ... z_{nG+G-1}: time, squeezed into the G channels of step n. Each
transform here leaves the first `kept` channels of every group as they are and changes the rest, so that its `ladj` has
a zero at each value that is kept. Where a term belongs to a group, as that of a matrix does, its changed values share
it equally: sums over a group, and over all steps, are exact, those over a part of a group are not.

Channels that every transform from some place on keeps have left the flow, as noise, before the others: early outputs,
or several scales (Dinh et al. 2016; Prenger et al. 2018, *WaveGlow*).
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedistill.flows.distributions import FlowDistribution
from wavedistill.flows.elementwise import Elementwise
from wavedistill.flows.transforms import Context, Transform

LEAST_DEVIATION = 1e-3
"""Of a channel's start: what is silent in the first batch is not amplified without bounds."""


class GroupConditioner(Protocol):
    """A function of groups, which may see the channels that are kept of every group, before and after."""

    def __call__(self, kept: Tensor, /, *context: Any) -> Tensor:
        """What stands for the parameters of an elementwise bijection, (B, N, outputs), from channels (B, N, kept)."""


class GroupTransform(Transform):
    """A bijection of the last channels of groups of values, given the first ones, which it keeps.

    Args:
        squeeze: G, the values in a group.
        kept: channels that stay as they are.
    """

    def __init__(self, squeeze: int, kept: int) -> None:
        super().__init__()
        self.squeeze, self.kept = squeeze, kept

    def forward(self, z: Tensor, context: Context = ()) -> tuple[Tensor, Tensor]:
        kept, changed = self._groups(z)
        return _values(kept, *self.to_x(changed, kept, context))

    def inverse(self, x: Tensor, context: Context = ()) -> tuple[Tensor, Tensor]:
        kept, changed = self._groups(x)
        return _values(kept, *self.to_z(changed, kept, context))

    def to_x(self, z: Tensor, kept: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """x and log|dx/dz| of the channels (B, N, G - kept) that change."""
        raise NotImplementedError

    def to_z(self, x: Tensor, kept: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """z and log|dz/dx| of the channels (B, N, G - kept) that change."""
        raise NotImplementedError

    def _groups(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The channels (B, N, ...) that are kept, and those that change, of values (B, T).

        Raises:
            ValueError: if T is no multiple of G.
        """
        if values.shape[1] % self.squeeze:
            raise ValueError(
                f"{values.shape[1]} samples are not whole groups of {self.squeeze}: a coupling flow takes whole hops"
            )
        kept, changed = values.unflatten(1, (-1, self.squeeze)).tensor_split([self.kept], -1)
        return kept, changed


def _values(kept: Tensor, changed: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
    """Values and per-step ladj, (B, T) each, of groups."""
    whole = torch.cat([kept, changed], -1)
    return whole.flatten(1), F.pad(ladj.expand_as(changed), (kept.shape[-1], 0)).flatten(1)


class CouplingLayer(GroupTransform):
    r"""Elementwise bijections whose parameters a network computes from the channels that stay as they are.

    .. math:: x_a = z_a, \qquad x_b = f(z_b; \theta(z_a)), \qquad \log|\det J| = \sum_b \log f'(z_b; \theta(z_a))

    With a shift for f it is an additive coupling, which preserves volume (Dinh et al. 2014, *NICE*), with an affine
    function an affine one (Dinh et al. 2016, *Real-NVP*). The parameters at a group may depend on the kept channels of
    all groups, before and after it: the Jacobian is triangular in the order (a, b), not in time.

    Args:
        conditioner: the network.
        squeeze: values in a group.
        kept: channels a.
        elementwise: the function of each value of b.
    """

    def __init__(self, conditioner: GroupConditioner, squeeze: int, kept: int, elementwise: Elementwise) -> None:
        super().__init__(squeeze, kept)
        self.conditioner, self.elementwise = conditioner, elementwise

    def to_x(self, z: Tensor, kept: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        return self.elementwise.to_x(z, *self._given(kept, context))

    def to_z(self, x: Tensor, kept: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        return self.elementwise.to_z(x, *self._given(kept, context))

    def summary(self) -> str:
        return f"{type(self.elementwise).__name__} of {self.squeeze - self.kept} in {self.squeeze} given {self.kept}"

    def _given(self, kept: Tensor, context: Context) -> tuple[Tensor, ...]:
        raw = self.conditioner(kept, *context)
        return self.elementwise.parameters(raw.unflatten(-1, (-1, self.elementwise.outputs)))


class ActNorm(GroupTransform):
    r"""A shift and a scale for each channel, which start from data (Kingma and Dhariwal 2018, *Glow*).

    .. math:: x_c = \mu_c + \sigma_c z_c, \qquad \log|\det J| = \sum_{n, c} \log \sigma_c

    Before that start, which `start_from_data` makes once, it is the identity.
    """

    def __init__(self, squeeze: int, kept: int) -> None:
        super().__init__(squeeze, kept)
        self.shift, self.log_scale = (nn.Parameter(torch.zeros(squeeze - kept)) for _ in range(2))

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Take shift and scale from values x (B, T), so that z has zero mean and unit deviation in every channel."""
        _, changed = self._groups(x)
        deviation, mean = torch.std_mean(changed, (0, 1), correction=0)
        self.shift.copy_(mean)
        self.log_scale.copy_(deviation.clamp_min(LEAST_DEVIATION).log())

    def to_x(self, z: Tensor, kept: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        return self.shift + self.log_scale.exp() * z, self.log_scale

    def to_z(self, x: Tensor, kept: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        return (x - self.shift) * (-self.log_scale).exp(), -self.log_scale


class InvertibleConv(GroupTransform):
    r"""One invertible matrix for every group, a 1x1 convolution of its channels (Kingma and Dhariwal 2018, *Glow*).

    .. math:: z_n = W x_n, \qquad \log|\det J| = -N \log|\det W|

    W starts as a random rotation. The n values that change in a group have a ladj of log|det W| / n each.
    """

    def __init__(self, squeeze: int, kept: int) -> None:
        super().__init__(squeeze, kept)
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(squeeze - kept, squeeze - kept)))

    def to_x(self, z: Tensor, kept: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(z, torch.linalg.inv(self.weight)), -self._ladj().expand_as(z)

    def to_z(self, x: Tensor, kept: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, self.weight), self._ladj().expand_as(x)

    def _ladj(self) -> Tensor:
        """Of z, for each value."""
        return torch.linalg.slogdet(self.weight).logabsdet / len(self.weight)


class Flip(GroupTransform):
    """The channels in reverse order, so that the next coupling changes what this one kept; its ladj is 0."""

    def to_x(self, z: Tensor, kept: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        return z.flip(-1), z.new_zeros(())

    def to_z(self, x: Tensor, kept: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        return self.to_x(x, kept, context)


@torch.no_grad()
def start_from_data(distribution: FlowDistribution, x: Tensor) -> None:
    """Give every `ActNorm` of a distribution its start, one after another, by values x (B, T) that pass to noise."""
    for step in reversed(distribution.steps):
        if isinstance(step.transform, ActNorm):
            step.transform.start(x)
        x, _ = step.inverse(x)
