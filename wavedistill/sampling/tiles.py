"""Vectors of a fixed width in compiled code, what is computed with them, and a network's layers laid out for it."""

import math
from collections.abc import Callable
from typing import Any, cast

import numba
import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import types
from numba.extending import intrinsic, models, overload, register_model
from torch import Tensor, nn

from wavedistill.networks.wavenet import WaveNet

TILE_BYTES = 256
"""Outputs that a product of matrix and vector keeps in registers: 64 in float32."""
ROWS = 6
"""Vectors that share each read of a weight in a product of matrices."""
ROWS_BYTES = 2 * (64 if get_host_cpu_features().get("avx512f") else 32)
"""Outputs that such a product keeps in registers for each of them: two registers' worth."""


def array(tensor: Tensor) -> np.ndarray:
    """The contiguous array of a tensor."""
    return np.ascontiguousarray(tensor.detach().numpy())


def pack(weight: Tensor, width: int = TILE_BYTES) -> np.ndarray:
    """Matrices (..., M, N) as tiles of columns (..., tiles, M, lanes) of a width in bytes, with zeros beside them."""
    lanes = width // weight.element_size()
    padded = F.pad(weight, (0, -weight.shape[-1] % lanes))
    return array(padded.unflatten(-1, (-1, lanes)).transpose(-2, -3))


def with_bias(layer: nn.Linear) -> Tensor:
    """The matrix (M + 1, N) that maps the inputs and a one to the outputs."""
    return torch.cat([layer.weight.t(), layer.bias[None]])


def residual_first(output: nn.Linear, skips: int, channels: int) -> Tensor:
    """As `with_bias`, residual then skip; the last layer, which has no residual path, gets one of zeros."""
    skip, residual = with_bias(output).tensor_split([skips], 1)
    return torch.cat([F.pad(residual, (0, channels - residual.shape[1])), skip], 1)


def signed_taps(net: WaveNet) -> tuple[Tensor, Tensor]:
    """Signs (2 C,) of gates that are what their exponentials are taken of, 2f and -g, and taps (layers, K, C, 2 C)."""
    signs = net.input.weight.new_tensor([2.0, -1.0]).repeat_interleave(net.channels)
    weights = torch.stack([cast(nn.Linear, layer).weight.t() * signs for layer in net.gates])
    return signs, weights.unflatten(1, (net.kernel_size, -1))


def exponential(values: np.ndarray) -> None:
    """Replace values by their exponentials, which stay finite."""
    raise NotImplementedError("compiled code only")


@overload(exponential, jit_options={"fastmath": {"contract"}})
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
            values[i] = math.exp(min(values[i], 700))

    return single if values.dtype == numba.float32 else double


@numba.njit(cache=True, fastmath={"contract"})
def add_product(y: np.ndarray, x: np.ndarray, weight: np.ndarray) -> None:
    """y (N,) += x (M or more,) @ weight packed in `TILE_BYTES` (tiles, M, lanes)."""
    tiles, inputs, lanes = weight.shape
    for tile in range(tiles):
        total = _load(y, tile * lanes, TILE_BYTES)
        for i in range(inputs):
            total = _add(total, x[i], _load(weight, (tile * inputs + i) * lanes, TILE_BYTES))
        _store(y, tile * lanes, total)


@numba.njit(cache=True, fastmath={"contract"})
def add_products(y: np.ndarray, x: np.ndarray, weight: np.ndarray) -> None:
    """y (n, N) += x (n, M or more) @ weight packed in `ROWS_BYTES` (tiles, M, lanes); all are contiguous."""
    tiles, inputs, lanes = weight.shape
    width, full = y.shape[1], len(x) // ROWS * ROWS
    for s in range(0, full, ROWS):
        for tile in range(tiles):
            at = s * width + tile * lanes
            total0, total1 = _load(y, at, ROWS_BYTES), _load(y, at + width, ROWS_BYTES)
            total2, total3 = _load(y, at + 2 * width, ROWS_BYTES), _load(y, at + 3 * width, ROWS_BYTES)
            total4, total5 = _load(y, at + 4 * width, ROWS_BYTES), _load(y, at + 5 * width, ROWS_BYTES)
            for i in range(inputs):
                w = _load(weight, (tile * inputs + i) * lanes, ROWS_BYTES)
                total0, total1 = _add(total0, x[s, i], w), _add(total1, x[s + 1, i], w)
                total2, total3 = _add(total2, x[s + 2, i], w), _add(total3, x[s + 3, i], w)
                total4, total5 = _add(total4, x[s + 4, i], w), _add(total5, x[s + 5, i], w)
            _store(y, at, total0)
            _store(y, at + width, total1)
            _store(y, at + 2 * width, total2)
            _store(y, at + 3 * width, total3)
            _store(y, at + 4 * width, total4)
            _store(y, at + 5 * width, total5)
    for s in range(full, len(x)):
        for tile in range(tiles):
            at = s * width + tile * lanes
            total = _load(y, at, ROWS_BYTES)
            for i in range(inputs):
                total = _add(total, x[s, i], _load(weight, (tile * inputs + i) * lanes, ROWS_BYTES))
            _store(y, at, total)


@numba.njit(cache=True, error_model="numpy", fastmath={"contract"})
def gate(active: np.ndarray, gates: np.ndarray, channels: int) -> None:
    """active (n, C or more) = tanh(f) sigmoid(g), of gates (n, 2 C or more) that are 2f and -g, and are overwritten."""
    one = gates.dtype.type(1)  # Python's is of float64, and so would be all that it is added to
    exponential(gates.reshape(-1))
    for n in range(len(gates)):
        for c in range(channels):
            active[n, c] = (gates[n, c] - one) / (gates[n, c] + one) / (gates[n, channels + c] + one)


@numba.njit(cache=True)
def copy_row(y: np.ndarray, to: int, x: np.ndarray, start: int, width: int) -> None:
    """Copy so many values in whole tiles from x to y, both contiguous, by their places in memory."""
    lanes = ROWS_BYTES // y.itemsize
    for at in range(0, width, lanes):
        _store(y, to + at, _load(x, start + at, ROWS_BYTES))


class _Tile(types.Type):
    """Numbers that compiled code holds as one vector, which LLVM spreads over the registers of the processor."""

    def __init__(self, dtype: types.Float, width: types.IntegerLiteral) -> None:
        self.dtype, self.lanes = dtype, width.literal_value * 8 // dtype.bitwidth
        super().__init__(f"Tile({dtype}, {self.lanes})")


@register_model(_Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager: Any, tile: _Tile) -> None:
        super().__init__(manager, tile, ir.VectorType(manager.lookup(tile.dtype).get_value_type(), tile.lanes))


def _address(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, tile: _Tile) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), context.get_value_type(tile).as_pointer())


# To the type checker: called without the first argument, which numba adds.
_instruction = cast(Callable[[Callable[..., Any]], Callable[..., Any]], intrinsic(prefer_literal=True))


@_instruction
def _load(_typing: Any, array: Any, offset: Any, width: Any) -> Any:
    """The tile, of a width in bytes, that starts `offset` elements into a contiguous array."""
    tile = _Tile(array.dtype, width)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _address(context, builder, signature.args[0], args[0], args[1], tile)
        return builder.load(place, align=tile.dtype.bitwidth // 8)

    return tile(array, types.intp, width), generate


@_instruction
def _store(_typing: Any, array: Any, offset: Any, tile: Any) -> Any:
    """Write a tile `offset` elements into a contiguous array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _address(context, builder, signature.args[0], args[0], args[1], tile)
        builder.store(args[2], place, align=tile.dtype.bitwidth // 8)

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
