"""Where an increasing function takes a given value: Newton's method inside a bracket, to rounding.

Steps in compiled code have the same loop written out: numba caches nothing that is given a function.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ITERATIONS = 100
"""At most; about ten are usual."""
LOOK_EVERY = 8
"""Iterations on a GPU between two looks at whether all has settled."""


@torch.no_grad()
def root(function: Callable[[Tensor], tuple[Tensor, Tensor]], value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The x between low and high where a function is so much, each in the shape of value (any); without gradient.

    Args:
        function: from x to what it is there, and the logarithm of its slope.
        value: what is looked for.
        low: where the function is no more than that.
        high: where it is no less.
    """
    x = (low + high) / 2
    for i in range(1, ITERATIONS + 1):
        found, slope = function(x)
        low, high = torch.where(found < value, x, low), torch.where(found < value, high, x)
        step, eps = (found - value) * (-slope).exp(), torch.finfo(x.dtype).eps
        settled = (step.abs() <= 2 * eps * x.abs()) | ((found - value).abs() <= 4 * eps * (1 + value.abs()))
        inside = (x - step > low) & (x - step < high)
        x = torch.where(settled | inside, x - step, (low + high) / 2)
        # To look at a value stops a GPU until it is there; once settled, further steps change nothing.
        if (x.device.type == "cpu" or i % LOOK_EVERY == 0) and settled.all():
            break
    return x
