"""Mel consistency: fixed points, what a step gains, streams, gradients."""

from collections.abc import Iterable, Iterator

import pytest
import soundfile
import torch

from tests.conftest import REPOSITORY, noise, speech_like
from wavedistill.recipe.sections import Audio
from wavedistill.speech.audio import LogMel
from wavedistill.speech.consistency import MOST_GAIN, ConsistentStream, MelConsistency

SETTINGS = [
    Audio(),
    Audio(hop_length=256),
    Audio(hop_length=64, n_fft=64, n_mels=8),
    Audio(hop_length=100, n_fft=150, n_mels=8, f_min=300, f_max=5000),
]
FRAMES = 30


def modulated(settings: Audio, seed: int) -> torch.Tensor:
    """Noise (2, FRAMES * hop) whose level changes from frame to frame."""
    levels = 0.1 * noise(2, FRAMES, seed=seed).abs().float()
    return noise(2, FRAMES * settings.hop_length, seed=seed + 1).float() * levels.repeat_interleave(
        settings.hop_length, 1
    )


def streamed(
    consistency: MelConsistency, pieces: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[torch.Tensor]:
    consistent = ConsistentStream(consistency)
    for wave, mel in pieces:
        if (done := consistent.given(wave, mel)).shape[1]:
            yield done
    yield from consistent.rest()


def error(settings: Audio, wave: torch.Tensor, mel: torch.Tensor) -> float:
    return float((LogMel(settings).of_file(wave) - mel).abs().mean())


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_has_its_log_mel_stays_where_it_is(settings: Audio) -> None:
    wave = modulated(settings, 0).double()
    mel = LogMel(settings).double().of_file(wave)
    assert (MelConsistency(settings, 4).double()(wave, mel) - wave).abs().max() < 1e-9
    assert torch.equal(MelConsistency(settings, 0)(wave, mel + 1), wave)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("start", ["noise", "soft noise", "clicks"])
def test_no_step_is_further_from_the_log_mel(settings: Audio, start: str) -> None:
    mel = LogMel(settings).of_file(modulated(settings, 0))
    wave = modulated(settings, 5)
    if start == "soft noise":
        wave = wave * 1e-3
    if start == "clicks":
        wave = torch.zeros_like(wave)
        wave[:, ::50] = 0.5
    errors = [error(settings, MelConsistency(settings, passes)(wave, mel), mel) for passes in range(7)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.7 * errors[0]


def test_no_step_is_further_from_a_voices_log_mel() -> None:
    folder = REPOSITORY.parent / "shared" / "data" / "LJSpeech-1.1" / "wavs"
    if not folder.is_dir():
        pytest.skip("the clips of a human voice are not beside the project")
    settings = Audio(sample_rate=22050, hop_length=256)
    for path in sorted(folder.glob("*.wav"))[:3]:
        samples = torch.from_numpy(soundfile.read(path, dtype="float32")[0][: 60 * 256])[None]
        mel = LogMel(settings).of_file(samples)
        other = 0.05 * noise(1, samples.shape[1]).float()
        errors = [error(settings, MelConsistency(settings, passes)(other, mel), mel) for passes in range(7)]
        assert errors == sorted(errors, reverse=True)
        assert (MelConsistency(settings, 4)(samples, mel) - samples).abs().max() < 1e-5


def test_silence_stays_finite_and_gains_are_bounded() -> None:
    settings = Audio()
    mel = LogMel(settings).of_file(modulated(settings, 0))
    silent = torch.zeros(2, FRAMES * 200, requires_grad=True)
    found = MelConsistency(settings, 3)(silent, mel)
    found.square().sum().backward()
    assert silent.grad is not None
    assert silent.grad.isfinite().all()
    assert not found.any()
    soft = 1e-6 * noise(2, FRAMES * 200).float()
    assert MelConsistency(settings)(soft, mel).norm() < 2 * torch.tensor(MOST_GAIN).exp() * soft.norm()


def test_gradient_is_that_of_differences() -> None:
    settings = Audio(sample_rate=400, hop_length=8, n_fft=32, n_mels=5, f_max=200, f0_min=40, f0_max=100)
    consistency = MelConsistency(settings, 2).double()
    mel = LogMel(settings).double().of_file(noise(1, 48))
    assert torch.autograd.gradcheck(lambda wave: consistency(wave, mel), noise(1, 48, seed=3).requires_grad_())


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("passes", [0, 1, 3])
@pytest.mark.parametrize("pieces", [[30], [1] * 30, [1, 7, 3, 14, 5]])
def test_a_stream_equals_the_whole_and_is_as_late_as_it_says(settings: Audio, passes: int, pieces: list[int]) -> None:
    consistency, hop = MelConsistency(settings, passes).double(), settings.hop_length
    wave, mel = modulated(settings, 3).double(), LogMel(settings).of_file(modulated(settings, 0)).double()
    given = 0

    def parts() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        nonlocal given
        for count in pieces:
            here = slice(given, given + count)
            given += count
            yield wave[:, here.start * hop : here.stop * hop], mel[..., here]

    blocks, known = [], 0
    for block in streamed(consistency, parts()):
        blocks.append(block)
        known += block.shape[1]
        if given < FRAMES:
            assert 0 <= given * hop - known - consistency.latency <= passes * hop
    torch.testing.assert_close(torch.cat(blocks, 1), consistency(wave, mel), rtol=0, atol=1e-9)


@pytest.mark.parametrize("frames", range(6))
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_stream_of_a_short_file_equals_the_whole(settings: Audio, frames: int) -> None:
    hop = settings.hop_length
    wave, mel = (
        modulated(settings, 3)[:, : frames * hop],
        LogMel(settings).of_file(modulated(settings, 0))[..., :frames],
    )
    for passes in (1, 2, 4):
        consistency = MelConsistency(settings, passes).double()
        parts = [(wave[:, i * hop : (i + 1) * hop].double(), mel[..., i : i + 1].double()) for i in range(frames)]
        for pieces in (parts, [(wave.double(), mel.double())]):
            found = torch.cat([wave[:, :0].double(), *streamed(consistency, pieces)], 1)
            expected = consistency(wave.double(), mel.double()) if frames else wave.double()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_a_batch_is_its_items() -> None:
    settings = Audio()
    wave, mel = modulated(settings, 3), LogMel(settings).of_file(modulated(settings, 0))
    both = MelConsistency(settings, 2)(wave, mel)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], MelConsistency(settings, 2)(wave[i : i + 1], mel[i : i + 1]))


def test_speech_gets_louder_where_its_log_mel_says_so() -> None:
    settings, wave = Audio(), speech_like(6000)[None]
    mel = LogMel(settings).of_file(wave)
    louder = MelConsistency(settings, 4)(wave, mel + 0.5)
    ratio = (louder[:, 1000:5000].square().mean() / wave[:, 1000:5000].square().mean()).sqrt()
    assert abs(float(ratio.log()) - 0.5) < 0.02
