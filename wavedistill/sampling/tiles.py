"""Vectors of a fixed width in compiled code, and the products and exponentials that are made of them."""

import math
from collections.abc import Callable
from typing import Any, cast

import numba
import numpy as np
import torch.nn.functional as F
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, overload, register_model
from torch import Tensor

TILE_BYTES = 256
"""Outputs that a product of matrix and vector keeps in registers: 64 in float32."""


def array(tensor: Tensor) -> np.ndarray:
    """The contiguous array of a tensor."""
    return np.ascontiguousarray(tensor.detach().numpy())


def pack(weight: Tensor) -> np.ndarray:
    """Matrices (..., M, N) as tiles of columns (..., tiles, M, lanes), with zeros beside them."""
    lanes = TILE_BYTES // weight.element_size()
    padded = F.pad(weight, (0, -weight.shape[-1] % lanes))
    return array(padded.unflatten(-1, (-1, lanes)).transpose(-2, -3))


def exponential(values: np.ndarray) -> None:
    """Replace values by their exponentials."""
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
            values[i] = math.exp(values[i])

    return single if values.dtype == numba.float32 else double


@numba.njit(cache=True, fastmath={"contract"})
def add_product(y: np.ndarray, x: np.ndarray, weight: np.ndarray) -> None:
    """y (N,) += x (M or more,) @ packed weight (tiles, M, lanes)."""
    tiles, inputs, lanes = weight.shape
    for tile in range(tiles):
        total = _load(y, tile * lanes)
        for i in range(inputs):
            total = _add(total, x[i], _load(weight, (tile * inputs + i) * lanes))
        _store(y, tile * lanes, total)


@numba.njit(cache=True, fastmath={"contract"})
def add_products(y: np.ndarray, x: np.ndarray, weight: np.ndarray) -> None:
    """As `add_product` for every step of y (n, N) and x (n, M): four share each read of a weight."""
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
        add_product(y[s], x[s], weight)


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
