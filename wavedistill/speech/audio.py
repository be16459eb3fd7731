"""Levels and log-mel of audio, and the files that it is written to."""

import io
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor, nn

from wavedistill.recipe.sections import Audio
from wavedistill.tools.files import replacing

PCM16_STEPS = 32768
MEL_FLOOR = 1e-5
"""Smallest mel amplitude that the logarithm sees."""
LOG_MEL_FLOOR = float(np.log(MEL_FLOOR))
BLOCK_SAMPLES = 2**20
"""Of long audio, that are converted at a time."""
BLOCK_FRAMES = 1024
"""Of long audio, whose log-mel is computed at a time."""


class LogMel(nn.Module):
    """Log of the mel-filtered magnitude spectrum, in nats of amplitude, framed so that frame k is centred on hop k.

    Frame k of a waveform of F hops sees the samples from k * hop - overlap to (k + 1) * hop + overlap, so that F hops
    have exactly F frames.
    """

    filters: Tensor

    def __init__(self, settings: Audio) -> None:
        super().__init__()
        self.overlap = settings.overlap
        self.spectrogram = torchaudio.transforms.Spectrogram(
            settings.n_fft, hop_length=settings.hop_length, power=1.0, center=False
        )
        self.register_buffer("filters", mel_filters(settings), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """Audio (B, F * hop) with `overlap` more samples at either end -> log-mel (B, n_mels, F)."""
        with torch.autocast(audio.device.type, enabled=False):
            magnitude: Tensor = self.spectrogram(audio)
            return (self.filters.T @ magnitude).clamp_min(MEL_FLOOR).log()

    def of_file(self, audio: Tensor, margin: int = 0) -> Tensor:
        """A whole waveform (B, F * hop) -> log-mel (B, n_mels, F + 2 margin), with silence before and after it."""
        mel = self(nn.functional.pad(audio, (self.overlap, self.overlap)))
        return pad_frames(mel, margin)

    def of_blocks(self, audio: Iterable[Tensor], margin: int) -> Iterator[Tensor]:
        """As `of_file`, piece by piece, each as soon as its samples are known, so that no more is ever held.

        Args:
            audio: pieces (B, any number); together filled up to whole hops.
            margin: frames of silence before and after.

        Yields:
            Pieces (B, n_mels, any number of frames).
        """
        hop, overlap = self.spectrogram.hop_length, self.overlap
        known: Tensor | None = None
        for piece in audio:
            if known is None:
                silence = pad_frames(piece.new_zeros(len(piece), len(self.filters.T), 0), margin)[..., :margin]
                known = piece.new_zeros(len(piece), overlap)
                yield silence
            known = torch.cat([known, piece], 1)
            if (frames := (known.shape[1] - 2 * overlap) // hop) > 0:
                yield self(known[:, : frames * hop + 2 * overlap])
                known = known[:, frames * hop :]
        if known is None:
            return
        if frames := -(-(known.shape[1] - overlap) // hop):
            yield self(nn.functional.pad(known, (0, frames * hop + 2 * overlap - known.shape[1])))
        yield silence

    def of_segment(self, audio: Tensor, inside: Tensor) -> Tensor:
        """As `forward`, but frames outside the file, where inside (B, F) is False, are those of `of_file`'s silence."""
        return self(audio).masked_fill(~inside[:, None], LOG_MEL_FLOOR)


def mel_filters(settings: Audio) -> Tensor:
    """The mel filterbank (n_fft / 2 + 1, n_mels) that `LogMel` applies to magnitudes."""
    return torchaudio.functional.melscale_fbanks(
        settings.n_fft // 2 + 1,
        settings.f_min,
        settings.f_max,
        settings.n_mels,
        settings.sample_rate,
        norm="slaney",
        mel_scale="slaney",
    )


def pad_frames(mel: Tensor, margin: int) -> Tensor:
    """Log-mel (..., F) -> (..., F + 2 margin), with frames of silence at either end."""
    return nn.functional.pad(mel, (margin, margin), value=LOG_MEL_FLOOR)


def pad_to_hops(audio: Tensor, hop_length: int) -> Tensor:
    """Append silence to audio (..., T) until it is a whole number of hops."""
    return nn.functional.pad(audio, (0, -audio.shape[-1] % hop_length))


def write(path: Path, audio: Tensor, sample_rate: int, comment: str | None = None) -> None:
    """Write audio (T,) in [-1, 1] with 16 bits as the kind of file its suffix says; larger values clip.

    A comment stands behind the samples, where `comment_of` finds it and players do not mind it.
    """
    content = encoded(audio, sample_rate, path.suffix.removeprefix(".").upper(), comment)
    with replacing(path) as file:
        file.write(content)


def encoded(audio: Tensor, sample_rate: int, kind: str = "WAV", comment: str | None = None) -> memoryview:
    """The content of a file of audio (T,); arguments as in `write`."""
    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", sample_rate, 1, "PCM_16", format=kind) as file:
        for block in audio.split(BLOCK_SAMPLES):
            file.write(to_pcm16(block))
        if comment is not None:
            file.comment = comment
    return content.getbuffer()


def comment_of(path: Path) -> str | None:
    """The comment in a file of audio; None if there is none, or the file is none of audio."""
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:
            return str(file.comment) or None
    except soundfile.SoundFileError:
        return None


def to_pcm16(audio: Tensor) -> np.ndarray:
    """Audio in [-1, 1] as 16-bit integers in its shape (any), clipped to their range."""
    scaled = (audio.detach().cpu().float() * PCM16_STEPS).round().clamp(-PCM16_STEPS, PCM16_STEPS - 1)
    return scaled.to(torch.int16).numpy()


def rms_db(audio: Tensor) -> float:
    """RMS level of audio (T,) in dB relative to full scale; at least -100."""
    return 10 * math.log10(max(float(squares(audio.detach().cpu().numpy())) / len(audio), 1e-10))


def squares(samples: np.ndarray) -> np.ndarray:
    """The sum of squares (...,) of samples (..., T), exact for long ones, without a copy of them."""
    return np.einsum("...i,...i", samples, samples, dtype=np.float64)


def level_gain(audio: Tensor, level_db: float) -> float:
    """The factor that brings audio (T,) to an RMS level in dB, or less if its peak would pass 0.95; 1 for silence."""
    low, high = audio.aminmax()
    peak = float(max(-low, high))
    if peak == 0:
        return 1.0
    return min(10 ** ((level_db - rms_db(audio)) / 20), 0.95 / peak)
