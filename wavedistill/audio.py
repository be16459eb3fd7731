"""Audio files, levels and log-mel."""

import io
import zipfile
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor, nn

from wavedistill.config import Audio
from wavedistill.errors import AudioError
from wavedistill.files import replacing

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg"})
PCM16_STEPS = 32768
MEL_FLOOR = 1e-5
"""Smallest mel amplitude that the logarithm sees."""
LOG_MEL_FLOOR = float(np.log(MEL_FLOOR))
LOG_MEL_RANGE = (-30, 10)
"""What the log-mel of audio in [-1, 1] lies well within, whatever floor it was made with."""


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
        magnitude: Tensor = self.spectrogram(audio)
        return (self.filters.T @ magnitude).clamp_min(MEL_FLOOR).log()

    def of_file(self, audio: Tensor, margin: int = 0) -> Tensor:
        """A whole waveform (B, F * hop) -> log-mel (B, n_mels, F + 2 margin), with silence before and after it."""
        mel = self(nn.functional.pad(audio, (self.overlap, self.overlap)))
        return pad_frames(mel, margin)

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


def read(path: Path, sample_rate: int, most_clipped: float = 1.0) -> Tensor:
    """Read an audio file as mono (T,) in [-1, 1] at a sample rate in Hz.

    Args:
        path: the file.
        sample_rate: to bring it to.
        most_clipped: the largest share of samples that may stand at full scale, three or more in a row.

    Raises:
        AudioError: if the file is missing, holds no audio or no samples, samples that are not finite, or clipped ones.
    """
    if not path.is_file():
        raise AudioError(f"{path}: no such file")
    try:
        samples, source_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise AudioError(f"{path}: not readable as audio: {_reason(error)}; convert it to wav, flac or ogg") from error
    if not len(samples):
        raise AudioError(f"{path}: holds no samples; remove it or record it again")
    if not np.isfinite(samples).all():
        raise AudioError(
            f"{path}: holds samples that are not finite numbers; export it again, as 16-bit PCM for instance"
        )
    if (share := clipped_share(samples)) > most_clipped:
        raise AudioError(f"{path}: is clipped: {share:.1%} of its samples stand at full scale; record it again, softer")
    mono = torch.from_numpy(samples.mean(1))
    return torchaudio.functional.resample(mono, source_rate, sample_rate)


def clipped_share(samples: np.ndarray) -> float:
    """The share of samples (T, channels) that stand at full scale, three or more in a row."""
    full = np.abs(samples) >= (PCM16_STEPS - 1) / PCM16_STEPS
    return float(np.lib.stride_tricks.sliding_window_view(full, 3, 0).all(-1).mean()) if len(full) > 2 else 0.0


def write(path: Path, audio: Tensor, sample_rate: int) -> None:
    """Write audio (T,) in [-1, 1] with 16 bits as the kind of file its suffix says; larger values clip."""
    content = io.BytesIO()
    soundfile.write(content, to_pcm16(audio), sample_rate, subtype="PCM_16", format=path.suffix.removeprefix("."))
    with replacing(path) as file:
        file.write(content.getbuffer())


def to_pcm16(audio: Tensor) -> np.ndarray:
    """Audio in [-1, 1] as 16-bit integers, clipped to their range."""
    scaled = (audio.detach().cpu().float() * PCM16_STEPS).round().clamp(-PCM16_STEPS, PCM16_STEPS - 1)
    return scaled.to(torch.int16).numpy()


def read_log_mel(path: Path, n_mels: int) -> Tensor:
    """Read a log-mel (n_mels, F) from a `.npy` file, as it is: other programs have lower floors than `LogMel`.

    Raises:
        AudioError: if the file does not hold a finite array of that shape.
    """
    try:
        mel = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise AudioError(f"{path}: no such file") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise AudioError(f"{path}: not a NumPy array file: {_reason(error)}") from error
    expected = f"expected a log-mel of shape ({n_mels}, frames), natural logarithm of amplitudes"
    if not isinstance(mel, np.ndarray) or mel.ndim != 2 or mel.shape[0] != n_mels or not mel.shape[1]:
        hint = ", so transpose it" if getattr(mel, "ndim", 0) == 2 and mel.shape[1] == n_mels else ""
        raise AudioError(f"{path}: has shape {getattr(mel, 'shape', '?')}; {expected}{hint}")
    if not np.issubdtype(mel.dtype, np.floating):
        raise AudioError(f"{path}: holds values of type {mel.dtype}; {expected}, as floating-point numbers")
    if not np.isfinite(mel).all():
        raise AudioError(f"{path}: holds values that are not finite; {expected}")
    low, high = LOG_MEL_RANGE
    if mel.min() < low or mel.max() > high:
        raise AudioError(
            f"{path}: holds values from {mel.min():.1f} to {mel.max():.1f}; {expected}, which lie between {low} and "
            f"{high}: is it in decibels, or of powers?"
        )
    return torch.from_numpy(mel.astype(np.float32))


def rms_db(audio: Tensor) -> float:
    """RMS level of audio (T,) in dB relative to full scale; at least -100."""
    return float(10 * torch.log10(audio.double().square().mean().clamp_min(1e-10)))


def level_gain(audio: Tensor, level_db: float) -> float:
    """The factor that brings audio (T,) to an RMS level in dB, or less if its peak would pass 0.95; 1 for silence."""
    peak = float(audio.abs().max())
    if peak == 0:
        return 1.0
    return min(10 ** ((level_db - rms_db(audio)) / 20), 0.95 / peak)


def _reason(error: Exception) -> str:
    return str(error).strip().rstrip(".").rsplit(": ", 1)[-1]
