"""Whatever is wrong with what a user gives: one line that names it, an exit code, and nothing finished is touched."""

import json
import os
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
from wavedistill.cli import main
from wavedistill.corpus.recordings import KINDS
from wavedistill.models import checkpoint
from wavedistill.recipe.loading import load_recipe
from wavedistill.recipe.sections import NanottsCorpus
from wavedistill.training.state import saved_states

SMALL = {"models.teacher.layers": 2, "models.student.flow_layers": [2], "prepare.min_seconds": 0.5}
for _kind in ("teacher", "student"):
    SMALL |= {f"training.{_kind}.{key}": 1 for key in ("steps", "batch_size", "validate_every", "validate_batches")}


OURS = "c.safetensors"
"""A name that says that it is a checkpoint."""


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

    def npz(self, name: str, **arrays: np.ndarray) -> Path:
        np.savez(self.root / name, **arrays)
        return self.root / name

    def tensor(self, name: str, content: Any) -> Path:
        torch.save(content, self.root / name)
        return self.root / name

    def dir(self, name: str) -> Path:
        (self.root / name).mkdir()
        return self.root / name

    def link(self, name: str, target: str) -> Path:
        (self.root / name).symlink_to(target)
        return self.root / name

    def copy(self, name: str) -> Path:
        return self.file(name, (self.voice / "0.wav").read_bytes())

    def patched(self, offset: int, content: bytes) -> Path:
        """A recording with some bytes of its header changed."""
        before = (self.voice / "0.wav").read_bytes()
        return self.file("a.wav", before[:offset] + content + before[offset + len(content) :])

    def sound(self, name: str, samples: Any = None, *, rate: int = 16000, subtype: str | None = None) -> Path:
        kind = KINDS[Path(name).suffix]
        samples = speech_like(16000, 9).numpy() if samples is None else samples
        soundfile.write(self.root / name, samples, rate, format=kind, subtype=subtype)
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
        return [*self.stage(kind), "--set", f"training.{kind}.steps={steps}"]


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


SEGMENT = "training.teacher.segment_frames"
PRECISION = ("--set", "training.teacher.precision=fp8")
ACCUMULATE = ("--set", "training.teacher.accumulate=2")
COMPILE = ("--set", "training.teacher.compile=true")
OWN = ("--set", "training.student.of=nowhere:load", "--set", "training.student.loss.kl_estimator=mc")
SOFT = 1e-3 * speech_like(16000, 9).numpy()
DITHER = np.sign(SOFT) / 2**15
FLAT = (1e5 * SOFT).clip(-1.5, 1.5)
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
    "half a header": (1, "a.flac: not readable", lambda p: p.generate(p.file("a.flac", b"fLaC\0\0\0"))),
    "overwrites": (1, "would overwrite this input", lambda p: p.generate(p.voice / "0.wav", out=p.voice)),
    "same name": (1, "another input of the same name", lambda p: p.generate(p.voice / "0.wav", p.root / "0.npy")),
    "out is a file": (1, "out: cannot be written", lambda p: p.generate(p.voice / "0.wav", out=p.file("out", "x"))),
    "half a wav": (1, "a.wav: is cut off: 0.50 of 1.00 seconds", lambda p: p.generate(damage(p.copy("a.wav")))),
    "half a FLAC": (1, "a.flac: is cut off: 0.", lambda p: p.generate(damage(p.sound("a.flac")))),
    "half an AIFF": (1, "a.aiff: is cut off: 0.", lambda p: p.generate(damage(p.sound("a.aiff")))),
    "half a CAF": (1, "a.caf: not readable as audio", lambda p: p.generate(damage(p.sound("a.caf")))),
    "half an Ogg": (1, "a.ogg: ", lambda p: p.generate(damage(p.sound("a.ogg")))),
    "half an Opus": (1, "a.opus: ", lambda p: p.generate(damage(p.sound("a.opus", subtype="OPUS")))),
    "wav's head": (1, "a.wav: ", lambda p: p.generate(p.file("a.wav", p.copy("b.wav").read_bytes()[:40]))),
    "no size": (1, "a.wav: says that it holds no samples, and", lambda p: p.generate(p.patched(40, b"\0\0\0\0"))),
    "no channels": (1, "a.wav: not readable as audio", lambda p: p.generate(p.patched(22, b"\0\0"))),
    "65,535 channels": (1, "a.wav: ", lambda p: p.generate(p.patched(22, b"\xff\xff"))),
    "no rate": (1, "a.wav: ", lambda p: p.generate(p.patched(24, b"\0\0\0\0"))),
    "a rate of 3 Hz": (1, "a.wav: says that it has 3 samples", lambda p: p.generate(p.patched(24, b"\3\0\0\0"))),
    "a rate of 4 GHz": (1, "a.wav: ", lambda p: p.generate(p.patched(24, b"\xff\xff\xff\xff"))),
    "unknown codec": (1, "a.wav: not readable as audio", lambda p: p.generate(p.patched(20, b"\x99\x99"))),
    "whole numbers": (
        1,
        "a.wav: holds values up to 20000: floating point on the scale of 16-bit integers; divide by 32768",
        lambda p: p.generate(p.wav("a.wav", [0.0, 20000.0, -1.0])),
    ),
    "one sample": (1, "a.wav: holds 1 samples", lambda p: p.generate(p.sound("a.wav", np.ones(1), rate=96000))),
    "m4a": (1, "a.m4a: ", lambda p: p.generate(p.file("a.m4a", b"\0\0\0 ftypM4A "))),
    "a page": (1, "a.wav: not readable as audio", lambda p: p.generate(p.file("a.wav", "<!DOCTYPE html><html>"))),
    "zip as sound": (1, "a.wav: not readable as audio", lambda p: p.generate(p.file("a.wav", b"PK\3\4" * 99))),
    "two lines": (1, "a\\nb.wav: not readable", lambda p: p.generate(p.file("a\nb.wav", "words"))),
    "no UTF-8": (1, "\\udcff.wav: not readable", lambda p: p.generate(p.file("\udcff.wav", "words"))),
    "longest name": (1, "nn.wav: not readable", lambda p: p.generate(p.file("n" * 251 + ".wav", "words"))),
    "longer name": (1, "nn.wav: cannot be read: file name too", lambda p: p.generate(p.root / ("n" * 252 + ".wav"))),
    "link to nothing": (1, "a.wav: no such file", lambda p: p.generate(p.link("a.wav", "nothing"))),
    "link to itself": (1, "a.wav: ", lambda p: p.generate(p.link("a.wav", "a.wav"))),
    "below a file": (1, "0.wav/a.wav: ", lambda p: p.generate(p.voice / "0.wav" / "a.wav")),
    "same long name": (1, "another input of the same name", lambda p: p.generate(p.copy("n" * 254), p.copy("n" * 253))),
    # Log-mels.
    "bands": (1, "m.npy: has shape (80, 12); the model was", lambda p: p.generate(p.npy("m.npy", np.ones((80, 12))))),
    "integers": (1, "m.npy: holds values of type int", lambda p: p.generate(p.npy("m.npy", MEL.astype(int)))),
    "NaN in a mel": (1, "m.npy: holds values that are not finite", lambda p: p.generate(p.npy("m.npy", MEL * np.nan))),
    "decibels": (1, "is it in decibels", lambda p: p.generate(p.npy("m.npy", MEL * 16))),
    "three axes": (1, "m.npy: has shape (2, 40, 12)", lambda p: p.generate(p.npy("m.npy", np.stack([MEL, MEL])))),
    "one axis": (1, "m.npy: has shape (40,)", lambda p: p.generate(p.npy("m.npy", MEL[:, 0]))),
    "a number": (1, "m.npy: has shape ()", lambda p: p.generate(p.npy("m.npy", np.float32(1)))),
    "complex": (1, "m.npy: holds values of type complex", lambda p: p.generate(p.npy("m.npy", MEL + 1j))),
    "words in an array": (1, "m.npy: holds values of type <U", lambda p: p.generate(p.npy("m.npy", MEL.astype(str)))),
    "infinite mel": (1, "m.npy: holds values that are not", lambda p: p.generate(p.npy("m.npy", MEL * np.inf))),
    "half's infinity": (1, "not finite", lambda p: p.generate(p.npy("m.npy", np.full((40, 9), np.inf, np.float16)))),
    "huge": (1, "m.npy: not a NumPy array", lambda p: p.generate(huge(p.npy("m.npy", MEL)))),
    "two arrays": (1, "m.npz: holds a, b; expected one", lambda p: p.generate(p.npz("m.npz", a=MEL, b=MEL))),
    "no arrays": (1, "m.npz: holds ; expected one", lambda p: p.generate(p.npz("m.npz"))),
    "no zip": (1, "m.npz: not a NumPy array", lambda p: p.generate(p.file("m.npz", "x"))),
    "no tensor": (1, "m.pt: not a file of tensors", lambda p: p.generate(p.file("m.pt", "x"))),
    "half a tensor": (1, "m.pt: not a torch array", lambda p: p.generate(damage(p.tensor("m.pt", MEL)))),
    "code": (1, "m.pt: not a file of tensors", lambda p: p.generate(p.tensor("m.pt", {"mel": Path("x")}))),
    "words in a tensor": (1, "m.pt: holds str; expected", lambda p: p.generate(p.tensor("m.pt", "x"))),
    "statistics": (1, "statistics are of 3 bands", lambda p: [*with_mel(p), "--mel-stats", stats(p, mean=3, scale=3)]),
    "no statistics": (1, "s.npz: holds a; expected mean", lambda p: [*with_mel(p), "--mel-stats", stats(p, a=3)]),
    "odd statistics": (1, "s.npy: has shape (40, 2)", lambda p: [*with_mel(p), "--mel-stats", odd_stats(p)]),
    # What is given beside it.
    "no match": (1, "*.wav: there is no such file, nor does any", lambda p: p.generate(p.root / "*.wav")),
    "empty folder": (1, "none: holds no audio and no log-mel", lambda p: p.generate(p.dir("none"))),
    "no list": (1, "no.txt: cannot be read as a list", lambda p: [*p.generate(), "--list", str(p.root / "no.txt")]),
    "not ours": (1, "0.wav: is there already, and", lambda p: then(in_the_way(p), p.generate(p.voice / "0.wav"))),
    "folder in the way": (1, "0.wav: is a folder", lambda p: then(folder_there(p), p.generate(p.voice / "0.wav"))),
    "no room": (1, "x: cannot be written to: ", lambda p: p.generate(p.voice / "0.wav", out=Path("/proc/x"))),
    "full disk": (1, "0.wav: cannot be written: no space left", lambda p: then(full(p), p.generate(p.voice / "0.wav"))),
    "folder as mel": (1, "m.npy: holds no audio and no log-mel", lambda p: p.generate(p.dir("m.npy"))),
    "mel of a strange name": (1, "m\\nm.npy: not a NumPy array", lambda p: p.generate(p.file("m\nm.npy", "x"))),
    "no frames": (1, "m.npy: has shape (40, 0)", lambda p: p.generate(p.npy("m.npy", MEL[:, :0]))),
    "objects": (1, "m.npy: not a NumPy array", lambda p: p.generate(p.npy("m.npy", np.array([{}], dtype=object)))),
    "half a mel": (1, "m.npy: not a NumPy array", lambda p: p.generate(damage(p.npy("m.npy", MEL)))),
    "text as mel": (1, "m.npy: not a NumPy array", lambda p: p.generate(p.file("m.npy", "words"))),
    "no mel": (1, "m.npy: no such file", lambda p: p.generate(p.root / "m.npy")),
    # Checkpoints.
    "no checkpoint": (1, "c.safetensors: no such checkpoint", lambda p: p.generate("a.wav", model=p.root / OURS)),
    "checkpoint's folder": (1, "c.safetensors: no such checkpoint (it", lambda p: p.generate("a", model=p.dir(OURS))),
    "pickle": (1, "a pickled file", lambda p: p.generate("a.wav", model=p.file(OURS, pickle.dumps({"a": 1})))),
    "torch's zip": (1, "a pickled file", lambda p: p.generate("a.wav", model=p.file(OURS, b"PK\3\4"))),
    "words as checkpoint": (1, ": not a wavedistill", lambda p: p.generate("a.wav", model=p.file(OURS, "x = 1"))),
    "half a checkpoint": (1, "a damaged one", lambda p: then(damage(p.model), p.generate("a.wav"))),
    "foreign": (1, "another program's tensors", lambda p: p.generate("a", model=p.tensors(OURS, {}, a=torch.ones(1)))),
    "newer": (1, "install a newer", lambda p: p.generate("a", model=p.tensors(OURS, {"version": 9}, a=torch.ones(1)))),
    "older": (1, "train again", lambda p: p.generate("a", model=p.tensors(OURS, {"version": 1}, a=torch.ones(1)))),
    "a state": (1, "not a model; give the", lambda p: p.generate("a", model=saved_states(p.model.parent)[0])),
    "recipe inside": (1, "does not fit this version", lambda p: p.generate("a", model=bad_recipe_inside(p))),
    # Recipes.
    "no recipe": (2, "mine.toml: cannot read", lambda p: then(p.recipe.unlink(), p.stage("prepare"))),
    "no TOML": (2, "mine.toml: not valid TOML", lambda p: then(p.recipe.write_text("[a"), p.stage("prepare"))),
    "binary": (2, "mine.toml: not valid TOML", lambda p: then(p.recipe.write_bytes(b"\xff\xfe"), p.stage("prepare"))),
    "misspelt": (2, "did you mean n_mels?", lambda p: p.change("n_mels = 40", "n_mels = 40\nn_mell = 4")),
    "type": (2, "audio.n_fft = 'x'", lambda p: p.change("n_fft = 800", 'n_fft = "x"')),
    "missing": (2, "training.student.of: missing", lambda p: p.change('of = "teacher"', "")),
    "hops": (2, "upsample = [4, 50] multiplies to 200", lambda p: p.change("n_fft", "hop_length = 100\nn_fft")),
    "negative": (2, "audio.n_mels = -1", lambda p: p.change("n_mels = 40", "n_mels = -1")),
    "fraction": (2, "prepare.valid_fraction = 2", lambda p: p.change("valid_fraction = 0.2", "valid_fraction = 2")),
    "kind of corpus": (2, "corpus", lambda p: p.change('kind = "folder"', 'kind = "magic"')),
    "no equals sign": (2, "--set seed: expected key=value", lambda p: [*p.stage("prepare"), "--set", "seed"]),
    "value as section": (2, "n_fft is a value", lambda p: [*p.stage("prepare"), "--set", "audio.n_fft.x=1"]),
    "precision": (2, "training.teacher.precision = 'fp8'", lambda p: [*p.again("teacher"), *PRECISION]),
    "uneven shares": (2, "cannot be shared out evenly", lambda p: [*p.again("teacher"), *ACCUMULATE]),
    "no compiler": (2, "needs a C++ compiler", lambda p: [*p.again("teacher"), *COMPILE]),
    "storage": (2, "prepare.storage = 'zip'", lambda p: [*p.stage("prepare"), "--set", "prepare.storage=zip"]),
    "no such teacher": (2, "No module named 'nowhere'", lambda p: [*p.stage("run", "--until", "student"), *OWN]),
    "key twice": (2, "mine.toml: not valid TOML", lambda p: p.change("n_fft = 800", "n_fft = 800\nn_fft = 800")),
    "section twice": (2, "mine.toml: not valid TOML", lambda p: p.change("[audio]", "[audio]\n[audio]")),
    "no such section": (2, "sound: unknown key", lambda p: p.change("[audio]", "[sound]\nx = 1\n[audio]")),
    "name": (2, "name: unknown key; the file's own name", lambda p: p.change("[corpus]", 'name = "x"\n[corpus]')),
    "backslashes": (2, "write a Windows path with / or", lambda p: p.change(str(p.voice), r"C:\Users\me\voice")),
    "a tab in a path": (2, "holds a control character; in double", lambda p: p.change(str(p.voice), r"C:\temp")),
    "folder as recipe": (2, "mine.toml: cannot read", lambda p: then(replaced_by_folder(p.recipe), p.stage("prepare"))),
    "UTF-16": (2, "mine.toml: not valid TOML", lambda p: then(in_utf16(p.recipe), p.stage("prepare"))),
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
    "soft": (1, "x.wav: is so soft that it would", lambda p: then(p.wav("voice/x.wav", SOFT), p.stage("prepare"))),
    "dither": (1, "x.wav: is so soft", lambda p: then(p.sound("voice/x.wav", DITHER), p.stage("prepare"))),
    "an offset only": (1, "x.wav: is silent", lambda p: then(p.wav("voice/x.wav", 0 * SOFT + 0.3), p.stage("prepare"))),
    "flat tops": (1, "x.wav: is clipped", lambda p: then(p.wav("voice/x.wav", FLAT), p.stage("prepare"))),
    "cut off": (1, "x.wav: is cut off: 0.", lambda p: then(damage(p.copy("voice/x.wav")), p.stage("prepare"))),
    "half a FLAC in it": (1, "x.flac: is cut", lambda p: then(damage(p.sound("voice/x.flac")), p.stage("prepare"))),
    "half an mp3 in it": (1, "x.mp3: ", lambda p: then(p.file("voice/x.mp3", b"ID3\4"), p.stage("prepare"))),
    "empty in it": (1, "x.wav: not readable", lambda p: then(p.file("voice/x.wav"), p.stage("prepare"))),
    "strange name in it": (1, "\\nx.wav: not readable", lambda p: then(p.file("voice/\nx.wav"), p.stage("prepare"))),
    "no UTF-8 in it": (1, "\\udcff.wav: not", lambda p: then(p.file("voice/\udcff.wav"), p.stage("prepare"))),
    "integers in it": (1, "on the scale of 16", lambda p: then(p.wav("voice/x.wav", SOFT * 1e8), p.stage("prepare"))),
    "only hidden": (1, "not used: .x, a hidden folder", lambda p: then(only(p, ".x/x.wav"), p.stage("prepare"))),
    "only a link": (1, "x.wav: not a file, or a link", lambda p: then(linked(p, "x.wav"), p.stage("prepare"))),
    "only text": (1, "holds no audio file", lambda p: then(only(p, "x.txt"), p.stage("prepare"))),
    "no text": (1, "corpus.text = 'no.txt': cannot be read", lambda p: [*p.stage("prepare"), *spoken("no.txt")]),
    "no UTF-8 text": (1, "cannot be read as", lambda p: [*p.stage("prepare"), *spoken(p.file("t.txt", b"\xff"))]),
    "empty text": (1, "holds no sentences", lambda p: [*p.stage("prepare"), *spoken(p.file("t.txt", " \n"))]),
    "folder as text": (1, "cannot be read as", lambda p: [*p.stage("prepare"), *spoken(p.voice)]),
    "together too much": (1, "leaves 1 groups", lambda p: [*p.stage("prepare"), "--set", "prepare.together='wav'"]),
    "all too short": (1, "prepare.min_seconds = 9", lambda p: [*p.stage("prepare"), "--set", "prepare.min_seconds=9"]),
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
ABSURD = {
    "seed": "-1 4294967296 1.5 x",
    "corpus.limit": "0 -1",
    "corpus.path": "'' 3",
    "corpus.pathh": "x",
    "audio.sample_rate": "0 -16000 16000.5",
    "audio.hop_length": "0",
    "audio.n_fft": "0 801 100",
    "audio.n_mels": "0",
    "audio.f_min": "-1 9000",
    "audio.f_max": "9000 nan",
    "audio.f0_min": "0 500",
    "audio.f0_max": "5000 inf",
    "audio.level_db": "0 loud",
    "prepare.trim_db": "0",
    "prepare.min_seconds": "0",
    "prepare.max_seconds": "0.5 inf",
    "prepare.max_gain_db": "0 -3",
    "prepare.valid_fraction": "0 0.5",
    "prepare.test_fraction": "1 -0.1",
    "prepare.together": "'(' '' 1",
    "prepare.storage": "mp3",
    "prepare.max_skipped": "1.1 -1",
    "conditioning.channels": "0 -2",
    "conditioning.context": "0",
    "conditioning.upsample": "[] [0] 200",
    "conditioning.pitch": "1",
    "linear_prediction.order": "-1 999",
    "linear_prediction.preemphasis": "1",
    "models.teacher.base": "cauchy",
    "models.teacher.components": "0",
    "models.teacher.layers": "0",
    "models.teacher.min_log_scale": "1",
    "models.teacher.network.channels": "0",
    "models.teacher.network.kernel_size": "1",
    "models.teacher.network.dilation_cycle": "0",
    "training.teacher.steps": "0",
    "training.teacher.batch_size": "0",
    "training.teacher.learning_rate": "0",
    "training.teacher.grad_clip": "-1",
    "training.teacher.ema_decay": "1",
    "models.student.flow_layers": "[] [0]",
    "training.student.of": "nowhere",
    "training.student.spectral_n_ffts": "[8]",
    "training.student.loss.kl": "-1",
    "training.student.loss.kl_estimator": "exact",
    "training.student.loss.kl_draws": "0",
    "evaluate.clips": "0",
    "evaluate.max_seconds": "0",
    "evaluate.temperature": "0",
    "gates.vuv_f1": "2",
    "gates.level_db": "0",
    "benchmark.threads": "[] [0]",
    "benchmark.seconds": "[0]",
    "benchmark.repeats": "0",
    "models.teacher.network.skip_channels": "0",
    "models.student.network.channels": "x",
    "training.student.segment_frames": "0",
    "training.student.compile": "yes",
    "training.student.validate_every": "0",
    "training.student.warmup_steps": "-1",
    "training.student.precision": "fp16",
    "models.student.periodic_source": "0",
    "evaluate.kl_draws": "0",
    "benchmark.naive_samples": "0",
    "gates.better_scores": "4",
}
CASES |= {
    f"{key} = {value}": (2, key.rpartition(".")[2], lambda p, s=f"{key}={value}": [*p.stage("prepare"), "--set", s])
    for key, values in ABSURD.items()
    for value in values.split()
}
PACKAGES = ("-o=Dir=/", "voice=1.0", "Voice", "a b", "v;ls", "../voice", "v", "")
CASES |= {
    f"package {name!r}": (2, "corpus.package", lambda p, n=name: [*p.stage("prepare"), "--set", fetched(n, p.root)])
    for name in PACKAGES
}


def fetched(package: str, folder: Path) -> str:
    return f'corpus={{kind="debian",package="{package}",sha256="{"0" * 64}",path="{folder}"}}'


def spoken(text: str | Path) -> list[str]:
    return ["--set", f'corpus={{kind="nanotts",text="{text}",voice="en-US"}}']


def huge(path: Path) -> Path:
    """An array whose header promises terabytes."""
    path.write_bytes(path.read_bytes().replace(b"(40, 12), }  ", b"(40, 1" + b"0" * 12 + b"), }"))
    return path


def only(p: Place, name: str) -> None:
    """The corpus is one copy of a recording by another name."""
    content = (p.voice / "0.wav").read_bytes()
    shutil.rmtree(p.voice)
    (p.voice / name).parent.mkdir(parents=True)
    (p.voice / name).write_bytes(content)


def linked(p: Place, name: str) -> None:
    only(p, "x.txt")
    (p.voice / name).symlink_to("nothing")


def with_mel(p: Place) -> list[str]:
    return p.generate(p.npy("m.npy", MEL))


def stats(p: Place, **bands: int) -> str:
    return str(p.npz("s.npz", **{name: np.ones(count) for name, count in bands.items()}))


def odd_stats(p: Place) -> str:
    return str(p.npy("s.npy", np.ones((40, 2))))


def in_the_way(p: Place) -> None:
    """What is to be written is there, but is somebody else's."""
    shutil.copytree(p.voice, p.out)


def folder_there(p: Place) -> None:
    (p.out / "0.wav").mkdir(parents=True)


def full(p: Place) -> None:
    """What is written on the way to 0.wav lies on a disk without room."""
    p.out.mkdir()
    (p.out / "0.wav.partial").symlink_to("/dev/full")


def replaced_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def in_utf16(path: Path) -> None:
    path.write_text(path.read_text(), encoding="utf-16")


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


def run(command: list[str], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["wavedistill", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_of_many_inputs_all_faults_that_show_are_named_before_anything_is_drawn(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path / "place")
    shutil.copytree(finished, place.root)
    faulty = [place.file("words.wav", "words"), place.npy("bad.npy", np.ones((9, 9))), place.root / "gone.wav"]
    place.out.mkdir()
    (place.out / "1.wav").write_text("mine")
    assert run(place.generate(*faulty, place.voice / "0.wav", place.voice / "1.wav"), monkeypatch) == 1
    assert [path.name for path in place.out.iterdir()] == ["1.wav"]
    assert (place.out / "1.wav").read_text() == "mine"
    said = capsys.readouterr()
    first, *others = said.err[said.err.index("wavedistill: ") :].splitlines()
    assert first == "wavedistill: nothing was drawn, because of 4 faults in 5 inputs:"
    for line, path in zip(others, (*faulty, place.out / "1.wav"), strict=True):
        assert line.startswith(f"{path}: ")


def test_what_shows_only_while_it_is_drawn_stops_no_other(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path / "place")
    shutil.copytree(finished, place.root)
    cut, nothing = damage(place.copy("cut.wav")), place.wav("nothing.wav", [])
    assert run(place.generate(cut, place.npy("good.npy", MEL), nothing), monkeypatch) == 1
    said = capsys.readouterr()
    assert {path.name for path in place.out.iterdir()} == {"good.wav"}
    first, *others = said.err[said.err.index("wavedistill: ") :].splitlines()
    assert first == "wavedistill: 2 of 3 inputs could not be synthesised:"
    for line, path in zip(others, (cut, nothing), strict=True):
        assert line.startswith(f"{path}: ")


@pytest.mark.parametrize(
    "mel",
    [MEL, MEL[None], MEL.astype(np.float16), MEL.astype(">f8"), np.asfortranarray(MEL)],
    ids=lambda m: str(m.dtype),
)
def test_log_mels_of_any_layout_and_names_of_any_length_are_taken(
    finished: Path, tmp_path: Path, mel: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(finished)
    out = tmp_path / "out"
    names = ["m" * 251 + ".npy", "\udcff\nm.npy", "\u0101" * 125 + ".npy"]
    for name in names:
        np.save(tmp_path / name, mel)
    assert run(place.generate(*(tmp_path / name for name in names), out=out), monkeypatch) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(name.replace(".npy", ".wav") for name in names)
    assert all(soundfile.info(os.fsencode(path)).frames == 12 * 200 for path in out.iterdir())


def test_a_recipe_may_begin_with_a_byte_order_mark_and_name_a_path_of_windows(tmp_path: Path) -> None:
    text = (RECIPES / "tiny.toml").read_text().replace('"demo.txt"', r"'C:\temp\a.txt'")
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8-sig")
    corpus = load_recipe(tmp_path / "mine.toml").corpus
    assert isinstance(corpus, NanottsCorpus)
    assert corpus.text.endswith(r"C:\temp\a.txt")
