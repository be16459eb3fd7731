"""Training objectives as pure functions: likelihood, Kullback-Leibler divergence, spectral distance."""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from wavedistill.flows.bases import StandardNormal
from wavedistill.flows.distributions import Conditionals

SILENCE = 1e-4
"""Amplitude below which a reference counts as silent: a relative distance from it would be without bounds."""


class Density(Protocol):
    """What `one_draw_kl` asks of a teacher: the log density of a given waveform, differentiable in it."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density (B,) of x (B, T), in nats."""


def negative_log_likelihood(p: Density, x: Tensor) -> Tensor:
    """Negative log-likelihood (B,) of x (B, T) under p, in nats per sample."""
    return -p.log_prob(x) / x.shape[-1]


def one_draw_kl(log_q: Tensor, p: Density, x: Tensor) -> Tensor:
    r"""One-draw estimate (B,) of :math:`KL(q \| p) = E_z[\log q(x(z)) - \log p(x(z))]` in nats per sample.

    Of van den Oord et al. 2018. Unbiased; may be negative; differentiable in q through both terms.

    Args:
        log_q: the log density (B,) of x under q, in nats, as the noise that x was drawn from gives it.
        p: the teacher's density.
        x: draws (B, T) from q.
    """
    return (log_q - p.log_prob(x)) / x.shape[-1]


def cross_entropy_kl(q: Conditionals, p: Conditionals, noise: Tensor) -> Tensor:
    r"""Estimate of :math:`KL(q_t \| p_t)` (B, T) from k draws of every step (van den Oord et al. 2018, eq. 6-7).

    .. math:: \frac{1}{k} \sum_i \log q(x_t^{(i)} | z_{<t}) - \log p(x_t^{(i)} | x_{<t})

    Unbiased for the same divergence as `one_draw_kl`, with one pass of the teacher whatever k.

    Args:
        q: the student's conditionals.
        p: the teacher's, at the student's sample.
        noise: draws (k, B, T) from q's base, independent of those that made the sample.
    """
    x = q.rsample(noise)
    return (q.log_prob_steps(x) - p.log_prob_steps(x)).mean(0)


def closed_kl(q: Conditionals, p: Conditionals) -> Tensor:
    r""":math:`KL(q_t \| p_t)` (B, T) of Gaussian conditionals in closed form (Ping et al. 2018, eq. 4).

    .. math:: \log\frac{\sigma_p}{\sigma_q} + \frac{\sigma_q^2 - \sigma_p^2 + (\mu_p - \mu_q)^2}{2 \sigma_p^2}

    The limit of `cross_entropy_kl` for many draws.

    Raises:
        ValueError: if either is not Gaussian.
    """
    if not (isinstance(q.base, StandardNormal) and isinstance(p.base, StandardNormal)):
        raise ValueError("the closed form of the KL is that of Gaussians")
    (shift_q, log_scale_q), (shift_p, log_scale_p) = q.affine, p.affine
    log_ratio = log_scale_q - log_scale_p
    difference = (shift_q - shift_p) * (-log_scale_p).exp()
    return 0.5 * ((2 * log_ratio).exp() - 1 + difference.square()) - log_ratio


def log_scale_distance(q: Conditionals, p: Conditionals) -> Tensor:
    r""":math:`(\log\sigma_p - \log\sigma_q)^2` (B, T), which steadies an early training (Ping et al. 2018, eq. 5)."""
    return (p.affine[1] - q.affine[1]).square()


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
        magnitude_x, magnitude_y = _magnitude(x, n_fft), _magnitude(y, n_fft)
        difference = (magnitude_x - magnitude_y).abs().sum((1, 2))
        silence = SILENCE * _noise_magnitude(n_fft) * magnitude_y[0].numel()
        distances.append(difference / magnitude_y.sum((1, 2)).clamp_min(silence))
    return torch.stack(distances).mean(0)


def log_mel_distance(x: Tensor, y: Tensor, filters: Mapping[int, Tensor]) -> Tensor:
    r"""Multi-resolution distance (B,) of log-mels in nats of amplitude: as the ear hears, loud or soft, low or high.

    .. math:: \frac{1}{R} \sum_r \frac{1}{KF} \sum_{k,f} \big| \log M_r |X_r| - \log M_r |Y_r| \big|

    A band's amplitude counts as at least that of white noise of amplitude `SILENCE`.

    Args:
        x: generated waveform (B, T), at least as long as the longest window.
        y: reference waveform (B, T).
        filters: for each window length in samples, a mel filterbank (n_fft / 2 + 1, bands) without empty bands.
    """
    distances = []
    for n_fft, filterbank in filters.items():
        silence = SILENCE * _noise_magnitude(n_fft) * filterbank.sum(0)[:, None]
        with torch.autocast(x.device.type, enabled=False):
            bands_x, bands_y = (filterbank.T @ _magnitude(audio, n_fft) for audio in (x, y))
        difference = bands_x.clamp_min(silence).log() - bands_y.clamp_min(silence).log()
        distances.append(difference.abs().mean((1, 2)))
    return torch.stack(distances).mean(0)


def _magnitude(audio: Tensor, n_fft: int) -> Tensor:
    """STFT magnitudes (B, n_fft / 2 + 1, F) of audio (B, T)."""
    window = torch.hann_window(n_fft, device=audio.device, dtype=audio.dtype)
    # The magnitude of a complex tensor has a zero, not an undefined, gradient at silence.
    return torch.stft(audio, n_fft, n_fft // 4, window=window, center=False, return_complex=True).abs()


def _noise_magnitude(n_fft: int) -> float:
    """RMS magnitude of white noise of unit variance."""
    return math.sqrt(3 / 8 * n_fft)
