r"""Bijections between noise z and signal x.

Throughout, z and x are (B, T), and `ladj` holds the per-step terms (B, T) of the log absolute determinant of the
Jacobian, so that a mask or a per-step estimator needs no second implementation; their sum over T is log|det J|.
"""

import math
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from wavedistill.flows.elementwise import Elementwise, Parameters

Context = tuple[Any, ...]
"""What a transform is conditioned on, for a network features and source; empty where it is conditioned on nothing."""


class SequentialDirectionError(RuntimeError):
    """Raised by the direction of an autoregressive bijection that one network call cannot compute."""


class Conditioner(Protocol):
    """A strictly causal function: the outputs at t see only the input before t."""

    def __call__(self, x: Tensor, /, *context: Any) -> Tensor:
        """What stands for the parameters of an elementwise bijection, (B, T, outputs), at every t of x (B, T)."""


class Transform(nn.Module):
    """A bijection: `forward` is z -> x, `inverse` is x -> z, each with its `ladj`, each at most one network call."""

    def forward(self, z: Tensor, context: Context = ()) -> tuple[Tensor, Tensor]:
        """x = f(z) and log|dx/dz|, (B, T) each."""
        raise NotImplementedError

    def inverse(self, x: Tensor, context: Context = ()) -> tuple[Tensor, Tensor]:
        """z = f^-1(x) and log|dz/dx|, (B, T) each."""
        raise NotImplementedError

    def summary(self) -> str:
        """A few words for people."""
        return type(self).__name__


class Bound(NamedTuple):
    """A transform and what it is conditioned on, hence a function of one variable in either direction."""

    transform: Transform
    context: Context = ()

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x = f(z) and log|dx/dz|, (B, T) each."""
        return self.transform(z, self.context)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z = f^-1(x) and log|dz/dx|, (B, T) each."""
        return self.transform.inverse(x, self.context)


class Autoregressive(Transform):
    r"""Elementwise bijections whose parameters a conditioner computes from the past of one of its two sides.

    .. math:: x_t = f(z_t; \theta_t), \qquad z_t = f^{-1}(x_t; \theta_t), \qquad
              \log|\det J| = \sum_t \log f'(z_t; \theta_t)

    With `reads="x"` it is a masked autoregressive flow (Papamakarios et al. 2017): theta_t = c(x_<t), density in
    parallel. With `reads="z"` it is an inverse autoregressive flow (Kingma et al. 2016): theta_t = c(z_<t), sampling in
    parallel. The other direction takes T steps and lives in `wavedistill.sampling.sequential`.

    Raises:
        SequentialDirectionError: when the direction asked for is the sequential one.
    """

    def __init__(self, conditioner: Conditioner, reads: Literal["x", "z"], elementwise: Elementwise) -> None:
        super().__init__()
        self.conditioner, self.reads, self.elementwise = conditioner, reads, elementwise

    def step_parameters(self, side: Tensor, context: Context = ()) -> Parameters:
        """The parameters at every t, given the side (B, T) that the conditioner reads."""
        return self.elementwise.parameters(self.conditioner(side, *context))

    def solve(self, given: Tensor, parameters: Parameters) -> Tensor:
        """The side that the conditioner reads, where the other and the parameters are known, of any shape."""
        return (self.elementwise.to_x if self.reads == "x" else self.elementwise.to_z)(given, *parameters)[0]

    def summary(self) -> str:
        return f"{type(self.elementwise).__name__} given past {self.reads}"

    def forward(self, z: Tensor, context: Context = ()) -> tuple[Tensor, Tensor]:
        if self.reads == "x":
            raise SequentialDirectionError(
                "x of a masked autoregressive flow is drawn step by step: wavedistill.sampling.sequential"
            )
        return self.elementwise.to_x(z, *self.step_parameters(z, context))

    def inverse(self, x: Tensor, context: Context = ()) -> tuple[Tensor, Tensor]:
        if self.reads == "z":
            raise SequentialDirectionError(
                "z of an inverse autoregressive flow is found step by step: wavedistill.sampling.sequential"
            )
        return self.elementwise.to_z(x, *self.step_parameters(x, context))


class Scale(Transform):
    r"""Fixed scaling :math:`x = s z`, which lets the flows before it work at unit variance."""

    log_scale: Tensor

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.register_buffer("log_scale", torch.tensor(math.log(scale)))

    def forward(self, z: Tensor, context: Context = ()) -> tuple[Tensor, Tensor]:
        return z * self.log_scale.exp(), self.log_scale.expand_as(z)

    def inverse(self, x: Tensor, context: Context = ()) -> tuple[Tensor, Tensor]:
        return x * (-self.log_scale).exp(), -self.log_scale.expand_as(x)
