r"""Bijections between noise z and signal x.

Throughout, z and x are (B, T), and `ladj` holds the per-step terms (B, T) of the log absolute determinant of the
Jacobian, so that a mask or a per-step estimator needs no second implementation; their sum over T is log|det J|.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from wavedistill.flows.elementwise import Elementwise, Parameters

Context = Any
"""What a transform is conditioned on: for a network, features; for a `Composition`, a sequence of one for each part."""


class SequentialDirectionError(RuntimeError):
    """Raised by the direction of an autoregressive bijection that one network call cannot compute."""


class Conditioner(Protocol):
    """A strictly causal function: the parameters at t see only the input before t."""

    def __call__(self, x: Tensor, /, context: Context) -> Parameters:
        """The parameters of an elementwise bijection at every t of the input (B, T)."""


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
