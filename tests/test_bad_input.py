"""Whatever is wrong with what a user gives: one line that names it, an exit code, and nothing finished is touched."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from filelock import FileLock

from tests.conftest import RECIPES, speech_like
from wavedistill import checkpoint
from wavedistill.cli import main
from wavedistill.training import saved_states

SMALL = {"teacher.layers": 2, "student.flow_layers": [2], "prepare.min_seconds": 0.5}
for _kind in ("teacher", "student"):
    SMALL |= {f"{_kind}.training.{key}": 1 for key in ("steps", "batch_size", "validate_every", "validate_batches")}


class Place:
    """A folder with recordings, an experiment whose two trainings are done, and files to give to `generate`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.voice, self.folder, self.recipe = root / "voice", root / "exp" / "mine", root / "mine.toml"
        self.model, self.out = self.folder / "student" / checkpoint.MODEL_FILE, root / "out"

    def make(self) -> None:
        self.voice.mkdir()
        for number in range(5):
            soundfile.write(self.voice / f"{number}.wav", speech_like(16000, number).numpy(), 16000)
        text = (RECIPES / "tiny.toml").read_text()
        before, _, rest = text.partition("[corpus]")
        _, _, rest = rest.partition("[audio]")
        self.recipe.write_text(f'{before}[corpus]\nkind = "folder"\npath = "{self.voice}"\n\n[audio]{rest}')

    def stage(self, *words: str | Path) -> list[str]:
        settings = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
        name, *others = words
        return [*map(str, [name, self.recipe, *others, "--exp", self.root / "exp", "--device", "cpu"]), *settings]

    def generate(self, *inputs: str | Path, model: Path | None = None, out: Path | None = None) -> list[str]:
        options = ["--out", out or self.out, "--device", "cpu"]
        return [str(word) for word in ("generate", model or self.model, *inputs, *options)]

    def file(self, name: str, content: bytes | str = b"") -> Path:
        path = self.root / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def wav(self, name: str, samples: Any) -> Path:
        path = self.root / name
        soundfile.write(path, np.asarray(samples, np.float32), 16000, subtype="FLOAT")
        return path

    def npy(self, name: str, array: Any) -> Path:
        np.save(self.root / name, array)
        return self.root / name

    def tensors(self, name: str, header: dict[str, Any], **tensors: torch.Tensor) -> Path:
        metadata = {checkpoint.HEADER: json.dumps(header)}
        safetensors.torch.save_file(tensors, self.root / name, metadata)
        return self.root / name

    def change(self, before: str, after: str) -> list[str]:
        text = self.recipe.read_text()
        assert before in text
        self.recipe.write_text(text.replace(before, after, 1))
        return self.stage("prepare")

    def again(self, kind: str, steps: int = 3) -> list[str]:
        """Lengthen a training."""
        return [*self.stage(kind), "--set", f"{kind}.training.steps={steps}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = Place(tmp_path_factory.mktemp("finished"))
    place.make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["wavedistill", *place.stage("run", "--until", "student")])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0
    return place.root


def damage(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def damaged(*paths: Path) -> None:
    for path in paths:
        damage(path)


def then(first: object, command: list[str]) -> list[str]:
    return command


def bad_recipe_inside(p: Place) -> Path:
    tensors, header = checkpoint.load(p.model)
    header["recipe"]["audio"]["hop_length"] = 100
    checkpoint.save(p.root / "bad.safetensors", tensors, header)
    return p.root / "bad.safetensors"


SEGMENT = "teacher.training.segment_frames"
PRECISION = ("--set", "teacher.training.precision=fp8")
ACCUMULATE = ("--set", "teacher.training.accumulate=2")
COMPILE = ("--set", "teacher.training.compile=true")
OWN = ("--set", "student.teacher=nowhere:load", "--set", "student.loss.kl_estimator=mc")
MEL = np.full((40, 12), -5.0, np.float32)
Case = Callable[[Place], list[str]]
CASES: dict[str, tuple[int, str, Case]] = {
    # Sound to synthesise anew.
    "text": (1, "a.wav: not readable as audio", lambda p: p.generate(p.file("a.wav", "words"))),
    "empty file": (1, "a.wav: not readable as audio", lambda p: p.generate(p.file("a.wav"))),
    "no samples": (1, "a.wav: holds no samples", lambda p: p.generate(p.wav("a.wav", []))),
    "NaN": (1, "a.wav: holds samples that are not finite", lambda p: p.generate(p.wav("a.wav", [0, np.nan, 0]))),
    "infinite": (1, "a.wav: holds samples that are not finite", lambda p: p.generate(p.wav("a.wav", [0, np.inf]))),
    "no file": (1, "a.wav: no such file", lambda p: p.generate(p.root / "a.wav")),
    "folder": (1, "voice: no such file", lambda p: p.generate(p.voice)),
    "half a header": (1, "a.flac: not readable", lambda p: p.generate(p.file("a.flac", b"fLaC\0\0\0"))),
    "overwrites": (1, "would overwrite this input", lambda p: p.generate(p.voice / "0.wav", out=p.voice)),
    "same name": (1, "another input of the same name", lambda p: p.generate(p.voice / "0.wav", p.root / "0.npy")),
    "out is a file": (1, "out", lambda p: p.generate(p.voice / "0.wav", out=p.file("out", "x"))),
    # Log-mels.
    "bands": (1, "m.npy: has shape (80, 12)", lambda p: p.generate(p.npy("m.npy", np.ones((80, 12))))),
    "transposed": (1, "so transpose it", lambda p: p.generate(p.npy("m.npy", MEL.T))),
    "integers": (1, "m.npy: holds values of type int", lambda p: p.generate(p.npy("m.npy", MEL.astype(int)))),
    "NaN in a mel": (1, "m.npy: holds values that are not finite", lambda p: p.generate(p.npy("m.npy", MEL * np.nan))),
    "decibels": (1, "is it in decibels", lambda p: p.generate(p.npy("m.npy", MEL * 16))),
    "three axes": (1, "m.npy: has shape (1, 40, 12)", lambda p: p.generate(p.npy("m.npy", MEL[None]))),
    "no frames": (1, "m.npy: has shape (40, 0)", lambda p: p.generate(p.npy("m.npy", MEL[:, :0]))),
    "objects": (1, "m.npy: not a NumPy array", lambda p: p.generate(p.npy("m.npy", np.array([{}], dtype=object)))),
    "half a mel": (1, "m.npy: not a NumPy array", lambda p: p.generate(damage(p.npy("m.npy", MEL)))),
    "text as mel": (1, "m.npy: not a NumPy array", lambda p: p.generate(p.file("m.npy", "words"))),
    "no mel": (1, "m.npy: no such file", lambda p: p.generate(p.root / "m.npy")),
    # Checkpoints.
    "no checkpoint": (1, "no.x: no such checkpoint", lambda p: p.generate("a.wav", model=p.root / "no.x")),
    "checkpoint's folder": (1, "student: no such checkpoint (it is a", lambda p: p.generate("a", model=p.model.parent)),
    "pickle": (1, "a pickled file", lambda p: p.generate("a.wav", model=p.file("c", pickle.dumps({"a": 1})))),
    "torch's zip": (1, "a pickled file", lambda p: p.generate("a.wav", model=p.file("c", b"PK\3\4"))),
    "recipe as checkpoint": (1, "mine.toml: not a wavedistill", lambda p: p.generate("a.wav", model=p.recipe)),
    "half a checkpoint": (1, "a damaged one", lambda p: then(damage(p.model), p.generate("a.wav"))),
    "foreign": (1, "another program's tensors", lambda p: p.generate("a", model=p.tensors("c", {}, a=torch.ones(1)))),
    "newer": (1, "install a newer", lambda p: p.generate("a", model=p.tensors("c", {"version": 9}, a=torch.ones(1)))),
    "older": (1, "train again", lambda p: p.generate("a", model=p.tensors("c", {"version": 1}, a=torch.ones(1)))),
    "a state": (1, "not a model; give the", lambda p: p.generate("a", model=saved_states(p.model.parent)[0])),
    "recipe inside": (1, "does not fit this version", lambda p: p.generate("a", model=bad_recipe_inside(p))),
    # Recipes.
    "no recipe": (2, "mine.toml: cannot read", lambda p: then(p.recipe.unlink(), p.stage("prepare"))),
    "no TOML": (2, "mine.toml: not valid TOML", lambda p: then(p.recipe.write_text("[a"), p.stage("prepare"))),
    "binary": (2, "mine.toml: not valid TOML", lambda p: then(p.recipe.write_bytes(b"\xff\xfe"), p.stage("prepare"))),
    "misspelt": (2, "did you mean n_mels?", lambda p: p.change("n_mels = 40", "n_mels = 40\nn_mell = 4")),
    "type": (2, "audio.n_fft = 'x'", lambda p: p.change("n_fft = 800", 'n_fft = "x"')),
    "missing": (2, "audio.n_fft: missing", lambda p: p.change("n_fft = 800", "")),
    "hops": (2, "upsample = [4, 50] multiplies to 200", lambda p: p.change("hop_length = 200", "hop_length = 100")),
    "negative": (2, "audio.n_mels = -1", lambda p: p.change("n_mels = 40", "n_mels = -1")),
    "fraction": (2, "prepare.valid_fraction = 2", lambda p: p.change("valid_fraction = 0.2", "valid_fraction = 2")),
    "kind of corpus": (2, "corpus", lambda p: p.change('kind = "folder"', 'kind = "magic"')),
    "no equals sign": (2, "--set seed: expected key=value", lambda p: [*p.stage("prepare"), "--set", "seed"]),
    "value as section": (2, "seed is a value", lambda p: [*p.stage("prepare"), "--set", "seed.x=1"]),
    "precision": (2, "teacher.training.precision = 'fp8'", lambda p: [*p.again("teacher"), *PRECISION]),
    "uneven shares": (2, "cannot be shared out evenly", lambda p: [*p.again("teacher"), *ACCUMULATE]),
    "no compiler": (2, "need a C++ compiler", lambda p: [*p.again("teacher"), *COMPILE]),
    "storage": (2, "prepare.storage = 'zip'", lambda p: [*p.stage("prepare"), "--set", "prepare.storage=zip"]),
    "no such teacher": (2, "No module named 'nowhere'", lambda p: [*p.stage("run", "--until", "student"), *OWN]),
    "fused without": (2, "need a C++ compiler", lambda p: [*p.generate(p.voice / "0.wav"), "--fused"]),
    # Corpora.
    "no corpus": (1, "not exist", lambda p: then(shutil.rmtree(p.voice), p.stage("prepare"))),
    "corpus is a file": (1, "a file", lambda p: then((shutil.rmtree(p.voice), p.file("voice")), p.stage("prepare"))),
    "no recordings": (1, "no audio file", lambda p: then([f.unlink() for f in p.voice.iterdir()], p.stage("prepare"))),
    "bad recording": (1, "x.wav: not readable", lambda p: then(p.file("voice/x.wav", "x"), p.stage("prepare"))),
    "silent": (1, "x.wav: is silent", lambda p: then(p.wav("voice/x.wav", np.zeros(9000)), p.stage("prepare"))),
    "clipped": (1, "x.wav: is clipped", lambda p: then(p.wav("voice/x.wav", np.ones(9000)), p.stage("prepare"))),
    "short": (1, "x.wav: is too short", lambda p: then(p.wav("voice/x.wav", speech_like(500)), p.stage("prepare"))),
    "twice": (1, "same sound", lambda p: then(shutil.copy(p.voice / "0.wav", p.voice / "9.wav"), p.stage("prepare"))),
    "NaN in one": (1, "x.wav: holds samples", lambda p: then(p.wav("voice/x.wav", [np.nan] * 9), p.stage("prepare"))),
    "too few": (1, "2 utterances", lambda p: [*p.stage("prepare"), "--set", "corpus.limit=2"]),
    # The experiment's folder.
    "not prepared": (1, "prepare stage has not", lambda p: then(shutil.rmtree(p.folder), p.stage("teacher"))),
    "no manifest": (1, "manifest.json: missing", lambda p: then(manifest(p).unlink(), p.stage("teacher"))),
    "half a manifest": (1, "manifest.json: not a manifest", lambda p: then(damage(manifest(p)), p.stage("teacher"))),
    "no sound": (1, ".wav: cannot be read", lambda p: then([f.unlink() for f in sounds(p)], p.again("teacher"))),
    "words as sound": (
        1,
        ".wav: cannot be read",
        lambda p: then([f.write_text("words") for f in sounds(p)], p.again("teacher")),
    ),
    "half a sound": (1, ".wav: cannot be read", lambda p: then(damaged(*sounds(p)), p.again("teacher"))),
    "half an F0": (1, "f0.npy: cannot be read", lambda p: then(damaged(*sounds(p, "npy")), p.again("teacher"))),
    "all states damaged": (
        1,
        "a damaged one",
        lambda p: then(damaged(*saved_states(p.folder / "teacher")), p.again("teacher")),
    ),
    "no teacher": (1, "teacher/checkpoint", lambda p: then(teacher(p).unlink(), p.again("student"))),
    "half a teacher": (1, "a damaged one", lambda p: then(damage(teacher(p)), p.again("student"))),
    "other units": (1, "[audio] is not the recipe's", lambda p: [*p.stage("teacher"), "--set", "audio.n_mels=30"]),
    "long segments": (1, "lower segment_frames", lambda p: [*p.stage("teacher"), "--set", f"{SEGMENT}=999"]),
    "root is a file": (1, "exp", lambda p: then((shutil.rmtree(p.root / "exp"), p.file("exp")), p.stage("prepare"))),
    "folder is a file": (1, "teacher", lambda p: then(replaced(p.folder / "teacher"), p.again("teacher"))),
    "locked": (1, "another process is at work", lambda p: then(locked(p), p.stage("prepare"))),
}  # fmt: skip


def teacher(p: Place) -> Path:
    return p.folder / "teacher" / checkpoint.MODEL_FILE


def manifest(p: Place) -> Path:
    return p.folder / "manifest.json"


def sounds(p: Place, suffix: str = "wav") -> list[Path]:
    return sorted((p.folder / "audio").glob(f"*.{suffix}"))


def replaced(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


LOCKS: list[FileLock] = []


def locked(p: Place) -> None:
    LOCKS.append(FileLock(p.folder / ".lock"))
    LOCKS[-1].acquire()


def contents(place: Place) -> dict[Path, bytes]:
    """Every file that a user would miss."""
    kept = [
        *sounds(place),
        *sounds(place, "npy"),
        *place.folder.glob("*/*.safetensors"),
        place.folder / "manifest.json",
    ]
    return {path: path.read_bytes() for path in kept if path.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_in_one_line_that_names_it(
    finished: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message, make = CASES[name]
    place = Place(tmp_path / "place")
    shutil.copytree(finished, place.root)
    place.recipe.write_text(place.recipe.read_text().replace(str(finished), str(place.root)))
    command = make(place)
    before = contents(place)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["wavedistill", *command])
    monkeypatch.setenv("CXX", "a compiler")
    with pytest.raises(SystemExit) as ended:
        main()
    for lock in LOCKS:
        lock.release()
    LOCKS.clear()
    errors = capsys.readouterr().err
    said = [line for line in errors.replace("\r", "\n").splitlines() if line.startswith("wavedistill: ")]
    assert ended.value.code == code, errors
    assert "Traceback" not in errors
    assert len(said) == 1, errors
    assert errors.rstrip().endswith(said[0]), "nothing after it"
    assert message in said[0]
    assert contents(place) == before
