"""Linear prediction as a flow: an autoregressive bijection with a linear conditioner, computed from the log-mel."""

import math
from collections.abc import Callable
from typing import Any, Self

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedistill.flows.transforms import Context, Transform
from wavedistill.recipe.sections import Audio
from wavedistill.speech.audio import PCM16_STEPS, mel_filters

LAG_WINDOW_HZ = 40
"""Width of the lag window: spectral peaks of an envelope are at least about this wide."""
WHITE_NOISE = 1e-9
"""Power of the noise added to a spectrum before a filter is fitted, relative to the spectrum's own."""


class LinearPrediction(Transform):
    r"""Linear prediction between a residual e and the signal x, with filters that are constant within a frame.

    .. math:: x_t = \sum_k a_k x_{t-k} + g e_t, \qquad e_t = (x_t - \sum_k a_k x_{t-k}) / g, \qquad
              \log|\det J| = \sum_t \log g_t

    Triangular in both directions (Makhoul 1975). The inverse, analysis, is one parallel pass; the forward direction,
    synthesis, is a recurrence of a few dozen multiplications a sample, differentiable in e: compiled on the CPU, and
    frame by frame elsewhere.
    The context is a pair of coefficients (B, F, K) and log-gains (B, F), for at least T / hop_length frames.

    Args:
        hop_length: samples a frame.
    """

    def __init__(self, hop_length: int) -> None:
        super().__init__()
        self.hop_length = hop_length

    def forward(self, z: Tensor, context: Context = ()) -> tuple[Tensor, Tensor]:
        _, log_gain = context
        x = self.synthesise(z, context, z.new_zeros(len(z), 0))
        return x.to(z.dtype), self._per_sample(log_gain, z.shape[1]).expand(len(z), -1)

    def synthesise(self, z: Tensor, context: Context, past: Tensor) -> Tensor:
        """x of z (B, T) after a past (B, any length) of x, in float64: rounding would ring on in a sharp filter.

        Raises:
            ValueError: if the context has fewer frames than z.
        """
        coefficients, log_gain = context
        order = coefficients.shape[-1]
        if coefficients.shape[1] * self.hop_length < z.shape[1]:
            raise ValueError(f"{coefficients.shape[1]} frames of {self.hop_length} samples do not cover {z.shape[1]}")
        excitation = z.double() * self._per_sample(log_gain, z.shape[1]).double().exp()
        past = F.pad(past, (order, 0))[:, past.shape[1] :].double()
        by_frames = z.device.type != "cpu" or torch.compiler.is_compiling()
        filtered = synthesise_by_frames if by_frames else _Synthesis.apply
        return filtered(excitation, coefficients.expand(len(z), -1, -1).double(), self.hop_length, past)

    def inverse(self, x: Tensor, context: Context = ()) -> tuple[Tensor, Tensor]:
        coefficients, log_gain = context
        length, order = x.shape[1], coefficients.shape[-1]
        frames = math.ceil(length / self.hop_length)
        past = F.pad(x, (order, frames * self.hop_length - length)).unfold(1, order, 1)  # row t: x_{t-K} ... x_{t-1}
        blocks = past[:, : frames * self.hop_length].unflatten(1, (frames, self.hop_length))  # (B, F, hop, K)
        with torch.autocast(x.device.type, enabled=False):
            predicted = torch.einsum("bfhk,bfk->bfh", blocks, coefficients[:, :frames].flip(-1)).flatten(1)[:, :length]
        log_gain = self._per_sample(log_gain, length)
        return (x - predicted) * (-log_gain).exp(), -log_gain

    def _per_sample(self, frames: Tensor, length: int) -> Tensor:
        return frames.repeat_interleave(self.hop_length, 1)[:, :length]


class LinearPredictionFromMel(nn.Module):
    r"""Coefficients and gain of linear prediction, :math:`x_t = \sum_k a_k x_{t-k} + g e_t`, from log-mel frames.

    A mel frame fixes a spectral envelope: band amplitudes, interpolated log-linearly over frequency, squared, and
    transformed to an autocorrelation, whose normal equations the Levinson-Durbin recursion solves (Makhoul 1975). A
    Gaussian lag window and a little white noise, at least that of 16-bit quantisation, keep every filter stable. The
    gain is scaled so that the residual of noise-like audio has unit variance.

    Args:
        settings: of the log-mel.
        order: number of coefficients K.
    """

    lower: Tensor
    upper: Tensor
    share: Tensor
    band_gain: Tensor
    lag_window: Tensor

    def __init__(self, settings: Audio, order: int) -> None:
        super().__init__()
        self.order = order
        filters = mel_filters(settings).T.double()  # (n_mels, bins)
        gain = filters.sum(1)
        centres = (filters @ torch.arange(filters.shape[1]).double() / gain)[gain > 0].numpy()
        # A band so narrow that it holds no bin says nothing: its neighbours are interpolated.
        (used,) = np.nonzero(gain.numpy() > 0)
        place = np.interp(np.arange(filters.shape[1]), centres, np.arange(len(used)))
        lower = np.minimum(place.astype(int), max(len(used) - 2, 0))
        lag = 2 * np.pi * LAG_WINDOW_HZ / settings.sample_rate * np.arange(order + 1)
        # The mean magnitude of noise is sqrt(pi) / 2 of its RMS, and the analysis window scales its power.
        window_power = torch.hann_window(settings.n_fft).double().square().sum()
        lag_window = 4 / torch.pi / window_power * torch.exp(-0.5 * torch.from_numpy(lag).square())
        lag_window[0] *= 1 + WHITE_NOISE
        self.register_buffer("lower", torch.from_numpy(used[lower]), persistent=False)
        self.register_buffer("upper", torch.from_numpy(used[np.minimum(lower + 1, len(used) - 1)]), persistent=False)
        self.register_buffer("share", torch.from_numpy(place - lower), persistent=False)
        self.register_buffer("band_gain", gain.clamp_min(1e-30).log(), persistent=False)
        self.register_buffer("lag_window", lag_window, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Go where the model goes, but keep constants in float64, whatever its networks are cast to."""
        constants = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, constant in constants.items():
            self._buffers[name] = constant.to(getattr(self, name).device)
        return self

    def forward(self, log_mel: Tensor) -> tuple[Tensor, Tensor]:
        """Log-mel (B, n_mels, F) -> coefficients (B, F, order) and log-gain (B, F); without gradient."""
        with torch.no_grad():
            bands = log_mel.double() - self.band_gain[:, None]
            # Not a matrix product, whose rounding would differ with the number of frames, and grow in what follows.
            lower, upper = (bands.index_select(1, band) for band in (self.lower, self.upper))
            power = (2 * torch.lerp(lower, upper, self.share[:, None])).exp()  # (B, bins, F)
            autocorrelation = torch.fft.irfft(power.transpose(1, 2))[..., : self.order + 1] * self.lag_window
            autocorrelation[..., 0] += 1 / (12 * PCM16_STEPS**2)
            coefficients, error = levinson_durbin(autocorrelation)
        return coefficients.to(log_mel.dtype), 0.5 * error.log().to(log_mel.dtype)


class Preemphasis(nn.Module):
    r"""The one coefficient and the gain of linear prediction that need no log-mel: :math:`x_t = a x_{t-1} + g e_t`.

    The gain is such that a first-order process of the level given has a residual of unit variance:
    :math:`g = s \sqrt{1 - a^2}`.

    Args:
        coefficient: a, the same for all frames.
        level: RMS of the waveform s.
    """

    def __init__(self, coefficient: float, level: float) -> None:
        super().__init__()
        self.coefficient, self.log_gain = coefficient, math.log(level) + 0.5 * math.log(1 - coefficient**2)

    def forward(self, log_mel: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficient (B, F, 1) and log-gain (B, F) for as many frames as the log-mel (B, n_mels, F) has."""
        frames = log_mel[:, 0]
        return torch.full_like(frames, self.coefficient).unsqueeze(-1), torch.full_like(frames, self.log_gain)


def levinson_durbin(autocorrelation: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (..., K) of linear prediction, and its error power (...), from autocorrelation (..., K + 1)."""
    error = autocorrelation[..., 0]
    coefficients = autocorrelation[..., :0]
    for k in range(1, autocorrelation.shape[-1]):
        known = autocorrelation[..., 1:k].flip(-1)
        reflection = (autocorrelation[..., k] - (coefficients * known).sum(-1)) / error
        change = reflection[..., None] * coefficients.flip(-1)
        coefficients = torch.cat([coefficients - change, reflection[..., None]], -1)
        error = error * (1 - reflection.square())
    return coefficients, error


def synthesise_by_frames(excitation: Tensor, coefficients: Tensor, hop_length: int, past: Tensor) -> Tensor:
    """The all-pole filter of `_Synthesis` in parallel over frames, then over the samples of a frame.

    For devices that like that better, and for programs that are exported. Within a frame the filter is constant: its
    output is what the excitation drives it to from silence, plus what rings on of the K samples before it. Those are
    an excitation of its first K samples, which the impulse response answers to; only they are handed from frame to
    frame. For float64, because responses to single samples of the past are far larger than their sum.

    Args:
        excitation: (B, T).
        coefficients: (B, F, K), for at least T / hop_length frames, with K at most hop_length.
        hop_length: samples a frame.
        past: (B, K) the output before.
    """
    length, order = excitation.shape[1], coefficients.shape[-1]
    frames = -(-length // hop_length)
    blocks = F.pad(excitation, (0, frames * hop_length - length)).unflatten(1, (frames, hop_length)).transpose(0, 1)
    a = coefficients[:, :frames].flip(-1).transpose(0, 1)  # (F, B, K)

    def sample(before: Tensor, driving: Tensor) -> tuple[Tensor, Tensor]:
        x = driving + (a * before).sum(-1)
        return torch.cat([before[..., 1:], x.unsqueeze(-1)], -1), x

    def frame(before: Tensor, alone: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        driven, ringing = alone
        x = driven + (ringing @ before.unsqueeze(-1)).squeeze(-1)
        return x[:, hop_length - order :].clone(memory_format=torch.contiguous_format), x

    def shifted(signal: Tensor) -> Tensor:
        return F.pad(signal, (order - 1, 0)).unfold(-1, order, 1)

    impulse = F.pad(torch.ones_like(blocks[..., :1]), (0, hop_length - 1))
    both = torch.stack([blocks, impulse]).movedim(-1, 0)  # (hop, 2, F, B)
    driven, response = _one_by_one(sample, a.new_zeros(2, *a.shape), both).movedim(0, -1)  # (F, B, hop) each
    ringing = shifted(response) @ shifted(a)  # (F, B, hop, K)
    return _one_by_one(frame, past, (driven, ringing)).transpose(0, 1).flatten(1)[:, :length]


def _one_by_one(step: Callable[[Tensor, Any], tuple[Tensor, Tensor]], state: Tensor, given: Any) -> Tensor:
    """What a step gives for each row of what is given, stacked in rows, while it hands on a state."""
    if torch.compiler.is_compiling():  # an exported program does not know yet how many there are
        from torch._higher_order_ops.scan import scan  # a prototype of torch's

        return scan(step, state, given)[1]
    out = []
    for each in zip(*given, strict=True) if isinstance(given, tuple) else given:
        state, found = step(state, each)
        out.append(found)
    return torch.stack(out)


class _Synthesis(torch.autograd.Function):
    r"""The all-pole filter :math:`x_t = \sum_k a_k x_{t-k} + u_t` after a past (B, K) of x, differentiable in u.

    On the CPU. The gradient is the transposed filter, run backwards:
    :math:`\lambda_t = \partial_t + \sum_k a_k^{(t+k)} \lambda_{t+k}`.
    """

    @staticmethod
    def forward(ctx: Any, excitation: Tensor, coefficients: Tensor, hop_length: int, past: Tensor) -> Tensor:
        ctx.coefficients, ctx.hop_length = coefficients.numpy(), hop_length
        x = torch.cat([past, excitation.detach()], 1).numpy()
        _filter(x, ctx.coefficients, hop_length)
        return torch.from_numpy(x[:, past.shape[1] :])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        adjoint = grad.numpy().copy()
        _filter_transposed(adjoint, ctx.coefficients, ctx.hop_length)
        return torch.from_numpy(adjoint), None, None, None


@numba.njit(cache=True, nogil=True)
def _filter(x: np.ndarray, a: np.ndarray, hop: int) -> None:
    """Replace the excitation, in x (B, K + T) after the past, by the output of the filter a (B, F, K)."""
    order = a.shape[2]
    for b in range(x.shape[0]):
        for t in range(order, x.shape[1]):
            total = x[b, t]
            for k in range(order):
                total += a[b, (t - order) // hop, k] * x[b, t - 1 - k]
            x[b, t] = total


@numba.njit(cache=True, nogil=True)
def _filter_transposed(x: np.ndarray, a: np.ndarray, hop: int) -> None:
    """Replace the gradient x (B, T) of the output of `_filter` by that of its excitation."""
    for b in range(x.shape[0]):
        for t in range(x.shape[1] - 1, -1, -1):
            for k in range(min(a.shape[2], t)):
                x[b, t - 1 - k] += a[b, t // hop, k] * x[b, t]
