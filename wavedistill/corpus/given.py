"""Log-mels that lie beside recordings, for instance of an acoustic model: in place of the recordings' own."""

import math
from pathlib import Path

import torch
from torch import Tensor

from wavedistill.recipe.sections import Audio
from wavedistill.speech import mels
from wavedistill.speech.audio import LOG_MEL_FLOOR, LogMel, pad_to_hops
from wavedistill.speech.foreign import examine, likeness
from wavedistill.speech.heard import Heard
from wavedistill.tools.errors import AudioError, CorpusError
from wavedistill.tools.files import shown

FRAMES_OFF = 2
"""By which a log-mel may be longer or shorter than its recording, as programs pad."""
OFFSET = 1.0
"""Nats by which a log-mel may be louder or softer than its recording's own: a factor of 2.7."""
COMPARED_SECONDS = 60
"""Of a recording, in which its own log-mel is computed, to see whether the numbers mean the same."""
NEAR_FLOOR = 0.01
"""Nats above it that are silence all the same, in half precision for instance."""


def find(folder: Path, recording: Path) -> Path | None:
    """The file below a folder of log-mels that is named as a recording below its own folder; None if there is none.

    Raises:
        CorpusError: if there is no such folder.
    """
    if not folder.is_dir():
        raise CorpusError(f"corpus.mels = {shown(folder)!r}: no such folder; give that of the recordings' log-mels")
    places = (folder / recording.with_suffix(suffix) for suffix in sorted(mels.SUFFIXES))
    return next((place for place in places if place.is_file()), None)


def read(folder: Path, recording: Path, samples: Tensor, settings: Audio) -> Tensor:
    """The log-mel (n_mels, F) of a recording, F hops but for two of its length.

    Args:
        folder: of log-mels.
        recording: its path below the folder of recordings.
        samples: (T,) of the recording.
        settings: the units that it is to be in.

    Raises:
        AudioError: if there is none, it is of other bands or another length, or its numbers mean something else.
    """
    path = find(folder, recording)
    if path is None:
        raise AudioError(
            f"{shown(recording)}: has no log-mel: {shown(folder / recording.with_suffix('.npy'))} is not there (nor "
            ".npz, .pt or .pth); make it, or remove the recording"
        )
    mel, name, hops = mels.read(path), shown(path), len(samples) / settings.hop_length
    if settings.n_mels not in mel.shape:
        raise AudioError(
            f"{name}: has shape {tuple(mel.shape)}, and audio.n_mels = {settings.n_mels}: expected "
            f"({settings.n_mels}, frames)"
        )
    mel, _ = mels.upright(mel, settings.n_mels)
    if not math.floor(hops) - FRAMES_OFF <= mel.shape[1] <= math.ceil(hops) + FRAMES_OFF:
        raise AudioError(
            f"{name}: has {mel.shape[1]} frames, and its recording is {hops:.1f} long, of audio.hop_length = "
            f"{settings.hop_length} at {settings.sample_rate} Hz: make it of the whole recording, with these"
        )
    if fault := _fault(mel, samples, settings):
        raise AudioError(f"{name}: {fault}")
    return mel


def _fault(mel: Tensor, samples: Tensor, settings: Audio) -> str | None:
    """What is wrong with the numbers of a log-mel (n_mels, F), beside the recording's (T,) own."""
    start = pad_to_hops(samples[: COMPARED_SECONDS * settings.sample_rate], settings.hop_length)
    own = LogMel(settings).of_file(start[None])
    heard, mel = Heard.of(own, torch.zeros(())), mel[:, : own.shape[2]]
    found = examine(mel, heard, settings)
    if found and found.other:
        return f"looks like {found.kind}; expected the natural logarithm of amplitudes, as HiFi-GAN has it: convert it"
    alike = likeness(mel, heard)
    if alike and abs(alike.offset) > OFFSET:
        decibels, how = abs(alike.offset) / mels.NATS_A_DECIBEL, "louder" if alike.offset > 0 else "softer"
        return f"is {decibels:.0f} dB {how} than its recording: give the recordings at the level that it was made of"
    return None


def louder(mel: Tensor, gain: float) -> Tensor:
    """The log-mel (n_mels, F) of a sound that is louder by a factor; silence stays silence."""
    shifted = (mel + math.log(gain)).clamp_min(LOG_MEL_FLOOR)
    return shifted.where(mel > LOG_MEL_FLOOR + NEAR_FLOOR, LOG_MEL_FLOOR)
