"""A network over consecutive blocks of a sequence: by torch, or as compiled code for the CPU.

In compiled code every layer is a product of matrices for a few dozen groups of steps at a time, so that all they go
through stays in the processor's nearest caches; and nothing is asked of the interpreter meanwhile, so that threads
compute abreast.
"""

from typing import Protocol, cast

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedistill.networks.products import product
from wavedistill.networks.wavenet import WaveNet, WaveNetState
from wavedistill.sampling.tiles import (
    ROWS,
    ROWS_BYTES,
    add_products,
    array,
    copy_row,
    gate,
    pack,
    residual_first,
    signed_taps,
    with_bias,
)

SPAN = 8 * ROWS
"""Groups of steps that go through all layers together."""


class Blocks(Protocol):
    """A `WaveNet` that is given a sequence block by block: as one call for the whole, without gradient.

    Args:
        net: the network.
        batch_size: sequences.
        room: steps of the longest block.
    """

    def __init__(self, net: WaveNet, batch_size: int, room: int) -> None: ...

    def __call__(self, x: Tensor, features: Tensor | None = None, source: Tensor | None = None) -> Tensor:
        """Outputs (B, T, out_channels) of the next block x (B, T); all else as in a call of the network.

        Every block but the last has a multiple of `repeat` steps.
        """


class BlocksByTorch(Blocks):
    """On any device, and under autocast."""

    def __init__(self, net: WaveNet, batch_size: int, room: int) -> None:
        self._net, self._state = net, WaveNetState(net, batch_size, room)

    def __call__(self, x: Tensor, features: Tensor | None = None, source: Tensor | None = None) -> Tensor:
        return self._net(x, features, source, self._state)


class CompiledBlocks(Blocks):
    """In compiled code, with copies of weights that are on the CPU."""

    def __init__(self, net: WaveNet, batch_size: int, room: int) -> None:
        self.net = net
        gates, outputs = (cast(list[nn.Linear], list(each)) for each in (net.gates, net.outputs))
        kind, self._groups = array(net.input.bias).dtype, room // net.squeeze
        lanes = ROWS_BYTES // kind.itemsize
        signs, taps = signed_taps(net)
        # What gates are beside their taps, filled up to whole tiles.
        fill = -len(signs) % lanes
        bias = torch.stack([layer.bias for layer in gates])
        if net.context is not None:
            bias = bias + net.context.bias.view_as(bias)
            rows = net.context.weight.unflatten(0, bias.shape) * signs[:, None]
            self._context = F.pad(rows, (0, 0, 0, fill)).flatten(0, 1)
        self._bias = F.pad(bias * signs, (0, fill))
        self._weights = (
            np.array(net.dilations),
            *(
                pack(weight, ROWS_BYTES)
                for weight in (
                    with_bias(net.input),
                    taps,
                    torch.stack([residual_first(layer, net.skip_channels, net.channels) for layer in outputs]),
                    with_bias(net.hidden),
                    with_bias(net.head),
                )
            ),
            net.skip_channels,
        )
        self._previous = net.input.weight.new_zeros(batch_size, net.squeeze)
        lengths = (net.kernel_size - 1) * np.array(net.dilations) + self._groups  # past and block of each layer
        self._history = np.zeros((batch_size, lengths.sum(), net.channels + -net.channels % lanes), kind)
        self._starts = lengths.cumsum() - lengths
        self._hidden = np.zeros((batch_size, self._groups + 1, net.skip_channels + 1), kind)
        self._hidden[:, :, net.skip_channels] = 1

    def __call__(self, x: Tensor, features: Tensor | None = None, source: Tensor | None = None) -> Tensor:
        net, (batch_size, length), squeeze = self.net, x.shape, self.net.squeeze
        values, seen, last = net.in_groups(self._previous, x)
        groups = seen.shape[1]
        inputs = [seen, *([] if source is None else [net.beside(source, groups)])]
        inputs.append(values.new_ones(1, 1, 1).expand(batch_size, groups, 1))
        context = self._projected(features, batch_size)
        # Compiled code does not look.
        if groups > self._groups or (features is not None and length > features.shape[1] * net.repeat):
            raise ValueError(f"a block of {length} steps is longer than its room or its features")
        found = np.empty((batch_size, net.outputs_a_step, length), self._history.dtype)
        repeat = net.repeat // squeeze if net.context is not None else np.iinfo(np.int64).max
        rows = (array(torch.cat(inputs, 2)), array(values), array(context), self._history, self._hidden, found)
        for row in zip(*rows, strict=True):
            _block(*row, squeeze - net.border, repeat, self._starts, *self._weights)  # type: ignore[call-arg]
        self._previous = last
        return torch.from_numpy(found).transpose(1, 2)

    def _projected(self, features: Tensor | None, batch_size: int) -> Tensor:
        """What the gates are beside their taps (B, F', layers, 2 C or more); without conditioning, one for all time."""
        if self.net.context is None:
            return self._bias.expand(batch_size, 1, -1, -1)
        if features is None:
            raise ValueError("this network is conditional: it needs features")
        projected = product(features.flatten(0, 1), self._context, self._bias.flatten())
        return projected.view(*features.shape[:2], *self._bias.shape)


# Division as in numpy: checked for zero as in Python, it is no vector instruction.
@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def _block(
    inputs: np.ndarray,
    values: np.ndarray,
    context: np.ndarray,
    history: np.ndarray,
    hidden: np.ndarray,
    out: np.ndarray,
    before: int,
    repeat: int,
    starts: np.ndarray,
    dilations: np.ndarray,
    input_weight: np.ndarray,
    tap_weights: np.ndarray,
    output_weights: np.ndarray,
    hidden_weight: np.ndarray,
    head_weight: np.ndarray,
    skips: int,
) -> None:
    """Fill out (outputs, T) from inputs (N, M + 1) and values (N + 1, squeeze); update history and hidden.

    The first group of outputs began so many steps before the block. Where a product has a bias, it is the last row of
    the weight, for an input of one.
    """
    groups, squeeze, kind = len(inputs), values.shape[1], inputs.dtype
    layers, taps, _, channels, _ = tap_weights.shape
    width = context.shape[2]
    gates = np.empty((SPAN, width), kind)
    active = np.ones((SPAN, channels + 1), kind)
    total = np.empty((SPAN, output_weights.shape[1] * output_weights.shape[3]), kind)  # the residual path, then skips
    rectified = np.ones((SPAN, skips + 1), kind)
    second = np.empty((SPAN, hidden_weight.shape[0] * hidden_weight.shape[2]), kind)
    raw = np.empty((SPAN, head_weight.shape[0] * head_weight.shape[2]), kind)
    for first in range(0, groups, SPAN):
        count = min(SPAN, groups - first)
        total[:] = 0
        add_products(total[:count], inputs[first : first + count], input_weight)
        for layer in range(layers):
            newest = starts[layer] + (taps - 1) * dilations[layer] + first
            for s in range(count):
                copy_row(history, (newest + s) * history.shape[1], total, s * total.shape[1], history.shape[1])
                feature = (first + s) // repeat * layers + layer
                copy_row(gates, s * width, context, feature * width, width)
            for tap in range(taps):
                row = newest - (taps - 1 - tap) * dilations[layer]
                add_products(gates[:count], history[row : row + count], tap_weights[layer, tap])
            gate(active, gates[:count], channels)
            add_products(total[:count], active[:count], output_weights[layer])
        for s in range(count):
            for c in range(skips):
                rectified[s, c] = max(total[s, channels + c], 0) * layers**-0.5
        second[:] = 0
        add_products(second[:count], rectified[:count], hidden_weight)
        for s in range(count):
            for c in range(skips):
                hidden[first + 1 + s, c] = max(second[s, c], 0)
    for first in range(0, groups + 1, SPAN):
        count = min(SPAN, groups + 1 - first)
        raw[:] = 0
        add_products(raw[:count], hidden[first : first + count], head_weight)
        for s in range(count):
            begin = (first + s) * squeeze - before
            for place in range(max(0, -begin), min(squeeze, out.shape[1] - begin)):
                shift = raw[s, place]
                weight = out.shape[0] * squeeze + place * (place - 1) // 2
                for earlier in range(place):
                    shift += raw[s, weight + earlier] * values[first + s, earlier]
                out[0, begin + place] = shift
                for output in range(1, out.shape[0]):
                    out[output, begin + place] = raw[s, output * squeeze + place]
    hidden[0] = hidden[groups]
    for layer in range(layers):
        for row in range(starts[layer], starts[layer] + (taps - 1) * dilations[layer]):
            history[row] = history[row + groups]
