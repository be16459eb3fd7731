"""What is not what a model was trained on: recognised, named, and nothing else is."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch
import torchaudio
from librosa import mel_frequencies
from torch import Tensor

from tests.conftest import RECIPES, REPOSITORY
from tests.test_metrics import buzz, hiss
from wavedistill.corpus.sources import sources
from wavedistill.recipe.loading import load_recipe
from wavedistill.recipe.sections import Audio
from wavedistill.speech.audio import LOG_MEL_FLOOR, LogMel, level_gain, pad_to_hops
from wavedistill.speech.foreign import examine, examine_f0
from wavedistill.speech.heard import Heard, change, sounding
from wavedistill.speech.mels import NATURAL, MelFormat

LJSPEECH = REPOSITORY.parent / "shared" / "data" / "LJSpeech-1.1" / "wavs"
RECIPE = load_recipe(RECIPES / "demo.toml", [f"corpus.text={RECIPES / 'demo.txt'}"])


def log_mels(clips: list[Tensor], settings: Audio) -> list[Tensor]:
    """Of clips (T,) at the level of the recipe."""
    clips = [pad_to_hops(clip * level_gain(clip, settings.level_db), settings.hop_length) for clip in clips]
    return [LogMel(settings).of_file(clip[None])[0] for clip in clips]


@pytest.fixture(scope="module")
def voices() -> dict[str, list[Tensor]]:
    """Log-mels of a synthetic voice, and of a human one."""
    pytest.importorskip("py_nanotts", reason="one of the voices is made by the package py-nanotts")
    paths = sorted(LJSPEECH.glob("*.wav"))[:6]
    if not paths:
        pytest.skip("the other voice is that of LJSpeech clips beside the repository, which are not there")
    human = [
        torchaudio.functional.resample(torch.from_numpy(soundfile.read(p, dtype="float32")[0]), 22050, 16000)
        for p in paths
    ]
    synthetic = [source.read(16000) for source in sources(RECIPE.corpus)[:6]]
    return {"synthetic": log_mels(synthetic, RECIPE.audio), "human": log_mels(human, RECIPE.audio)}


def heard(mels: list[Tensor]) -> Heard:
    """As a training hears them: by segments of half a second."""
    segments = [mel[:, first : first + 40] for mel in mels for first in range(0, mel.shape[1] - 40, 20)]
    return Heard.of(torch.stack(segments), torch.zeros(1))


PAIRS = [(own, other) for own in ("synthetic", "human") for other in ("synthetic", "human")]
DECIBELS = 20 / math.log(10)


def decibels_01(mel: Tensor) -> Tensor:
    return ((mel * DECIBELS - 20 + 100) / 100).clamp(0, 1)


EDGES = Tensor(mel_frequencies(82, fmin=0, fmax=8000))
AREAS = (EDGES[2:, None] - EDGES[:80, None]) / 2
SPACING = math.log(16000 / 1024) / 2
FOREIGN: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "log10": ("looks like log10 of amplitudes: give --mel-format log10", lambda m: m.exp().log10()),
    "powers": ("looks like natural logarithms of powers: compute it of magn", lambda m: 2 * (m + SPACING)),
    "decibels": ("looks like decibels", lambda m: 20 * m.exp().log10()),
    "none": ("looks like amplitudes without a logarithm: take its", lambda m: m.exp()),
    "powers alone": ("looks like powers without a logarithm: compute", lambda m: (2 * (m + SPACING)).exp()),
    "decibels of powers": ("looks like decibels", lambda m: (m + SPACING) * DECIBELS),
    "[0, 1]": ("looks like decibels normalised to [0, 1]: give --mel-format unit", decibels_01),
    "[-4, 4]": (
        "looks like decibels normalised to [-4, 4]: give --mel-format symmetric",
        lambda m: 8 * decibels_01(m) - 4,
    ),
    "standard": (
        "looks like a log-mel normalised to mean 0 and deviation 1: give --mel-stats",
        lambda m: (m - m.mean(1, True)) / m.std(1, keepdim=True),
    ),
    "height 1": (
        "looks like amplitudes of mel filters without area normalisation: give the filters norm='slaney'",
        lambda m: m + AREAS.log(),
    ),
}


@pytest.mark.parametrize(("own", "other"), PAIRS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_another_kind_of_log_mel_is_named(voices: dict[str, list[Tensor]], own: str, other: str, kind: str) -> None:
    message, made = FOREIGN[kind]
    for mel in voices[other]:
        found = examine(made(mel), heard(voices[own]), RECIPE.audio)
        assert found is not None
        assert found.other
        assert found.said.startswith(message)
        if message == "looks like decibels":  # nobody can tell these apart where the level is unknown
            assert "give --mel-format db" in found.said
            assert "--mel-ref-db -11.9" in found.said


@pytest.mark.parametrize("kind", set(NATURAL) - {"ln"})
def test_a_format_that_is_given_is_believed_where_it_fits_and_doubted_where_not(
    voices: dict[str, list[Tensor]], kind: str
) -> None:
    names = {"log10": "log10", "db": "decibels", "unit": "[0, 1]", "symmetric": "[-4, 4]"}
    mel, own, given = voices["human"][0], heard(voices["human"]), MelFormat(kind)
    assert examine(FOREIGN[names[kind]][1](mel), own, RECIPE.audio, given) is None
    found = examine(mel, own, RECIPE.audio, given)
    assert found is not None
    assert found.said == "looks like natural logarithms of amplitudes: leave out --mel-format"


@pytest.mark.parametrize(("own", "other"), PAIRS)
@pytest.mark.parametrize(
    "changed",
    [
        lambda mel: mel,
        lambda mel: mel + 6 / DECIBELS,
        lambda mel: (mel - 12 / DECIBELS).clamp_min(LOG_MEL_FLOOR),
        lambda mel: torch.nn.functional.pad(mel, (1000, 1000), value=LOG_MEL_FLOOR),
        lambda mel: mel[:, 60:70],
        lambda mel: torch.full_like(mel, LOG_MEL_FLOOR),
    ],
    ids=["as it is", "louder", "softer", "between silence", "short", "silence"],
)
def test_a_log_mel_of_our_own_passes_without_a_word(
    voices: dict[str, list[Tensor]], own: str, other: str, changed: Callable[[Tensor], Tensor]
) -> None:
    """Of the voice of the training, or of a stranger's."""
    for mel in voices[other]:
        assert examine(changed(mel), heard(voices[own]), RECIPE.audio) is None


def test_what_is_no_speech_is_called_unlike(voices: dict[str, list[Tensor]]) -> None:
    found = examine(voices["human"][0] + torch.linspace(8, -8, 80)[:, None], heard(voices["human"]), RECIPE.audio)
    assert found is not None
    assert not found.other
    assert found.said.startswith("unlike the log-mels of the training")


def test_pauses_are_the_same_in_any_unit() -> None:
    mel = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).cumsum(1)
    kept = sounding(mel)
    assert 0 < kept.shape[1] < 300
    torch.testing.assert_close(sounding(mel * 3 - 20), kept * 3 - 20)


def test_a_voice_outside_the_training_is_told() -> None:
    """A child's, which comes out an octave down, but neither the training's own nor what has no pitch."""
    low = Heard(mel_mean=(0.0,), mel_std=(1.0,), f0_low=80.0, f0_high=180.0)
    audio = RECIPE.audio.model_copy(update={"f0_max": 200.0})
    said = examine_f0(buzz(2, 291.0), audio, low)
    assert said is not None
    assert "at about 291 Hz" in said
    assert "80 to 180 Hz" in said
    assert examine_f0(buzz(2, 120.0), audio, low) is None
    assert examine_f0(hiss(2), audio, low) is None
    assert examine_f0(buzz(2, 291.0), audio, low.model_copy(update={"f0_low": None, "f0_high": None})) is None


def test_what_a_model_hears_are_the_bands_and_f0_of_its_segments(tmp_path: Path) -> None:
    mel = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0))
    f0 = torch.cat([torch.zeros(100), torch.linspace(100, 200, 101)])[None]
    found = Heard.of(mel, f0)
    frames = torch.cat([sounding(each) for each in mel], 1)
    assert found.mel_mean == pytest.approx(frames.mean(1).tolist())
    assert (found.f0_low, found.f0_high) == pytest.approx((105, 195))
    assert found.mel_change == change(mel)


def test_what_changes_from_frame_to_frame_grows_with_the_hop() -> None:
    mel = torch.randn(4, 400, generator=torch.Generator().manual_seed(0)).cumsum(1)
    steps = sounding(mel).diff().abs().mean() / sounding(mel).std(1, correction=0).mean()
    assert change([mel]) == pytest.approx(float(steps))
    slow = torch.nn.functional.interpolate(mel[None], scale_factor=2.0, mode="linear")[0]
    assert change([slow]) == pytest.approx(change([mel]) / 2, rel=0.25)
