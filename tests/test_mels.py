"""Log-mels of other programs: read from their files, of their formats, computed by their code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pytest
import soundfile
import torch

import wavedistill
from tests.conftest import RECIPES, REPOSITORY, speech_like
from wavedistill.experiment.folder import Experiment
from wavedistill.experiment.stage import run_stage
from wavedistill.models.checkpoint import save_model
from wavedistill.models.kinds import build
from wavedistill.recipe.loading import load_recipe
from wavedistill.speech.audio import LogMel, level_gain, pad_to_hops
from wavedistill.speech.heard import Heard
from wavedistill.speech.mels import MelFormat, mel_format, read, read_statistics, upright
from wavedistill.stages import stages_of
from wavedistill.tools.errors import AudioError, UserError
from wavedistill.vocoder.contract import contract, in_words

LJSPEECH = REPOSITORY.parent / "shared" / "data" / "LJSpeech-1.1" / "wavs"
HIFIGAN = load_recipe(RECIPES / "hifigan_mel.toml")
UNITS = HIFIGAN.audio
SOUND = speech_like(256 * 100).numpy()
DYING = SOUND * np.logspace(0, -6, len(SOUND), dtype=np.float32)
"""Sound that falls below every floor."""


def spectrum(wave: np.ndarray, **changes: Any) -> np.ndarray:
    """Mel-filtered magnitudes (n_mels, F) by librosa alone, or powers, with silence around."""
    about = {"sr": 22050, "n_fft": 1024, "hop": 256, "n_mels": 80, "fmin": 0, "fmax": 8000, "power": 1}
    about |= changes
    hop, power, n_fft = (about.pop(name) for name in ("hop", "power", "n_fft"))
    padded = np.pad(wave, (n_fft - hop) // 2)
    magnitude = np.abs(librosa.stft(padded, n_fft=n_fft, hop_length=hop, center=False)) ** power
    return librosa.filters.mel(n_fft=n_fft, **about) @ magnitude


# Formats.


def decibels(magnitude: np.ndarray, reference: float = 0.0) -> np.ndarray:
    return librosa.amplitude_to_db(magnitude, ref=1.0, amin=1e-5, top_db=None) - reference


def unit(magnitude: np.ndarray) -> np.ndarray:
    return np.clip((decibels(magnitude, 20) + 100) / 100, 0, 1)


FORMATS: dict[str, tuple[MelFormat, float, Callable[[np.ndarray], np.ndarray]]] = {
    "ln": (MelFormat(), 1e-5, lambda s: np.log(np.maximum(s, 1e-5))),
    "log10": (MelFormat("log10"), 1e-5, lambda s: np.log10(np.maximum(s, 1e-10))),
    "db": (MelFormat("db"), 1e-5, decibels),
    "db with a reference": (MelFormat("db", 20), 1e-5, lambda s: decibels(s, 20)),
    "unit": (MelFormat("unit"), 1e-4, unit),
    "unit with a reference": (MelFormat("unit", 0), 1e-5, lambda s: np.clip(decibels(s) / 100 + 1, 0, 1)),
    "symmetric": (MelFormat("symmetric"), 1e-4, lambda s: np.clip(8 * unit(s) - 4, -4, 4)),
    "normalised": (
        MelFormat("log10", None, torch.linspace(-3, -1, 80), torch.linspace(0.5, 0.9, 80)),
        1e-5,
        lambda s: (
            (np.log10(np.maximum(s, 1e-10)) - np.linspace(-3, -1, 80)[:, None]) / np.linspace(0.5, 0.9, 80)[:, None]
        ),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_what_others_compute(name: str) -> None:
    """From one waveform, above that format's floor: the log-mel that this program computes."""
    form, floor, made = FORMATS[name]
    magnitude = spectrum(DYING)
    assert 0.3 < (magnitude > floor).mean() < 1, "some below, to be left out"
    found = form.natural(torch.from_numpy(made(magnitude)).float())
    expected = LogMel(UNITS).of_file(torch.from_numpy(DYING)[None])[0]
    assert expected.shape == found.shape == (80, 100)
    above = torch.from_numpy(magnitude > 1.01 * floor)
    torch.testing.assert_close(found[above], expected[above], rtol=0, atol=2e-3)


def test_a_format_that_is_none_and_statistics_of_other_bands_are_named() -> None:
    with pytest.raises(UserError, match="nepers: no format of log-mels; there are ln, log10, db, unit, symmetric"):
        mel_format("nepers")
    with pytest.raises(UserError, match="statistics are of 3 bands, and the log-mel has 80"):
        MelFormat("ln", None, torch.zeros(3), torch.ones(3)).natural(torch.zeros(80, 4))


def test_statistics_are_read_as_others_write_them(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).normal(3, 2, (500, 80))
    mean, scale = frames.mean(0), frames.std(0)
    np.save(tmp_path / "pwg.npy", np.stack([mean, scale]))
    np.savez(tmp_path / "named.npz", mean=mean[None], scale=scale[None])
    np.savez(tmp_path / "std.npz", mean=mean, std=scale)
    sums = {"count": len(frames), "sum": frames.sum(0), "sum_square": np.square(frames).sum(0)}
    np.savez(tmp_path / "espnet.npz", **sums)
    for name in ("pwg.npy", "named.npz", "std.npz", "espnet.npz"):
        found = read_statistics(tmp_path / name)
        for one, other in zip(found, (mean, scale), strict=True):
            np.testing.assert_allclose(one.numpy(), other, rtol=1e-5, err_msg=name)


# Files.

MEL = np.random.default_rng(0).normal(-5, 1, (80, 7)).astype(np.float32)


def saved(path: Path, content: Any) -> Path:
    if path.suffix == ".npy":
        np.save(path, content)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.npy", MEL),
        ("m.npy", MEL[None]),
        ("m.npy", MEL.astype(np.float64)),
        ("m.npz", {"anything": MEL}),
        ("m.npz", {"mel": MEL[None], "f0": np.zeros(7)}),
        ("m.pt", torch.from_numpy(MEL)),
        ("m.pth", torch.from_numpy(MEL)[None].requires_grad_()),
        ("m.pt", {"mel": torch.from_numpy(MEL), "text": "hello"}),
        ("M.PT", [torch.from_numpy(MEL)][0]),
    ],
)
def test_a_log_mel_is_found_in_whatever_it_comes_in(tmp_path: Path, name: str, content: Any) -> None:
    assert torch.equal(read(saved(tmp_path / name, content)), torch.from_numpy(MEL))


@pytest.mark.parametrize("kind", [np.float16, torch.bfloat16])
def test_lower_precision_is_read(tmp_path: Path, kind: Any) -> None:
    lowered = MEL.astype(kind) if kind is np.float16 else torch.from_numpy(MEL).to(kind)
    found = read(saved(tmp_path / ("m.npy" if kind is np.float16 else "m.pt"), lowered))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.from_numpy(MEL), rtol=0.01, atol=0)


def test_a_log_mel_is_turned_where_only_that_fits() -> None:
    mel = torch.from_numpy(MEL)
    assert upright(mel, 80) == (mel, None)
    turned, said = upright(mel.T, 80)
    assert torch.equal(turned, mel)
    assert said == "has shape (7, 80): taken as (frames, bands)"
    square = torch.zeros(80, 80)
    assert upright(square, 80) == (square, None)
    with pytest.raises(AudioError, match=r"has shape \(128, 7\); the model was trained with 80 bands"):
        upright(torch.zeros(128, 7), 80)


def test_log_mel_files_are_checked(tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "zip.npz").write_bytes(b"PK and no more")
    np.save(tmp_path / "whole.npy", np.zeros((80, 7), int))
    np.save(tmp_path / "flat.npy", np.zeros(80))
    np.save(tmp_path / "many.npy", np.zeros((2, 80, 7)))
    np.save(tmp_path / "infinite.npy", np.full((80, 7), -np.inf))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=MEL, b=MEL)
    torch.save({"mel": Path("x")}, tmp_path / "code.pt")
    torch.save([MEL.tolist()], tmp_path / "list.pt")
    expected = {
        "text.npy": "not a NumPy array",
        "empty.npy": "not a NumPy array",
        "zip.npz": "not a NumPy array",
        "whole.npy": "values of type int64",
        "flat.npy": r"shape \(80,\)",
        "many.npy": r"shape \(2, 80, 7\)",
        "infinite.npy": "not finite; is there a logarithm of 0",
        "objects.npy": "not a NumPy array",
        "two.npz": "holds a, b; expected one array, or one called mel",
        "code.pt": "not a file of tensors alone",
        "list.pt": "holds list; expected an array",
        "missing.npy": "no such file",
        "missing.pt": "no such file",
    }
    for name, reason in expected.items():
        with pytest.raises(AudioError, match=rf"{name}: .*{reason}"):
            read(tmp_path / name)


# HiFi-GAN's.


def hifigan(wave: np.ndarray) -> np.ndarray:
    """A log-mel as HiFi-GAN's `meldataset.py` defines it, by librosa: reflection by 384 samples, and no centring."""
    cut = librosa.stft(np.pad(wave, 384, mode="reflect"), n_fft=1024, hop_length=256, center=False)
    magnitude = np.sqrt(cut.real**2 + cut.imag**2 + 1e-9)
    filters = librosa.filters.mel(sr=22050, n_fft=1024, n_mels=80, fmin=0, fmax=8000)
    return np.log(np.maximum(filters @ magnitude, 1e-5))


def test_log_mels_are_those_of_hifigan_but_for_the_outermost_two_frames() -> None:
    """There, HiFi-GAN has a reflection where this program has silence."""
    expected, found = hifigan(SOUND), LogMel(UNITS).of_file(torch.from_numpy(SOUND)[None])[0].numpy()
    assert found.shape == expected.shape == (80, 100)
    difference = np.abs(found - expected)
    assert difference[:, 2:98].max() < 5e-5
    outermost = np.concatenate([difference[:, :2], difference[:, 98:]], 1)
    assert 0.05 < outermost.max() < 2


# Through a vocoder.


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained student of HiFi-GAN's log-mels, which has heard LJSpeech."""
    paths = sorted(LJSPEECH.glob("*.wav"))
    if len(paths) < 24:
        pytest.skip("the voice is that of LJSpeech clips beside the repository, which are not there")
    heard = []
    for path in paths[:16]:
        clip = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        clip = pad_to_hops(clip * level_gain(clip, UNITS.level_db), 256)
        mel = LogMel(UNITS).of_file(clip[None])[0]
        heard += [mel[:, first : first + 40] for first in range(0, mel.shape[1] - 40, 20)]
    path = tmp_path_factory.mktemp("hifigan") / "checkpoint.safetensors"
    weights = build(HIFIGAN, "student", 0).state_dict()
    save_model(path, "student", HIFIGAN, 1, Heard.of(torch.stack(heard), torch.zeros(1)), weights)
    return path


def of_rate(wave: np.ndarray, **changes: Any) -> np.ndarray:
    return spectrum(librosa.resample(wave, orig_sr=22050, target_sr=16000), sr=16000, **changes)


def ln(magnitude: np.ndarray, floor: float = 1e-5) -> np.ndarray:
    return np.log(np.maximum(magnitude, floor))


def standard(mel: np.ndarray) -> np.ndarray:
    return (mel - mel.mean(1, keepdims=True)) / mel.std(1, keepdims=True)


SHAPE = "the model was trained with 80 bands"
FOREIGN: dict[str, tuple[str | None, bool, Callable[[np.ndarray], np.ndarray]]] = {
    "its own": (None, False, lambda w: ln(spectrum(w))),
    "log10": ("log10 of amplitudes: give --mel-format log10", True, lambda w: ln(spectrum(w), 1e-10) / np.log(10)),
    "decibels": ("looks like decibels: give --mel-format db", True, lambda w: decibels(spectrum(w))),
    "decibels of powers": (
        "looks like decibels of powers: give --mel-format db --mel-ref-db -13.3",
        True,
        lambda w: librosa.power_to_db(spectrum(w, power=2)),
    ),
    "[0, 1]": ("give --mel-format unit", True, lambda w: unit(spectrum(w))),
    "[-4, 4]": ("give --mel-format symmetric", True, lambda w: 8 * unit(spectrum(w)) - 4),
    "powers": ("natural logarithms of powers", True, lambda w: ln(spectrum(w, power=2), 1e-10)),
    "torchaudio's default": (
        "looks like powers of mel filters without area normalisation",
        True,
        lambda w: ln(spectrum(w, power=2, norm=None, htk=True), 1e-10),
    ),
    "HTK's scale": ("up to about 8000 Hz on HTK's mel scale", False, lambda w: ln(spectrum(w, htk=True))),
    "128 bands": (SHAPE, True, lambda w: ln(spectrum(w, n_mels=128))),
    "another upper frequency": ("up to about 11025 Hz on Slaney's", False, lambda w: ln(spectrum(w, fmax=11025))),
    "half the hop": ("0.5 times as much from frame to frame", False, lambda w: ln(spectrum(w, hop=128))),
    # Bands in Hz are the same, and the hop is so in ms, nearly.
    "another rate": (None, False, lambda w: ln(of_rate(w, hop=200))),
    "transposed": ("taken as (frames, bands)", False, lambda w: ln(spectrum(w)).T),
    "a batch in float16": (None, False, lambda w: ln(spectrum(w))[None].astype(np.float16)),
    "standardised": ("give --mel-stats with its mean and scale", True, lambda w: standard(ln(spectrum(w)))),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_others_compute_from_the_training_s_voice_is_told(student: Path, tmp_path: Path, name: str) -> None:
    """And refused, where its numbers mean something else. Of four clips that were not in the training."""
    message, refused, made = FOREIGN[name]
    vocoder, right = wavedistill.load(student), 0
    for path in sorted(LJSPEECH.glob("*.wav"))[16:20]:
        np.save(tmp_path / "m.npy", made(soundfile.read(path, dtype="float32")[0]))
        try:
            _, said = vocoder._understood(read(tmp_path / "m.npy"), None, "m.npy")
            assert not refused
        except AudioError as error:
            said = [str(error)]
            assert refused
        right += (message in "; ".join(said)) if message else not said
    assert right >= 3, said


def test_a_format_given_is_drawn_as_the_log_mel_it_stands_for(student: Path, tmp_path: Path) -> None:
    """In a program and on the command line; one that is not given is refused, and one in doubt is warned of."""
    vocoder = wavedistill.load(student, passes=1)
    wave = soundfile.read(sorted(LJSPEECH.glob("*.wav"))[1], dtype="float32")[0][:22050]
    mel, other = (
        torch.from_numpy(made(spectrum(wave))).float() for made in (ln, lambda s: np.log10(np.maximum(s, 1e-5)))
    )
    expected = vocoder.vocode(mel)
    torch.testing.assert_close(vocoder.vocode(other, format="log10"), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(
        vocoder.vocode(other, format=wavedistill.mel_format("log10")), expected, rtol=0, atol=1e-3
    )
    np.savez(tmp_path / "m.npz", mel=other.numpy())
    torch.testing.assert_close(vocoder.vocode(tmp_path / "m.npz", format="log10"), expected, rtol=0, atol=1e-3)
    with pytest.raises(AudioError, match="log-mel: looks like log10 of amplitudes"):
        vocoder.vocode(other)
    with pytest.warns(UserWarning, match="log-mel: looks like log10 of amplitudes: give --mel-format log10"):
        vocoder.vocode(other, format="ln")
    with pytest.warns(UserWarning, match="taken as"):
        torch.testing.assert_close(vocoder.vocode(mel.T), expected)


def test_a_checkpoint_says_what_it_expects_and_gives(student: Path) -> None:
    figures = contract(student)
    assert json.loads(json.dumps(figures)) is not None
    mel, model = figures["log_mel"], figures["model"]
    made = {"sr": mel["sample_rate"], "hop": mel["hop_length"], "fmin": mel["f_min"], "fmax": mel["f_max"]}
    kept = {name: mel[name] for name in ("n_fft", "n_mels", "norm", "power")}
    found = ln(spectrum(SOUND, **made, **kept), mel["floor"])
    expected = wavedistill.load(student).log_mel(torch.from_numpy(SOUND)).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert mel["padding"] == 384
    assert len(mel["mean"]) == len(mel["std"]) == 80
    assert (model["kind"], model["passes"], model["in_parallel"], model["step"]) == ("iaf", 4, True, 1)
    assert model["receptive_field"] == 8 * (2 + 63) - 1
    assert model["latency"] == 384 + 7 * 256 + 4 * 768
    assert model["weights"] == sum(weight.numel() for weight in build(HIFIGAN, "student", 0).parameters())
    assert figures["file"]["licence"].startswith("LJ Speech")
    words = in_words(figures)
    for word in ("22050 Hz", "256 samples, 11.6 ms", "-21 dB", "0 to f_max 8000 Hz", "LJ Speech", "1e-05"):
        assert word in words


TWO_STEPS = ("steps=2", "validate_every=2", "validate_batches=1", "batch_size=2", "compile=false")


@pytest.mark.slow
def test_a_vocoder_for_hifigan_s_log_mels_is_trained(tmp_path: Path) -> None:
    """The recipe as it is, in few steps."""
    if not LJSPEECH.is_dir():
        pytest.skip("LJSpeech clips beside the repository are not there")
    steps = [f"training.{name}.{key}" for name in ("teacher", "student") for key in TWO_STEPS]
    recipe = load_recipe(RECIPES / "hifigan_mel.toml", [f"corpus.path={LJSPEECH}", "corpus.limit=8", *steps])
    experiment = Experiment(recipe, tmp_path / "hifigan_mel", torch.device("cpu"), 1)
    for name in ("prepare", "teacher", "student"):
        run_stage(stages_of(recipe)[name], experiment)
    vocoder = wavedistill.load(experiment.checkpoint("student"))
    assert vocoder.heard.mel_change is not None
    wave = vocoder.vocode(LJSPEECH / "LJ001-0002.wav")
    assert wave.isfinite().all()
