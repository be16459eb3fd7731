"""Sound from a pipe and into one, a tenth of a second at a time, while it is being made."""

import struct
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from wavedistill.corpus.recordings import Forward
from wavedistill.speech.audio import PCM16_STEPS, to_pcm16
from wavedistill.tools.errors import AudioError

BLOCK_SECONDS = 0.1
UNKNOWN = 2**32 - 1
"""What a wav file's header says of bytes that nobody has counted yet, as ffmpeg and sox write it."""


def read_raw(file: BinaryIO, sample_rate: int) -> Iterator[Tensor]:
    """Blocks (n,) of mono 16-bit little-endian samples without a header, at a sample rate in Hz."""
    while data := file.read(2 * _count(sample_rate)):
        samples = np.frombuffer(data[: len(data) // 2 * 2], "<i2")
        yield torch.from_numpy(samples.astype(np.float32) / PCM16_STEPS)


def read_wav(descriptor: int, sample_rate: int) -> Iterator[Tensor]:
    """Blocks (n,) of a wav stream as mono at a sample rate in Hz.

    Args:
        descriptor: of the open file.
        sample_rate: to bring it to.

    Raises:
        AudioError: if it is no wav stream.
    """
    try:
        with Forward(descriptor, closefd=False) as file:
            resampler = soxr.ResampleStream(file.samplerate, sample_rate, 1, dtype="float32")
            while len(block := file.read(_count(file.samplerate), dtype="float32", always_2d=True)):
                mono = block.mean(1)
                yield torch.from_numpy(mono if file.samplerate == sample_rate else resampler.resample_chunk(mono))
            if file.samplerate != sample_rate:
                yield torch.from_numpy(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"standard input: not readable as a wav stream: {error.error_string.rstrip('.')}; for 16-bit samples "
            "without a header, give --raw"
        ) from error


def write(file: BinaryIO, blocks: Iterable[Tensor], sample_rate: int, *, raw: bool) -> int:
    """Write audio (n,) in [-1, 1] as it comes, 16-bit mono, as a wav stream or without a header; how many samples."""
    length = 0
    if not raw:
        file.write(wav_head(sample_rate))
    for block in blocks:
        file.write(to_pcm16(block).astype("<i2").tobytes())
        file.flush()
        length += len(block)
    return length


def wav_head(sample_rate: int) -> bytes:
    """The first 44 bytes of a 16-bit mono wav file that nobody knows the length of yet."""
    about = (16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    return struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", UNKNOWN, b"WAVEfmt ", *about, b"data", UNKNOWN)


def _count(sample_rate: int) -> int:
    return max(1, int(BLOCK_SECONDS * sample_rate))
