"""Matrix products of a network's layers, by whichever library has the faster one."""

import torch
import torch.nn.functional as F
from torch import Tensor

WORK = 1_000_000
"""Multiplications from which a product by oneDNN is faster; it takes ten microseconds to begin."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r""":math:`x W^\top + b` (N, M) of x (N, K), weight W (M, K) and bias b (M,).

    In float32 on a CPU and without gradients, by oneDNN, as torch's own compiler has it: on processors of AMD with
    AVX-512 it is twice as fast as MKL, which does not use it there.
    """
    if _by_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight.contiguous(), bias, "none", [], "")
    if bias is not None and torch.compiler.is_compiling():
        # Where it is read: a compiler would copy the bias to the whole width of the product first.
        found = F.linear(x, weight)
        return found + bias.to(found.dtype)
    return F.linear(x, weight, bias)


def added(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    r""":math:`y + x W^\top` (N, M) of a total y (N, M), which may be overwritten, x (N, K) and weight W (M, K)."""
    if _by_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise.binary(x, total, weight.contiguous(), None, "add")
    if torch.compiler.is_compiling():
        return total + F.linear(x, weight)
    return total.addmm_(x.to(total.dtype), weight.t().to(total.dtype))  # in place: autocast leaves it to us


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.numel() * len(weight) >= WORK
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and has_onednn()
    )


def has_onednn() -> bool:
    """Whether this torch has the library, and the operation that its compiler calls it by."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
