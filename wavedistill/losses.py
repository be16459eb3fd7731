"""Training objectives as pure functions: likelihood, Kullback-Leibler divergence, spectral distance."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from wavedistill.flows import FlowDistribution

SILENCE = 1e-4
"""Amplitude below which a reference counts as silent: a relative distance from it would be without bounds."""


class Density(Protocol):
    """What distillation asks of a teacher: the log density of a given waveform, differentiable in it."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density (B,) of x (B, T), in nats."""


def negative_log_likelihood(p: Density, x: Tensor) -> Tensor:
    """Negative log-likelihood (B,) of x (B, T) under p, in nats per sample."""
    return -p.log_prob(x) / x.shape[-1]


def monte_carlo_kl(q: FlowDistribution, p: Density, noise: Tensor) -> tuple[Tensor, Tensor]:
    r"""One-draw estimate of :math:`KL(q \| p) = E_z[\log q(x(z)) - \log p(x(z))]` (van den Oord et al. 2018).

    The estimate is unbiased, may be negative, and is differentiable in q through both terms.

    Args:
        q: the student's density, which maps noise to x in parallel.
        p: the teacher's density.
        noise: draws (B, T) from q's base distribution.

    Returns:
        The KL (B,) in nats per sample, and the waveform x (B, T) that the noise maps to.
    """
    x, log_q = q.rsample_and_log_prob(noise)
    return (log_q - p.log_prob(x)) / x.shape[-1], x


def spectral_distance(x: Tensor, y: Tensor, n_ffts: Sequence[int]) -> Tensor:
    r"""Multi-resolution distance of STFT magnitudes (B,), relative to the magnitude of y; no unit.

    .. math:: \frac{1}{R} \sum_r \frac{\sum_{k,f} \big| |X_r| - |Y_r| \big|}{\sum_{k,f} |Y_r|}

    with Hann windows of n_fft samples and hops of a quarter of it. Magnitudes, neither powers nor logarithms, and no
    rectangular window: those leave noise at high frequencies (Parallel WaveNet reproductions).

    The magnitude of y counts as at least that of white noise of amplitude `SILENCE`.

    Args:
        x: generated waveform (B, T), at least as long as the longest window.
        y: reference waveform (B, T).
        n_ffts: window lengths of the R resolutions, in samples.
    """
    distances = []
    for n_fft in n_ffts:
        window = torch.hann_window(n_fft, device=x.device, dtype=x.dtype)

        # The magnitude of a complex tensor has a zero, not an undefined, gradient at silence.
        magnitude_x, magnitude_y = (
            torch.stft(audio, n_fft, n_fft // 4, window=window, center=False, return_complex=True).abs()
            for audio in (x, y)
        )
        difference = (magnitude_x - magnitude_y).abs().sum((1, 2))
        bins = magnitude_y[0].numel()
        silence = SILENCE * window.square().sum().sqrt() * bins
        distances.append(difference / magnitude_y.sum((1, 2)).clamp_min(silence))
    return torch.stack(distances).mean(0)
