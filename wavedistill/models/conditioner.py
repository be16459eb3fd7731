"""The only place where a network meets a flow: its outputs become the parameters of a bijection."""

import torch.nn.functional as F
from torch import Tensor, nn

from wavedistill.flows.elementwise import Parameters
from wavedistill.networks.wavenet import WaveNet, WaveNetState


class ConditionerNetwork(nn.Module):
    r"""A WaveNet whose outputs are the parameters of an elementwise bijection: of an affine one, or of a mixture.

    Every log-scale is bounded below by a softplus, whose gradient never vanishes:
    :math:`\log\sigma = b + softplus(r - b)`, which is r where r is well above the bound b.

    Args:
        wavenet: with 2 outputs for an affine bijection, 3 K for a mixture of K components.
        min_log_scale: the bound b.
    """

    def __init__(self, wavenet: WaveNet, min_log_scale: float) -> None:
        super().__init__()
        self.wavenet, self.min_log_scale = wavenet, min_log_scale

    def forward(
        self, x: Tensor, context: tuple[Tensor | None, ...] = (), state: WaveNetState | None = None
    ) -> Parameters:
        """The parameters at every t, from x (B, T) before t; context and state are what `WaveNet` takes."""
        return self._split(self.wavenet(x, *context, state=state))

    def step(
        self, previous: Tensor, state: WaveNetState, context: Tensor | None = None, source: Tensor | None = None
    ) -> Parameters:
        """The parameters at the next t, from x_{t-1} (B,), as `WaveNet.step`."""
        return self._split(self.wavenet.step(previous, state, context, source))

    def _split(self, out: Tensor) -> Parameters:
        if out.shape[-1] == 2:
            shift, raw = out.unbind(-1)
            return shift, self._log_scale(raw)
        weights, shift, raw = out.chunk(3, -1)
        return weights, shift, self._log_scale(raw)

    def _log_scale(self, raw: Tensor) -> Tensor:
        return self.min_log_scale + F.softplus(raw - self.min_log_scale)
