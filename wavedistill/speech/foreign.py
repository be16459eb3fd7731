"""Whether what a model is to speak from looks like what it was trained on, and if not, what it looks like."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from librosa import mel_frequencies
from torch import Tensor

from wavedistill.recipe.sections import Audio
from wavedistill.speech.audio import LOG_MEL_FLOOR, MEL_FLOOR
from wavedistill.speech.heard import Heard, change, sounding
from wavedistill.speech.mels import NATS_A_DECIBEL, MelFormat
from wavedistill.speech.pitch import track_f0

USUAL = MelFormat()
OFFSETS, SHAPES, SPREADS = (-4.0, 2.0), (0.0, 1.5), (-0.8, 0.6)
"""What the log-mel of another speaker, or of another level, stays well within: see `Likeness`."""
FEWEST_FRAMES = 40
UPPER_FREQUENCIES = (4000.0, 5500.0, 7000.0, 8000.0, 9500.0, 11025.0, 12000.0)
"""Hz; of mel bands as others have them."""
SAME_VOICE, BETTER_BY = 0.38, 0.15
"""RMS over bands, nats: what a mean of the training's own voice stays below, and by how much other bands must do so
better than the model's. Another voice is further off wherever its bands lie."""
PACES = (0.7, 1.42)
"""How much a log-mel may change from frame to frame, relative to the training."""
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


class Finding(NamedTuple):
    """What a log-mel that is not like those of the training looks like.

    Attributes:
        said: in words, with what to do.
        other: whether its numbers mean something else: what would be drawn from it is noise.
        kind: what it looks like, without what to do; empty where that is nothing known.
    """

    said: str
    other: bool
    kind: str = ""


def examine(mel: Tensor, heard: Heard, units: Audio, given: MelFormat = USUAL) -> Finding | None:
    """What a log-mel (n_mels, F) looks like that no voice explains; None for a usual one.

    Other voices and levels are usual, and so are log10 of powers, which differ by an eighth. Other mel bands are told
    where the voice is that of the training. Less than half a second, in frames of 12.5 ms, is too little to tell.
    """
    restored, natural = given.restored(mel), given.natural(mel)
    if natural.max() <= LOG_MEL_FLOOR:
        return None
    found = likeness(natural, heard)
    if found and found.usual:
        said = _other_bands(natural, heard, units) or _other_pace(natural, heard, units)
        return Finding(said, False) if said else None
    if found and mel.mean(1).abs().mean() < 0.3 and (mel.std(1) - 1).abs().mean() < 0.3:
        return Finding(
            "looks like a log-mel normalised to mean 0 and deviation 1: give --mel-stats with its mean and scale",
            True,
            "a log-mel normalised to mean 0 and deviation 1",
        )
    kinds = _kinds(units)
    fits = {kind: likeness(natural_of(restored), heard) for kind, (_, natural_of) in kinds.items()}
    usual = {kind: fit.distance for kind, fit in fits.items() if fit and fit.usual}
    if usual:
        kind = min(usual, key=lambda name: usual[name])
        return Finding(f"looks like {kind}: {kinds[kind][0]}", True, kind)
    return found and Finding(
        f"unlike the log-mels of the training: {found.offset:+.1f} nats in level, {found.shape:.1f} in shape, "
        f"{math.exp(found.spread):.2f} times as lively; was it made with what `wavedistill info` shows?",
        False,
    )


def _other_bands(natural: Tensor, heard: Heard, units: Audio) -> str | None:
    """A word about a log-mel whose mean is that of the training, if its bands lay elsewhere."""
    mean, envelope = sounding(natural).mean(1).numpy(), np.array(heard.mel_mean)
    here = _edges(units, units.f_max)[1 : units.n_mels + 1]
    shapes: dict[tuple[bool, float], float] = {}
    for htk, f_max in itertools.product((False, True), sorted({units.f_max, *UPPER_FREQUENCIES})):
        there = _edges(units, f_max, htk=htk)[1 : units.n_mels + 1]
        known = there <= here[-1]
        shapes[htk, f_max] = float((mean - np.interp(there, here, envelope))[known].std())
    own = shapes[False, units.f_max]
    (htk, f_max), shape = min(shapes.items(), key=lambda item: item[1])
    if shape > SAME_VOICE or own - shape < BETTER_BY:
        return None
    scale = "HTK's mel scale" if htk else "Slaney's mel scale"
    return (
        f"looks like mel bands up to about {f_max:.0f} Hz on {scale}, and the model's go up to {units.f_max:.0f} Hz on "
        "Slaney's: compute it with the settings that `wavedistill info` shows"
    )


def _other_pace(natural: Tensor, heard: Heard, units: Audio) -> str | None:
    """A word about a log-mel that changes faster or more slowly than speech does at the model's hop."""
    if heard.mel_change is None:
        return None
    ratio, hop_ms = change([natural]) / heard.mel_change, 1000 * units.hop_length / units.sample_rate
    if PACES[0] <= ratio <= PACES[1]:
        return None
    return (
        f"changes {ratio:.1f} times as much from frame to frame as in the training, as if its hop were about "
        f"{ratio * hop_ms:.0f} ms; the model's is {hop_ms:.1f} ms, {units.hop_length} samples at {units.sample_rate} Hz"
    )


def _kinds(units: Audio) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Kinds of log-mel: what to do with one, and the same as natural logarithm of amplitudes.

    A filter of area 1 gives the mean over its band of magnitudes or powers, divided by the Hz from bin to bin; one of
    height 1 (torchaudio's default, on powers) gives its area times as much.
    """
    edges = torch.from_numpy(_edges(units, units.f_max)).float()
    log_areas = ((edges[2:] - edges[: units.n_mels]) / 2).log()[:, None]
    spacing = math.log(units.sample_rate / units.n_fft) / 2
    decibels = MelFormat("db").natural
    powers = f"--mel-ref-db {-spacing / NATS_A_DECIBEL:.1f}"
    scaled = "give the filters norm='slaney', as librosa does by default"
    magnitudes = "compute it of magnitudes (power=1) with filters of norm='slaney', and take the natural logarithm"
    return {
        "natural logarithms of amplitudes": ("leave out --mel-format", lambda m: m),
        "log10 of amplitudes": ("give --mel-format log10", MelFormat("log10").natural),
        "decibels": (f"give --mel-format db, and {powers} if they are of powers", decibels),
        "decibels normalised to [0, 1]": ("give --mel-format unit", MelFormat("unit").natural),
        "decibels normalised to [-4, 4]": ("give --mel-format symmetric", MelFormat("symmetric").natural),
        "natural logarithms of powers": (
            f"compute it of magnitudes (power=1), or halve it and take off {spacing:.2f}",
            lambda m: m / 2 - spacing,
        ),
        "decibels of powers": (
            f"give --mel-format db {powers}, or without this if they are of amplitudes",
            lambda m: decibels(m) - spacing,
        ),
        "amplitudes without a logarithm": (
            f"take its natural logarithm, with a floor of {MEL_FLOOR}",
            lambda m: m.clamp_min(MEL_FLOOR).log(),
        ),
        "powers without a logarithm": (
            f"compute it of magnitudes (power=1), and take the natural logarithm, with a floor of {MEL_FLOOR}",
            lambda m: m.clamp_min(MEL_FLOOR**2).log() / 2 - spacing,
        ),
        "amplitudes of mel filters without area normalisation": (scaled, lambda m: m - log_areas),
        "powers of mel filters without area normalisation": (magnitudes, lambda m: (m - log_areas) / 2 - spacing),
        "decibels of mel filters without area normalisation": (
            magnitudes,
            lambda m: decibels(m) - log_areas / 2 - spacing,
        ),
    }


def _edges(units: Audio, f_max: float, *, htk: bool = False) -> np.ndarray:
    """Where mel bands (n_mels + 2,) begin, have their middles and end, in Hz."""
    edges: np.ndarray = mel_frequencies(units.n_mels + 2, fmin=units.f_min, fmax=f_max, htk=htk)
    return edges


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


def likeness(mel: Tensor, heard: Heard) -> Likeness | None:
    """How a log-mel (n_mels, F) differs from what a model heard; None of too few frames."""
    if sounding(mel).shape[1] < FEWEST_FRAMES:
        return None
    mean, deviation, mel = torch.tensor(heard.mel_mean), torch.tensor(heard.mel_std), sounding(mel)
    difference = mel.mean(1) - mean
    spread = mel.std(1, correction=0).mean() / deviation.mean()
    return Likeness(float(difference.mean()), float(difference.std(correction=0)), float(spread.clamp_min(1e-3).log()))
