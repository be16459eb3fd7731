"""A conditioner of a few values: a masked perceptron, for the autoregressive flows of `flows/`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Made(nn.Module):
    r"""A perceptron whose outputs at t see the input before t only (Germain et al. 2015, *MADE*).

    Input i has degree i + 1, a hidden unit a degree m from 1 to D - 1, and the outputs at t, counted from 0, degree t:

    .. math:: h^1_k = a\Big(\sum_{i < m_k} W_{ki} x_i + (V c)_k\Big), \quad
              h^2_l = a\Big(\sum_{m_k \le m_l} W_{lk} h^1_k\Big), \quad
              y_t = \sum_{m_l \le t} W_{tl} h^2_l + (V' c)_t

    The last layer starts at zero, so that an affine flow starts as the identity.

    Args:
        features: D, two or more.
        outputs: for each t.
        hidden: units of either hidden layer.
        context: values in a context c (B, context), which every output may see.
    """

    first_mask: Tensor
    second_mask: Tensor
    last_mask: Tensor

    def __init__(self, features: int, outputs: int, hidden: int = 64, context: int = 0) -> None:
        super().__init__()
        self.outputs = outputs
        before, units = torch.arange(features) + 1, torch.arange(hidden) % (features - 1) + 1
        after = torch.arange(features).repeat_interleave(outputs)
        self.first, self.second = nn.Linear(features, hidden), nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, features * outputs)
        self.told = nn.Linear(context, hidden, bias=False) if context else None
        self.told_last = nn.Linear(context, features * outputs, bias=False) if context else None
        self.register_buffer("first_mask", units[:, None] >= before)
        self.register_buffer("second_mask", units[:, None] >= units)
        self.register_buffer("last_mask", after[:, None] >= units)
        for layer in (self.last, *([self.told_last] if self.told_last else [])):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """Outputs (B, D, outputs) of x (B, D), and of a context (B, context) where there is one."""
        hidden = self._masked(self.first, self.first_mask, x)
        if self.told is not None:
            hidden = hidden + self.told(*context)
        hidden = F.silu(hidden)
        hidden = F.silu(self._masked(self.second, self.second_mask, hidden))
        raw = self._masked(self.last, self.last_mask, hidden)
        if self.told_last is not None:
            raw = raw + self.told_last(*context)
        return raw.unflatten(-1, (-1, self.outputs))

    @staticmethod
    def _masked(layer: nn.Linear, mask: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight * mask, layer.bias)
