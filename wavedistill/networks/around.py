"""The conditioner of a coupling flow: dilated convolutions over groups of samples that look both ways."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedistill.networks.network import Network


class WaveNetAround(Network):
    r"""Gated convolution stack that is not causal: outputs at a group see as many groups after it as before it.

    Each layer computes, with dilation d_l and conditioning c,

    .. math:: h \leftarrow h + R\,a, \quad skip \leftarrow skip + S\,a, \quad
              a = \tanh(W_f * h + V_f c) \odot \sigma(W_g * h + V_g c)

    (Prenger et al. 2018, *WaveGlow*). Beyond either end of what it is given it sees zeros, in every layer: so it does
    in training at the edges of a segment, and in use at the ends of a sound. The last layer starts at zero, so that a
    flow built on it starts from what its caller chose. As in `WaveNet`, activations are time-major.

    Args:
        layers: number of gated layers; layer i has dilation 2 ** (i mod dilation_cycle).
        dilation_cycle: layers until the dilation starts again at 1.
        kernel_size: taps of each dilated convolution, an odd number.
        channels: residual width; the gates are twice as wide.
        skip_channels: width of the skip path and of the head.
        in_channels: values of a group that it reads.
        out_channels: outputs a group.
        feature_channels: width of the conditioning features.
        repeat: samples that share one conditioning feature.
        squeeze: samples a group.
        source_channels: signals at every sample that it reads too; functions of the conditioning.
    """

    context: nn.Linear

    def __init__(
        self,
        *,
        layers: int,
        dilation_cycle: int,
        kernel_size: int,
        channels: int,
        skip_channels: int,
        in_channels: int,
        out_channels: int,
        feature_channels: int,
        repeat: int,
        squeeze: int,
        source_channels: int = 0,
    ) -> None:
        super().__init__(
            layers=layers,
            dilation_cycle=dilation_cycle,
            kernel_size=kernel_size,
            channels=channels,
            skip_channels=skip_channels,
            in_channels=in_channels + squeeze * source_channels,
            out_channels=out_channels,
            feature_channels=feature_channels,
            repeat=repeat,
            squeeze=squeeze,
        )
        self.in_channels, self.source_channels = in_channels, source_channels

    @property
    def receptive_field(self) -> int:
        return self.squeeze * (self.kernel_size - 1) * sum(self.dilations)

    def trial(self, samples: int) -> tuple[Tensor | None, ...]:
        groups, zeros = samples // self.squeeze, self.input.weight.new_zeros
        features = zeros(1, -(-samples // self.repeat), self.context.in_features)
        source = zeros(1, groups * self.squeeze, self.source_channels) if self.source_channels else None
        return zeros(1, groups, self.in_channels), features, source

    def forward(self, x: Tensor, features: Tensor, source: Tensor | None = None) -> Tensor:
        """Outputs (B, N, out_channels) for N groups.

        Args:
            x: (B, N, in_channels) what is read of each group.
            features: (B, at least N * squeeze / repeat, feature_channels); a group has that of its middle.
            source: (B, at least N * squeeze, source_channels), or None where these are 0.
        """
        steps, batch_size = x.shape[1], x.shape[0]
        if source is not None:
            x = torch.cat([x, source[:, : steps * self.squeeze].reshape(batch_size, steps, -1)], -1)
        h = self.input(x.transpose(0, 1))  # (N, B, C)
        context = self.context(features.transpose(0, 1)).unflatten(-1, (len(self.gates), -1))  # (F', B, layers, 2C)
        place = (torch.arange(steps, device=x.device) * self.squeeze + self.squeeze // 2) // self.repeat
        skip = x.new_zeros(1, 1, 1)  # under autocast, sums stay as precise as x
        for i, (dilation, gates, outputs) in enumerate(zip(self.dilations, self.gates, self.outputs, strict=True)):
            around = (self.kernel_size - 1) // 2 * dilation
            padded = F.pad(h, (0, 0, 0, 0, around, around))
            taps = torch.cat([padded[k * dilation :][:steps] for k in range(self.kernel_size)], -1)
            filtered, gate = (gates(taps) + context[place, :, i]).chunk(2, -1)
            # tanh(f) = 2 sigmoid(2f) - 1: on a CPU, torch's tanh takes as long as six of its sigmoids.
            out = outputs((2 * torch.sigmoid(2 * filtered) - 1) * torch.sigmoid(gate))
            skip = skip + out[..., : self.skip_channels]
            if i < len(self.gates) - 1:
                h = h + out[..., self.skip_channels :]
        with torch.autocast(x.device.type, enabled=False):  # a density is no more precise than its parameters
            hidden = F.relu(self.hidden(F.relu(skip * len(self.gates) ** -0.5)))
            return self.head(hidden).transpose(0, 1)
