"""Linear prediction as a flow: exact, stable for every mel, and the envelope it claims."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import torch
from torch import Tensor

from tests.conftest import noise, speech_like, told
from wavedistill.models.kinds import build
from wavedistill.recipe.loading import validate_recipe
from wavedistill.recipe.recipe import Recipe
from wavedistill.sampling.sequential import invert, sample
from wavedistill.speech import linear_prediction
from wavedistill.speech.audio import LogMel, mel_filters
from wavedistill.speech.linear_prediction import (
    LinearPrediction,
    LinearPredictionFromMel,
    Preemphasis,
    levinson_durbin,
    synthesise_by_frames,
)

HOP = 200
ORDER = 24


def envelope_of(tiny: Recipe, audio: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients and log-gain of a waveform (T,) in float64, by way of its log-mel."""
    mel = LogMel(tiny.audio).of_file(audio[None].float()).double()
    return LinearPredictionFromMel(tiny.audio, ORDER)(mel)


def tone(frequency: float) -> Tensor:
    return torch.sin(2 * math.pi * frequency / 16000 * torch.arange(6000))


SOUNDS: dict[str, Callable[[], Tensor]] = {
    "speech-like": lambda: speech_like(6000),
    "silence": lambda: torch.zeros(6000),
    "clipping": lambda: torch.sign(speech_like(6000)),
    "low tone": partial(tone, 60),
    "tone": partial(tone, 1000),
    "highest tone": partial(tone, 7990),
    "click": lambda: torch.nn.functional.one_hot(torch.tensor(3000), 6000).float(),
    "silence, then full scale": lambda: torch.cat([torch.zeros(3000), torch.sign(speech_like(3000))]),
}


@pytest.mark.parametrize("sound", SOUNDS)
def test_analysis_and_synthesis_invert_each_other_for_every_mel(tiny: Recipe, sound: str) -> None:
    """Also for a waveform that has nothing to do with the mel, from a length that is no whole number of frames."""
    context, flow = envelope_of(tiny, SOUNDS[sound]()), LinearPrediction(HOP)
    # A gain near that of 16-bit quantisation noise divides rounding errors by itself: so compare where it starts.
    residual = noise(1, 5930)
    x, ladj = flow(residual, context)
    back, inverse_ladj = flow.inverse(x, context)
    assert (back - residual).abs().max() < 1e-9
    assert torch.equal(ladj, -inverse_ladj)
    assert x.isfinite().all()
    assert x.abs().max() < 100, "bounded for a residual of unit variance"


@pytest.mark.parametrize("level", [-11.512925, -3.0, 4.0])
def test_any_mel_gives_a_stable_filter(tiny: Recipe, level: float) -> None:
    """All poles inside the unit circle: for flat, random and single-band mels, at the floor and far above it."""
    flat = torch.full((1, tiny.audio.n_mels, 3), level).double()
    spiky = flat.clone()
    spiky[:, 7] += 12
    wild = flat + 6 * noise(1, tiny.audio.n_mels, 3)
    for mel in (flat, spiky, wild):
        coefficients, log_gain = LinearPredictionFromMel(tiny.audio, ORDER)(mel)
        assert log_gain.isfinite().all()
        for a in coefficients[0]:
            companion = scipy.linalg.companion([1, *(-a).tolist()])
            assert abs(scipy.linalg.eigvals(companion)).max() < 1


def test_synthesis_is_the_textbook_filter() -> None:
    a, residual = torch.tensor([1.2, -0.7, 0.1]).double(), noise(2, 50)
    context = (a.expand(2, 5, 3), torch.full((2, 5), math.log(0.3)).double())
    x, _ = LinearPrediction(10)(residual, context)
    expected = scipy.signal.lfilter([0.3], [1, *(-a).tolist()], residual.numpy())
    torch.testing.assert_close(x, torch.from_numpy(expected))


def test_one_mel_serves_a_batch_of_draws_and_too_few_frames_are_refused() -> None:
    context = (0.2 * noise(1, 3, 4), 0.1 * noise(1, 3, seed=1))
    residual, flow = noise(4, 15, seed=2), LinearPrediction(5)
    x, ladj = flow(residual, context)
    assert x.shape == ladj.shape == (4, 15)
    torch.testing.assert_close(flow.inverse(x, context)[0], residual)
    torch.testing.assert_close(x[2:3], flow(residual[2:3], context)[0])
    with pytest.raises(ValueError, match="do not cover 16"):
        flow(noise(1, 16), context)


def test_synthesis_has_the_gradient_of_the_recurrence() -> None:
    context = (0.2 * noise(2, 3, 4), 0.1 * noise(2, 3, seed=1))
    residual = noise(2, 14, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda e: LinearPrediction(5)(e, context)[0], residual)


@pytest.mark.parametrize("sound", SOUNDS)
def test_synthesis_by_frames_is_the_recurrence(tiny: Recipe, sound: str) -> None:
    """What a GPU runs, here on the CPU: the same output and the same gradient."""
    (coefficients, log_gain), residual = envelope_of(tiny, SOUNDS[sound]()), noise(2, 5930).requires_grad_()
    x, _ = LinearPrediction(HOP)(residual, (coefficients, log_gain))
    gain = log_gain.exp().repeat_interleave(HOP, 1)[:, :5930]
    by_frames = synthesise_by_frames(
        residual * gain, coefficients.expand(2, -1, -1), HOP, torch.zeros(2, coefficients.shape[-1]).double()
    )
    scale = x.abs().max()
    assert (by_frames - x).abs().max() < 1e-8 * scale
    target = noise(2, 5930, seed=1)
    expected, found = (torch.autograd.grad((out * target).sum(), residual)[0] for out in (x, by_frames))
    assert (found - expected).abs().max() < 1e-8 * expected.abs().max()


def test_levinson_durbin_solves_the_normal_equations() -> None:
    sound = scipy.signal.lfilter([1], [1, -1.5, 0.8], noise(4000).numpy())
    r = torch.tensor([(sound[: len(sound) - k] * sound[k:]).sum() for k in range(7)])
    coefficients, error = levinson_durbin(r)
    expected = torch.from_numpy(scipy.linalg.solve_toeplitz(r[:6].numpy(), r[1:].numpy()))
    torch.testing.assert_close(coefficients, expected)
    torch.testing.assert_close(error, r[0] - (coefficients * r[1:]).sum())


def test_residual_of_noise_has_unit_variance_whatever_its_colour_and_level(tiny: Recipe) -> None:
    white = noise(160_000)
    for level in (0.3, 0.001):
        for coloured in (white, torch.from_numpy(scipy.signal.lfilter([1], [1, -1.3, 0.8], white.numpy()))):
            audio = coloured / coloured.std() * level
            residual, _ = LinearPrediction(HOP).inverse(audio[None], envelope_of(tiny, audio))
            assert 0.95 < residual.std() < 1.03


def test_crops_of_the_mel_give_crops_of_the_filters(tiny: Recipe) -> None:
    """So that training on crops and generation of files see the same residual."""
    mel = LogMel(tiny.audio).of_file(speech_like(6000)[None])
    envelope = LinearPredictionFromMel(tiny.audio, ORDER)
    for whole, crop in zip(envelope(mel), envelope(mel[..., 5:9]), strict=True):
        torch.testing.assert_close(crop, whole[:, 5:9], rtol=1e-5, atol=1e-5)


def test_preemphasis_inverts_and_whitens_a_first_order_process_of_the_level(tiny: Recipe) -> None:
    """The same flow with one fixed coefficient, whatever the log-mel."""
    envelope, flow = Preemphasis(0.9, 0.07), LinearPrediction(HOP)
    context = envelope(noise(1, tiny.audio.n_mels, 30))
    white = noise(1, 6000)
    x, ladj = flow(white, context)
    torch.testing.assert_close(flow.inverse(x, context)[0], white, rtol=0, atol=1e-9)
    torch.testing.assert_close(ladj, torch.full_like(x, math.log(0.07 * math.sqrt(1 - 0.81))))
    assert x.std().item() == pytest.approx(0.07, rel=0.1)


@pytest.mark.parametrize(("order", "preemphasis"), [(0, 0.9), (0, 0.0), (8, 0.0)])
def test_models_share_whichever_last_transform_the_recipe_asks_for(
    tiny_data: dict[str, Any], order: int, preemphasis: float
) -> None:
    tiny_data["linear_prediction"] = {"order": order, "preemphasis": preemphasis}
    recipe = validate_recipe(tiny_data, "tiny.toml")
    mel, z = noise(1, recipe.audio.n_mels, 14) - 5, noise(1, 800)
    waves = []
    for kind in ("teacher", "student"):
        model = build(recipe, kind, 0).double()
        x = sample(model(told(recipe, mel)), z)
        found, _ = invert(model(told(recipe, mel)), x)
        assert (found - z).abs().max() < 1e-9
        waves.append(x)
    torch.testing.assert_close(waves[0], waves[1], rtol=0.1, atol=1e-2)


def test_its_constants_stay_exact_whatever_the_model_is_cast_to(tiny: Recipe) -> None:
    envelope, mel = LinearPredictionFromMel(tiny.audio, 24), noise(1, tiny.audio.n_mels, 9) * 2 - 5
    expected = envelope(mel)
    for cast in (envelope.float, envelope.half, envelope.bfloat16, lambda: envelope.to(torch.float32)):
        cast()
        assert all(map(torch.equal, envelope(mel), expected))


def test_the_autocorrelation_is_windowed_and_whitened_before_a_filter_is_fitted(
    tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Gaussian of 40 Hz over lags, and noise of one 16-bit step: no peak is sharper, and silence has a filter."""
    given: list[torch.Tensor] = []
    fit = linear_prediction.levinson_durbin
    monkeypatch.setattr(linear_prediction, "levinson_durbin", lambda a: (given.append(a.clone()), fit(a))[1])
    envelope = LinearPredictionFromMel(tiny.audio, 24)
    mel = noise(1, tiny.audio.n_mels, 5)
    envelope(mel)
    envelope.lag_window.fill_(1)
    envelope(mel)
    envelope(mel - 1000)
    windowed, bare, silent = given
    lags = torch.arange(25, dtype=torch.float64)
    gaussian = torch.exp(-0.5 * (2 * math.pi * 40 * lags / tiny.audio.sample_rate) ** 2)
    # The analysis window's power is 3/8 of its length, and the mean magnitude of noise sqrt(pi) / 2 of its RMS.
    scaled = 4 / math.pi / (3 / 8 * tiny.audio.n_fft) * gaussian
    torch.testing.assert_close(windowed[..., 1:] / bare[..., 1:], scaled[1:].expand_as(bare[..., 1:]))
    torch.testing.assert_close(silent[..., 0], torch.full_like(silent[..., 0], 1 / (12 * 32768**2)))
    assert not silent[..., 1:].any()


def test_filters_are_those_of_an_independent_computation(tiny: Recipe) -> None:
    """From a log-mel's amplitudes at the bands' centres to the solution of scipy for the normal equations."""
    audio, order = tiny.audio, 8
    mel = noise(1, audio.n_mels, 2) - 4
    coefficients, log_gain = LinearPredictionFromMel(audio, order)(mel)
    filters = mel_filters(audio).double().numpy()  # (bins, n_mels)
    gains = filters.sum(0)
    centres = (np.arange(len(filters)) @ filters)[gains > 0] / gains[gains > 0]
    window = scipy.signal.get_window("hann", audio.n_fft)
    lags = np.arange(order + 1)
    for frame in range(2):
        bands = mel[0, gains > 0, frame].numpy() - np.log(gains[gains > 0])
        power = np.exp(2 * np.interp(np.arange(len(filters)), centres, bands)) * 4 / np.pi / (window**2).sum()
        r = np.fft.irfft(power)[: order + 1] * np.exp(-0.5 * (2 * np.pi * 40 * lags / audio.sample_rate) ** 2)
        r[0] = r[0] * (1 + 1e-9) + 1 / (12 * 32768**2)
        a = scipy.linalg.solve_toeplitz(r[:-1], r[1:])
        torch.testing.assert_close(coefficients[0, frame], torch.from_numpy(a), rtol=1e-9, atol=1e-9)
        assert log_gain[0, frame].item() == pytest.approx(0.5 * np.log(r[0] - a @ r[1:]), abs=1e-7)
