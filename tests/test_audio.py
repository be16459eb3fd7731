"""Files, levels and log-mel frames."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tests.conftest import speech_like
from wavedistill.corpus import recordings
from wavedistill.corpus.segments import Segments, dequantise
from wavedistill.corpus.utterances import Manifest, Part, Utterance, read_samples
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech import audio
from wavedistill.tools.errors import AudioError, CorpusError
from wavedistill.tools.random import random_stream


def corpus(folder: Path, recipe: Recipe, frames: list[int]) -> Manifest:
    """A prepared corpus of made-up utterances of so many frames, all for training."""
    folder.mkdir(parents=True)
    utterances = []
    for i, count in enumerate(frames):
        audio.write(folder / f"{i}.wav", speech_like(count * recipe.audio.hop_length, i), recipe.audio.sample_rate)
        np.save(folder / f"{i}.f0.npy", np.linspace(0, 200, count, dtype=np.float32))
        parts = [Part(name, 0, (folder / name).stat().st_size) for name in (f"{i}.wav", f"{i}.f0.npy")]
        about = {"name": str(i), "source": str(i), "split": "train", "frames": count, "gain": 1, "sha256": ""}
        utterances.append(Utterance(**about, audio=parts[0], f0=parts[1]))
    return Manifest(audio=recipe.audio, utterances=utterances)


@pytest.mark.parametrize("first", [0, 1, 9, 25, 30])
def test_frame_k_of_a_crop_is_frame_k_of_the_file(
    tmp_path: Path, tiny: Recipe, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the borders of the file, and with the context frames that the encoder looks at."""
    context, frames = 3, 10
    manifest = corpus(tmp_path / "audio", tiny, [40])
    segments = Segments(manifest, tmp_path / "audio", "train", frames=frames, margin=context)
    monkeypatch.setattr("wavedistill.corpus.segments.read_samples", lambda *place: read_samples(*place).double())
    segments.log_mel.double()
    samples, _ = soundfile.read(tmp_path / "audio" / "0.wav")
    wave = torch.from_numpy(samples)[None]
    whole = audio.LogMel(tiny.audio).double().of_file(wave, context)
    batch = segments.cut([(manifest.utterances[0], first)])
    assert whole.shape[-1] == 40 + 2 * context
    crop = whole[..., first : first + frames + 2 * context]
    torch.testing.assert_close(batch.conditioning.mel, crop, rtol=0, atol=1e-9)
    f0 = torch.nn.functional.pad(torch.linspace(0, 200, 40), (context, context))
    torch.testing.assert_close(batch.conditioning.f0[0], f0[first : first + frames + 2 * context])
    hop = tiny.audio.hop_length
    assert torch.equal(batch.audio, wave[:, first * hop : (first + frames) * hop])
    padded = torch.nn.functional.pad(wave, (context * hop, context * hop))
    assert torch.equal(batch.with_margins, padded[:, first * hop : (first + frames + 2 * context) * hop])


def test_frames_are_centred_on_their_hops(tiny: Recipe) -> None:
    """A click in the middle of hop 7 is loudest in frame 7."""
    hop = tiny.audio.hop_length
    click = torch.zeros(1, 20 * hop)
    click[0, 7 * hop + hop // 2] = 1
    mel = audio.LogMel(tiny.audio).of_file(click)
    assert mel.shape == (1, tiny.audio.n_mels, 20)
    assert mel.sum(1).argmax() == 7


def test_digital_silence_has_a_finite_log_mel(tiny: Recipe) -> None:
    mel = audio.LogMel(tiny.audio).of_file(torch.zeros(1, 2000))
    torch.testing.assert_close(mel, torch.full_like(mel, audio.LOG_MEL_FLOOR))


@pytest.mark.parametrize(("length", "padded"), [(0, 0), (1, 200), (200, 200), (201, 400)])
def test_padding_to_hops_loses_and_adds_no_more_than_needed(length: int, padded: int) -> None:
    assert audio.pad_to_hops(torch.ones(length), 200).shape == (padded,)


def test_written_files_hold_the_samples_to_half_a_step(tmp_path: Path) -> None:
    half = torch.cat([speech_like(1000), torch.tensor([1.5, 1.0])])
    wave = torch.cat([half, -half])
    audio.write(tmp_path / "a.wav", wave, 16000)
    assert soundfile.info(tmp_path / "a.wav").subtype == "PCM_16"
    back = recordings.read(tmp_path / "a.wav", 16000)
    assert (back - wave.clamp(-1, 1)).abs().max() <= 1.01 / audio.PCM16_STEPS
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_any_rate_and_channel_count_is_read_as_mono(tmp_path: Path) -> None:
    """A tone of one channel of a stereo 44.1 kHz flac keeps its pitch and has half its amplitude."""
    n = np.arange(44100)
    tone = np.sin(2 * np.pi * 441 * n / 44100)
    soundfile.write(tmp_path / "a.flac", np.stack([tone, 0 * tone], 1), 44100)
    mono = recordings.read(tmp_path / "a.flac", 16000)
    assert mono.shape == (16000,)
    spectrum = torch.fft.rfft(mono).abs()
    assert spectrum.argmax() == 441
    assert abs(spectrum.max() / 8000 - 0.5) < 0.01


def test_unusable_files_are_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("not audio at all, though its name says so")
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "good.wav", speech_like(8000).numpy(), 16000)
    (tmp_path / "cut.wav").write_bytes((tmp_path / "good.wav").read_bytes()[:20])
    expected = {
        "text": "not readable as audio",
        "empty": "not readable as audio",
        "none": "holds no samples",
        "nan": "not finite",
        "cut": "not readable as audio",
        "missing": "no such file",
    }
    for name, reason in expected.items():
        with pytest.raises(AudioError, match=rf"{name}\.wav: .*{reason}"):
            recordings.read(tmp_path / f"{name}.wav", 16000)


def test_level_gain_reaches_the_level_without_clipping() -> None:
    quiet = speech_like(8000) * 0.01
    assert abs(audio.rms_db(quiet * audio.level_gain(quiet, -23)) + 23) < 1e-4
    spiky = torch.zeros(8000)
    spiky[0] = 1
    assert abs(spiky * audio.level_gain(spiky, -23)).max() <= 0.951
    assert audio.level_gain(torch.zeros(10), -23) == 1


def test_segments_start_everywhere_equally_often(tmp_path: Path, tiny: Recipe) -> None:
    """No position of the corpus is favoured: 2 + 5 places in two utterances, the third too short."""
    manifest = corpus(tmp_path / "audio", tiny, [11, 14, 9])
    for i, utterance in enumerate(manifest.utterances):
        labels = (20 * i + torch.arange(utterance.frames)).repeat_interleave(tiny.audio.hop_length) / 1000
        audio.write(tmp_path / "audio" / f"{i}.wav", labels, tiny.audio.sample_rate)
    segments = Segments(manifest, tmp_path / "audio", "train", frames=10, margin=1)
    first = segments.draw([random_stream(0, i) for i in range(3500)]).audio[:, 0]
    labels, counts = (first * 1000).round().int().unique(return_counts=True)
    assert labels.tolist() == [0, 1, 20, 21, 22, 23, 24]
    assert ((counts - 500).abs() < 5 * 500**0.5).all()


def test_segments_longer_than_every_utterance_are_refused(tmp_path: Path, tiny: Recipe) -> None:
    manifest = corpus(tmp_path / "audio", tiny, [11, 14])
    with pytest.raises(CorpusError, match=r"the longest has 14.*lower segment_frames"):
        Segments(manifest, tmp_path / "audio", "train", frames=15, margin=1)


def test_dequantisation_fills_one_step_evenly() -> None:
    steps = (dequantise(torch.full((1, 100_000), 0.25), [random_stream(0)]) - 0.25) * audio.PCM16_STEPS
    assert steps.min() >= -0.5
    assert steps.max() <= 0.5
    assert abs(steps.mean()) < 0.01
    assert abs(steps.var() - 1 / 12) < 0.01


def test_random_streams_repeat_and_differ() -> None:
    draws = [
        torch.rand(4, generator=random_stream(*entropy)).tolist()
        for entropy in [(1, 2), (1, 2), (2, 1), (1, 3), (1,), (1, 0)]
    ]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 5
