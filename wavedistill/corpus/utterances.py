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
