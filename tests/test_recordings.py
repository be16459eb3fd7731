"""Whatever a recording is like, it is read right, or what is wrong with it is said."""

import math
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import soxr
import torch

from tests.conftest import HEARD, REPOSITORY, speech_like
from wavedistill.corpus import media, recordings
from wavedistill.corpus.recordings import flat_tops, loudness, read, speech
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech import audio
from wavedistill.speech.conditioning import Conditioning
from wavedistill.tools.errors import AudioError
from wavedistill.vocoder import vocoder

RATE = 16000
SPEECH = speech_like(2 * RATE).numpy()


def flac(path: Path, frames: int | None = None) -> bytes:
    """A FLAC file's content, whose header says how many samples it has; 0 is what a program says that cannot know."""
    soundfile.write(path, SPEECH, RATE)
    content = bytearray(path.read_bytes())
    if frames is not None:
        content[21] &= 0xF0  # of 36 bits that end at byte 26
        content[22:26] = struct.pack(">I", frames)
    return bytes(content)


def wav(path: Path, data: int | None = None, keep: int | None = None) -> bytes:
    """A wav file's content, whose header promises so many bytes, cut off after so many."""
    soundfile.write(path, SPEECH, RATE)
    content = bytearray(path.read_bytes())
    if data is not None:
        content[40:44] = struct.pack("<I", data)
    return bytes(content[:keep])


@pytest.mark.parametrize("rate", [RATE, 8000, 22050, 44100, 44101, 48003])
@pytest.mark.parametrize("block", [1, 700, 10**6])
def test_a_file_is_read_in_blocks_as_it_would_be_whole(
    tmp_path: Path, rate: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at rates that share no factor with the recipe's, where a table of filters would take gigabytes."""
    samples = np.stack([speech_like(3000, i).numpy() + 0.1 for i in range(2)], 1)
    soundfile.write(tmp_path / "a.flac", samples, rate, subtype="PCM_24")
    monkeypatch.setattr(recordings, "BLOCK_VALUES", block)
    mono = soundfile.read(tmp_path / "a.flac")[0].mean(1)
    expected = soxr.resample(mono - mean if (mean := mono.mean()) else mono, rate, RATE)
    found = read(tmp_path / "a.flac", RATE)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: flac(path.with_suffix(".flac"), 0),
        lambda path: wav(path, 0xFFFFFFFF),
        lambda path: wav(path, 0x7FFFFFFF - 36),
        lambda path: wav(path, 0)[:4] + struct.pack("<I", 8) + wav(path, 0)[8:],
    ],
    ids=["FLAC of unknown length", "wav of unknown length", "as sox writes it", "never closed"],
)
def test_what_was_written_to_a_pipe_is_read_to_its_end(tmp_path: Path, make: Callable[[Path], bytes]) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(make(path))
    np.testing.assert_allclose(read(path, RATE).numpy(), SPEECH - SPEECH.mean(), atol=1e-4)


FAULTS: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "half a wav": (r"is cut off: 1.00 of 2.00 seconds are there; copy", lambda p: wav(p, keep=44 + 2 * RATE)),
    "half a FLAC": (r"is cut off: 0\.\d\d of 2.00 seconds are there", lambda p: flac(p)[: len(flac(p)) // 2]),
    "less than promised": (r"is cut off: 2.00 of 2.50 seconds are there", lambda p: flac(p, 5 * RATE // 2)),
    "half an AIFF": (r"is cut off: \d\.\d\d of 2.00 seconds", lambda p: as_kind(p, "AIFF")[:RATE]),
    "no size": (r"says that it holds no samples, and 64,000 bytes follow.*sox --ignore-length", lambda p: wav(p, 0)),
    "16-bit scale": (
        r"values up to 20000: floating point on the scale of 16-bit integers; divide by 32768",
        lambda p: floating(p, SPEECH / np.abs(SPEECH).max() * 20000),
    ),
    "24-bit scale": (r"24-bit integers; divide by 8388608", lambda p: floating(p, SPEECH * 8e7)),
    "32-bit scale": (r"32-bit integers; divide by 2147483648", lambda p: floating(p, SPEECH * 2e10)),
    "flat tops": (r"is clipped: \d\d\.\d% of its", lambda p: floating(p, (40 * SPEECH).clip(-2, 2))),
    "clipped": (r"is clipped: \d\d\.\d% of its", lambda p: as_kind(p, "WAV", 40 * SPEECH)),
    "clipped FLAC": (r"is clipped: \d\d\.\d% of its", lambda p: as_kind(p, "FLAC", 40 * SPEECH)),
    "a slow clock": (r"says that it has 5 samples a second", lambda p: as_kind(p, "WAV", rate=5)),
    "one sample": (r"holds 1 samples, too few to bring to 16000 Hz", lambda p: as_kind(p, "WAV", SPEECH[:1], 48000)),
    "NaN": ("holds samples that are not finite", lambda p: floating(p, SPEECH * np.nan)),
    "no samples": ("holds no samples; remove it", lambda p: as_kind(p, "WAV", SPEECH[:0])),
    "half an Ogg": ("not readable as audio|holds no samples", lambda p: as_kind(p, "OGG")[:5000]),
    "words": ("not readable as audio", lambda p: b"words"),
}


def as_kind(path: Path, kind: str, samples: np.ndarray = SPEECH, rate: int = RATE) -> bytes:
    soundfile.write(path, samples, rate, format=kind)
    return path.read_bytes()


def floating(path: Path, samples: np.ndarray) -> bytes:
    soundfile.write(path, samples, RATE, format="WAV", subtype="FLOAT")
    return path.read_bytes()


@pytest.mark.parametrize("name", ["plain", "two\nlines", "\udcff\udc80", "u" * 250])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_file_is_said_in_one_line_that_names_it(tmp_path: Path, fault: str, name: str) -> None:
    message, make = FAULTS[fault]
    content = make(tmp_path / ("a.flac" if "FLAC" in fault or fault == "less than promised" else "a.wav"))
    path = tmp_path / f"{name}.wav"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=message) as caught:
        read(path, RATE, most_clipped=0.001)
    assert str(caught.value).isprintable()
    assert str(caught.value).encode()
    assert name[:1] not in "pu" or str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied"), "cannot be read: permission denied"),
        (OSError(5, "Input/output error"), "cannot be read: input/output error"),
        (ZeroDivisionError("a decoder's\nown"), r"not readable as audio: a decoder's\\nown; convert it"),
        (MemoryError(), "not readable as audio: MemoryError"),
    ],
)
def test_whatever_a_decoder_stumbles_over_names_the_file(
    tmp_path: Path, error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise error

    soundfile.write(tmp_path / "a.wav", SPEECH, RATE)
    monkeypatch.setattr(recordings, "_opened", fail)
    with pytest.raises(AudioError, match=rf"^\S+/a\.wav: {said}"):
        read(tmp_path / "a.wav", RATE)


def test_folders_and_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"is a folder; give the files in it: .*/\*\.wav"):
        read(tmp_path, RATE)
    with pytest.raises(AudioError, match=r"a\.wav: no such file"):
        read(tmp_path / "a.wav", RATE)
    with pytest.raises(AudioError, match="cannot be read: file name too long"):
        read(tmp_path / ("a" * 300), RATE)


def test_full_scale_is_no_clipping_where_a_file_holds_more(tmp_path: Path) -> None:
    """Peaks, of whole numbers as of floating point beyond 1, are not flat tops."""
    loud = 3 * SPEECH / np.abs(SPEECH).max()
    (tmp_path / "a.wav").write_bytes(floating(tmp_path / "a.wav", loud))
    torch.testing.assert_close(read(tmp_path / "a.wav", RATE, 0.0), torch.from_numpy(loud - loud.mean()))
    for samples, floats, expected in ((loud / 3, False, 0), (loud, True, 0), (loud[:2], False, 0)):
        assert flat_tops(samples[:, None], floats) == expected
    assert flat_tops(loud.clip(-1, 1)[:, None], False) >= flat_tops(loud.clip(-1, 1)[:, None], True) > 1000


def test_clipping_is_counted_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    square = np.tile(np.repeat([1.0, -1.0], 4), 100)
    soundfile.write(tmp_path / "a.wav", square, RATE)
    for block in (1, 3, 4, 10**6):
        monkeypatch.setattr(recordings, "BLOCK_VALUES", block)
        found = recordings._survey(tmp_path / "a.wav")
        assert found.frames == 800
        assert found.clipped == flat_tops(soundfile.read(tmp_path / "a.wav")[0][:, None], False) / 798


def encoded(path: Path, codec: str, rate: int) -> Path:
    """Speech as a phone, a browser or a video has it."""
    av = pytest.importorskip("av", reason="m4a and webm are read by the package av, of the extra media")
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.stack([SPEECH, SPEECH]), format="fltp", layout="stereo")
        frame.sample_rate = RATE
        resampler = av.AudioResampler(format=stream.format, layout="stereo", rate=rate)
        for piece in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("a.m4a", "aac", 44100),
        ("a.MP4", "aac", RATE),
        ("a.aac", "aac", RATE),
        ("a.webm", "libopus", 48000),
        ("a.mka", "libopus", 48000),
    ],
)
def test_what_libsndfile_does_not_read_is_read_by_av(tmp_path: Path, name: str, codec: str, rate: int) -> None:
    """But for what the codec takes away; an encoder's silence may come first and last."""
    path = encoded(tmp_path / name, codec, rate)
    assert recordings.rate(path) == rate
    found = read(path, RATE).numpy()
    assert 0 <= len(found) - len(SPEECH) < 3000
    if name != "a.aac":  # of which nobody knows how long it is
        assert recordings.seconds(path) == pytest.approx(len(found) / RATE, abs=0.2)
    late = int(np.correlate(found, SPEECH[: len(SPEECH) - 3000], "valid").argmax())
    same = found[late : late + len(SPEECH) - 3000]
    assert np.square(same - SPEECH[: len(same)]).mean() < 0.3 * np.square(SPEECH).mean()


def test_what_is_wrong_with_a_file_of_av_s_is_said_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = encoded(tmp_path / "cut.webm", "libopus", 48000)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (tmp_path / "words.m4a").write_text("words" * 100)
    for name, message in (
        ("cut.webm", r"is cut off: \d\.\d\d of 1\.9\d seconds are there"),
        ("words.m4a", "not readable as audio: invalid data found when processing input; convert it"),
        ("gone.m4a", "no such file"),
    ):
        with pytest.raises(AudioError, match=rf"{name}: {message}"):
            read(tmp_path / name, RATE)
    monkeypatch.setattr(media, "INSTALLED", False)
    with pytest.raises(AudioError, match=r"words\.m4a: \.m4a files are read by .* pip install .wavedistill\[media\]"):
        read(tmp_path / "words.m4a", RATE)


@pytest.mark.parametrize("rate", [RATE, 22050])
def test_an_offset_is_no_sound(tmp_path: Path, tiny: Recipe, rate: int) -> None:
    """It is taken off, so that silence is silent again, and what is left is what there was without it."""
    parts = [np.zeros(rate), speech_like(rate).numpy(), np.zeros(rate)]
    clean = np.concatenate(parts)
    for name, offset in (("clean", 0.0), ("offset", 0.02), ("nothing", None)):
        samples = clean + offset if offset is not None else np.full_like(clean, 0.3)
        soundfile.write(tmp_path / f"{name}.wav", samples, rate, subtype="FLOAT")
    without, with_offset, nothing = (read(tmp_path / f"{name}.wav", RATE) for name in ("clean", "offset", "nothing"))
    torch.testing.assert_close(with_offset, without, atol=1e-6, rtol=0)
    assert not nothing.any(), "nothing but an offset is silence"
    (piece,), _ = speech(with_offset, tiny)
    assert piece.stop - piece.start < 1.2 * RATE, "the silence around it is trimmed"


@pytest.mark.parametrize("length", [1, 511, 512, 513, 5000, 70_000])
def test_loudness_and_trimming_are_those_of_librosa(tiny: Recipe, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    swell = torch.rand(length // 700 + 2, generator=generator).pow(9).repeat_interleave(700)[:length]
    samples = torch.randn(length, generator=generator) * swell
    expected = librosa.feature.rms(y=samples.numpy())[0]
    np.testing.assert_allclose(loudness(samples), expected, rtol=1e-4, atol=1e-9)
    (trimmed,), _ = speech(samples, tiny)
    np.testing.assert_array_equal(samples[trimmed].numpy(), librosa.effects.trim(samples.numpy(), top_db=40)[0])


@pytest.mark.parametrize("hops", [0, 1, 7, 18.5])
@pytest.mark.parametrize("frames", [0.1, 1, 2.7, 1024])
def test_a_log_mel_in_blocks_is_that_of_the_whole(tiny: Recipe, hops: int, frames: float) -> None:
    """Also where pieces and the whole are no whole number of hops."""
    samples, log_mel = speech_like(math.ceil(hops * 200))[None].double(), audio.LogMel(tiny.audio).double()
    pieces = list(log_mel.of_blocks(samples.split(int(frames * 200), 1), 3))
    assert max(piece.shape[-1] for piece in pieces) <= max(frames + 3, 3)
    samples = audio.pad_to_hops(samples, 200)
    expected = log_mel.of_file(samples, 3) if hops else torch.full((1, 40, 6), audio.LOG_MEL_FLOOR).double()
    torch.testing.assert_close(torch.cat(pieces, -1), expected, atol=1e-6, rtol=0)


def test_a_log_mel_is_as_exact_beside_networks_in_bfloat16(tiny: Recipe) -> None:
    """A stream computes it while its networks are under autocast."""
    samples, log_mel = speech_like(4000)[None], audio.LogMel(tiny.audio)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = log_mel.of_file(samples)
    exact = audio.LogMel(tiny.audio).double().of_file(samples.double())
    torch.testing.assert_close(lowered, exact.float(), rtol=0, atol=1e-3)


def test_a_recording_is_synthesised_at_the_level_that_it_would_be_trained_at(
    tmp_path: Path, tiny: Recipe, tiny_model: Callable[[str], WaveformModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silence around speech changes neither level."""
    sound = torch.cat([torch.zeros(RATE), 0.2 * speech_like(RATE), torch.zeros(RATE)])
    soundfile.write(tmp_path / "a.wav", sound.numpy(), RATE, subtype="FLOAT")
    samples = read(tmp_path / "a.wav", RATE)
    (piece,), gain = speech(samples, tiny)
    assert audio.rms_db(samples[piece] * gain) == pytest.approx(tiny.audio.level_db)
    seen: list[torch.Tensor] = []

    def stream(model: WaveformModel, told: list[Conditioning], noise: Callable, **_: object) -> list[torch.Tensor]:
        seen.extend(piece.mel for piece in told)
        return [noise(3 * RATE)]

    monkeypatch.setattr(vocoder, "stream", stream)
    loaded = vocoder.Vocoder("student", tiny, HEARD, tiny_model("student"))
    wave, _ = loaded.of_file(tmp_path / "a.wav", 0, 1e-3)
    expected = audio.LogMel(tiny.audio).of_file(samples[None] * gain, loaded.model.margin)
    torch.testing.assert_close(torch.cat(seen, -1), expected, atol=1e-5, rtol=0)
    assert float(wave.std()) == pytest.approx(1e-3 / gain, rel=0.02)


MEASURE = """
import resource, sys, torch
from pathlib import Path
from tests.conftest import HEARD
from wavedistill.corpus import clips, recordings
from wavedistill.corpus.sources import Source
from wavedistill.models.kinds import build
from wavedistill.recipe.loading import load_recipe
from wavedistill.speech import audio
from wavedistill.vocoder import vocoder

what, path, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
recipe = load_recipe(Path("recipes/tiny.toml"))

def stream(model, told, noise, **_):  # in place of the networks, which take minutes
    padding = 2 * model.margin
    for piece in told:
        frames = max(0, piece.frames - padding)
        padding -= piece.frames - frames
        if frames:
            yield noise(frames * recipe.audio.hop_length)

def work(path):
    if what == "prepare":
        source = Source("a", "a", lambda rate: recordings.read(path, rate))
        assert clips._clips(source, recipe, folder)
    else:
        vocoder.stream = stream
        wave, _ = vocoder.Vocoder("student", recipe, HEARD, build(recipe, "student", 1)).of_file(path, 0, 0.01)
        audio.write(folder / "out.wav", wave, 16000)

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

work(path.with_name("short.wav"))
before = peak()
work(path)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["prepare", "generate"])
def test_memory_grows_by_little_more_than_the_samples_themselves(tmp_path: Path, what: str) -> None:
    """A sample takes 4 bytes: in the recording, its speech, the noise and the waveform, and in nothing else."""
    minutes, limit = 4, 20
    words = np.concatenate([speech_like(RATE, i).numpy() * (i % 5 != 4) for i in range(60)])
    soundfile.write(tmp_path / "short.wav", words[: 20 * RATE], RATE)
    soundfile.write(tmp_path / "long.wav", np.tile(words, minutes), RATE)
    command = [sys.executable, "-c", MEASURE, what, str(tmp_path / "long.wav"), str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < limit * minutes * 60 * RATE
