"""What every network that conditions a flow says of itself, to those who time, compile or count it."""

from torch import Tensor, nn


class Network(nn.Module):
    """A stack of gated convolutions.

    Attributes:
        channels: width of its residual path.
        kernel_size: taps of each convolution.
        head: its last layer.
    """

    channels: int
    kernel_size: int
    head: nn.Linear

    @property
    def flops_per_sample(self) -> float:
        """Floating-point operations for one sample in matrix products, two for a multiplication and its sum."""
        raise NotImplementedError

    @property
    def receptive_field(self) -> int:
        """How many samples an output can see beside its own place."""
        raise NotImplementedError

    def trial(self, samples: int) -> tuple[Tensor | None, ...]:
        """Zeros for about so many samples, as a call takes them."""
        raise NotImplementedError
