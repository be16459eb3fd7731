"""Recordings as people have them: which files are some, what each sounds like, and what in it is speech.

None is ever held whole but as mono at the rate that is wanted, so that one of hours takes no more memory than it must.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from wavedistill.corpus import media
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech.audio import PCM16_STEPS, level_gain, squares
from wavedistill.tools.errors import AudioError
from wavedistill.tools.files import shown

KINDS = {
    **{".wav": "WAV", ".wave": "WAV", ".rf64": "RF64", ".w64": "W64", ".flac": "FLAC", ".mp3": "MP3", ".caf": "CAF"},
    **{".ogg": "OGG", ".oga": "OGG", ".opus": "OGG", ".aiff": "AIFF", ".aif": "AIFF", ".aifc": "AIFF"},
    **{".au": "AU", ".snd": "AU", ".voc": "VOC", ".sph": "NIST", ".nist": "NIST"},
}
"""What files of audio are called, and the kind that libsndfile calls them."""
MEDIA = frozenset(suffix for suffix, kind in KINDS.items() if kind not in soundfile.available_formats()) | frozenset(
    [".3gp", ".aac", ".ac3", ".amr", ".ape", ".m4a", ".m4b", ".mka", ".mp2", ".mp4", ".mpc", ".webm", ".wma", ".wv"]
)
"""Plainly audio, which libsndfile cannot read."""
READABLE = (frozenset(KINDS) - MEDIA) | (MEDIA if media.INSTALLED else frozenset())
UNREADABLE = MEDIA - READABLE
BLOCK_VALUES = 2**12
"""Of all channels, that are read at a time; a block in which a decoder fails is lost."""
FULL_SCALE = (PCM16_STEPS - 1) / PCM16_STEPS
LOUDEST = 16
"""Of floating point in [-1, 1], which may pass 1 by a little."""
INTEGER_BITS = (16, 24, 32)
STREAMED = 2**31 - 2**16
"""What a program that writes to a pipe, and so cannot know, says of the bytes to come, at the least; or it says 0."""
RATES = (1000, 1_000_000)
"""Hz; of any recording."""
HOP = 512
"""Samples from one measurement of the loudness to the next."""


class Survey(NamedTuple):
    """What one reading of a recording says about it.

    Attributes:
        frames: samples of each channel.
        rate: Hz.
        mean: of all samples.
        clipped: share of the samples that stand at full scale.
    """

    frames: int
    rate: int
    mean: float
    clipped: float


class Forward(soundfile.SoundFile):  # type: ignore[misc]
    """A file read from beginning to end: soundfile seeks after each read, where FLAC of unknown length fails."""

    def seekable(self) -> bool:
        return False


def read(path: Path, sample_rate: int, most_clipped: float = 1.0) -> Tensor:
    """Read a recording as mono (T,) of mean 0 at a sample rate in Hz; full scale is 1, which floating point may pass.

    Args:
        path: the file.
        sample_rate: to bring it to.
        most_clipped: the largest share of samples that may be clipped.

    Raises:
        AudioError: whatever is wrong with it.
    """
    with _naming(path):
        found = _survey(path)
        if found.clipped > most_clipped:
            raise AudioError(
                f"{shown(path)}: is clipped: {found.clipped:.1%} of its samples stand at full scale; record it again, "
                "softer"
            )
        out = np.empty(-(-found.frames * sample_rate // found.rate) + 1, np.float32)
        length = 0
        for block in _resampled(path, found, sample_rate):
            out[length : length + len(block)] = block
            length += len(block)
        if not length:
            raise AudioError(f"{shown(path)}: holds {found.frames} samples, too few to bring to {sample_rate} Hz")
    return torch.from_numpy(out[:length])


def rate(path: Path) -> int:
    """The sample rate in Hz that a recording says it has.

    Raises:
        AudioError: if it is none.
    """
    with _naming(path), _opened(path) as file:
        return int(file.samplerate)


def seconds(path: Path) -> float:
    """How long a recording says that it is; 0 where it does not say."""
    try:
        with _opened(path) as file:
            return float(file.frames / file.samplerate) if file.frames < STREAMED else 0.0
    except (soundfile.SoundFileError, AudioError, OSError, ValueError):
        return 0.0


def _survey(path: Path) -> Survey:
    """Read a recording and look whether it is one.

    Raises:
        AudioError: if it is none, holds no samples or odd ones, or is cut off.
    """
    promised, there = _chunk(path)
    frames, clipped, total, peak = 0, 0, 0.0, 0.0
    with _opened(path) as file:
        floating = file.subtype in ("FLOAT", "DOUBLE")
        known = file.format != "MP3" and file.frames < STREAMED  # that of MP3 is a guess
        expected = file.frames if known else 0
        tail = np.zeros((0, file.channels), np.float32)
        try:
            for block in _blocks(file):
                if not np.isfinite(block).all():
                    raise AudioError(
                        f"{shown(path)}: holds samples that are not finite numbers; export it again, as 16-bit PCM for "
                        "instance"
                    )
                frames += len(block)
                total += float(block.mean(1).sum(dtype=np.float64))
                peak = max(peak, float(np.abs(block).max()))
                clipped += flat_tops(joined := np.concatenate([tail, block]), floating)
                tail = joined[-2:]
        except soundfile.LibsndfileError:
            if not frames:
                raise
        rate, values = file.samplerate, file.channels * max(frames - 2, 1)
    if not frames and there and not promised:
        raise AudioError(
            f"{shown(path)}: says that it holds no samples, and {there:,} bytes follow: it was written to a pipe; sox "
            "--ignore-length mends it"
        )
    if not frames:
        raise AudioError(f"{shown(path)}: holds no samples; remove it or record it again")
    if not RATES[0] <= rate <= RATES[1]:
        raise AudioError(f"{shown(path)}: says that it has {rate} samples a second; export it again")
    if 0 < there < promised < STREAMED:
        expected = max(expected, frames * promised // there)
    if expected - frames > rate // 100:
        raise AudioError(
            f"{shown(path)}: is cut off: {frames / rate:.2f} of {expected / rate:.2f} seconds are there; copy or "
            "export it again"
        )
    if peak > LOUDEST:
        bits = next((bits for bits in INTEGER_BITS if peak <= 2 ** (bits - 1)), INTEGER_BITS[-1])
        raise AudioError(
            f"{shown(path)}: holds values up to {peak:.0f}: floating point on the scale of {bits}-bit integers; divide "
            f"by {2 ** (bits - 1)}"
        )
    return Survey(frames, rate, total / frames, clipped / values)


def _resampled(path: Path, found: Survey, sample_rate: int) -> Iterator[np.ndarray]:
    """A recording as mono blocks of mean 0 at a sample rate in Hz."""
    resampler = soxr.ResampleStream(found.rate, sample_rate, 1, dtype="float32")
    with _opened(path) as file:
        for block in _blocks(file):
            mono = block.mean(1) - np.float32(found.mean)
            yield mono if found.rate == sample_rate else resampler.resample_chunk(mono)
    if found.rate != sample_rate:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def resample(samples: np.ndarray, rate: int, sample_rate: int) -> Tensor:
    """Samples (T,) at one rate, in Hz, as audio at another."""
    return torch.from_numpy(soxr.resample(samples, rate, sample_rate))


def flat_tops(samples: np.ndarray, floating: bool) -> int:
    """How many values of samples (T, channels) stand at full scale, three in a row.

    Floating point goes beyond full scale, so that there a clipped peak has one value as well.
    """
    if len(samples) < 3:
        return 0
    flat = np.lib.stride_tricks.sliding_window_view(np.abs(samples) >= FULL_SCALE, 3, 0).all(-1)
    if floating and flat.any():
        flat &= np.ptp(np.lib.stride_tricks.sliding_window_view(samples, 3, 0), -1) == 0
    return int(flat.sum())


def _blocks(file: soundfile.SoundFile | media.Media) -> Iterator[np.ndarray]:
    """Samples (n, channels) of a file, until there are none."""
    count = max(1, BLOCK_VALUES // file.channels)
    while len(block := file.read(count, dtype="float32", always_2d=True)):
        yield block


def _opened(path: Path) -> soundfile.SoundFile | media.Media:
    if path.suffix.lower() in MEDIA:
        return media.Media(path)
    return Forward(os.fsencode(path))  # soundfile cannot encode every name that a file may have


def _chunk(path: Path) -> tuple[int, int]:
    """How many bytes of sound the header of a wav or AIFF file promises, and how many are there; (0, 0) of other kinds.

    libsndfile believes the file and not its header.
    """
    with path.open("rb") as file:
        kind = file.read(4)
        file.seek(12)
        while kind in (b"RIFF", b"FORM") and len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], "little" if kind == b"RIFF" else "big")
            if head[:4] in (b"data", b"SSND"):
                return size, path.stat().st_size - file.tell()
            file.seek(size + size % 2, os.SEEK_CUR)
    return 0, 0


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong where a file is read, by whatever decoder, into an error that names it."""
    name = shown(path)
    try:
        if path.is_dir():
            raise AudioError(f"{name}: is a folder; give the files in it: {name}/*.wav")
        with path.open("rb"):  # libsndfile says "System error" for all that may go wrong here
            pass
        yield
    except AudioError:
        raise
    except FileNotFoundError as error:
        raise AudioError(f"{name}: no such file") from error
    except OSError as error:
        raise AudioError(f"{name}: cannot be read: {(error.strerror or str(error)).lower()}") from error
    except Exception as error:
        reason = str(error).strip().rstrip(".").rsplit(": ", 1)[-1] or type(error).__name__
        raise AudioError(f"{name}: not readable as audio: {shown(reason)}; convert it to wav, flac or ogg") from error


def loudness(samples: Tensor) -> np.ndarray:
    """RMS (1 + T // HOP,) of audio (T,) in windows of four hops around the borders of hops, with silence outside.

    As `librosa.feature.rms`, which holds each window.
    """
    whole, hops = len(samples) // HOP, samples.numpy()
    energy = np.zeros(whole + 5)
    energy[2 : whole + 2] = squares(hops[: whole * HOP].reshape(whole, HOP))
    energy[whole + 2] = squares(hops[whole * HOP :])
    return np.sqrt(np.lib.stride_tricks.sliding_window_view(energy, 4).sum(-1)[: whole + 1] / (4 * HOP))


def _pieces(samples: Tensor, recipe: Recipe, grain: int) -> Iterator[slice]:
    """Where to cut a recording (T,) into pieces of at most `max_seconds`, each without silence at its ends.

    What counts as silence is the same for all pieces, so that a long pause leaves an empty one, not amplified noise.
    """
    quiet = float(loudness(samples).max()) * 10 ** (-recipe.prepare.trim_db / 20)

    def trim(first: int, last: int) -> slice:
        loud = np.flatnonzero(loudness(samples[first:last]) >= quiet)
        if not len(loud):
            return slice(first, first)
        start, end = first + int(loud[0]) * HOP, first + (int(loud[-1]) + 1) * HOP
        return slice(start // grain * grain, min(-(-end // grain) * grain, last))

    whole = trim(0, len(samples))
    first, last = whole.start, whole.stop
    longest = int(recipe.prepare.max_seconds * recipe.audio.sample_rate)
    while last - first > longest:
        middle, latest = first + longest // 2, first + longest
        quietest = middle + _quietest(samples[middle:latest], recipe.audio.sample_rate)
        cut = min(-(-quietest // grain) * grain, last)
        yield trim(first, cut)
        first = cut
    yield trim(first, last)


def speech(samples: Tensor, recipe: Recipe, grain: int = 1) -> tuple[list[slice], float]:
    """The pieces of speech in a recording (T,), and the gain that brings them to the level of a training.

    Args:
        samples: of the recording.
        recipe: of the training.
        grain: of how many samples the pieces begin and end at a multiple, but for the end of the recording.
    """
    pieces = list(_pieces(samples, recipe, grain))
    return pieces, level_gain(torch.cat([samples[piece] for piece in pieces]), recipe.audio.level_db)


def _quietest(samples: Tensor, rate: int) -> int:
    """The middle of the quietest 50 ms of samples (T,)."""
    width = rate // 20
    energy = np.convolve(samples.numpy() ** 2, np.ones(width), mode="valid")
    return int(energy.argmin()) + width // 2
