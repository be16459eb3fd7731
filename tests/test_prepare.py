"""From recordings to utterances: what is accepted, what is refused, and what is split how."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from tests.conftest import RECIPES, REPOSITORY, speech_like
from wavedistill import audio, stages
from wavedistill.config import DebianCorpus, Recipe, validate_recipe
from wavedistill.corpora import _command, sources
from wavedistill.data import Manifest, read_f0, read_samples
from wavedistill.errors import CorpusError
from wavedistill.experiment import Experiment, run_stage
from wavedistill.stages import STAGES
from wavedistill.stages.prepare import Clip, splits

Prepare = Callable[..., Experiment]


@pytest.fixture
def voice(tmp_path: Path) -> Path:
    """A folder of five good recordings of different kinds."""
    folder = tmp_path / "voice"
    (folder / "deeper").mkdir(parents=True)
    for i, (name, rate) in enumerate([("a.wav", 16000), ("b.wav", 22050), ("c.ogg", 16000), ("deeper/a.wav", 16000)]):
        soundfile.write(folder / name, speech_like(rate * 2, i).numpy(), rate)
    stereo = torch.stack([speech_like(88200, 8), speech_like(88200, 9)], 1)
    soundfile.write(folder / "d.flac", stereo.numpy(), 44100)
    (folder / "notes.txt").write_text("not a recording")
    (folder / "._a.wav").write_bytes(b"what macOS leaves")
    return folder


@pytest.fixture
def prepare(tmp_path: Path, tiny_data: dict[str, Any]) -> Prepare:
    """Run the prepare stage on a folder."""

    def run(folder: Path, **changes: Any) -> Experiment:
        corpus = {"kind": "folder", "path": str(folder)}
        corpus.update({key: changes.pop(key) for key in list(changes) if key == "limit"})
        settings = {**tiny_data["prepare"], **changes}
        recipe = validate_recipe({**tiny_data, "corpus": corpus, "prepare": settings}, "mine.toml")
        experiment = Experiment(recipe, tmp_path / "exp", torch.device("cpu"))
        run_stage(STAGES["prepare"], experiment)
        return experiment

    return run


def test_every_readable_format_becomes_level_mono_utterances(voice: Path, prepare: Prepare) -> None:
    experiment = prepare(voice)
    manifest = Manifest.read(experiment.manifest)
    assert len(manifest.utterances) == 5
    assert {u.source for u in manifest.utterances} == {"a.wav", "b.wav", "c.ogg", "d.flac", "deeper/a.wav"}
    assert {u.split for u in manifest.utterances} == {"train", "valid", "test"}
    for utterance in manifest.utterances:
        samples = read_samples(experiment.audio, utterance)
        assert len(samples) == utterance.frames * 200
        assert abs(len(samples) - 32000) <= 200
        assert abs(audio.rms_db(samples) + 23) < 0.2


def test_silence_at_the_ends_is_trimmed_and_the_gain_recorded(voice: Path, prepare: Prepare) -> None:
    for path in voice.glob("*.wav"):
        path.unlink()
    padded = torch.cat([torch.zeros(16000), speech_like(32000) * 0.5, torch.zeros(8000)])
    soundfile.write(voice / "padded.wav", padded.numpy(), 16000, subtype="FLOAT")
    manifest = Manifest.read(prepare(voice).manifest)
    (utterance,) = (u for u in manifest.utterances if u.source == "padded.wav")
    assert abs(utterance.frames * 200 - 32000) < 2500
    rms = float((speech_like(32000) * 0.5).square().mean().sqrt())
    assert utterance.gain == pytest.approx(10 ** (-23 / 20) / rms, rel=0.05)


def test_long_recordings_are_cut_at_quiet_places_and_nothing_is_lost(voice: Path, prepare: Prepare) -> None:
    words = [torch.cat([speech_like(14000, i), torch.zeros(2000)]) for i in range(12)]
    soundfile.write(voice / "long.wav", torch.cat(words).numpy(), 16000)
    manifest = Manifest.read((experiment := prepare(voice, max_seconds=3.0)).manifest)
    pieces = [u for u in manifest.utterances if u.source == "long.wav"]
    assert len(pieces) >= 4
    assert len({u.split for u in pieces}) == 1, "pieces of one recording stay together"
    assert all(u.frames * 200 <= 3 * 16000 + 200 for u in pieces)
    samples = [read_samples(experiment.audio, u) for u in pieces]
    assert sum(map(len, samples)) >= 12 * 14000, "no word is lost"


def test_long_pauses_become_neither_silent_nor_amplified_utterances(voice: Path, prepare: Prepare) -> None:
    hiss = 1e-4 * torch.randn(14 * 16000, generator=torch.Generator().manual_seed(0))
    parts = [speech_like(32000), torch.zeros(14 * 16000), speech_like(32000, 1), hiss, speech_like(32000, 2)]
    soundfile.write(voice / "long.wav", torch.cat(parts).numpy(), 16000, subtype="FLOAT")
    experiment = prepare(voice, max_seconds=3.0)
    pieces = [u for u in Manifest.read(experiment.manifest).utterances if u.source == "long.wav"]
    assert len({u.gain for u in pieces}) == 1
    assert all(audio.rms_db(read_samples(experiment.audio, u)) > -30 for u in pieces)
    assert 90_000 < sum(u.frames for u in pieces) * 200 < 110_000


def test_a_damaged_manifest_is_made_again(voice: Path, prepare: Prepare) -> None:
    experiment = prepare(voice)
    experiment.manifest.write_text("{")
    assert "5 utterances" in run_stage(STAGES["prepare"], experiment)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "bad.wav").write_text("words"), r"bad\.wav: not readable as audio"),
        (lambda f: soundfile.write(f / "bad.wav", np.zeros(0), 16000), r"bad\.wav: holds no samples"),
        (lambda f: soundfile.write(f / "bad.wav", np.zeros(9000), 16000), r"bad\.wav: is silent"),
        (lambda f: soundfile.write(f / "bad.wav", speech_like(1000), 16000), r"bad\.wav: is too short: 0\.\d+ s"),
        (lambda f: soundfile.write(f / "bad.wav", 30 * speech_like(20000), 16000), r"bad\.wav: is clipped: \d+"),
        (
            lambda f: soundfile.write(f / "bad.wav", np.full(9000, np.nan), 16000, subtype="FLOAT"),
            r"bad\.wav: holds samples that are not finite",
        ),
        (lambda f: (f / "bad.wav").write_bytes((f / "a.wav").read_bytes()), "bad.wav: holds the same sound as a.wav"),
        (lambda f: (f / "bad.flac").write_bytes((f / "d.flac").read_bytes()[:30]), r"bad\.flac: not readable as audio"),
    ],
)
def test_a_bad_file_stops_the_stage_or_is_left_out_on_request(
    voice: Path, prepare: Prepare, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(voice)
    advice = r".*; 1 of 6 recordings cannot be used .*, and prepare.max_skipped = 0: .* raise it to 0\.17$"
    with pytest.raises(CorpusError, match=message + advice) as caught:
        prepare(voice)
    assert "\n" not in str(caught.value)
    experiment = prepare(voice, max_skipped=0.17)
    assert len(Manifest.read(experiment.manifest).utterances) == 5
    report = json.loads((experiment.root / "prepare.json").read_text())
    assert (report["recordings"], report["utterances"]) == (6, 5)
    assert re.search(message, *report["left_out"])
    assert len(list(experiment.audio.iterdir())) == 2 * 5, "a wav and its F0 each, and nothing else"


def test_all_cores_prepare_what_one_does(voice: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    (voice / "bad.wav").write_text("words")
    one = prepare(voice, max_skipped=0.2)
    before = {path: path.read_bytes() for path in [one.manifest, *one.audio.iterdir()]}
    one.manifest.unlink()
    monkeypatch.setattr(stages.prepare, "FEW", 0)
    prepare(voice, max_skipped=0.2)
    assert {path: path.read_bytes() for path in [one.manifest, *one.audio.iterdir()]} == before


def test_an_interrupted_preparation_goes_on(voice: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    true_read = audio.read

    def reader(path: Path, *args: Any, **options: Any) -> torch.Tensor:
        read.append(path)
        if len(read) == 4:
            raise KeyboardInterrupt
        return true_read(path, *args, **options)

    monkeypatch.setattr(audio, "read", reader)
    with pytest.raises(KeyboardInterrupt):
        prepare(voice)
    assert len(Manifest.read(prepare(voice).manifest).utterances) == 5
    assert len(read) == 4 + 2, "what was done is not done again"
    prepare(voice, trim_db=30.0)
    assert len(read) == 4 + 2 + 5, "other settings prepare everything"
    (voice / "bad.wav").write_text("words")
    with pytest.raises(CorpusError):
        prepare(voice)
    assert len(read) == 4 + 2 + 5 + 6
    prepare(voice, max_skipped=0.2)
    assert len(read) == 4 + 2 + 5 + 6, "to allow more takes no time"


def test_a_peak_at_full_scale_is_not_clipping() -> None:
    wave = speech_like(16000)[:, None].numpy()
    wave /= np.abs(wave).max()
    assert audio.clipped_share(wave) == 0
    assert audio.clipped_share((wave * 4).clip(-1, 1)) > 0.01
    assert audio.clipped_share(wave[:2]) == 0


def test_a_failed_run_keeps_the_corpus_prepared_before(voice: Path, prepare: Prepare) -> None:
    experiment = prepare(voice)
    before = {path: path.read_bytes() for path in [experiment.manifest, *experiment.audio.iterdir()]}
    (voice / "bad.wav").write_text("words")
    with pytest.raises(CorpusError):
        prepare(voice)
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: None, "does not exist"),
        (lambda f: f.write_text("a file"), "is a file, not a folder"),
        (lambda f: f.mkdir(), "holds no audio file"),
    ],
)
def test_a_folder_without_recordings_is_named(
    tmp_path: Path, prepare: Prepare, make: Callable[[Path], Any], message: str
) -> None:
    make(tmp_path / "nothing")
    with pytest.raises(CorpusError, match=f"corpus.path = .*nothing.*{message}"):
        prepare(tmp_path / "nothing")


def test_too_few_utterances_are_refused(voice: Path, prepare: Prepare) -> None:
    with pytest.raises(CorpusError, match="2 utterances: a corpus needs 3"):
        prepare(voice, limit=2)
    with pytest.raises(CorpusError, match=r"is too short: 2\.\d+ s .* prepare.min_seconds = 60.0; 5 of 5 recordings"):
        prepare(voice, min_seconds=60.0)


def test_a_stage_runs_again_only_if_something_changed(voice: Path, prepare: Prepare) -> None:
    experiment = prepare(voice)
    stage = STAGES["prepare"]
    assert run_stage(stage, experiment) == "prepare: up to date"
    next(experiment.audio.iterdir()).unlink()
    assert "5 utterances" in run_stage(stage, experiment), "a lost file is made again"
    (voice / "c.ogg").unlink()
    assert "4 utterances" in run_stage(stage, experiment), "a changed corpus is prepared again"


def test_splits_depend_on_names_and_seed_only(voice: Path, prepare: Prepare) -> None:
    recipe = prepare(voice).recipe
    clips = [Clip(f"{i}", f"file {i // 2}", 10, 1.0, "") for i in range(40)]
    first = splits(clips, recipe)
    assert splits(clips[::-1], recipe) == first
    assert splits(clips, recipe.model_copy(update={"seed": 99})) != first
    assert list(first.values()).count("test") == list(first.values()).count("valid") == 8
    assert all(first[f"{i}"] == first[f"{i + 1}"] for i in range(0, 40, 2)), "pieces of one recording stay together"


def test_synthetic_speech_does_not_depend_on_what_was_said_before(tiny: Recipe) -> None:
    """The synthesiser keeps state in its process: the same sentence, read again in any order, is the same sound."""
    pytest.importorskip("py_nanotts", reason="speech is made by the package py-nanotts")
    first, second = sources(tiny.corpus)[3:5]
    a, b = first.read(16000), second.read(16000)
    assert torch.equal(second.read(16000), b)
    assert torch.equal(first.read(16000), a)
    assert not torch.equal(a[:10000], b[:10000])
    assert a.abs().max() < 1
    assert len(first.read(8000)) == -(-len(a) // 2)


@pytest.fixture
def package(tmp_path: Path, voice: Path) -> tuple[Path, str]:
    """A folder with a Debian package of three recordings, and its digest."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    content = tmp_path / "content"
    (content / "DEBIAN").mkdir(parents=True)
    (content / "DEBIAN" / "control").write_text(
        "Package: voice\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: a voice\n"
    )
    for name in ("a.wav", "b.wav", "d.flac"):
        shutil.copy(voice / name, content / name)
    folder = tmp_path / "fetched"
    folder.mkdir()
    subprocess.run(["dpkg-deb", "-b", content, folder / "voice_1_all.deb"], check=True, capture_output=True)
    return folder, hashlib.sha256((folder / "voice_1_all.deb").read_bytes()).hexdigest()


def debian(folder: Path, sha256: str) -> DebianCorpus:
    return DebianCorpus(kind="debian", package="voice", sha256=sha256, path=str(folder))


def test_a_debian_package_is_unpacked_once_and_read_like_a_folder(package: tuple[Path, str]) -> None:
    folder, sha256 = package
    found = sources(debian(folder, sha256))
    assert [source.origin for source in found] == ["a.wav", "b.wav", "d.flac"]
    assert found[0].read(16000).shape == (32000,)
    (folder / "voice_1_all.deb").unlink()
    assert len(sources(debian(folder, sha256))) == 3, "what is unpacked needs its package no more"


def test_another_package_of_the_same_name_is_refused_and_left_alone(package: tuple[Path, str]) -> None:
    folder, _ = package
    with pytest.raises(CorpusError, match=r"voice_1_all\.deb: its sha256 is .*, not corpus\.sha256"):
        sources(debian(folder, "0" * 64))
    assert [path.name for path in folder.iterdir()] == ["voice_1_all.deb"]


def test_a_damaged_package_is_named_and_leaves_nothing_half_done(package: tuple[Path, str]) -> None:
    folder, _ = package
    (folder / "voice_1_all.deb").write_bytes(b"!<arch>\n")
    sha256 = hashlib.sha256(b"!<arch>\n").hexdigest()
    for _ in range(2):
        with pytest.raises(CorpusError, match=r"dpkg-deb -x voice_1_all\.deb.*; remove .* and fetch it again"):
            sources(debian(folder, sha256))
        assert not (folder / sha256).exists()


def test_a_command_that_fails_without_a_word_is_reported_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"^false: exit code 1; do something else$"):
        _command(["false"], tmp_path, "do something else")


def test_a_system_without_apt_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        CorpusError, match=r"needs apt-get, a part of Debian and Ubuntu; put the package into .*https://packages"
    ):
        sources(debian(tmp_path / "fetched", "0" * 64))


def test_f0_is_prepared_beside_the_audio(voice: Path, prepare: Prepare) -> None:
    experiment = prepare(voice)
    utterance = Manifest.read(experiment.manifest).utterances[0]
    assert read_f0(experiment.audio, utterance).shape == (utterance.frames,)
    path = experiment.audio / f"{utterance.name}.f0.npy"
    for content in (b"not an array", b""):
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=r"\.f0\.npy: cannot be read: delete it and run the prepare stage again"):
            read_f0(experiment.audio, utterance)
    np.save(path, np.zeros(3, np.float32))
    with pytest.raises(CorpusError, match="is not that of its audio"):
        read_f0(experiment.audio, utterance)
    path.unlink()
    prepare(voice)
    assert path.exists(), "prepared again, because a file was gone"


WARM = """
import os, sys, torch
from pathlib import Path
from wavedistill.config import load_recipe
from wavedistill.stages import prepare

def cached():
    return set(Path(os.environ["NUMBA_CACHE_DIR"]).rglob("guf-*.nbc"))

recipe = load_recipe(Path(sys.argv[1]))
list(prepare.utterances(torch.ones(recipe.audio.sample_rate), recipe))
before = cached()
list(prepare.utterances(torch.randn(16 * recipe.audio.sample_rate) * torch.linspace(0, 1, 16 * 16000), recipe))
print(len(before), len(cached() - before))
"""


@pytest.mark.slow
def test_one_process_fills_the_cache_that_several_would_break(tmp_path: Path) -> None:
    """What librosa compiles for a recording is compiled for the sound that `prepare` begins with."""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", WARM, str(RECIPES / "tiny.toml")]
    said = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split()
    assert int(said[0]) > 0
    assert int(said[1]) == 0
