"""Log-mels of other programs: the files they come in, and what their numbers mean."""

import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wavedistill.tools.errors import AudioError, UserError
from wavedistill.tools.files import shown

SUFFIXES = frozenset([".npy", ".npz", ".pt", ".pth"])
"""Of files of log-mels."""
KEY = "mel"
"""Of the log-mel among several arrays of a file."""
NATS_A_DECIBEL = math.log(10) / 20
MIN_LEVEL_DB = -100
"""That 0 stands for, or -4, where decibels are normalised (Tacotron's `min_level_db`)."""
NATURAL: dict[str, tuple[float, Callable[[Tensor, float], Tensor]]] = {
    "ln": (0.0, lambda m, ref: m),
    "log10": (0.0, lambda m, ref: m * math.log(10)),
    "db": (0.0, lambda m, ref: (m + ref) * NATS_A_DECIBEL),
    "unit": (20.0, lambda m, ref: (-MIN_LEVEL_DB * (m - 1) + ref) * NATS_A_DECIBEL),
    "symmetric": (20.0, lambda m, ref: (-MIN_LEVEL_DB * ((m + 4) / 8 - 1) + ref) * NATS_A_DECIBEL),
}
"""Kinds of log-mels: their usual reference in dB, and what gives the natural logarithm of amplitudes."""


class MelFormat(NamedTuple):
    r"""What the numbers of a log-mel mean, where S are mel-filtered magnitudes.

    ==========  ========================================================  ===================================
    kind        the numbers                                               for instance of
    ==========  ========================================================  ===================================
    ln          :math:`\ln S`                                             HiFi-GAN, Tacotron 2 (NVIDIA's)
    log10       :math:`\log_{10} S`                                       ParallelWaveGAN, ESPnet
    db          :math:`d = 20 \log_{10} S - r`                            librosa's `amplitude_to_db`, r = 0
    unit        :math:`(d + 100) / 100`, clipped to [0, 1], r = 20        Tacotron (keithito's), WaveRNN
    symmetric   :math:`8 (d + 100) / 100 - 4`, clipped to [-4, 4]         Tacotron 2 (Rayhane's)
    ==========  ========================================================  ===================================

    Attributes:
        kind: one of these.
        ref_db: r; None for the usual one.
        mean, scale: (n_mels,) by which the numbers were normalised after that, mean taken off and divided by scale.
    """

    kind: str = "ln"
    ref_db: float | None = None
    mean: Tensor | None = None
    scale: Tensor | None = None

    def restored(self, mel: Tensor) -> Tensor:
        """A log-mel (n_mels, F) as it was before it was normalised.

        Raises:
            UserError: if the statistics are of another number of bands.
        """
        if self.mean is None or self.scale is None:
            return mel
        if len(self.mean) != len(mel):
            raise UserError(f"statistics are of {len(self.mean)} bands, and the log-mel has {len(mel)}")
        return mel * self.scale[:, None] + self.mean[:, None]

    def natural(self, mel: Tensor) -> Tensor:
        """A log-mel (n_mels, F) of this format as natural logarithm of amplitudes, without a floor; errors as above."""
        usual, natural = NATURAL[self.kind]
        return natural(self.restored(mel), usual if self.ref_db is None else self.ref_db)


def mel_format(kind: str, ref_db: float | None = None, statistics: Path | None = None) -> MelFormat:
    """The format of log-mels of a kind, normalised by the statistics in a file.

    Raises:
        UserError: if there is no such kind, or no statistics are in the file.
    """
    if kind not in NATURAL:
        raise UserError(f"{kind}: no format of log-mels; there are {', '.join(NATURAL)}")
    mean, scale = (None, None) if statistics is None else read_statistics(statistics)
    return MelFormat(kind, ref_db, mean, scale)


def read(path: Path) -> Tensor:
    """The one array (n_mels, F), or (F, n_mels), in a file of NumPy's or torch's, in float32, without an axis of one.

    Of several arrays in a file, the one that is called mel. Nothing in a file is run.

    Raises:
        AudioError: if it does not hold one such array of finite floating-point numbers.
    """
    name = shown(path)
    array = _array(_loaded(path), name)
    if array.ndim == 3 and len(array) == 1:
        array = array[0]
    if array.ndim != 2 or not array.size:
        raise AudioError(f"{name}: has shape {array.shape}; expected a log-mel of shape (bands, frames)")
    if not np.issubdtype(array.dtype, np.floating):
        raise AudioError(f"{name}: holds values of type {array.dtype}; a log-mel is of floating-point numbers")
    if not np.isfinite(array).all():
        raise AudioError(f"{name}: holds values that are not finite; is there a logarithm of 0 without a floor?")
    return torch.from_numpy(array.astype(np.float32))


def upright(mel: Tensor, n_mels: int) -> tuple[Tensor, str | None]:
    """A log-mel as (n_mels, F), turned, with a word on it, where it fits only so.

    Raises:
        AudioError: if neither axis has as many bands.
    """
    if mel.ndim != 2 or n_mels not in mel.shape:
        raise AudioError(
            f"has shape {tuple(mel.shape)}; the model was trained with {n_mels} bands, and expects ({n_mels}, frames): "
            "compute it with the settings that `wavedistill info` shows"
        )
    if len(mel) == n_mels:
        return mel, None
    return mel.T, f"has shape {tuple(mel.shape)}: taken as (frames, bands)"


def read_statistics(path: Path) -> tuple[Tensor, Tensor]:
    """Mean and scale (n_mels,) that log-mels were normalised by.

    From `.npz` with `mean` and `scale` (or `std`), or with ESPnet's `count`, `sum` and `sum_square`; or from `.npy` of
    shape (2, n_mels), as ParallelWaveGAN writes.

    Raises:
        AudioError: if there are none in the file.
    """
    name, loaded = shown(path), _loaded(path)
    if isinstance(loaded, Mapping):
        found = {key: np.asarray(loaded[key], np.float64).squeeze() for key in loaded}
        scale = found.get("scale", found.get("std"))
        if "mean" in found and scale is not None:
            return _tensors(found["mean"], scale)
        if {"count", "sum", "sum_square"} <= found.keys():
            mean = found["sum"] / found["count"]
            return _tensors(mean, np.sqrt(found["sum_square"] / found["count"] - mean**2))
        raise AudioError(f"{name}: holds {', '.join(found)}; expected mean and scale, or count, sum and sum_square")
    if not isinstance(loaded, np.ndarray) or loaded.ndim != 2 or len(loaded) != 2:
        raise AudioError(f"{name}: has shape {getattr(loaded, 'shape', '?')}; expected (2, bands): mean and scale")
    return _tensors(*loaded)


def _tensors(*arrays: np.ndarray) -> tuple[Tensor, Tensor]:
    mean, scale = (torch.from_numpy(array.astype(np.float32)) for array in arrays)
    return mean, scale


def _loaded(path: Path) -> Any:
    """What a file of NumPy's or torch's holds: arrays, tensors, or several by name."""
    name, kind = shown(path), "torch" if path.suffix.lower() in (".pt", ".pth") else "NumPy"
    try:
        if kind == "torch":
            return torch.load(path, map_location="cpu", weights_only=True)
        loaded = np.load(path, allow_pickle=False)
        return {key: loaded[key] for key in loaded.files} if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
    except FileNotFoundError as error:
        raise AudioError(f"{name}: no such file") from error
    except OSError as error:
        raise AudioError(f"{name}: cannot be read: {(error.strerror or str(error)).lower()}") from error
    except pickle.UnpicklingError as error:
        raise AudioError(
            f"{name}: not a file of tensors alone, as torch.save(mel, 'm.pt') writes it; what else may be in it could "
            "run code, and is not read"
        ) from error
    except (ValueError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split()).rstrip(".").rsplit(": ", 1)[-1]
        raise AudioError(f"{name}: not a {kind} array file: {reason}") from error


def _array(loaded: Any, name: str) -> np.ndarray:
    """The one array in what a file holds."""
    if isinstance(loaded, Mapping):
        key = KEY if KEY in loaded else next(iter(loaded)) if len(loaded) == 1 else None
        if key is None:
            raise AudioError(f"{name}: holds {', '.join(map(str, loaded))}; expected one array, or one called {KEY}")
        loaded = loaded[key]
    if isinstance(loaded, Tensor):
        loaded = loaded.detach().to(torch.float64 if loaded.is_floating_point() else loaded.dtype).numpy()
    if not isinstance(loaded, np.ndarray):
        raise AudioError(f"{name}: holds {type(loaded).__name__}; expected an array of numbers")
    return loaded
