"""Scores: exact values where these are known, and the order of better and worse."""

import math
import sys
from importlib.metadata import version
from types import ModuleType

import pytest
import torch
import torchaudio

from wavedistill.evaluation import metrics, systems
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech.audio import LogMel

RATE = 16000


def buzz(seconds: float = 1.5, pitch: float = 120.0) -> torch.Tensor:
    """A voiced sound: decaying harmonics of a pitch."""
    n = torch.arange(int(seconds * RATE), dtype=torch.float64) / RATE
    return sum(torch.sin(2 * math.pi * pitch * k * n) / k for k in range(1, 30)).float() * 0.05


def hiss(seconds: float = 1.5) -> torch.Tensor:
    return 0.05 * torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(0))


def test_bits_of_a_uniform_density_over_full_scale() -> None:
    """Density 1/2 on [-1, 1) is 16 bits a sample; each halving of the range saves one."""
    assert metrics.bits_per_sample(math.log(2)) == pytest.approx(16)
    assert metrics.bits_per_sample(math.log(1)) == pytest.approx(15)


def test_spectral_distance_measures_a_gain_in_db() -> None:
    sound = hiss()
    assert metrics.log_spectral_distance_db(sound, sound) == 0
    assert metrics.log_spectral_distance_db(sound, sound * 10 ** (6 / 20)) == pytest.approx(6, abs=0.01)
    assert metrics.log_spectral_distance_db(0 * sound, 0 * sound) == 0
    quiet, quieter = (metrics.log_spectral_distance_db(sound * gain, sound) for gain in (1e-5, 0))
    assert quieter == pytest.approx(quiet), "the reference alone sets the floor"
    # 80 dB of dynamic range below the peak, from the mean of what the reference has above that.
    spectrum = torch.stft(sound.double(), 1024, 256, window=torch.hann_window(1024).double(), return_complex=True).abs()
    level = 20 * spectrum.log10() - 20 * spectrum.max().log10() + 80
    assert quieter == pytest.approx(level.square().mean(0).sqrt().mean().item())


def test_a_whisper_has_no_periodicity_and_a_voice_has_it(tiny: Recipe) -> None:
    voice = buzz()
    assert metrics.periodicity(voice, voice, tiny.audio) == pytest.approx(1, abs=0.01)
    whisper = metrics.periodicity(voice, hiss(), tiny.audio)
    assert whisper is not None
    assert whisper < 0.25
    assert metrics.periodicity(voice, buzz(pitch=123), tiny.audio) == pytest.approx(1, abs=0.1), "slightly out of tune"
    assert metrics.periodicity(hiss(), voice, tiny.audio) is None, "nothing voiced to compare"
    out_of_tune = metrics.periodicity(voice, buzz(pitch=135), tiny.audio)
    assert out_of_tune is not None
    assert out_of_tune < 0.5, "a tenth of the period is another voice"


@pytest.mark.parametrize("pitch", [45.0, 620.0])
def test_periodicity_looks_where_the_recipe_says(tiny: Recipe, pitch: float) -> None:
    wide = tiny.audio.model_copy(update={"f0_min": 40.0, "f0_max": 700.0})
    assert metrics.periodicity(buzz(pitch=pitch), buzz(pitch=pitch), wide) == pytest.approx(1, abs=0.02)


def test_scores_of_a_copy_are_the_best_there_are(tiny: Recipe) -> None:
    voice = buzz() + 0.02 * hiss()
    best, worse = (
        metrics.Scorer(voice, tiny.audio)(voice),
        metrics.Scorer(voice, tiny.audio)(voice * 0.5 + 0.5 * hiss()),
    )
    assert best["stoi"] == pytest.approx(1, abs=1e-4)
    assert best["lsd_db"] == 0
    assert best["level_difference_db"] == 0
    assert best["stoi"] > worse["stoi"]
    if metrics.pesq_available():
        assert best["pesq_wb"] > 4.5
        assert best["pesq_wb"] > worse["pesq_wb"]


def test_a_clip_too_short_for_stoi_has_none(tiny: Recipe) -> None:
    """The package gives 1e-5 for it, even to a perfect copy."""
    voice = buzz(0.35)
    assert metrics.Scorer(voice, tiny.audio)(voice)["stoi"] is None


def test_scores_name_what_computed_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert metrics.implementations()["pystoi"] == f"pystoi {version('pystoi')}"
    monkeypatch.setattr(metrics, "pesq_available", lambda: False)
    assert metrics.implementations()["pesq_wb"] is None


def test_scores_go_on_without_pesq(tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "pesq_available", lambda: False)
    assert metrics.Scorer(buzz(), tiny.audio)(buzz())["pesq_wb"] is None


def test_griffin_lim_keeps_length_place_and_level(tiny: Recipe) -> None:
    """A sound in the middle of silence comes back in the same place."""
    sound = torch.cat([torch.zeros(8000), hiss(0.5), torch.zeros(8000)])
    copy = systems.griffin_lim(LogMel(tiny.audio).of_file(sound[None])[0], tiny.audio)
    assert copy.shape == sound.shape
    assert copy[:7000].abs().max() < 0.01 > copy[-7000:].abs().max()
    assert abs(10 * torch.log10(copy.square().sum() / sound.square().sum())) < 1.5
    assert torch.equal(copy, systems.griffin_lim(LogMel(tiny.audio).of_file(sound[None])[0], tiny.audio))


def test_a_voice_and_a_whisper_differ_in_voicing_and_a_transposed_voice_in_cents(tiny: Recipe) -> None:
    voice = buzz()
    whisper = metrics.Scorer(voice, tiny.audio)(hiss())
    assert whisper["vuv_f1"] == 0
    assert whisper["f0_rmse_cents"] is None
    assert whisper["periodicity_rmse"] is not None
    assert whisper["periodicity_rmse"] > 0.5
    semitone = metrics.Scorer(voice, tiny.audio)(buzz(pitch=120 * 2 ** (1 / 12)))
    assert semitone["vuv_f1"] == pytest.approx(1, abs=0.02)
    assert semitone["f0_rmse_cents"] == pytest.approx(100, abs=15)


def test_agreement_of_f0_counts_what_it_says() -> None:
    reference, other = torch.tensor([0.0, 100, 100, 100]), torch.tensor([100.0, 200, 100, 0])
    found = metrics.f0_agreement(reference, other)
    assert found["vuv_f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert found["f0_rmse_cents"] == pytest.approx(1200 / math.sqrt(2))
    assert metrics.f0_agreement(torch.zeros(3), torch.zeros(3)) == {"f0_rmse_cents": None, "vuv_f1": None}


def test_tilt_is_the_power_above_2_khz_relative_to_that_below() -> None:
    n = torch.arange(RATE, dtype=torch.float64) / RATE
    low, high = torch.sin(2 * math.pi * 500 * n), torch.sin(2 * math.pi * 5000 * n)
    assert metrics.tilt_db(low + 0.1 * high, RATE) == pytest.approx(-20, abs=0.01)
    assert metrics.tilt_db(hiss() * 3, RATE) == pytest.approx(metrics.tilt_db(hiss(), RATE))
    assert metrics.tilt_db(torch.zeros(RATE), RATE) == -100


def test_mel_cepstral_distortion_hears_the_envelope_and_not_the_level(tiny: Recipe) -> None:
    sound = hiss()
    assert metrics.mel_cepstral_distortion_db(sound, sound, tiny.audio) == 0
    assert metrics.mel_cepstral_distortion_db(sound, 2 * sound, tiny.audio) < 0.01
    # A tilt of the spectrum by a cosine of height h over the mel axis is c_1 = h: 10 / ln 10 * sqrt(2) * h decibels.
    tilted = torchaudio.functional.preemphasis(sound, 0.9)
    mel, mel_tilted = (LogMel(tiny.audio).of_file(a[None])[0].mean(1) for a in (sound, tilted))
    bands = torch.arange(len(mel)) + 0.5
    change = mel_tilted - mel
    cepstrum = [2 * (change * torch.cos(math.pi * m * bands / len(mel))).mean() for m in range(1, 25)]
    expected = 10 / math.log(10) * math.sqrt(2 * sum(c**2 for c in cepstrum))
    found = metrics.mel_cepstral_distortion_db(sound, tilted, tiny.audio)
    assert found == pytest.approx(expected, rel=0.1)


def test_mel_cepstral_distortion_is_of_speech_and_not_of_its_pauses(tiny: Recipe) -> None:
    speech, pause, others = hiss(1.0), 3e-3 * buzz(1.0), 3e-3 * hiss(1.0)
    reference, other = torch.cat([speech, pause]), torch.cat([speech, others])
    assert metrics.mel_cepstral_distortion_db(pause, others, tiny.audio) > 2, "another envelope, above the floor"
    assert metrics.mel_cepstral_distortion_db(reference, other, tiny.audio) < 0.2


def test_differences_are_those_of_the_synthesis_from_the_reference(tiny: Recipe) -> None:
    """Half as loud is -6 dB, and a duller sound tilts down."""
    voice = buzz() + 0.02 * hiss()
    found = metrics.Scorer(voice, tiny.audio)(0.5 * voice)
    assert found["level_difference_db"] == pytest.approx(-6.02, abs=0.01)
    dull = torchaudio.functional.lowpass_biquad(voice, RATE, 1000.0)
    assert metrics.Scorer(voice, tiny.audio)(dull)["tilt_difference_db"] < -10


def test_tilt_divides_at_2_khz() -> None:
    n = torch.arange(RATE, dtype=torch.float64) / RATE
    tones = {hertz: torch.sin(2 * math.pi * hertz * n) for hertz in (500, 1900, 2100, 3000)}
    for hertz in (2100, 3000):
        assert metrics.tilt_db(tones[500] + 0.1 * tones[hertz], RATE) == pytest.approx(-20, abs=0.01)
    assert metrics.tilt_db(tones[500] + 0.1 * tones[1900], RATE) < -60


def test_pesq_is_given_the_reference_first(tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not symmetric: it forgives what is missing sooner than what is added."""
    given = []
    module = ModuleType("pesq")
    module.PesqError = RuntimeError
    module.pesq = lambda rate, reference, degraded, mode: (given.append((rate, reference, degraded, mode)), 1.0)[1]
    monkeypatch.setitem(sys.modules, "pesq", module)
    monkeypatch.setattr(metrics, "pesq_available", lambda: True)
    voice, other = buzz(), hiss()
    metrics.Scorer(voice, tiny.audio)(other)
    ((rate, reference, degraded, mode),) = given
    assert (rate, mode) == (16000, "wb")
    assert torch.equal(torch.from_numpy(reference), voice)
    assert torch.equal(torch.from_numpy(degraded), other)


def test_f1_counts_what_is_claimed_as_well_as_what_is_found() -> None:
    """One of three voiced frames found and nothing claimed beside it: recall 1/3, precision 1."""
    voiced, found = torch.tensor([100.0, 100, 100, 0]), torch.tensor([100.0, 0, 0, 0])
    assert metrics.f0_agreement(voiced, found)["vuv_f1"] == pytest.approx(2 * 1 / (3 + 1))


def test_aperiodicity_is_more_with_noise_and_less_with_pulses(tiny: Recipe) -> None:
    """Against itself none; a silence and a hiss have nothing voiced to compare."""
    voice = buzz() + 0.2 * hiss()
    scorer = metrics.Scorer(voice, tiny.audio)
    own, noisier, buzzing = (scorer(sound) for sound in (voice, voice + hiss(), buzz()))
    assert own["aperiodicity_db"] == own["aperiodicity_bias_db"] == 0
    assert noisier["aperiodicity_bias_db"] > 1
    assert buzzing["aperiodicity_bias_db"] < -1
    for found in (noisier, buzzing):
        assert found["aperiodicity_db"] > abs(found["aperiodicity_bias_db"])
    nothing = {"aperiodicity_db": None, "aperiodicity_bias_db": None}
    assert metrics.aperiodicity_difference(voice, voice, torch.zeros(120), tiny.audio) == nothing


def test_aperiodicity_does_not_hear_the_level(tiny: Recipe) -> None:
    voice = buzz() + 0.3 * hiss()
    assert metrics.Scorer(voice, tiny.audio)(0.5 * voice)["aperiodicity_db"] == pytest.approx(0, abs=1e-3)
