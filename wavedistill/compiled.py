"""The sequential direction of a flow as one compiled loop for the CPU: network, state, and the solution of each step.

Weights are packed so that a product of matrix and vector reads them in order; the conditioning, with every bias that
does not change, is folded into one vector a layer before the loop; threads share the batch.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numba.extending import overload
from torch import Tensor, nn

from wavedistill.flows import Autoregressive, MixtureCdf, StandardNormal
from wavedistill.models import ConditionerNetwork
from wavedistill.wavenet import WaveNetState

NEWTON_STEPS = MixtureCdf.ITERATIONS


class CompiledLoop:
    """The sequential direction of one flow from its first step on, in as many calls as one likes.

    Args:
        flow: the autoregressive flow.
        conditioner: its network.
        context: conditioning features (B, F', C) and source (B, T, S), as the network takes them.
        batch_size: B.

    Raises:
        ValueError: if the network is not on the CPU.
    """

    def __init__(
        self, flow: Autoregressive, conditioner: ConditionerNetwork, context: tuple[Tensor | None, ...], batch_size: int
    ) -> None:
        net = conditioner.wavenet
        if net.input.weight.device.type != "cpu":
            raise ValueError(f"the compiled loop runs on the CPU, and the network is on {net.input.weight.device}")
        features, source = (*context, None, None)[:2]
        projected, state = net.project(features), WaveNetState(net, batch_size, 0)
        gates, outputs = (cast(list[nn.Linear], list(each)) for each in (net.gates, net.outputs))
        biases = torch.stack([gate.bias for gate in gates])[:, None]  # (layers, 1, 2C)
        # Without conditioning, one feature for all time.
        folded = biases.expand(1, -1, batch_size, -1) if projected is None else projected + biases
        source = net.input.weight.new_zeros(batch_size, 0, 0) if source is None else source
        # The last layer has no residual path: it gets one of zeros, so that all layers look alike.
        rows = net.skip_channels + net.channels
        missing = [rows - len(output.bias) for output in outputs]
        mixture = flow.elementwise if isinstance(flow.elementwise, MixtureCdf) else None
        self._time = 0
        self._rows = list(
            zip(
                _array(folded.permute(2, 0, 1, 3)),  # (B, F', layers, 2C)
                _array(source),  # (B, T, S)
                np.zeros((batch_size, sum(len(history) for history in state.history), net.channels), _kind(source)),
                np.zeros((batch_size, 1), _kind(source)),
                strict=True,
            )
        )
        self._weights = (
            net.repeat if projected is not None else np.iinfo(np.int64).max,
            np.array(net.dilations),
            net.kernel_size,
            _array(net.input.weight.t()),
            _array(net.input.bias),
            _array(torch.stack([gate.weight.t() for gate in gates])),
            _array(torch.stack([F.pad(o.weight, (0, 0, 0, n)).t() for o, n in zip(outputs, missing, strict=True)])),
            _array(torch.stack([F.pad(o.bias, (0, n)) for o, n in zip(outputs, missing, strict=True)])),
            _array(net.hidden.weight.t()),
            _array(net.hidden.bias),
            _array(net.head.weight.t()),
            _array(net.head.bias),
            conditioner.min_log_scale,
            flow.reads == "x",
            mixture is not None,
            mixture is not None and isinstance(mixture.component, StandardNormal),
        )

    def __call__(self, given: Tensor) -> Tensor:
        """The other side (B, n) of the next n steps of the known side (B, n); threads share the batch."""
        out = np.empty(tuple(given.shape), _kind(given))

        def run(own: tuple[Any, ...]) -> None:
            _sequence(self._time, *own, *self._weights)  # type: ignore[call-arg]

        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(run, [(g, o, *row) for g, o, row in zip(_array(given), out, self._rows, strict=True)]))
        self._time += given.shape[1]
        return torch.from_numpy(out)


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().numpy())


def _kind(tensor: Tensor) -> np.dtype:
    return tensor.detach().numpy().dtype


def _exponential(values: np.ndarray) -> None:
    """Replace values by their exponentials."""
    raise NotImplementedError("compiled code only")


@overload(_exponential, jit_options={"fastmath": {"contract"}})
def _exponential_of_kind(values: np.ndarray) -> Callable[[np.ndarray], None]:
    """In float32 without a branch or a call, so that a loop over it becomes vector instructions; exact in float64."""

    def single(values: np.ndarray) -> None:
        scale = np.empty(len(values), np.int32)
        for i in range(len(values)):
            x = min(max(values[i], np.float32(-87)), np.float32(88))
            whole = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
            # e^x = 2^whole e^rest; the two parts of log 2 keep the rest exact.
            rest = x - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)
            series = np.float32(1.9875691500e-4)
            series = series * rest + np.float32(1.3981999507e-3)
            series = series * rest + np.float32(8.3334519073e-3)
            series = series * rest + np.float32(4.1665795894e-2)
            series = series * rest + np.float32(1.6666665459e-1)
            series = series * rest + np.float32(5.0000001201e-1)
            values[i] = series * rest * rest + rest + np.float32(1)
            scale[i] = (np.int32(whole) + 127) << 23
        power = scale.view(np.float32)
        for i in range(len(values)):
            values[i] *= power[i]

    def double(values: np.ndarray) -> None:
        for i in range(len(values)):
            values[i] = math.exp(values[i])

    return single if values.dtype == numba.float32 else double


@numba.njit(cache=True, nogil=True, fastmath={"contract"})
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
    kernel_size: int,
    input_weight: np.ndarray,
    input_bias: np.ndarray,
    gate_weights: np.ndarray,
    output_weights: np.ndarray,
    output_biases: np.ndarray,
    hidden_weight: np.ndarray,
    hidden_bias: np.ndarray,
    head_weight: np.ndarray,
    head_bias: np.ndarray,
    min_log_scale: float,
    reads_x: bool,
    mixture: bool,
    normal: bool,
) -> None:
    """Fill out (n,) from given (n,), from step `start` on; update history and previous. The rest is packed above."""
    layers, inputs, gates = gate_weights.shape
    channels, skips = gates // 2, len(hidden_bias)
    lengths = dilations * (kernel_size - 1)
    h = np.empty(channels, given.dtype)
    taps = np.empty(inputs, given.dtype)
    gate = np.empty(gates, given.dtype)
    active = np.empty(channels, given.dtype)
    both = np.empty(skips + channels, given.dtype)
    skip = np.empty(skips, given.dtype)
    hidden = np.empty(skips, given.dtype)
    raw = np.empty(len(head_bias), given.dtype)
    for n in range(len(given)):
        t = start + n
        h[:] = input_bias
        _add_product(h, input_weight, previous)
        if source.shape[1]:
            _add_product(h, input_weight[1:], source[t])
        skip[:] = 0
        first = 0
        for layer in range(layers):
            length, dilation = lengths[layer], dilations[layer]
            for k in range(kernel_size - 1):
                row = first + (t - (kernel_size - 1 - k) * dilation) % length
                taps[k * channels : (k + 1) * channels] = history[row]
            taps[inputs - channels :] = h
            history[first + t % length] = h
            first += length
            gate[:] = bias[t // repeat, layer]
            _add_product(gate, gate_weights[layer], taps)
            # tanh(f) sigmoid(g) = (1 - 2 / (1 + e^2f)) / (1 + e^-g)
            for c in range(channels):
                gate[c] = 2 * gate[c]
                gate[channels + c] = -gate[channels + c]
            _exponential(gate)
            for c in range(channels):
                active[c] = (1 - 2 / (1 + gate[c])) / (1 + gate[channels + c])
            both[:] = output_biases[layer]
            _add_product(both, output_weights[layer], active)
            for c in range(skips):
                skip[c] += both[c]
            for c in range(channels):
                h[c] += both[skips + c]
        for c in range(skips):
            skip[c] = max(skip[c], 0) * layers**-0.5
        hidden[:] = hidden_bias
        _add_product(hidden, hidden_weight, skip)
        for c in range(skips):
            hidden[c] = max(hidden[c], 0)
        raw[:] = head_bias
        _add_product(raw, head_weight, hidden)
        if mixture:
            value = _solve_mixture(raw, given[n], min_log_scale, reads_x, normal)
        else:
            log_scale = min_log_scale + _softplus(raw[1] - min_log_scale)
            scale = math.exp(log_scale)
            value = raw[0] + scale * given[n] if reads_x else (given[n] - raw[0]) / scale
        out[n] = value
        previous[0] = value


@numba.njit(cache=True, fastmath={"contract"})
def _add_product(y: np.ndarray, weight: np.ndarray, x: np.ndarray) -> None:
    """y (N,) += x (M,) @ weight (M or more, N), four rows at a time: y is read and written a quarter as often."""
    full = len(x) // 4 * 4
    for i in range(0, full, 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        w0, w1, w2, w3 = weight[i], weight[i + 1], weight[i + 2], weight[i + 3]
        for o in range(len(y)):
            y[o] += w0[o] * x0 + w1[o] * x1 + w2[o] * x2 + w3[o] * x3
    for i in range(full, len(x)):
        for o in range(len(y)):
            y[o] += weight[i, o] * x[i]


@numba.njit(cache=True)
def _softplus(x: float) -> float:
    return x if x > 20 else math.log1p(math.exp(x))  # as torch has it


@numba.njit(cache=True)
def _log_cdf(u: float, normal: bool) -> float:
    """Of a standard normal or logistic; accurate in the lower tail."""
    if not normal:
        return min(u, 0.0) - math.log1p(math.exp(-abs(u)))
    if u > -37:
        return math.log(0.5 * math.erfc(-u / math.sqrt(2)))
    square = 1 / (u * u)
    tail = 1 - square * (1 - 3 * square * (1 - 5 * square))
    return -0.5 * u * u - math.log(-u * math.sqrt(2 * math.pi)) + math.log(tail)


@numba.njit(cache=True)
def _mixture_to_z(raw: np.ndarray, x: float, min_log_scale: float, normal: bool) -> tuple[float, float]:
    """z and log dz/dx at x of the mixture whose unnormalised weights, shifts and scales the network gave."""
    k = len(raw) // 3
    highest = raw[:k].max()
    total = np.exp(raw[:k].astype(np.float64) - highest).sum()
    below, above, density = np.empty(k), np.empty(k), np.empty(k)
    for i in range(k):
        log_weight = raw[i] - highest - math.log(total)
        log_scale = min_log_scale + _softplus(raw[2 * k + i] - min_log_scale)
        u = (x - raw[k + i]) * math.exp(-log_scale)
        below[i] = log_weight + _log_cdf(u, normal)
        above[i] = log_weight + _log_cdf(-u, normal)
        shape = -0.5 * u * u - 0.5 * math.log(2 * math.pi)
        if not normal:
            shape = -abs(u) - 2 * math.log1p(math.exp(-abs(u)))
        density[i] = log_weight + shape - log_scale
    low, high = _log_sum(below), _log_sum(above)
    return low - high, _log_sum(density) - low - high


@numba.njit(cache=True)
def _log_sum(values: np.ndarray) -> float:
    highest = values.max()
    return highest + math.log(np.exp(values - highest).sum())


@numba.njit(cache=True)
def _solve_mixture(raw: np.ndarray, given: float, min_log_scale: float, reads_x: bool, normal: bool) -> float:
    """As `MixtureCdf.to_x` or `to_z`, for one value, in float64."""
    if not reads_x:
        return _mixture_to_z(raw, given, min_log_scale, normal)[0]
    # A bracket that grows from the middle of the components until it holds the solution.
    k = len(raw) // 3
    middle, width = raw[k : 2 * k].mean(), 1.0
    low, high = middle - width, middle + width
    while _mixture_to_z(raw, low, min_log_scale, normal)[0] > given:
        width *= 2
        low -= width
    width = 1.0
    while _mixture_to_z(raw, high, min_log_scale, normal)[0] < given:
        width *= 2
        high += width
    x = (low + high) / 2
    for _ in range(NEWTON_STEPS):
        found, slope = _mixture_to_z(raw, x, min_log_scale, normal)
        if found < given:
            low = x
        else:
            high = x
        step = (found - given) * math.exp(-slope)
        settled = abs(step) <= 4e-16 * abs(x) or abs(found - given) <= 1e-15 * (1 + abs(given))
        x = x - step if settled or low < x - step < high else (low + high) / 2
        if settled:
            break
    return x
