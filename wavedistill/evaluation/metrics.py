"""Objective scores of synthesised speech and of densities."""

import math
import warnings
from importlib.metadata import version
from importlib.util import find_spec

import librosa
import numpy as np
import pyworld
import torch
import torchaudio
from torch import Tensor

from wavedistill.recipe.sections import Audio
from wavedistill.speech.audio import LogMel, rms_db
from wavedistill.speech.pitch import track_f0

PESQ_SAMPLE_RATE = 16000


def bits_per_sample(nll_nats: float) -> float:
    """Bits that an ideal coder spends on a 16-bit sample, given nats per sample of audio in [-1, 1).

    Of a density given the log-mel, these are bits beside the log-mel, which the receiver has to have: no figure to hold
    against a coder of the waveform alone.

    A step of 16-bit audio is 2 ** -15 wide, so its probability is the density times that.
    """
    return 15 + nll_nats / math.log(2)


class Scorer:
    """Scores speech against one reference (T,) in [-1, 1].

    F0 and voicing of both are those of pYIN, which is not the tracker that conditions the models; aperiodicity is
    measured on the reference's F0 by that one, hop by hop.
    """

    def __init__(self, reference: Tensor, settings: Audio) -> None:
        self.reference, self.settings = reference, settings
        self.f0, self.voicing = _pyin(reference, settings)
        self.tracked = track_f0(reference, settings)

    def __call__(self, synthesised: Tensor) -> dict[str, float | None]:
        """Scores of synthesised speech (T,).

        Returns:
            `pesq_wb`, mean opinion score of wide-band PESQ, about 1 to 4.6; None where its package is missing or finds
            no speech. `stoi`, intelligibility, 0 to 1; None for less than about 0.4 s of sound. `mcd_db`, mel-cepstral
            distortion. `lsd_db`, log-spectral distance. `f0_rmse_cents`, where both are voiced. `vuv_f1`, F1 of being
            voiced. `periodicity_rmse`, of the probability of being voiced. `periodicity`, how far the voiced parts of
            the reference are periodic in the synthesis: a whisper is near 0, the reference itself near 1.
            `level_difference_db` and `tilt_difference_db`, RMS level and spectral tilt of the synthesis less those of
            the reference. `aperiodicity_db` and `aperiodicity_bias_db`, as `aperiodicity_difference`.
        """
        reference, rate = self.reference, self.settings.sample_rate
        f0, voicing = _pyin(synthesised, self.settings)
        return {
            **likeness(reference, synthesised, self.settings),
            "lsd_db": log_spectral_distance_db(synthesised, reference),
            **f0_agreement(self.f0, f0),
            "periodicity_rmse": float((voicing - self.voicing).square().mean().sqrt()),
            "periodicity": periodicity(reference, synthesised, self.settings),
            "level_difference_db": rms_db(synthesised) - rms_db(reference),
            "tilt_difference_db": tilt_db(synthesised, rate) - tilt_db(reference, rate),
            **aperiodicity_difference(reference, synthesised, self.tracked, self.settings),
        }


def likeness(reference: Tensor, synthesised: Tensor, settings: Audio) -> dict[str, float | None]:
    """Those scores of `Scorer` by which systems are compared, of two sounds (T,): PESQ, STOI and MCD."""
    return {
        "pesq_wb": _pesq_wb(reference, synthesised, settings.sample_rate),
        "stoi": _stoi(reference, synthesised, settings.sample_rate),
        "mcd_db": mel_cepstral_distortion_db(reference, synthesised, settings),
    }


def f0_agreement(reference: Tensor, other: Tensor) -> dict[str, float | None]:
    """F1 of being voiced, and RMS difference in cents where both are, of two F0 tracks (F,) in Hz, 0 where unvoiced.

    Both are None where there is nothing to compare.
    """
    voiced, claimed = reference > 0, other > 0
    both = voiced & claimed
    cents = 1200 * (other[both] / reference[both]).log2()
    total = int(voiced.sum() + claimed.sum())
    return {
        "f0_rmse_cents": float(cents.square().mean().sqrt()) if len(cents) else None,
        "vuv_f1": 2 * int(both.sum()) / total if total else None,
    }


def tilt_db(audio: Tensor, sample_rate: int) -> float:
    """Power of audio (T,) above 2 kHz relative to that below, in dB; at least -100."""
    power = torch.fft.rfft(audio.double()).abs().square()
    split = round(2000 / sample_rate * len(audio))
    ratio = power[split:].sum() / power[1:split].sum().clamp_min(1e-20)
    return float(10 * ratio.clamp_min(1e-10).log10())


def mel_cepstral_distortion_db(reference: Tensor, synthesised: Tensor, settings: Audio) -> float:
    r"""Mean distance of mel-cepstra of two sounds (T,) in dB, over the frames of speech in the reference.

    .. math:: \frac{10}{\ln 10} \sqrt{2 \sum_{m=1}^{24} (c_m - c'_m)^2}, \qquad
              c_m = \frac{2}{N} \sum_n \log M_n \cos\frac{\pi m (n + 1/2)}{N}

    (Kubichek 1993), with the N mel amplitudes M of `LogMel`. It hears the envelope, neither the level nor the pitch.
    Frames more than 40 dB below the loudest are not speech.
    """
    log_mel = LogMel(settings)
    bands = settings.n_mels
    cosines = torchaudio.functional.create_dct(min(25, bands), bands, norm=None)[:, 1:] / bands
    mel_r, mel_s = (log_mel.of_file(audio[None].float())[0].T for audio in (reference, synthesised))
    loudness = mel_r.exp().square().sum(1)
    distance = ((mel_r - mel_s) @ cosines).square().sum(1).mul(2).sqrt() * (10 / math.log(10))
    return float(distance[loudness > loudness.max() * 1e-4].mean())


def pesq_available() -> bool:
    """Whether the package that computes PESQ is installed; it is compiled from source, so it is optional."""
    return find_spec("pesq") is not None


def implementations() -> dict[str, str | None]:
    """What computes the scores, by name and version; None for what is not installed.

    The package pesq wraps the reference code of ITU-T P.862.2, whose Corrigendum 2 of 2018 scores higher: compare with
    figures of the same code only.
    """
    pesq = f"pesq {version('pesq')}: ITU-T P.862.2, without Corrigendum 2" if pesq_available() else None
    return {"pesq_wb": pesq, **{name: f"{name} {version(name)}" for name in ("pystoi", "librosa")}}


def log_spectral_distance_db(synthesised: Tensor, reference: Tensor) -> float:
    r"""Mean over frames of the RMS over frequency of the difference of log power spectra (T,), in dB.

    Both are floored 80 dB below the peak of the reference, so that the distance of two silences counts nothing.
    """

    def spectrum(audio: Tensor) -> Tensor:
        return torch.stft(audio.double(), 1024, 256, window=torch.hann_window(1024).double(), return_complex=True).abs()

    power_s, power_r = spectrum(synthesised).square(), spectrum(reference).square()
    floor = max(float(power_r.max()), 1e-20) * 1e-8
    difference = 10 * (power_s.clamp_min(floor).log10() - power_r.clamp_min(floor).log10())
    return float(difference.square().mean(0).sqrt().mean())


def periodicity(reference: Tensor, synthesised: Tensor, settings: Audio) -> float | None:
    """Mean normalised autocorrelation of synthesised speech (T,) at the reference's pitch period, where that is voiced.

    Frames of 40 ms are voiced where the reference's own autocorrelation peaks above 0.7 in the range of F0. The
    synthesis may be off by 5 % of the period. None where no frame is voiced.
    """
    shortest, longest = (round(settings.sample_rate / f0) for f0 in (settings.f0_max, settings.f0_min))
    lags = longest + max(1, longest // 20)
    correlation_r, correlation_s = (
        _autocorrelation(audio, settings.sample_rate, lags) for audio in (reference, synthesised)
    )
    peak, lag = correlation_r[:, shortest : longest + 1].max(1)
    voiced = peak > 0.7
    values = []
    for row, period in zip(correlation_s[voiced], (lag[voiced] + shortest).tolist(), strict=True):
        slack = max(1, period // 20)
        values.append(float(row[period - slack : period + slack + 1].max()))
    return float(np.mean(values)) if values else None


def aperiodicity_difference(
    reference: Tensor, synthesised: Tensor, f0: Tensor, settings: Audio
) -> dict[str, float | None]:
    """RMS and mean of the aperiodicity of synthesised speech less that of the reference, in dB, where that is voiced.

    Too much noise between the harmonics has a positive mean, a buzz a negative one. Over the voiced frames of the
    reference's F0 (F,), a hop each, and all frequencies alike: WORLD's D4C (Morise 2016), which measures every 3 kHz
    and interpolates, from harmonics alone at 0 Hz to noise alone at half the sample rate. None where nothing is voiced.
    """
    if not bool((f0 > 0).any()):
        return {"aperiodicity_db": None, "aperiodicity_bias_db": None}
    difference = _aperiodicity(synthesised, f0, settings) - _aperiodicity(reference, f0, settings)
    return {
        "aperiodicity_db": float(np.sqrt(np.square(difference).mean())),
        "aperiodicity_bias_db": float(difference.mean()),
    }


def _aperiodicity(audio: Tensor, f0: Tensor, settings: Audio) -> np.ndarray:
    """Amplitude of what is not periodic over that of all, in dB (voiced frames, bins), of audio (T,), given F0 (F,)."""
    times = np.arange(len(f0)) * settings.hop_length / settings.sample_rate
    samples, voiced = audio.double().numpy()[settings.hop_length // 2 :], (f0 > 0).numpy()
    # A threshold would call frames aperiodic that are not voiced in this audio: they are measured like all others.
    share = pyworld.d4c(samples, f0.double().numpy()[voiced], times[voiced], settings.sample_rate, threshold=0)
    decibels: np.ndarray = 20 * np.log10(share)
    return decibels


def _pyin(audio: Tensor, settings: Audio) -> tuple[Tensor, Tensor]:
    """F0 in Hz, 0 where unvoiced, and the probability of being voiced, every 10 ms of audio (T,)."""
    f0, voiced, probability = librosa.pyin(
        audio.numpy(),
        fmin=settings.f0_min,
        fmax=settings.f0_max,
        sr=settings.sample_rate,
        frame_length=settings.sample_rate // 16,
        hop_length=settings.sample_rate // 100,
    )
    return torch.from_numpy(np.where(voiced, f0, 0)), torch.from_numpy(probability)


def _stoi(reference: Tensor, synthesised: Tensor, sample_rate: int) -> float | None:
    from pystoi import stoi  # here, because it takes most of a second, and every command would wait for it

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Not enough STFT frames", RuntimeWarning)
        try:
            return float(stoi(reference.numpy(), synthesised.numpy(), sample_rate))
        except RuntimeWarning:  # too little sound, for which it gives 1e-5 even to a perfect copy
            return None


def _pesq_wb(reference: Tensor, synthesised: Tensor, sample_rate: int) -> float | None:
    if not pesq_available():
        return None
    from pesq import PesqError, pesq

    pair = (torchaudio.functional.resample(a, sample_rate, PESQ_SAMPLE_RATE).numpy() for a in (reference, synthesised))
    try:
        return float(pesq(PESQ_SAMPLE_RATE, *pair, "wb"))
    except (PesqError, ValueError):  # too short, no speech in it, or silent
        return None


def _autocorrelation(audio: Tensor, sample_rate: int, longest: int) -> Tensor:
    """Normalised autocorrelation (frames, longest + 1) of audio (T,) in frames of 40 ms every 10 ms."""
    width = sample_rate // 25
    frames = audio.double().unfold(0, width + longest, sample_rate // 100)  # (frames, width + longest)
    spectrum = torch.fft.rfft(frames[:, :width], 2 * (width + longest)).conj()
    product = torch.fft.irfft(spectrum * torch.fft.rfft(frames, 2 * (width + longest)))[:, : longest + 1]
    power = torch.nn.functional.pad(frames.square().cumsum(1), (1, 0))
    energy = power[:, width:] - power[:, : longest + 1]  # of the window at each lag
    return product / (energy[:, :1] * energy + 1e-12).sqrt()
