"""The sequential direction of a flow as one compiled loop for the CPU: network, state, and the solution of each step.

A step reads every weight once, so that memory, not arithmetic, sets its time: the products keep their outputs in
registers and read packed weights in order, and those of the past taps, whose inputs are known ahead, are computed for
many steps at once. The conditioning is folded into the gates' biases before the loop; threads share the batch.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numba
import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, overload, register_model
from torch import Tensor, nn

from wavedistill.flows.bases import StandardNormal
from wavedistill.flows.elementwise import MixtureCdf
from wavedistill.flows.transforms import Autoregressive
from wavedistill.models.conditioner import ConditionerNetwork
from wavedistill.networks.wavenet import WaveNetState

NEWTON_STEPS = MixtureCdf.ITERATIONS
TILE_BYTES = 256
"""Outputs that a product of matrix and vector keeps in registers: 64 in float32."""
AHEAD = 16
"""Steps for which the product of the past taps is computed at once, if the dilation allows; a power of two."""


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
        # The gates as what their exponentials are taken of, 2f and -g.
        signs = net.input.weight.new_tensor([2.0, -1.0]).repeat_interleave(net.channels)
        biases = torch.stack([gate.bias for gate in gates])[:, None]  # (layers, 1, 2C)
        # Without conditioning, one feature for all time.
        folded = (biases.expand(1, -1, batch_size, -1) if projected is None else projected + biases) * signs
        taps = torch.stack([gate.weight.t() * signs for gate in gates]).unflatten(1, (net.kernel_size, -1))
        source = net.input.weight.new_zeros(batch_size, 0, 0) if source is None else source
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
            _pack(_with_bias(net.input)),
            _pack(taps[:, : net.kernel_size - 1]),
            _pack(taps[:, -1]),
            _pack(torch.stack([_residual_first(output, net.skip_channels, net.channels) for output in outputs])),
            _pack(_with_bias(net.hidden)),
            _pack(_with_bias(net.head)),
            net.skip_channels,
            len(net.head.bias),
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


def _with_bias(layer: nn.Linear) -> Tensor:
    """The matrix (M + 1, N) that maps the inputs and a one to the outputs."""
    return torch.cat([layer.weight.t(), layer.bias[None]])


def _residual_first(output: nn.Linear, skips: int, channels: int) -> Tensor:
    """As `_with_bias`, residual then skip; the last layer, which has no residual path, gets one of zeros."""
    skip, residual = _with_bias(output).tensor_split([skips], 1)
    return torch.cat([F.pad(residual, (0, channels - residual.shape[1])), skip], 1)


def _pack(weight: Tensor) -> np.ndarray:
    """Matrices (..., M, N) as tiles of columns (..., tiles, M, lanes), with zeros beside them."""
    lanes = TILE_BYTES // weight.element_size()
    padded = F.pad(weight, (0, -weight.shape[-1] % lanes))
    return _array(padded.unflatten(-1, (-1, lanes)).transpose(-2, -3))


def _exponential(values: np.ndarray) -> None:
    """Replace values by their exponentials."""
    raise NotImplementedError("compiled code only")


@overload(_exponential, jit_options={"fastmath": {"contract"}})
def _exponential_of_kind(values: np.ndarray) -> Callable[[np.ndarray], None]:
    """In float32 without a branch or a call, so that a loop over it becomes vector instructions; exact in float64."""

    def single(values: np.ndarray) -> None:
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
            power = np.int32((np.int32(whole) + 127) << 23).view(np.float32)
            values[i] = (series * rest * rest + rest + np.float32(1)) * power

    def double(values: np.ndarray) -> None:
        for i in range(len(values)):
            values[i] = math.exp(values[i])

    return single if values.dtype == numba.float32 else double


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
    min_log_scale: float,
    reads_x: bool,
    mixture: bool,
    normal: bool,
) -> None:
    """Fill out (n,) from given (n,), from step `start` on; update history and previous. The rest is packed above."""
    layers, gate_tiles, channels, lanes = gate_weights.shape
    past = past_weights.shape[1]
    # Where a product has a bias, it is the last row of the weight, for an input of one.
    inputs = np.ones(1 + source.shape[1] + 1, given.dtype)
    active = np.ones(channels + 1, given.dtype)
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
        _add_product(h, inputs, input_weight)
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
                    _add_products(steps, history[row : row + count], past_weights[layer, k])
            newest = history[first + t % length]
            for c in range(channels):  # a loop, which becomes vector instructions, as assigning a slice does not
                newest[c] = h[c]
            first += length
            gate = gates[layer, place]
            _add_product(gate, h, gate_weights[layer])
            # tanh(f) sigmoid(g) = (e^2f - 1) / (e^2f + 1) / (1 + e^-g), with one division; tanh(20) rounds to 1.
            for c in range(channels):
                gate[c] = min(gate[c], 40)
            _exponential(gate[: 2 * channels])
            for c in range(channels):
                active[c] = (gate[c] - 1) / ((gate[c] + 1) * (gate[channels + c] + 1))
            _add_product(h, active, output_weights[layer])
        for c in range(skips):
            rectified[c] = max(h[channels + c], 0) * layers**-0.5
        hidden[:] = 0
        _add_product(hidden, rectified, hidden_weight)
        for c in range(skips):
            rectified[c] = max(hidden[c], 0)
        raw[:] = 0
        _add_product(raw, rectified, head_weight)
        if mixture:
            value = _solve_mixture(raw[:outputs], given[n], min_log_scale, reads_x, normal)
        else:
            log_scale = min_log_scale + _softplus(raw[1] - min_log_scale)
            scale = math.exp(log_scale)
            value = raw[0] + scale * given[n] if reads_x else (given[n] - raw[0]) / scale
        out[n] = value
        previous[0] = value


@numba.njit(cache=True, fastmath={"contract"})
def _add_product(y: np.ndarray, x: np.ndarray, weight: np.ndarray) -> None:
    """y (N,) += x (M or more,) @ packed weight (tiles, M, lanes)."""
    tiles, inputs, lanes = weight.shape
    for tile in range(tiles):
        total = _load(y, tile * lanes)
        for i in range(inputs):
            total = _add(total, x[i], _load(weight, (tile * inputs + i) * lanes))
        _store(y, tile * lanes, total)


@numba.njit(cache=True, fastmath={"contract"})
def _add_products(y: np.ndarray, x: np.ndarray, weight: np.ndarray) -> None:
    """As `_add_product` for every step of y (n, N) and x (n, M): four share each read of a weight."""
    tiles, inputs, lanes = weight.shape
    full = len(x) // 4 * 4
    for s in range(0, full, 4):
        x0, x1, x2, x3 = x[s], x[s + 1], x[s + 2], x[s + 3]
        y0, y1, y2, y3 = y[s], y[s + 1], y[s + 2], y[s + 3]
        for tile in range(tiles):
            at = tile * lanes
            total0, total1, total2, total3 = _load(y0, at), _load(y1, at), _load(y2, at), _load(y3, at)
            for i in range(inputs):
                w = _load(weight, (tile * inputs + i) * lanes)
                total0, total1 = _add(total0, x0[i], w), _add(total1, x1[i], w)
                total2, total3 = _add(total2, x2[i], w), _add(total3, x3[i], w)
            _store(y0, at, total0)
            _store(y1, at, total1)
            _store(y2, at, total2)
            _store(y3, at, total3)
    for s in range(full, len(x)):
        _add_product(y[s], x[s], weight)


class _Tile(types.Type):
    """Numbers that compiled code holds as one vector, which LLVM spreads over the registers of the processor."""

    def __init__(self, dtype: types.Float) -> None:
        super().__init__(f"Tile({dtype})")
        self.dtype, self.lanes = dtype, TILE_BYTES * 8 // dtype.bitwidth


@register_model(_Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager: Any, tile: _Tile) -> None:
        super().__init__(manager, tile, ir.VectorType(manager.lookup(tile.dtype).get_value_type(), tile.lanes))


def _address(context: Any, builder: Any, kind: Any, array: Any, offset: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), context.get_value_type(_Tile(kind.dtype)).as_pointer())


# To the type checker: called without the first argument, which numba adds.
_instruction = cast(Callable[[Callable[..., Any]], Callable[..., Any]], intrinsic)


@_instruction
def _load(_typing: Any, array: Any, offset: Any) -> Any:
    """The tile that starts `offset` elements into a contiguous array."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, array, *args), align=array.dtype.bitwidth // 8)

    return _Tile(array.dtype)(array, types.intp), generate


@_instruction
def _store(_typing: Any, array: Any, offset: Any, tile: Any) -> Any:
    """Write a tile `offset` elements into a contiguous array."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> None:
        builder.store(args[2], _address(context, builder, array, *args[:2]), align=array.dtype.bitwidth // 8)

    return types.void(array, types.intp, tile), generate


@_instruction
def _add(_typing: Any, total: Any, factor: Any, tile: Any) -> Any:
    """total + factor * tile, fused where the processor can."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        total, factor, tile = args
        unset = ir.Constant(tile.type, ir.Undefined)
        lane_zero = ir.Constant(ir.VectorType(ir.IntType(32), tile.type.count), None)
        factors = builder.shuffle_vector(builder.insert_element(unset, factor, ir.IntType(32)(0)), unset, lane_zero)
        return builder.fadd(total, builder.fmul(factors, tile, flags=["contract"]), flags=["contract"])

    return total(total, total.dtype, tile), generate


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
def _components(raw: np.ndarray, min_log_scale: float) -> np.ndarray:
    """Log weights, shifts, log scales and inverse scales (4, K) of a mixture whose parameters the network gave."""
    k = len(raw) // 3
    components = np.empty((4, k))
    components[0] = raw[:k]
    components[0] -= _log_sum(components[0])
    components[1] = raw[k : 2 * k]
    for i in range(k):
        components[2, i] = min_log_scale + _softplus(raw[2 * k + i] - min_log_scale)
        components[3, i] = math.exp(-components[2, i])
    return components


@numba.njit(cache=True)
def _mixture_to_z(components: np.ndarray, x: float, normal: bool) -> tuple[float, float]:
    """z and log dz/dx of a mixture at x."""
    terms = np.empty((3, components.shape[1]))
    for i in range(components.shape[1]):
        log_weight, shift, log_scale, inverse_scale = components[:, i]
        u = (x - shift) * inverse_scale
        below, above = _log_cdf(u, normal), _log_cdf(-u, normal)
        # The logistic density is the product of its two tails.
        shape = -0.5 * u * u - 0.5 * math.log(2 * math.pi) if normal else below + above
        terms[0, i], terms[1, i], terms[2, i] = log_weight + below, log_weight + above, log_weight + shape - log_scale
    low, high = _log_sum(terms[0]), _log_sum(terms[1])
    return low - high, _log_sum(terms[2]) - low - high


@numba.njit(cache=True)
def _log_sum(values: np.ndarray) -> float:
    highest, total = values.max(), 0.0
    for value in values:
        total += math.exp(value - highest)
    return highest + math.log(total)


@numba.njit(cache=True)
def _solve_mixture(raw: np.ndarray, given: float, min_log_scale: float, reads_x: bool, normal: bool) -> float:
    """As `MixtureCdf.to_x` or `to_z`, for one value, in float64."""
    components = _components(raw, min_log_scale)
    if not reads_x:
        return _mixture_to_z(components, given, normal)[0]
    # A bracket that grows from the middle of the components until it holds the solution.
    middle, width = components[1].mean(), 1.0
    low, high = middle - width, middle + width
    while _mixture_to_z(components, low, normal)[0] > given:
        width *= 2
        low -= width
    width = 1.0
    while _mixture_to_z(components, high, normal)[0] < given:
        width *= 2
        high += width
    x = (low + high) / 2
    for _ in range(NEWTON_STEPS):
        found, slope = _mixture_to_z(components, x, normal)
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
