"""What a training draws: hop-aligned random segments of the prepared corpus, with their conditioning."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wavedistill.corpus.utterances import Manifest, Split, Utterance, read_f0, read_mel, read_samples
from wavedistill.speech.audio import PCM16_STEPS, LogMel, pad_frames
from wavedistill.speech.conditioning import Conditioning
from wavedistill.tools.errors import CorpusError
from wavedistill.tools.random import Streams, each


class Batch(NamedTuple):
    """A batch of segments, with the margins that conditioning and linear prediction look at.

    Attributes:
        audio: (B, F * hop) the segments.
        with_margins: (B, (F + 2 margin) * hop) the segments with the audio around them, silent outside the file.
        conditioning: the log-mel of `with_margins`, as it is in the whole file, or the one that was given, and the F0
            that was tracked in the recording.
    """

    audio: Tensor
    with_margins: Tensor
    conditioning: Conditioning


class Segments:
    """Hop-aligned segments of one split, and their log-mels: given ones, or those of the audio, computed on the fly.

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
        surroundings, inside, f0, given = [], [], [], {}
        for item, (utterance, first) in enumerate(places):
            start = first * self.hop_length - around
            surroundings.append(read_samples(self.folder, utterance, start, length + 2 * around))
            frames = torch.arange(first - self.margin, first + self.frames + self.margin)
            inside.append((frames >= 0) & (frames < utterance.frames))
            f0.append(read_f0(self.folder, utterance)[frames.clamp(0, utterance.frames - 1)] * inside[-1])
            if utterance.mel:
                mel = pad_frames(read_mel(self.folder, utterance, self.log_mel), self.margin)
                given[item] = mel[:, first : first + len(frames)]
        wide = torch.stack(surroundings)
        if torch.device(self.device).type == "cuda":  # from pinned memory, a copy does not wait
            wide = wide.pin_memory()
        wide = wide.to(self.device, non_blocking=True)
        mel = self.log_mel.of_segment(wide, torch.stack(inside).to(self.device))
        for item, own in given.items():
            mel[item] = own
        return Batch(
            audio=wide[:, around : around + length],
            with_margins=wide[:, self.overlap : self.overlap + length + 2 * margin],
            conditioning=Conditioning(mel, self.margin, torch.stack(f0).to(self.device)),
        )


def dequantise(audio: Tensor, streams: Streams) -> Tensor:
    """Audio (B, T) and uniform noise of one 16-bit step, centred on zero, so that a continuous density fits it."""
    noise = each(streams, lambda stream: torch.rand(audio.shape[1:], generator=stream)) - 0.5
    return audio + noise.to(audio.device) / PCM16_STEPS
