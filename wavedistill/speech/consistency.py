"""Mel consistency: waveforms whose log-mel is the one they were drawn for."""

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedistill.networks.products import product
from wavedistill.recipe.sections import Audio
from wavedistill.speech.audio import MEL_FLOOR, mel_filters

MOST_GAIN = 6.0
"""Nats of amplitude by which a step raises or lowers a bin at most."""
MOMENTUM = 0.6
"""Of a step, on top of where the one before led: four steps with it are worth six without."""
WEIGHT_FLOOR = 1e-3
"""Of squared windows in sum, about 1.5 where there are four to a window: less counts as this much."""
LENGTHS = 8
"""Numbers of frames that come at a time in a stream, of which it remembers the weights."""
SMALLEST = 1e-30
"""Square of a magnitude; less counts as this much."""


class MelConsistency(nn.Module):
    r"""Moves a waveform towards those that have a given log-mel; what already has it stays where it is.

    A step multiplies each bin of the short-time spectrum X by the gain that its mel bands lack, with the filterbank M
    normalised over the bands of each bin, and adds what that changes to the waveform, by weighted overlap-add:

    .. math:: X_{kf} \leftarrow X_{kf} \exp \frac{\sum_b M_{bk} (m_{bf} - \log \sum_j M_{bj} |X_{jf}|)}{\sum_b M_{bk}}

    From the second step on, X is that of :math:`x_i + \mu (x_i - x_{i-1})` (Perraudin et al. 2013, for phases).
    Phase and fine structure stay the draw's own. The spectrum is that of `LogMel`. Differentiable; no bijection, so the
    density of a draw is that before the step. One batch of matrix products, no loop over time, no synchronisation.

    Args:
        settings: of the log-mel.
        passes: how many steps; 0 leaves every waveform as it is.
    """

    filters: Tensor
    spread: Tensor
    window: Tensor

    def __init__(self, settings: Audio, passes: int = 1) -> None:
        super().__init__()
        self.passes = passes
        self.hop_length, self.n_fft, self.overlap = settings.hop_length, settings.n_fft, settings.overlap
        filters = mel_filters(settings)  # (bins, n_mels)
        # Bins of no band keep what they have.
        shares = filters / filters.sum(1, keepdim=True).clamp_min(torch.finfo(filters.dtype).tiny)
        self.register_buffer("filters", filters.T.contiguous(), persistent=False)
        self.register_buffer("spread", shares, persistent=False)
        self.register_buffer("window", torch.hann_window(settings.n_fft), persistent=False)

    @property
    def latency(self) -> int:
        """Samples of the waveform after a sample that have to be known for it, and at most a hop more a step."""
        return self.passes * (self.n_fft - self.hop_length)

    def forward(self, wave: Tensor, log_mel: Tensor) -> Tensor:
        """A waveform (B, F * hop_length) with silence around it, after the steps towards a log-mel (B, n_mels, F)."""
        frames = log_mel.shape[-1]
        weight = self.weights(frames)
        inside = slice(self.overlap, self.overlap + wave.shape[1])
        before = wave
        for _ in range(self.passes):
            start = _beyond(wave, before)
            padded = F.pad(start, (self.overlap, self.overlap))
            change = self.overlapped(self.changes(padded.unfold(1, self.n_fft, self.hop_length), log_mel))
            wave, before = start + _mean(change, weight)[:, inside], wave
        return wave

    def changes(self, cut: Tensor, log_mel: Tensor) -> Tensor:
        """What a step adds to each frame (B, F, n_fft) of a waveform, times the window, given (B, n_mels, F)."""
        filters, spread, window = (each.to(cut.dtype) for each in (self.filters, self.spread, self.window))
        with torch.autocast(cut.device.type, enabled=False):
            spectrum = torch.fft.rfft(cut * window)
            drawn = product(_magnitude(spectrum), filters).clamp_min(MEL_FLOOR).log()
            gain = product(log_mel.transpose(1, 2) - drawn, spread).clamp(-MOST_GAIN, MOST_GAIN)
            # Not expm1, which takes five times as long.
            return torch.fft.irfft(spectrum * (gain.exp() - 1), self.n_fft) * window

    def weights(self, frames: int) -> Tensor:
        """The squared windows of so many frames, overlapped: (1, T), T = (frames - 1) * hop_length + n_fft or more."""
        return self.overlapped(self.window.square().expand(1, frames, -1))

    def overlapped(self, cut: Tensor) -> Tensor:
        """The sum of frames (B, F, n_fft), a hop after one another: (B, (F - 1) * hop_length + n_fft or more)."""
        hops, frames = -(-self.n_fft // self.hop_length), cut.shape[1]
        parts = F.pad(cut, (0, hops * self.hop_length - self.n_fft)).unflatten(2, (hops, self.hop_length))
        total = cut.new_zeros(len(cut), frames + hops - 1, self.hop_length)
        for hop in range(hops):
            total[:, hop : hop + frames] += parts[:, :, hop]
        return total.flatten(1)


class ConsistentStream:
    """A waveform that comes piece by piece, after the steps that `MelConsistency` gives the whole."""

    def __init__(self, consistency: MelConsistency) -> None:
        self._consistency, self._steps = consistency, list[_Step]()
        self._weights = lru_cache(LENGTHS)(consistency.weights)

    def given(self, wave: Tensor, log_mel: Tensor) -> Tensor:
        """What is done (B, any number), `latency` behind, after n frames more: (B, n * hop_length), (B, n_mels, n)."""
        if not self._steps:
            steps = range(self._consistency.passes)
            self._steps = [_Step(self._consistency, self._weights, wave, log_mel) for _ in steps]
        before = wave
        for step in self._steps:
            wave, before = step.given(wave, before, log_mel)
        return wave

    def rest(self) -> Iterator[Tensor]:
        """What is left (B, any number), once silence follows."""
        if self._steps:
            wave = before = self._steps[0].wave[:, :0]
            for step in self._steps:
                wave, before = step.rest(wave, before)
            yield wave


class _Step:
    """One step of a stream: what is known and not done yet, and what the frames that are done change ahead of them."""

    def __init__(
        self, consistency: MelConsistency, weights: Callable[[int], Tensor], wave: Tensor, log_mel: Tensor
    ) -> None:
        self.consistency, self.weights = consistency, weights
        self.before = consistency.overlap  # silence, which nobody wants back
        self.wave = self.start = wave.new_zeros(len(wave), consistency.overlap)
        self.log_mel = log_mel[..., :0]
        self.ahead = consistency.n_fft - consistency.hop_length
        self.change, self.weight = wave.new_zeros(len(wave), self.ahead), wave.new_zeros(1, self.ahead)

    def given(self, wave: Tensor, before: Tensor, log_mel: Tensor) -> tuple[Tensor, Tensor]:
        """What no frame will change any more (B, any number), and what it was, now that a piece more is known.

        Args:
            wave: the piece.
            before: what it was before the step before.
            log_mel: the frames that are known with it.
        """
        hop, n_fft = self.consistency.hop_length, self.consistency.n_fft
        self.wave = torch.cat([self.wave, wave], 1)
        self.start = torch.cat([self.start, _beyond(wave, before)], 1)
        self.log_mel = torch.cat([self.log_mel, log_mel], -1)
        frames = min((self.wave.shape[1] - self.ahead) // hop, self.log_mel.shape[-1])
        if frames <= 0:
            return wave[:, :0], wave[:, :0]
        done = frames * hop
        cut = self.start.unfold(1, n_fft, hop)[:, :frames]
        change = self.consistency.overlapped(self.consistency.changes(cut, self.log_mel[..., :frames]))
        weight = self.weights(frames).clone()
        change[:, : self.ahead] += self.change
        weight[:, : self.ahead] += self.weight
        ready, was = self.start[:, :done] + _mean(change[:, :done], weight[:, :done]), self.wave[:, :done]
        self.change, self.weight = (each[:, done : done + self.ahead].clone() for each in (change, weight))
        self.wave, self.start, self.log_mel = self.wave[:, done:], self.start[:, done:], self.log_mel[..., frames:]
        skipped = min(self.before, done)
        self.before -= skipped
        return ready[:, skipped:], was[:, skipped:]

    def rest(self, wave: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """What is left (B, any number), and what it was, once silence follows a last piece without frames."""
        silence = self.wave.new_zeros(len(self.wave), self.consistency.overlap)
        wave, before = (torch.cat([each, silence], 1) for each in (wave, before))
        ready, was = self.given(wave, before, self.log_mel[..., :0])
        left = self.wave.shape[1] - self.consistency.overlap
        last = self.start[:, :left] + _mean(self.change[:, :left], self.weight[:, :left])
        # Of a file shorter than the silence before it, that is still there.
        return torch.cat([ready, last[:, self.before :]], 1), torch.cat([was, self.wave[:, self.before : left]], 1)


def _magnitude(spectrum: Tensor) -> Tensor:
    """Of complex values, twice as fast as torch's, whose hypotenuse cannot overflow; at silence, without gradient."""
    real, imaginary = torch.view_as_real(spectrum).unbind(-1)
    return torch.addcmul(real.square(), imaginary, imaginary).clamp_min(SMALLEST).sqrt()


def _beyond(wave: Tensor, before: Tensor) -> Tensor:
    """Where a step starts: beyond where the one before led."""
    return torch.lerp(before, wave, 1 + MOMENTUM)


def _mean(change: Tensor, weight: Tensor) -> Tensor:
    """Weighted overlap-add; where windows hardly reach, nothing changes."""
    return change / weight.clamp_min(WEIGHT_FLOOR)
