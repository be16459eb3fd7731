"""From recordings to utterances: what is accepted, what is refused, and what is split how."""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from tests.conftest import speech_like
from wavedistill.corpus import clips as clips_of
from wavedistill.corpus import recordings
from wavedistill.corpus.clips import Clip
from wavedistill.corpus.sources import _command, sources, unused
from wavedistill.corpus.splits import splits
from wavedistill.corpus.utterances import Manifest, read_f0, read_samples
from wavedistill.experiment.folder import Experiment
from wavedistill.experiment.stage import run_stage
from wavedistill.recipe.loading import validate_recipe
from wavedistill.recipe.recipe import Recipe
from wavedistill.recipe.sections import DebianCorpus, FolderCorpus
from wavedistill.speech import audio
from wavedistill.stages import stages_of
from wavedistill.tools.errors import CorpusError, RecipeError

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
        run_stage(stages_of(experiment.recipe)["prepare"], experiment)
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
    assert "5 utterances" in run_stage(stages_of(experiment.recipe)["prepare"], experiment)


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
        (
            lambda f: soundfile.write(f / "bad.wav", 1e-4 * speech_like(20000) / 0.07, 16000, subtype="FLOAT"),
            r"bad\.wav: is so soft that it would be amplified by 5\d dB, and prepare.max_gain_db = 40",
        ),
        (
            lambda f: (f / "bad.wav").write_bytes((f / "a.wav").read_bytes()[:40000]),
            r"bad\.wav: is cut off: 1\.25 of 2.00",
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
    assert not report["not_used"]
    assert len(list(experiment.audio.iterdir())) == 2 * 5, "a wav and its F0 each, and nothing else"


@pytest.mark.parametrize("finished", [False, True])
def test_a_fault_of_the_moment_is_not_kept(
    voice: Path, prepare: Prepare, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by a stage that stopped for it, nor by one that left the file out."""

    def refuse(path: Path) -> tuple[int, int]:
        if path.name == "b.wav":
            raise PermissionError(13, "Permission denied")
        return true_chunk(path)

    true_chunk, true_access = recordings._chunk, os.access
    with monkeypatch.context() as patch:
        patch.setattr(recordings, "_chunk", refuse)
        patch.setattr(os, "access", lambda path, mode: Path(path).name != "b.wav" and true_access(path, mode))
        if finished:
            experiment = prepare(voice, max_skipped=1.0)
            (fault,) = json.loads((experiment.root / "prepare.json").read_text())["left_out"]
            assert fault.endswith("b.wav: cannot be read: permission denied")
            assert run_stage(stages_of(experiment.recipe)["prepare"], experiment) == "prepare: up to date"
        else:
            with pytest.raises(CorpusError, match=r"b\.wav: cannot be read: permission denied; 1 of 5"):
                prepare(voice)
    experiment = prepare(voice, max_skipped=1.0 if finished else 0)
    assert len(Manifest.read(experiment.manifest).utterances) == 5


@pytest.mark.parametrize(
    ("spoil", "not_used"),
    [
        (lambda f: (f / "b.M4A").touch(), "1 .m4a file, such as b.M4A: need the package av: pip install"),
        (lambda f: [(f / "deeper" / f"{n}.wma").touch() for n in "ba"], "2 .wma files, such as deeper/a.wma"),
        (lambda f: shutil.copytree(f / "deeper", f / ".Trash"), r"\.Trash, a hidden folder: 1 recordings"),
        (lambda f: shutil.copytree(f / "deeper", f / "x" / ".git" / "y"), r"x/\.git, a hidden folder: 1 recordings"),
        (lambda f: (f / "gone.wav").symlink_to("nothing"), r"gone\.wav: not a file, or a link to nothing"),
        (lambda f: (f / ".hidden").mkdir(), None),
        (lambda f: (f / "around").symlink_to(f), None),
        (lambda f: (f / "deeper" / "again").symlink_to(f / "deeper"), None),
        (lambda f: (f / "a_second_way").symlink_to(f / "deeper"), None),
    ],
)
def test_what_is_not_used_is_told(
    voice: Path,
    prepare: Prepare,
    spoil: Callable[[Path], Any],
    not_used: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what is used has the same name and split as before; m4a is not, where its package is not installed."""
    monkeypatch.setattr(recordings, "READABLE", recordings.READABLE - recordings.MEDIA)
    monkeypatch.setattr(recordings, "UNREADABLE", recordings.MEDIA)
    before = prepare(voice).manifest.read_bytes()
    spoil(voice)
    experiment = prepare(voice, max_seconds=11.0)
    said = json.loads((experiment.root / "prepare.json").read_text())["not_used"]
    assert re.match(not_used, *said) if not_used else not said
    assert (f"not used: {said[0]}" if said else "not used") in capsys.readouterr().err or not said
    assert experiment.manifest.read_bytes() == before


def test_links_are_followed_and_every_kind_is_read(
    tmp_path: Path, voice: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder behind a link, a kind that is not wav, a name that cannot be printed, and one as long as can be."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (voice / "link").symlink_to(elsewhere)
    names = [
        "a.aiff",
        "b.w64",
        "c.caf",
        "d.au",
        "e.mp3",
        "f.oga",
        "new\nline.wav",
        "\udcff.wav",
        "\u0101" * 125 + ".WAV",
    ]
    for number, name in enumerate(names, 20):
        kind = recordings.KINDS[Path(name).suffix.lower()]
        soundfile.write(os.fsencode(elsewhere / name), speech_like(32000, number).numpy(), 16000, format=kind)
    monkeypatch.setattr(clips_of, "FEW", 0)
    experiment = prepare(voice)
    manifest = Manifest.read(experiment.manifest)
    assert len(manifest.utterances) == 5 + len(names)
    assert {"link/a.aiff", "link/new\\nline.wav", "link/\\udcff.wav"} <= {u.source for u in manifest.utterances}
    assert all(u.name.isprintable() for u in manifest.utterances)


def test_a_folder_that_may_not_be_read_is_told(voice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "deeper" and true_access(path, mode))
    corpus = FolderCorpus(kind="folder", path=str(voice))
    assert unused(corpus) == ["deeper, a folder: permission denied"]
    assert len(sources(corpus)) == 4


def test_home_is_known(voice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(voice.parent))
    assert len(sources(FolderCorpus(kind="folder", path="~/voice"))) == 5


@pytest.mark.parametrize(("cores", "room", "workers"), [(1, 1e3, 1), (4, 1e3, 4), (4, 3.3, 3), (4, 0.5, 1), (4, 0, 1)])
def test_long_recordings_have_fewer_processes(
    tmp_path: Path, cores: int, room: float, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as have room, by the length of the longest and the memory that is free."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores))
    paths = [tmp_path / f"{seconds}.wav" for seconds in (1, 3)]
    for path in paths:
        soundfile.write(path, np.zeros(int(path.stem) * 16000), 16000)
    (tmp_path / "words.wav").write_text("words")
    each = clips_of.WORKER_BYTES + clips_of.SAMPLE_BYTES * 3 * 16000
    monkeypatch.setattr(clips_of, "free_memory", lambda: int(room * each))
    assert clips_of._workers([*paths, tmp_path / "words.wav"], 16000) == workers


def test_all_cores_prepare_what_one_does(voice: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    (voice / "bad.wav").write_text("words")
    one = prepare(voice, max_skipped=0.2)
    before = {path: path.read_bytes() for path in [one.manifest, *one.audio.iterdir()]}
    one.manifest.unlink()
    monkeypatch.setattr(clips_of, "FEW", 0)
    prepare(voice, max_skipped=0.2)
    assert {path: path.read_bytes() for path in [one.manifest, *one.audio.iterdir()]} == before


def test_an_interrupted_preparation_goes_on(voice: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    true_read = recordings.read

    def reader(path: Path, *args: Any, **options: Any) -> torch.Tensor:
        read.append(path)
        if len(read) == 4:
            raise KeyboardInterrupt
        return true_read(path, *args, **options)

    monkeypatch.setattr(recordings, "read", reader)
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
    assert len(read) == 4 + 2 + 5 + 6 + 1, "what failed is tried again, and nothing else"


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
    stage = stages_of(experiment.recipe)["prepare"]
    assert run_stage(stage, experiment) == "prepare: up to date"
    next(experiment.audio.iterdir()).unlink()
    assert "5 utterances" in run_stage(stage, experiment), "a lost file is made again"
    (voice / "c.ogg").unlink()
    assert "4 utterances" in run_stage(stage, experiment), "a changed corpus is prepared again"


def test_splits_depend_on_names_and_seed_only(tiny: Recipe) -> None:
    clips = [Clip(f"{i}", f"file {i // 2}", 10, 1.0, "") for i in range(40)]
    first = splits(clips, tiny)
    assert splits(clips[::-1], tiny) == first
    assert splits(clips, tiny.model_copy(update={"seed": 99})) != first
    assert list(first.values()).count("test") == list(first.values()).count("valid") == 8
    assert all(first[f"{i}"] == first[f"{i + 1}"] for i in range(0, 40, 2)), "pieces of one recording stay together"


def split_by(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"prepare": recipe.prepare.model_copy(update=changes)})


@pytest.mark.parametrize("seed", range(40))
def test_splits_are_shares_of_the_sound_and_training_has_the_rest(tiny: Recipe, seed: int) -> None:
    """Whatever the lengths: nobody's share is passed but by the shortest recording there is, and no split is empty."""
    chance = random.Random(seed)
    valid, test = (chance.choice([0.02, 0.1, 0.3, 0.49]) for _ in range(2))
    lengths = [int(10 ** chance.uniform(0, 4)) for _ in range(chance.choice([3, 4, 5, 30]))]
    clips = [Clip(f"{i}", f"{i}", length, 1.0, "") for i, length in enumerate(lengths)]
    found = splits(clips, split_by(tiny, valid_fraction=valid, test_fraction=test).model_copy(update={"seed": seed}))
    parts = {
        split: [clip.frames for clip in clips if found[clip.name] == split] for split in ("train", "valid", "test")
    }
    assert all(parts.values())
    for split, fraction in (("test", test), ("valid", valid)):
        others = parts["train"] + (parts["valid"] if split == "test" else [])
        fits = sum(parts[split]) <= fraction * sum(lengths) + 1e-6
        assert fits or (len(parts[split]) == 1 and parts[split][0] <= min(others))
    if len(lengths) == 30 and max(lengths) < sum(lengths) / 3:
        assert sum(parts["test"]) > (test - max(lengths) / sum(lengths)) * sum(lengths), "a share is used"


def test_one_long_recording_among_short_ones_is_trained_on(tiny: Recipe) -> None:
    clips = [Clip(name, name, frames, 1.0, "") for name, frames in (("a", 200), ("b", 3700), ("c", 100))]
    for seed in range(20):
        assert splits(clips, tiny.model_copy(update={"seed": seed}))["b"] == "train"


def test_what_belongs_together_is_in_one_split(tiny: Recipe) -> None:
    names = [f"{speaker}/s{sentence}_take{take}.wav" for speaker in "ab" for sentence in range(9) for take in (1, 2)]
    clips = [Clip(name, name, 10, 1.0, "") for name in [*names, "else.wav"]]
    for pattern, key in ((r"^(.*)_take", lambda n: n[:4]), (r"s\d", lambda n: n[2:4]), (r"s(\d)|x", lambda n: n[2:4])):
        found = splits(clips, split_by(tiny, together=pattern))
        for first in names:
            assert len({found[name] for name in names if key(name) == key(first)}) == 1
        assert set(found.values()) == {"train", "valid", "test"}
        assert "else.wav" in found
    with pytest.raises(CorpusError, match=r"prepare.together = '\^.' leaves 2 groups of recordings"):
        splits(clips[:-1], split_by(tiny, together="^."))


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


def test_several_corpora_are_one_and_a_recording_at_other_speeds_stays_in_its_split(
    voice: Path, tmp_path: Path, tiny_data: dict[str, Any]
) -> None:
    parts = [
        {"corpus": {"kind": "folder", "path": str(voice), "limit": 3}, "speeds": [0.8, 1, 1.25]},
        {"corpus": {"kind": "folder", "path": str(voice / "deeper")}},
    ]
    data = {**tiny_data, "corpus": {"kind": "several", "parts": parts}}
    recipe = validate_recipe(data, "mine.toml")
    found = sources(recipe.corpus)
    assert [source.name for source in found[:3]] == ["1_080_00001_a", "1_100_00001_a", "1_125_00001_a"]
    assert [source.origin for source in found[8:]] == ["1: c.ogg", "2: a.wav"]
    slow, plain, fast = (source.read(16000) for source in found[:3])
    assert [len(each) for each in (slow, plain, fast)] == [40000, 32000, 25600]
    tone = torch.sin(torch.arange(16000) * 2 * torch.pi * 400 / 16000)
    soundfile.write(voice / "a.wav", tone.numpy() / 2, 16000)
    for source, hz in zip(found[:3], (320, 400, 500), strict=True):
        spectrum = torch.fft.rfft(source.read(16000)[:12000]).abs()
        assert int(spectrum.argmax()) / 12000 * 16000 == pytest.approx(hz, abs=2)
    soundfile.write(voice / "a.wav", speech_like(32000, 0).numpy(), 16000)
    experiment = Experiment(recipe, tmp_path / "exp", torch.device("cpu"))
    run_stage(stages_of(recipe)["prepare"], experiment)
    utterances = Manifest.read(experiment.manifest).utterances
    split_of = {(u.source, u.split) for u in utterances}
    assert len(split_of) == len({source for source, _ in split_of}) == 4
    assert len(utterances) == 10


def test_what_is_wrong_in_a_part_of_several_corpora_is_named(tiny_data: dict[str, Any]) -> None:
    def fault(part: dict[str, Any]) -> str:
        with pytest.raises(RecipeError) as caught:
            validate_recipe({**tiny_data, "corpus": {"kind": "several", "parts": [part]}}, "mine.toml")
        return str(caught.value)

    folder = {"kind": "folder", "path": "x"}
    assert "corpus.parts.0.corpus.paht: unknown key; did you mean path?" in fault({"corpus": {**folder, "paht": "y"}})
    assert "corpus.parts.0.speed: unknown key; did you mean speeds?" in fault({"corpus": folder, "speed": [1]})
    assert "corpus.parts.0.speeds.0 = 9.0" in fault({"corpus": folder, "speeds": [9.0]})


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
