"""The prepared corpus: a manifest of utterances, and their samples and F0."""

import io
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
import soundfile
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from wavedistill.recipe.sections import Audio
from wavedistill.speech.audio import LogMel
from wavedistill.tools.errors import CorpusError
from wavedistill.tools.files import Stretch

Split = Literal["train", "valid", "test"]


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
        mel: where the log-mel is that was given for it, as a NumPy file; None where it is that of its samples.
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
    mel: Part | None = None
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

    def files(self) -> set[str]:
        """What the utterances' parts are in."""
        parts = (part for utterance in self.utterances for part in (utterance.audio, utterance.f0, utterance.mel))
        return {part.file for part in parts if part}

    def seconds(self, split: Split) -> float:
        """Total duration of one split."""
        return sum(u.frames for u in self.of(split)) * self.audio.hop_length / self.audio.sample_rate


def read_samples(folder: Path, utterance: Utterance, start: int = 0, length: int | None = None) -> Tensor:
    """Samples (length,) of an utterance in [-1, 1) from position start on, zero outside the file; all by default.

    Raises:
        CorpusError: if they cannot be read.
    """
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
    """F0 (frames,) of an utterance in Hz, 0 where unvoiced.

    Raises:
        CorpusError: if it cannot be read, or is not that of its audio.
    """
    return _array(folder, utterance.f0, (utterance.frames,))


def read_mel(folder: Path, utterance: Utterance, log_mel: LogMel) -> Tensor:
    """Log-mel (n_mels, frames) that models are told of an utterance: the one that was given, or else that of its audio.

    Raises:
        CorpusError: if it cannot be read, or is not that of its audio.
    """
    if utterance.mel is None:
        return log_mel.of_file(read_samples(folder, utterance)[None])[0]
    return _array(folder, utterance.mel, (log_mel.filters.shape[1], utterance.frames))


def _array(folder: Path, part: Part, shape: tuple[int, ...]) -> Tensor:
    try:
        with _open(folder, part) as stretch:
            array = np.load(io.BytesIO(stretch.read()), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(folder, part, "cannot be read") from error
    if array.shape != shape or not np.isfinite(array).all():
        raise _unreadable(folder, part, "is not that of its audio")
    return torch.from_numpy(array.astype(np.float32))


def _open(folder: Path, part: Part) -> Stretch:
    return Stretch((folder / part.file).open("rb"), part.offset, part.size)


def _unreadable(folder: Path, part: Part, why: str) -> CorpusError:
    return CorpusError(f"{folder / part.file}: {why}: delete it and run the prepare stage again")
