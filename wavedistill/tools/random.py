"""Random numbers as functions of whole numbers: a seed, a purpose, a step, an item."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Streams = Sequence[torch.Generator]
"""One for each item of a batch, so that an item's noise is the same in a batch of any size, in any process."""


def each(streams: Streams, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
    """What is drawn from each stream, stacked (B, ...)."""
    return torch.stack([draw(stream) for stream in streams])


def random_stream(*entropy: int) -> torch.Generator:
    """A generator on the CPU for one purpose, given by whole numbers such as a seed, a purpose and a step.

    Streams of different numbers are independent; drawing on the CPU gives the same noise on every device.
    """
    # The count comes first, because trailing zeros would not count.
    (state,) = np.random.SeedSequence([len(entropy), *entropy]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) >> 1)
