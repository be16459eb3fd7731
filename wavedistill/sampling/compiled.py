"""The sequential direction of a flow as one compiled loop for the CPU: network, state, and the solution of each step.

A step reads every weight once, so that memory, not arithmetic, sets its time: the products keep their outputs in
registers and read packed weights in order, and those of the past taps, whose inputs are known ahead, are computed for
many steps at once. The conditioning is folded into the gates' biases before the loop; threads share the batch.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numba
import numpy as np
import torch
from torch import Tensor, nn

from wavedistill.flows.elementwise import StepConstants, solve_step
from wavedistill.flows.transforms import Autoregressive, Context
from wavedistill.networks.wavenet import WaveNet, WaveNetState
from wavedistill.sampling.tiles import (
    ROWS_BYTES,
    add_product,
    add_products,
    array,
    gate,
    pack,
    residual_first,
    signed_taps,
    with_bias,
)

AHEAD = 16
"""Steps for which the product of the past taps is computed at once, if the dilation allows; a power of two."""


class CompiledLoop:
    """The sequential direction of one flow from its first step on, in as many calls as one likes.

    Args:
        flow: the autoregressive flow.
        net: its network.
        context: conditioning features (B, F', C) and source (B, T, S), as the network takes them.
        batch_size: B.

    Raises:
        ValueError: if the network is not on the CPU.
    """

    def __init__(self, flow: Autoregressive, net: WaveNet, context: Context, batch_size: int) -> None:
        if net.input.weight.device.type != "cpu":
            raise ValueError(f"the compiled loop runs on the CPU, and the network is on {net.input.weight.device}")
        features, source = (*context, None, None)[:2]
        projected, state = net.project(features), WaveNetState(net, batch_size, 0)
        gates, outputs = (cast(list[nn.Linear], list(each)) for each in (net.gates, net.outputs))
        signs, taps = signed_taps(net)
        biases = torch.stack([gate.bias for gate in gates])[:, None]  # (layers, 1, 2C)
        # Without conditioning, one feature for all time.
        folded = (biases.expand(1, -1, batch_size, -1) if projected is None else projected + biases) * signs
        source = net.input.weight.new_zeros(batch_size, 0, 0) if source is None else source
        self._time = 0
        self._rows = list(
            zip(
                array(folded.permute(2, 0, 1, 3)),  # (B, F', layers, 2C)
                array(source),  # (B, T, S)
                np.zeros((batch_size, sum(len(history) for history in state.history), net.channels), _kind(source)),
                np.zeros((batch_size, 1), _kind(source)),
                strict=True,
            )
        )
        self._weights = (
            net.repeat if projected is not None else np.iinfo(np.int64).max,
            np.array(net.dilations),
            pack(with_bias(net.input)),
            pack(taps[:, : net.kernel_size - 1], ROWS_BYTES),
            pack(taps[:, -1]),
            pack(torch.stack([residual_first(output, net.skip_channels, net.channels) for output in outputs])),
            pack(with_bias(net.hidden)),
            pack(with_bias(net.head)),
            net.skip_channels,
            len(net.head.bias),
            flow.elementwise.step(to_x=flow.reads == "x"),
        )

    def __call__(self, given: Tensor) -> Tensor:
        """The other side (B, n) of the next n steps of the known side (B, n); threads share the batch."""
        out = np.empty(tuple(given.shape), _kind(given))

        def run(own: tuple[Any, ...]) -> None:
            _sequence(self._time, *own, *self._weights)  # type: ignore[call-arg]

        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(run, [(g, o, *row) for g, o, row in zip(array(given), out, self._rows, strict=True)]))
        self._time += given.shape[1]
        return torch.from_numpy(out)


def _kind(tensor: Tensor) -> np.dtype:
    return tensor.detach().numpy().dtype


# Division as in numpy: checked for zero as in Python, it is no vector instruction.
@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def _sequence(
    start: int,
    given: np.ndarray,
    out: np.ndarray,
    bias: np.ndarray,
    source: np.ndarray,
    history: np.ndarray,
    previous: np.ndarray,
    repeat: int,
    dilations: np.ndarray,
    input_weight: np.ndarray,
    past_weights: np.ndarray,
    gate_weights: np.ndarray,
    output_weights: np.ndarray,
    hidden_weight: np.ndarray,
    head_weight: np.ndarray,
    skips: int,
    outputs: int,
    constants: StepConstants,
) -> None:
    """Fill out (n,) from given (n,), from step `start` on; update history and previous. The rest is packed above."""
    layers, gate_tiles, channels, lanes = gate_weights.shape
    past = past_weights.shape[1]
    # Where a product has a bias, it is the last row of the weight, for an input of one.
    inputs = np.ones(1 + source.shape[1] + 1, given.dtype)
    active = np.ones((1, channels + 1), given.dtype)
    rectified = np.ones(skips + 1, given.dtype)
    h = np.empty(output_weights.shape[1] * lanes, given.dtype)  # the residual path, then the sum of skips
    hidden = np.empty(hidden_weight.shape[0] * lanes, given.dtype)
    raw = np.empty(head_weight.shape[0] * lanes, given.dtype)
    gates = np.zeros((layers, AHEAD, gate_tiles * lanes), given.dtype)  # of steps to come, without the last tap
    for n in range(len(given)):
        t = start + n
        inputs[0] = previous[0]
        if source.shape[1]:
            inputs[1 : 1 + source.shape[1]] = source[t]
        h[:] = 0
        add_product(h, inputs, input_weight)
        first = 0
        for layer in range(layers):
            dilation = dilations[layer]
            length, span = past * dilation, min(dilation, AHEAD)
            place = t % span
            if n == 0 or place == 0:
                count = min(span - place, len(given) - n)
                steps = gates[layer, place : place + count]
                for s in range(count):
                    for c in range(2 * channels):
                        steps[s, c] = bias[(t + s) // repeat, layer, c]
                for k in range(past):
                    row = first + (t - (past - k) * dilation) % length
                    add_products(steps, history[row : row + count], past_weights[layer, k])
            newest = history[first + t % length]
            for c in range(channels):  # a loop, which becomes vector instructions, as assigning a slice does not
                newest[c] = h[c]
            first += length
            add_product(gates[layer, place], h, gate_weights[layer])
            gate(active, gates[layer, place : place + 1], channels)
            add_product(h, active[0], output_weights[layer])
        for c in range(skips):
            rectified[c] = max(h[channels + c], 0) * layers**-0.5
        hidden[:] = 0
        add_product(hidden, rectified, hidden_weight)
        for c in range(skips):
            rectified[c] = max(hidden[c], 0)
        raw[:] = 0
        add_product(raw, rectified, head_weight)
        value = solve_step(raw[:outputs], given[n], constants)
        out[n] = value
        previous[0] = value
