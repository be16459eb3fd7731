"""What every network that conditions a flow is made of, and says of itself to those who time, compile or count it."""

from typing import cast

from torch import Tensor, nn


class Network(nn.Module):
    """The layers of a stack of gated convolutions; a flow built on it starts from what its caller chose.

    Args:
        layers: number of gated layers; layer i has dilation 2 ** (i mod dilation_cycle).
        dilation_cycle: layers until the dilation starts again at 1.
        kernel_size: taps of each convolution.
        channels: residual width; the gates are twice as wide.
        skip_channels: width of the skip path and of the head.
        in_channels: inputs at each place.
        out_channels: outputs at each place, of the head, which starts at zero.
        feature_channels: width of the conditioning features, or None for an unconditional network.
        repeat: samples that share one conditioning feature.
        squeeze: samples that share a place.
    """

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
        feature_channels: int | None,
        repeat: int,
        squeeze: int,
    ) -> None:
        super().__init__()
        self.dilations = [2 ** (i % dilation_cycle) for i in range(layers)]
        self.kernel_size, self.channels, self.skip_channels = kernel_size, channels, skip_channels
        self.repeat, self.squeeze = repeat, squeeze
        self.input = nn.Linear(in_channels, channels)
        self.gates = nn.ModuleList(nn.Linear(kernel_size * channels, 2 * channels) for _ in range(layers))
        # Nothing follows the last layer's residual path, so it has none.
        self.outputs = nn.ModuleList(
            nn.Linear(channels, skip_channels + (channels if i < layers - 1 else 0)) for i in range(layers)
        )
        self.context = None if feature_channels is None else nn.Linear(feature_channels, layers * 2 * channels)
        self.hidden = nn.Linear(skip_channels, skip_channels)
        self.head = nn.Linear(skip_channels, out_channels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def flops_per_sample(self) -> float:
        """Floating-point operations for one sample in matrix products, two for a multiplication and its sum."""
        layers = [self.input, *self.gates, *self.outputs, self.hidden, self.head]
        weights = sum(cast(nn.Linear, layer).weight.numel() for layer in layers)
        shared = 0 if self.context is None else self.context.weight.numel() / self.repeat
        return 2 * (weights / self.squeeze + shared)

    @property
    def receptive_field(self) -> int:
        """How many samples an output can see beside its own place."""
        raise NotImplementedError

    def trial(self, samples: int) -> tuple[Tensor | None, ...]:
        """Zeros for about so many samples, as a call takes them."""
        raise NotImplementedError
