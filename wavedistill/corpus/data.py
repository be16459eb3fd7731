"""The prepared corpus: a manifest of utterances, whole or in hop-aligned random segments."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
import soundfile
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from wavedistill.recipe.config import Audio
from wavedistill.speech.audio import PCM16_STEPS, LogMel
from wavedistill.tools.errors import CorpusError
from wavedistill.tools.files import Stretch

Split = Literal["train", "valid", "test"]
Streams = Sequence[torch.Generator]
"""One for each item of a batch, so that an item's noise is the same in a batch of any size, in any process."""


class Part(NamedTuple):
    """A file below the prepared corpus's folder, or a member of an archive there: a stretch of its bytes."""

    file: str
    offset: int
    size: int


class Utterance(BaseModel):
    """One prepared clip.

    Attributes:
        name: of the clip.
        audio: where its samples are, as a wav or FLAC file.
        f0: where its F0 is, as a NumPy file.
        source: the file of the corpus it comes from.
        split: the part of the corpus it belongs to.
        frames: its length in hops.
        gain: the factor between the source's samples and the clip's; it shifts a log density by -log(gain) a sample.
        sha256: of its audio file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    audio: Part
    f0: Part
    source: str
    split: Split
    frames: int
    gain: float
    sha256: str


class Manifest(BaseModel):
    """All utterances of a prepared corpus, and the units they are in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    audio: Audio
    utterances: list[Utterance]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a manifest.

        Raises:
            CorpusError: if the file is not a manifest.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            raise CorpusError(f"{path}: not a manifest: run the prepare stage again") from error

    def of(self, split: Split) -> list[Utterance]:
        """The utterances of one split."""
        return [utterance for utterance in self.utterances if utterance.split == split]

    def seconds(self, split: Split) -> float:
        """Total duration of one split."""
        return sum(u.frames for u in self.of(split)) * self.audio.hop_length / self.audio.sample_rate


class Batch(NamedTuple):
    """A batch of segments, with the margins that conditioning and linear prediction look at.

    Attributes:
        audio: (B, F * hop) the segments.
        with_margins: (B, (F + 2 margin) * hop) the segments with the audio around them, silent outside the file.
        mel: (B, n_mels, F + 2 margin) the log-mel of `with_margins`, as it is in the whole file.
        f0: (B, F + 2 margin) its F0 in Hz, 0 where unvoiced.
    """

    audio: Tensor
    with_margins: Tensor
    mel: Tensor
    f0: Tensor


class Heard(BaseModel):
    """What a model was trained on, so far as whoever uses it has to know.

    Attributes:
        mel_mean, mel_std: of each band of the log-mel, over frames.
        f0_low, f0_high: the range in Hz that nine of ten voiced frames lie in; None where none is voiced.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mel_mean: tuple[float, ...]
    mel_std: tuple[float, ...]
    f0_low: float | None
    f0_high: float | None

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """What a model hears of a batch."""
        frames = torch.cat([sounding(mel) for mel in batch.mel], 1)
        voiced = batch.f0[batch.f0 > 0]
        low, high = voiced.quantile(voiced.new_tensor([0.05, 0.95])).tolist() if len(voiced) else (None, None)
        return cls(
            mel_mean=tuple(frames.mean(1).tolist()),
            mel_std=tuple(frames.std(1, correction=0).tolist()),
            f0_low=low,
            f0_high=high,
        )


def sounding(mel: Tensor) -> Tensor:
    """The frames of a log-mel (n_mels, F) that are no pauses: louder than a quarter of the way from softest to loudest.

    They are the same, whatever base and unit the logarithm has.
    """
    loudness = mel.mean(0)
    low, high = loudness.min(), loudness.max()
    return mel[:, loudness >= low + (high - low) / 4]


class Segments:
    """Hop-aligned segments of one split, and their log-mels, computed on the fly.

    Args:
        manifest: the prepared corpus.
        folder: the folder of its audio files.
        split: the part to draw from.
        frames: length of a segment in hops.
        margin: mel frames needed on either side of it.
        device: where the batches go.
    """

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        split: Split,
        *,
        frames: int,
        margin: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.folder, self.frames, self.margin, self.device = folder, frames, margin, device
        self.hop_length, self.overlap = manifest.audio.hop_length, manifest.audio.overlap
        self.log_mel = LogMel(manifest.audio).to(device)
        self.utterances = [u for u in manifest.of(split) if u.frames >= frames]
        if not self.utterances:
            longest = max((u.frames for u in manifest.of(split)), default=0)
            raise CorpusError(
                f"no utterance of the {split} split has {frames} frames (the longest has {longest}): "
                "lower segment_frames, or add longer recordings"
            )
        self._ends = np.cumsum([u.frames - frames + 1 for u in self.utterances])

    def draw(self, streams: Streams) -> Batch:
        """A batch of random segments, one from each stream; every position of the corpus is equally likely."""
        places = []
        for stream in streams:
            position = int(torch.randint(int(self._ends[-1]), (), generator=stream))
            index = int(np.searchsorted(self._ends, position, side="right"))
            places.append((self.utterances[index], int(self._ends[index]) - 1 - position))
        return self.cut(places)

    def cut(self, places: Sequence[tuple[Utterance, int]]) -> Batch:
        """The segments that start at given frames of given utterances."""
        margin = self.margin * self.hop_length
        around, length = margin + self.overlap, self.frames * self.hop_length
        surroundings, inside, f0 = [], [], []
        for utterance, first in places:
            start = first * self.hop_length - around
            surroundings.append(read_samples(self.folder, utterance, start, length + 2 * around))
            frames = torch.arange(first - self.margin, first + self.frames + self.margin)
            inside.append((frames >= 0) & (frames < utterance.frames))
            f0.append(read_f0(self.folder, utterance)[frames.clamp(0, utterance.frames - 1)] * inside[-1])
        wide = torch.stack(surroundings)
        if torch.device(self.device).type == "cuda":  # from pinned memory, a copy does not wait
            wide = wide.pin_memory()
        wide = wide.to(self.device, non_blocking=True)
        return Batch(
            audio=wide[:, around : around + length],
            with_margins=wide[:, self.overlap : self.overlap + length + 2 * margin],
            mel=self.log_mel.of_segment(wide, torch.stack(inside).to(self.device)),
            f0=torch.stack(f0).to(self.device),
        )


def read_samples(folder: Path, utterance: Utterance, start: int = 0, length: int | None = None) -> Tensor:
    """Samples (length,) of an utterance in [-1, 1) from position start on, zero outside the file; all by default."""
    try:
        with _open(folder, utterance.audio) as stretch, soundfile.SoundFile(stretch) as file:
            length = file.frames if length is None else length
            first, last = max(start, 0), min(start + length, file.frames)
            out = np.zeros(length, np.float32)
            file.seek(first)
            out[first - start : last - start] = file.read(last - first, dtype="float32")
    except (OSError, ValueError, soundfile.SoundFileError) as error:  # ValueError: cut short behind its header
        raise _unreadable(folder, utterance.audio, "cannot be read") from error
    return torch.from_numpy(out)


def read_f0(folder: Path, utterance: Utterance) -> Tensor:
    """F0 (frames,) of an utterance in Hz, 0 where unvoiced."""
    try:
        with _open(folder, utterance.f0) as stretch:
            f0 = np.load(io.BytesIO(stretch.read()), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(folder, utterance.f0, "cannot be read") from error
    if f0.shape != (utterance.frames,) or not np.isfinite(f0).all():
        raise _unreadable(folder, utterance.f0, "is not that of its audio")
    return torch.from_numpy(f0.astype(np.float32))


def _open(folder: Path, part: Part) -> Stretch:
    return Stretch((folder / part.file).open("rb"), part.offset, part.size)


def _unreadable(folder: Path, part: Part, why: str) -> CorpusError:
    return CorpusError(f"{folder / part.file}: {why}: delete it and run the prepare stage again")


def dequantise(audio: Tensor, streams: Streams) -> Tensor:
    """Add uniform noise of one 16-bit step, centred on zero, so that a continuous density fits 16-bit audio."""
    noise = each(streams, lambda stream: torch.rand(audio.shape[1:], generator=stream)) - 0.5
    return audio + noise.to(audio.device) / PCM16_STEPS


def each(streams: Streams, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
    """What is drawn from each stream, stacked (B, ...)."""
    return torch.stack([draw(stream) for stream in streams])


def random_stream(*entropy: int) -> torch.Generator:
    """A generator on the CPU for one purpose, given by whole numbers such as a seed, a purpose and a step.

    Streams of different numbers are independent; drawing on the CPU gives the same noise on every device.
    """
    # The count comes first, because trailing zeros would not count.
    (state,) = np.random.SeedSequence([len(entropy), *entropy]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) >> 1)
