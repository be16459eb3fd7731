"""What systems are told of a test, and what they are compared with."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Self

from torch import Tensor

from wavedistill.corpus.utterances import Utterance, read_mel, read_samples
from wavedistill.recipe.sections import Audio
from wavedistill.speech.audio import LogMel


class Excerpt(NamedTuple):
    """A recording's beginning, or all of it, and its log-mel.

    Attributes:
        audio: (F * hop,) as it was recorded.
        mel: log-mel (n_mels, F) that systems speak from: the one that was given for it, or its own.
    """

    audio: Tensor
    mel: Tensor

    @classmethod
    def of(cls, audio: Tensor, settings: Audio) -> Self:
        """Audio (F * hop,) with its own log-mel (n_mels, F)."""
        return cls(audio, LogMel(settings).of_file(audio[None])[0])


def excerpts(folder: Path, utterances: Iterable[Utterance], settings: Audio, most: int | None = None) -> list[Excerpt]:
    """Utterances of the prepared corpus in a folder, each of at most so many frames."""
    log_mel, found = LogMel(settings), []
    for utterance in utterances:
        audio = read_samples(folder, utterance)
        if most is not None:
            audio = audio[: most * settings.hop_length]
        given = utterance.mel and read_mel(folder, utterance, log_mel)[:, :most]
        found.append(Excerpt.of(audio, settings) if given is None else Excerpt(audio, given))
    return found
