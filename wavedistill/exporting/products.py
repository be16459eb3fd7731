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
    """Stretches (..., count, size) of the last dimension of x, in as few copies as it takes."""
    assert dimension in (-1, x.ndim - 1)
    count = (x.shape[-1] - size) // step + 1
    if step == 1:
        return torch.stack([x[..., k : k + count] for k in range(size)], -2).transpose(-1, -2)
    pieces = -(-size // step)
    rows = F.pad(x[..., : (count - 1) * step + size], (0, pieces * step - size)).unflatten(
        -1, (count + pieces - 1, step)
    )
    return torch.cat([rows[..., k : k + count, :] for k in range(pieces)], -1)[..., :size]


def rfft(x: Tensor) -> Tensor:
    r"""The Fourier transform (..., N / 2 + 1) of real x (..., N), in two stages (Cooley and Tukey 1965).

    With N = P Q, n = Q p + q and k = r + P s,

    .. math:: X_{r + P s} = \sum_q e^{-2 \pi i q s / Q} e^{-2 \pi i q r / N} \sum_p e^{-2 \pi i p r / P} x_{Q p + q}

    for s up to Q / 2: the other bins are conjugates of these.
    """
    size = x.shape[-1]
    stages = _Stages(size, x.dtype)
    real, imag = (torch.cat(stages.outer) @ x.unflatten(-1, (stages.p, stages.q))).chunk(2, -2)  # (..., P, Q)
    inner = stages.both(*stages.inner)  # (2 S, 2 Q)
    real, imag = (torch.cat(stages.turned(real, imag), -1) @ inner.T).chunk(2, -1)  # (..., P, S)
    real, imag = (part.transpose(-1, -2).flatten(-2)[..., : size // 2 + 1] for part in (real, imag))
    return torch.complex(real, -imag)


def irfft(spectrum: Tensor, n: int | None = None) -> Tensor:
    """The real x (..., N) of a Fourier transform (..., N / 2 + 1), N even: the stages of `rfft` from back to front."""
    size = 2 * (spectrum.shape[-1] - 1)
    assert n in (None, size)
    real, imag = (spectrum.real, spectrum.imag) if spectrum.is_complex() else (spectrum, torch.zeros_like(spectrum))
    stages = _Stages(size, real.dtype)
    inner, outer = stages.inner, stages.outer
    missing = len(inner[0]) * stages.p - (size // 2 + 1)
    rows = [F.pad(part * stages.share, (0, missing)).unflatten(-1, (-1, stages.p)) for part in (real, imag)]
    real, imag = (stages.both(inner[0].T, inner[1].T) @ torch.cat(rows, -2)).chunk(2, -2)  # (..., Q, P)
    real, imag = stages.turned(real.transpose(-1, -2), imag.transpose(-1, -2))
    return (torch.cat([outer[0].T, -outer[1].T], 1) @ torch.cat([real, imag], -2)).flatten(-2)  # (..., P, Q)


class _Stages:
    """The constants of a Fourier transform of a real signal in two stages, each a cosine and a sine; S = Q // 2 + 1.

    The transform is computed as the conjugate of what it is, that of positive angles, which suits its inverse too.

    Attributes:
        p, q: factors of the size, near each other.
        outer: of 2 pi r p / P (P, P).
        twiddle: of 2 pi r q / N (P, Q).
        inner: of 2 pi s q / Q (S, Q).
        share: of each bin (N / 2 + 1) in the signal: most stand for their conjugates too.
    """

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.p = max(p for p in range(1, math.isqrt(size) + 1) if size % p == 0)
        self.q = size // self.p

        def waves(rows: int, columns: int, period: int) -> tuple[Tensor, Tensor]:
            angle = 2 * np.pi / period * (np.outer(np.arange(rows), np.arange(columns)) % period)
            return torch.from_numpy(np.cos(angle)).to(dtype), torch.from_numpy(np.sin(angle)).to(dtype)

        self.outer, self.twiddle = waves(self.p, self.p, self.p), waves(self.p, self.q, size)
        self.inner = waves(self.q // 2 + 1, self.q, self.q)
        share = np.full(size // 2 + 1, 2 / size)
        share[[0, -1]] = 1 / size
        self.share = torch.from_numpy(share).to(dtype)

    def turned(self, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
        """Real and imaginary parts (..., P, Q), times the twiddles."""
        cos, sin = self.twiddle
        return real * cos - imag * sin, real * sin + imag * cos

    def both(self, cos: Tensor, sin: Tensor) -> Tensor:
        """What multiplies columns of real, then imaginary parts by waves (M, N): (2 M, 2 N)."""
        return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])


REPLACED: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.conv1d: conv1d,
    F.leaky_relu: leaky_relu,
    torch.Tensor.unfold: unfold,
    torch.fft.rfft: rfft,
    torch.fft.irfft: irfft,
}
"""What is computed otherwise while `InProducts` is active."""
