"""F0: tracked, predicted, and as a periodic source."""

import math

import pytest
import torch

from tests.conftest import SMALL_AUDIO
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech.audio import LogMel
from wavedistill.speech.conditioning import Conditioning
from wavedistill.speech.pitch import PITCH_CONTEXT, PeriodicSource, PitchPredictor, track_f0


def harmonic(f0: torch.Tensor, sample_rate: int) -> torch.Tensor:
    """A voice-like tone whose F0 (T,) in Hz varies from sample to sample; silent where that is 0."""
    phase = 2 * math.pi * (f0.double() / sample_rate).cumsum(0)
    tone = sum(torch.sin(k * phase) / k for k in range(1, 20))
    return (0.05 * tone * (f0 > 0)).float()


def test_tracker_finds_a_gliding_tone_at_the_middle_of_each_hop(tiny: Recipe) -> None:
    hop, frames = tiny.audio.hop_length, 120
    f0 = 100 * 2 ** torch.linspace(0, 1, frames * hop)  # 5 cents in half a hop
    f0[50 * hop : 80 * hop] = 0
    found = track_f0(harmonic(f0, tiny.audio.sample_rate), tiny.audio)
    expected = f0.view(frames, hop)[:, hop // 2]
    assert found.shape == (frames,)
    inside = torch.cat([torch.arange(5, 45), torch.arange(85, 115)])
    cents = 1200 * (found[inside] / expected[inside]).log2().abs()
    assert cents.median() < 1.5, "half a hop of misplacement would be 6, a wrong octave 1200"
    assert cents.max() < 15
    assert not found[55:75].any()


def test_tracker_gives_one_value_a_frame_also_for_silence_and_short_clips(tiny: Recipe) -> None:
    for frames in (1, 2, 8):
        f0 = track_f0(torch.zeros(frames * tiny.audio.hop_length), tiny.audio)
        assert f0.shape == (frames,)
        assert not f0.any()


def test_source_repeats_with_f0_and_is_zero_where_unvoiced() -> None:
    source = PeriodicSource(SMALL_AUDIO)
    f0 = torch.full((1, 12), 50.0).double()  # 8 samples a period, as long as a hop
    f0[:, 6:8] = 0
    signals, _ = source(f0)
    assert signals.shape == (1, 80, 4)
    voiced = signals[0, :40].view(5, 8, 4)
    torch.testing.assert_close(voiced[1:], voiced[:-1], rtol=0, atol=1e-9)
    assert not signals[0, 40:56].any(), "frames 6 and 7 of f0, whose first frame is a margin"
    sine, cosine, pulse, flag = voiced.flatten(0, 1).T
    angle = 2 * math.pi * torch.arange(1, 41).double() / 8
    torch.testing.assert_close(sine, angle.sin(), rtol=0, atol=1e-9)
    torch.testing.assert_close(cosine, angle.cos(), rtol=0, atol=1e-9)
    assert (flag == 1).all()
    harmonics = sum((k * angle).cos() for k in range(1, 5))  # all below the Nyquist frequency, 200 Hz
    torch.testing.assert_close(pulse, (1 + 2 * harmonics) / math.sqrt(8), rtol=0, atol=1e-9)


def test_phase_goes_on_across_chunks() -> None:
    """Two halves, the second with the phase that the first left, are the whole."""
    source = PeriodicSource(SMALL_AUDIO)
    f0 = torch.linspace(40, 90, 22)[None].double()
    f0[:, 5:7] = 0
    whole, end = source(f0)
    first, phase = source(f0[:, :12])
    second, last = source(f0[:, 10:], phase)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-7)
    torch.testing.assert_close(last, end, rtol=0, atol=1e-9)


def test_a_source_ahead_is_that_of_the_next_frames() -> None:
    f0 = torch.tensor([[0.0, 50, 60, 55, 0, 0, 70, 80, 75, 60]]).double()
    source, later = PeriodicSource(SMALL_AUDIO), PeriodicSource(SMALL_AUDIO, ahead=4)
    whole, _ = source(f0)
    for frames in (1, 3, 4, 5):
        here, phase = later(f0[:, : frames + 2])
        assert here.shape[1] == frames * 8 + 4
        torch.testing.assert_close(here, whole[:, : frames * 8 + 4], rtol=0, atol=1e-9)
        torch.testing.assert_close(phase, source(f0[:, : frames + 2])[1])


def test_f0_glides_between_the_middles_of_frames() -> None:
    """A linear F0 comes out linear: the phase is then its square."""
    source = PeriodicSource(SMALL_AUDIO)
    f0 = torch.linspace(40, 62, 12)[None].double()
    _, phase = source(f0)
    slope = (62 - 40) / 11 / 8
    first = 40 + 8 * slope - 3.5 * slope  # the middle of the first frame that counts lies between its samples
    samples = first + slope * torch.arange(80).double()
    assert phase.item() == pytest.approx(float(samples.sum() / 400) % 1, abs=1e-9)


def test_predictor_learns_f0_from_the_log_mel(tiny: Recipe) -> None:
    torch.manual_seed(0)
    settings, hop = tiny.audio, tiny.audio.hop_length
    log_mel = LogMel(settings)

    def speech(seed: int) -> Conditioning:
        generator = torch.Generator().manual_seed(seed)
        f0 = torch.rand(16, generator=generator).mul(160).add(90).repeat_interleave(10)
        f0[torch.rand(16, generator=generator).repeat_interleave(10) < 0.3] = 0
        audio = harmonic(f0.repeat_interleave(hop), settings.sample_rate)
        audio += 0.01 * torch.randn(len(audio), generator=generator)
        known = torch.nn.functional.pad(f0, (PITCH_CONTEXT,) * 2)[None]
        return Conditioning(log_mel.of_file(audio[None], PITCH_CONTEXT), PITCH_CONTEXT, known)

    predictor = PitchPredictor(settings)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=2e-3)
    for step in range(150):
        optimizer.zero_grad()
        predictor.loss(speech(step)).backward()
        optimizer.step()
    heard = speech(1000)
    assert heard.f0 is not None
    found, f0 = predictor(heard.mel), heard.f0[:, PITCH_CONTEXT:-PITCH_CONTEXT]
    inside = torch.arange(160).view(16, 10)[:, 3:7].flatten()  # a frame's window spans several
    assert ((found > 0) == (f0 > 0))[0, inside].float().mean() > 0.9
    both = ((found > 0) & (f0 > 0))[0] & torch.zeros(160).index_fill(0, inside, 1).bool()
    assert (1200 * (found[0, both] / f0[0, both]).log2()).abs().median() < 60


def test_features_are_of_order_one_and_tell_silence_from_the_middle_of_the_range() -> None:
    predictor = PitchPredictor(SMALL_AUDIO)
    features = predictor.features(torch.tensor([[0.0, 40.0, math.sqrt(4000), 100.0]]))
    torch.testing.assert_close(features[0], torch.tensor([[0.0, 1, 1, 1], [0, -1, 0, 1]]), atol=1e-6, rtol=0)


def f0_of(floor: float, peaks: dict[int, float]) -> tuple[torch.Tensor, PitchPredictor]:
    """What a predictor says whose bins have these log-weights, all others the floor, and the predictor."""
    predictor = PitchPredictor(SMALL_AUDIO, channels=4)
    head = predictor.layers[-1]
    torch.nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.fill_(floor)
        head.bias[0] = 1  # voiced
        for number, height in peaks.items():
            head.bias[1 + number] = height
    return predictor(torch.zeros(1, SMALL_AUDIO.n_mels, 1 + 2 * PITCH_CONTEXT))[0], predictor


def test_a_second_peak_does_not_pull_f0() -> None:
    """An octave away it may be nearly as high: F0 is where the highest peak is, not between them."""
    f0, predictor = f0_of(-10, {12: 5.0, 50: 4.9})
    torch.testing.assert_close(f0, predictor.centres[12:13].exp(), rtol=0.01, atol=0)


def test_f0_lies_between_bins_and_at_the_highest_peak_alone() -> None:
    """Two equal neighbours: their geometric mean. A peak three bins off has no part in it."""
    f0, predictor = f0_of(-30, {12: 5.0, 13: 5.0, 16: 4.9})
    torch.testing.assert_close(f0, predictor.centres[12:14].mean()[None].exp(), rtol=1e-4, atol=0)


def test_voicing_is_learnt_everywhere_and_height_where_there_is_a_voice() -> None:
    predictor = PitchPredictor(SMALL_AUDIO, channels=4)
    mel = torch.randn(1, SMALL_AUDIO.n_mels, 3 + 2 * PITCH_CONTEXT, generator=torch.Generator().manual_seed(0))

    def gradients(f0: float) -> torch.Tensor:
        """Of the head's biases, voicing first, where all frames have one F0."""
        loss = predictor.loss(Conditioning(mel, PITCH_CONTEXT, torch.full((1, 3 + 2 * PITCH_CONTEXT), f0)))
        return torch.autograd.grad(loss, predictor.layers[-1].bias)[0]

    silent, voiced = gradients(0.0), gradients(60.0)
    assert silent[0] > 0 > voiced[0]
    assert not silent[1:].any()
    assert voiced[1:].argmin() == (predictor.centres.exp() - 60).abs().argmin(), "what is to rise"
