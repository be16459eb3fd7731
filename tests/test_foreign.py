"""What is not what a model was trained on: recognised, named, and nothing else is."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch
import torchaudio
from torch import Tensor

from tests.conftest import RECIPES, REPOSITORY
from tests.test_metrics import buzz, hiss
from wavedistill.corpus.sources import sources
from wavedistill.recipe.loading import load_recipe
from wavedistill.recipe.sections import Audio
from wavedistill.speech.audio import LOG_MEL_FLOOR, LogMel, level_gain, pad_to_hops
from wavedistill.speech.foreign import examine, examine_f0
from wavedistill.speech.heard import Heard, sounding
from wavedistill.tools.errors import AudioError

FILE = Path("m.npy")
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
FOREIGN: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "log10": ("looks like log10 of amplitudes.*2.3026", lambda m: m.exp().log10()),
    "powers": ("looks like natural logarithm of powers.*halve", lambda m: m.exp().square().log()),
    "decibels": ("looks like decibels, .*0.11513", lambda m: 20 * m.exp().log10()),
    "none": ("looks like amplitudes without a logarithm", lambda m: m.exp()),
    "[0, 1]": (r"looks like decibels normalised to \[0, 1\]", lambda m: ((m * DECIBELS - 20 + 100) / 100).clamp(0, 1)),
    "[-4, 4]": (
        r"looks like decibels normalised to \[-4, 4\]",
        lambda m: 8 * ((m * DECIBELS - 20 + 100) / 100).clamp(0, 1) - 4,
    ),
    "standard": (
        "looks like a log-mel normalised to mean 0 and deviation 1",
        lambda m: (m - m.mean(1, True)) / m.std(1, keepdim=True),
    ),
}


@pytest.mark.parametrize(("own", "other"), PAIRS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_another_kind_of_log_mel_is_named(voices: dict[str, list[Tensor]], own: str, other: str, kind: str) -> None:
    message, made = FOREIGN[kind]
    for mel in voices[other]:
        with pytest.raises(AudioError, match=f"m.npy: {message}"):
            examine(FILE, made(mel), heard(voices[own]))


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
        assert examine(FILE, changed(mel), heard(voices[own])) is None


def test_what_is_no_speech_is_called_unlike(voices: dict[str, list[Tensor]]) -> None:
    upside_down = voices["human"][0].flip(0)
    assert "unlike the log-mels of the training" in (examine(FILE, upside_down, heard(voices["human"])) or "")


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
