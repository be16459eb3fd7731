"""Spectrograms as the page shows them: finer than a log-mel, on the same mel scale, with their frequencies in Hz."""

import io

import librosa
import matplotlib
import numpy as np
from matplotlib.image import imsave

from wavedistill.recipe.sections import Audio

WIDTH, HEIGHT = 1600, 176
"""Pixels: twice those of a wide screen's page."""
WINDOW_S = 0.04
"""Which tells the harmonics of a low voice apart."""
RANGE_DB = 75
NEAREST = 0.13
"""Of two ticks, as a share of the height."""


def spectrogram_db(samples: np.ndarray, settings: Audio) -> np.ndarray:
    """Power (HEIGHT, about WIDTH) of samples (T,) in dB, in bands that are equally wide on the mel scale."""
    rate = settings.sample_rate
    power = librosa.feature.melspectrogram(
        y=samples,
        sr=rate,
        n_fft=2 ** int(np.ceil(np.log2(4 * WINDOW_S * rate))),  # padded, so that the lowest bands have bins
        win_length=round(WINDOW_S * rate),
        hop_length=max(1, len(samples) // WIDTH),
        n_mels=HEIGHT,
        fmin=settings.f_min,
        fmax=settings.f_max,
        norm=None,
    )
    decibels: np.ndarray = librosa.power_to_db(power, top_db=None)
    return decibels


def picture(decibels: np.ndarray, top_db: float) -> bytes:
    """A spectrogram as a WebP image whose brightest pixels are at so many dB."""
    content = io.BytesIO()
    colours = matplotlib.colormaps["magma"]
    shown = np.clip((decibels - top_db) / RANGE_DB + 1, 0, 1)
    pixels = (255 * colours(shown)[..., :3]).astype(np.uint8)
    imsave(content, pixels, origin="lower", format="webp", pil_kwargs={"quality": 70, "method": 4})
    return content.getvalue()


def ticks(settings: Audio) -> list[tuple[str, float]]:
    """Frequencies to mark, and how high up they are as a share of the height."""
    low, high = librosa.hz_to_mel([settings.f_min, settings.f_max])
    found: list[tuple[str, float]] = []
    for frequency in 125 * 2.0 ** np.arange(10):
        at = float((librosa.hz_to_mel(frequency) - low) / (high - low))
        if (found[-1][1] if found else 0) + NEAREST <= at <= 0.95:
            found.append((f"{frequency:g} Hz" if frequency < 1000 else f"{frequency / 1000:g} kHz", at))
    return found
