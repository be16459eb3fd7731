"""Fundamental frequency: tracked in audio, predicted from a log-mel, and turned into a periodic source.

Throughout, f0 is (..., F) in Hz, one value for each frame of the log-mel, and 0 where speech is unvoiced.
"""

import math

import numpy as np
import pyworld
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedistill.networks.encoder import normalise_log_mel
from wavedistill.recipe.sections import Audio
from wavedistill.speech.conditioning import Conditioning

PITCH_CHANNELS = 2
"""Of `PitchPredictor.features`."""
SOURCE_CHANNELS = 4
"""Of `PeriodicSource`."""
BINS = 64
"""Into which `PitchPredictor` divides the range of F0, logarithmically."""
PITCH_CONTEXT = 4
"""Frames that `PitchPredictor` sees on either side."""


def track_f0(audio: Tensor, settings: Audio) -> Tensor:
    """F0 (F,) in Hz at the middle of each hop of audio (F * hop), by WORLD's DIO and StoneMask (Morise et al. 2016)."""
    samples = audio.double().numpy()[settings.hop_length // 2 :]
    period = 1000 * settings.hop_length / settings.sample_rate
    # Twice the default's channels: fewer octave errors.
    coarse, times = pyworld.dio(
        samples,
        settings.sample_rate,
        f0_floor=settings.f0_min,
        f0_ceil=settings.f0_max,
        channels_in_octave=4,
        frame_period=period,
    )
    f0 = pyworld.stonemask(samples, coarse, times, settings.sample_rate)
    # Refinement may leave the range by a little.
    f0 = np.where(f0 > 0, np.clip(f0, settings.f0_min, settings.f0_max), 0)
    return torch.from_numpy(f0[: len(audio) // settings.hop_length].astype(np.float32))


class PeriodicSource(nn.Module):
    r"""Signals that repeat with F0: sine and cosine of its running phase, a pulse train, and whether speech is voiced.

    .. math:: \phi_t = 2\pi \sum_{s \le t} f_s / r, \qquad
              pulse_t = \frac{1}{\sqrt{2 K_t}} \Big( 1 + 2 \sum_{k=1}^{K_t} \cos k \phi_t \Big), \qquad
              K_t = \lfloor r / 2 f_t \rfloor

    They depend on F0 alone, so a conditioner that reads them stays as causal as it was (after Wang et al. 2019, *Neural
    source-filter waveform models*). All are 0 where speech is unvoiced; the phase goes on at the next voiced sample.

    Args:
        settings: of the log-mel.
        ahead: samples beyond the last frame that are given too, at most half a hop.
    """

    def __init__(self, settings: Audio, ahead: int = 0) -> None:
        super().__init__()
        self.hop_length, self.sample_rate, self.ahead = settings.hop_length, settings.sample_rate, ahead

    def forward(self, f0: Tensor, phase: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Source (B, F * hop + ahead, 4) of the middle of f0 (B, F + 2), and the phase (B,) after F frames, in periods.

        Args:
            f0: one more frame on either side, towards which F0 is interpolated.
            phase: (B,) before the first sample, in periods, as the call for the frames before gave it; 0 by default.
        """
        kind, f0 = f0.dtype, f0.double()  # a phase in float32 would be lost after some minutes
        frames = f0.shape[1] - 2
        length = frames * self.hop_length
        # Of the frame after the last, the half that does not need its successor.
        known = frames + 1 if self.ahead else frames
        here, following = f0[:, 1 : 1 + known], F.pad(f0, (0, 1))[:, 2 : 2 + known]
        before, after = (torch.where(other > 0, other, here) for other in (f0[:, :known], following))
        # Of each sample in its hop, from -1/2 to 1/2.
        place = (torch.arange(self.hop_length, device=f0.device) + 0.5) / self.hop_length - 0.5
        slope = torch.where(place < 0, (here - before)[..., None], (after - here)[..., None])
        hertz = torch.where(here[..., None] > 0, here[..., None] + place * slope, 0.0)
        hertz = hertz.flatten(1)[:, : length + self.ahead]
        periods = (hertz / self.sample_rate).cumsum(1) + (0 if phase is None else phase[:, None])
        angle = 2 * math.pi * (periods % 1)
        voiced = hertz > 0
        harmonics = (self.sample_rate / 2 / hertz.clamp_min(1)).floor().clamp_min(1)
        half = angle / 2
        sine, cosine = half.sin(), half.cos()
        near = sine.abs() < 1e-6
        pulse = torch.where(near, 2 * harmonics + 1, ((2 * harmonics + 1) * half).sin() / sine.where(~near, 1.0))
        parts = [2 * sine * cosine, 1 - 2 * sine.square(), pulse / (2 * harmonics).sqrt(), torch.ones_like(angle)]
        return torch.stack(parts, -1).to(kind) * voiced[..., None], periods[:, length - 1] % 1


class PitchPredictor(nn.Module):
    """F0 from a log-mel alone, where none is given: a few convolutions over frames.

    None is padded: the caller gives `PITCH_CONTEXT` real neighbours on either side, so that a crop has the F0 of the
    whole file.

    Args:
        settings: of the log-mel.
        channels: width.
    """

    centres: Tensor

    def __init__(self, settings: Audio, channels: int = 128) -> None:
        super().__init__()
        self.low, self.high = math.log(settings.f0_min), math.log(settings.f0_max)
        taps = PITCH_CONTEXT + 1
        self.layers = nn.Sequential(
            nn.Conv1d(settings.n_mels, channels, taps),
            nn.LeakyReLU(0.2),
            nn.Conv1d(channels, channels, taps),
            nn.LeakyReLU(0.2),
            nn.Conv1d(channels, BINS + 1, 1),
        )
        self.register_buffer("centres", torch.linspace(self.low, self.high, BINS), persistent=False)

    @torch.no_grad()
    def forward(self, mel: Tensor) -> Tensor:
        """Log-mel (B, n_mels, F + 2 PITCH_CONTEXT) -> F0 (B, F), without gradient.

        In float64, because the number of harmonics of a pulse train jumps with F0: rounding must not decide.
        """
        weights = {name: weight.double() for name, weight in self.layers.state_dict().items()}
        logits = torch.func.functional_call(self.layers, weights, (normalise_log_mel(mel.double()),))
        voicing, bins = logits[:, 0], logits[:, 1:]
        # The mean over the highest bin and its neighbours: finer than a bin, and deaf to a second peak an octave away.
        peak = bins.argmax(1, keepdim=True)
        number = torch.arange(BINS, device=mel.device)[None, :, None]
        near = bins.masked_fill((number - peak).abs() > 2, -math.inf).softmax(1)
        f0 = (near * self.centres[:, None]).sum(1).exp()
        return torch.where(voicing > 0, f0, 0.0).to(mel.dtype)

    def features(self, f0: Tensor) -> Tensor:
        """F0 (B, F) -> what a network sees of it (B, 2, F): voiced or not, and log F0 in [-1, 1], 0 where unvoiced."""
        height = (2 * f0.clamp_min(1).log() - self.low - self.high) / (self.high - self.low)
        voiced = f0 > 0
        return torch.stack([voiced.to(f0.dtype), height.where(voiced, 0.0)], 1)

    def loss(self, told: Conditioning) -> Tensor:
        """Cross-entropy of voicing, and where voiced of F0's bin, in nats a frame (a scalar), where F0 is known."""
        assert told.f0 is not None
        f0, mel = told.f0[:, PITCH_CONTEXT : told.f0.shape[1] - PITCH_CONTEXT], told.mel
        voicing, bins = self._logits(mel)
        voiced = (f0 > 0).to(mel.dtype)
        width = (self.high - self.low) / (BINS - 1)
        distance = (f0.clamp_min(1).log()[:, None] - self.centres[:, None]) / width
        target = (-0.5 * distance.square()).softmax(1)
        height = -(target * bins.log_softmax(1)).sum(1) * voiced
        return (F.binary_cross_entropy_with_logits(voicing, voiced, reduction="none") + height).mean()

    def _logits(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Of voicing (B, F), and of bins (B, BINS, F)."""
        logits = self.layers(normalise_log_mel(mel)).to(mel.dtype)  # lower under autocast
        return logits[:, 0], logits[:, 1:]
