"""What ONNX runtimes lack or are slow at, written as matrix products and other plain operations."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class InProducts(TorchFunctionMode):
    """While it is active, torch computes some functions by others that every runtime has, with the same results.

    Convolutions in float64 have no kernel on the CPU of ONNX Runtime, Fourier transforms are slow there and their
    float64 is rounded on the way.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return REPLACED.get(func, func)(*args, **(kwargs or {}))


def conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor:
    """The convolution of x (B, C, T) without stride, padding, dilation and groups: one product a tap."""
    assert (math.prod(stride), sum(padding), math.prod(dilation), groups) == (1, 0, 1, 1)
    taps = weight.shape[2]
    length = x.shape[2] - taps + 1
    parts = [weight[:, :, k] @ x[:, :, k : k + length] for k in range(taps)]
    return torch.stack(parts).sum(0) + bias[:, None]


def leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """As torch has it."""
    return torch.maximum(x, x * torch.tensor(negative_slope, dtype=x.dtype))


def unfold(x: Tensor, dimension: int, size: int, step: int) -> Tensor:
    """Stretches (..., count, size) of the last dimension of x."""
    assert dimension in (-1, x.ndim - 1)
    count = (x.shape[-1] - size) // step + 1
    places = torch.arange(count)[:, None] * step + torch.arange(size)
    return x.index_select(-1, places.flatten()).unflatten(-1, (count, size))


def rfft(x: Tensor) -> Tensor:
    r"""The Fourier transform (..., N / 2 + 1) of real x (..., N), in two stages (Cooley and Tukey 1965).

    With N = P Q, n = Q p + q and k = r + P s,

    .. math:: X_{r + P s} = \sum_q e^{-2 \pi i q s / Q} e^{-2 \pi i q r / N} \sum_p e^{-2 \pi i p r / P} x_{Q p + q}

    for r up to P / 2: the other bins are conjugates of these.
    """
    stages = _Stages(x.shape[-1], x.dtype)
    rows = x.unflatten(-1, (stages.p, stages.q))
    real, imag = stages.outer_real @ rows, -stages.outer_imag @ rows  # (..., R, Q)
    turned = stages.turned(real, imag, back=True)
    real, imag = (torch.cat(turned, -1) @ stages.inner.T).chunk(2, -1)  # (..., R, S)
    real, imag = (part.flatten(-2).index_select(-1, stages.place) for part in (real, imag))
    return torch.complex(real, imag * stages.sign)


def irfft(spectrum: Tensor, n: int | None = None) -> Tensor:
    """The real x (..., N) of a Fourier transform (..., N / 2 + 1), N even: the stages of `rfft` from back to front."""
    size = 2 * (spectrum.shape[-1] - 1)
    assert n in (None, size)
    real, imag = (spectrum.real, spectrum.imag) if spectrum.is_complex() else (spectrum, torch.zeros_like(spectrum))
    stages = _Stages(size, real.dtype)
    place, sign = stages.back
    real, imag = (part.index_select(-1, place).unflatten(-1, sign.shape) for part in (real, imag))
    both = torch.cat([real, imag * sign], -1)  # (..., R, 2 S)
    real, imag = (both @ stages.inner).chunk(2, -1)  # (..., R, Q)
    turned = stages.turned(real, imag)
    outer = torch.cat([stages.outer_real, -stages.outer_imag]).T * stages.share  # (P, 2 R)
    return (outer @ torch.cat(turned, -2)).flatten(-2)


class _Stages:
    """The constants of a Fourier transform in two stages, as tensors; R = P // 2 + 1.

    Attributes:
        p, q: factors of the size, near each other.
        known: R.
        outer_real, outer_imag: cosine and sine of r p / P (R, P).
        twiddle_real, twiddle_imag: cosine and sine of r q / N (R, Q).
        inner: multiplies rows of real and imaginary parts, over s, by e^{2 pi i q s / Q} (2 S, 2 Q), S = Q.
        place, sign: where the bins (N / 2 + 1) are among (R * S) that are computed, and the sign of their imaginary part.
        share: of each of twice R rows in the signal: a bin and its conjugate are two.
        back: where those (R * S) are among the bins, and the sign (R, S) of their imaginary part.
    """

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.p = max(p for p in range(1, math.isqrt(size) + 1) if size % p == 0)
        self.q = size // self.p
        self.known = self.p // 2 + 1
        r, s, bins = np.arange(self.known), np.arange(self.q), np.arange(size // 2 + 1)

        def waves(products: np.ndarray, period: int) -> tuple[Tensor, Tensor]:
            angle = 2 * np.pi * (products % period) / period
            return torch.from_numpy(np.cos(angle)).to(dtype), torch.from_numpy(np.sin(angle)).to(dtype)

        self.outer_real, self.outer_imag = waves(np.outer(r, np.arange(self.p)), self.p)
        self.twiddle_real, self.twiddle_imag = waves(np.outer(r, s), size)
        real, imag = waves(np.outer(s, s), self.q)
        self.inner = torch.cat([torch.cat([real, imag], 1), torch.cat([-imag, real], 1)])
        mirrored = bins % self.p >= self.known
        here = np.where(mirrored, size - bins, bins)
        self.place = torch.from_numpy(here % self.p * self.q + here // self.p)
        self.sign = torch.from_numpy(np.where(mirrored, -1.0, 1.0)).to(dtype)
        self.share = torch.from_numpy(np.tile(np.where(2 * r % self.p == 0, 1.0, 2.0) / size, 2)).to(dtype)
        every = r[:, None] + self.p * s
        half = np.where(every > size // 2, size - every, every)
        self.back = torch.from_numpy(half.flatten()), torch.from_numpy(np.where(half == every, 1.0, -1.0)).to(dtype)

    def turned(self, real: Tensor, imag: Tensor, *, back: bool = False) -> tuple[Tensor, Tensor]:
        """Real and imaginary parts (..., R, Q) times e^{2 pi i r q / N}, or its conjugate."""
        cos, sin = self.twiddle_real, -self.twiddle_imag if back else self.twiddle_imag
        return real * cos - imag * sin, real * sin + imag * cos


REPLACED: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.conv1d: conv1d,
    F.leaky_relu: leaky_relu,
    torch.Tensor.unfold: unfold,
    torch.fft.rfft: rfft,
    torch.fft.irfft: irfft,
}
"""What is computed otherwise while `InProducts` is active."""
