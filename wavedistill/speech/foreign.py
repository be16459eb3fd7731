"""Whether what a model is to speak from looks like what it was trained on, and if not, what it looks like."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from wavedistill.recipe.sections import Audio
from wavedistill.speech.audio import LOG_MEL_FLOOR, MEL_FLOOR
from wavedistill.speech.heard import Heard, sounding
from wavedistill.speech.pitch import track_f0
from wavedistill.tools.errors import AudioError

NATS_A_DECIBEL = math.log(10) / 20
OFFSETS, SHAPES, SPREADS = (-4.0, 2.0), (0.0, 1.5), (-0.8, 0.6)
"""What the log-mel of another speaker, or of another level, stays well within: see `Likeness`."""
FEWEST_FRAMES = 40
F0_RANGE = (50.0, 800.0)
"""Hz; of any voice."""
F0_MARGIN = 1.2
"""Factor by which a voice may leave the range that nine of ten frames of the training lie in."""


class Likeness(NamedTuple):
    """How far a log-mel is from those that a model was trained on.

    Attributes:
        offset: by how many nats it is louder, over all bands.
        shape: RMS over bands of what is left, nats: another envelope.
        spread: log of the ratio of its deviation over time to theirs.
    """

    offset: float
    shape: float
    spread: float

    @property
    def usual(self) -> bool:
        """Whether a voice may differ so much."""
        return all(low <= value <= high for value, (low, high) in zip(self, (OFFSETS, SHAPES, SPREADS), strict=True))

    @property
    def distance(self) -> float:
        """One number for all three."""
        return abs(self.offset) + self.shape + 3 * abs(self.spread)


KINDS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "log10 of amplitudes": ("multiply it by ln 10 = 2.3026", lambda m: m * math.log(10)),
    "natural logarithm of powers": ("halve it", lambda m: m / 2),
    "decibels": ("multiply it by ln 10 / 20 = 0.11513", lambda m: m * NATS_A_DECIBEL),
    "amplitudes without a logarithm": (
        "take its logarithm, with a floor of 1e-5",
        lambda m: m.clamp_min(MEL_FLOOR).log(),
    ),
    "decibels normalised to [0, 1]": (
        "undo it: (100 m - 80) x 0.11513, if 20 dB were the reference and -100 dB the floor",
        lambda m: (100 * m - 80) * NATS_A_DECIBEL,
    ),
    "decibels normalised to [-4, 4]": (
        "undo it: (12.5 m - 30) x 0.11513, if 20 dB were the reference and -100 dB the floor",
        lambda m: (12.5 * m - 30) * NATS_A_DECIBEL,
    ),
}
"""Other kinds of log-mel: what to do with one, and the same as natural logarithm of amplitudes."""


def examine(path: Path, mel: Tensor, heard: Heard) -> str | None:
    """A word about a log-mel (n_mels, F) from a file that no voice explains; None for a usual one.

    Other voices, levels, rates and upper frequencies are usual, and so are log10 of powers, which differ by an eighth.
    Less than half a second, in frames of 12.5 ms, is too little to tell.

    Raises:
        AudioError: if it looks like another kind of log-mel: what would be drawn from it is noise.
    """
    silent = bool(mel.max() <= LOG_MEL_FLOOR)
    if silent or sounding(mel).shape[1] < FEWEST_FRAMES or likeness(mel, heard).usual:
        return None
    if mel.mean(1).abs().mean() < 0.3 and (mel.std(1) - 1).abs().mean() < 0.3:
        kind, advice = "a log-mel normalised to mean 0 and deviation 1", "undo that with its mean and deviation"
    else:
        fits = {kind: likeness(natural(mel), heard) for kind, (_, natural) in KINDS.items()}
        usual = [kind for kind, fit in fits.items() if fit.usual]
        if not usual:
            found = likeness(mel, heard)
            return (
                f"unlike the log-mels of the training: {found.offset:+.1f} nats in level, {found.shape:.1f} in shape, "
                f"{math.exp(found.spread):.2f} times as lively; was it made with the settings that the recipe has?"
            )
        kind = min(usual, key=lambda name: fits[name].distance)
        advice = KINDS[kind][0]
    raise AudioError(f"{path}: looks like {kind}, and natural logarithms of amplitudes are wanted: {advice}")


def examine_f0(audio: Tensor, settings: Audio, heard: Heard) -> str | None:
    """A word about speech (T,) that is higher or lower than what a model was trained on; None for other speech."""
    wide = settings.model_copy(update={"f0_min": F0_RANGE[0], "f0_max": min(F0_RANGE[1], settings.sample_rate / 4)})
    f0 = track_f0(audio, wide)
    voiced = f0[f0 > 0]
    if heard.f0_low is None or heard.f0_high is None or not len(voiced):
        return None
    median = float(voiced.median())
    if heard.f0_low / F0_MARGIN <= median <= heard.f0_high * F0_MARGIN:
        return None
    return (
        f"its voice is at about {median:.0f} Hz, and the model was trained on {heard.f0_low:.0f} to "
        f"{heard.f0_high:.0f} Hz: it may come out an octave off"
    )


def likeness(mel: Tensor, heard: Heard) -> Likeness:
    """How a log-mel (n_mels, F) differs from what a model heard."""
    mean, deviation, mel = torch.tensor(heard.mel_mean), torch.tensor(heard.mel_std), sounding(mel)
    difference = mel.mean(1) - mean
    spread = mel.std(1, correction=0).mean() / deviation.mean()
    return Likeness(float(difference.mean()), float(difference.std(correction=0)), float(spread.clamp_min(1e-3).log()))
