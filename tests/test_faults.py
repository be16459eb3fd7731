"""A true training in a process of its own, killed without warning, again and again: nothing finished is lost."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from tests.conftest import RECIPES, REPOSITORY, write_voice
from wavedistill.models import checkpoint
from wavedistill.training.state import KEPT_STATES, saved_states

KINDS = ("teacher", "student")
EVERY = 5
"""Steps between two states."""


class Training:
    """A small experiment, teacher and student, in a folder of its own."""

    def __init__(self, root: Path, corpus: Path, steps: int) -> None:
        settings = {
            "corpus": f'{{kind="folder",path="{corpus}"}}',
            "models.teacher.layers": 3,
            "models.student.flow_layers": [2, 2],
        }
        for kind in KINDS:
            values = {"steps": steps, "validate_every": EVERY, "validate_batches": 1, "batch_size": 1}
            settings |= {f"training.{kind}.{key}": value for key, value in values.items()}
        self.folder = root / "tiny"
        self._options = [RECIPES / "tiny.toml", "--exp", root, "--device", "cpu"]
        for key, value in settings.items():
            self._options += ["--set", f"{key}={value}"]

    def start(self, *words: str, before: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
        command = [*before, sys.executable, "-m", "wavedistill", *words, *map(str, self._options)]
        return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def finish(self, *words: str) -> None:
        process = self.start(*words)
        _, errors = process.communicate()
        assert process.returncode == 0, errors

    @property
    def progress(self) -> tuple[int, int]:
        """The last saved step of either model; 0 where there is none."""
        teacher, student = (
            max((int(path.stem.partition("-")[2]) for path in saved_states(self.folder / kind)), default=0)
            for kind in KINDS
        )
        return teacher, student


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_voice(tmp_path / "voice", 5)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.endurance)])
def test_a_training_killed_at_random_ends_with_the_very_weights_of_one_left_alone(
    tmp_path: Path, corpus: Path, kills: int
) -> None:
    alone, killed = (Training(tmp_path / name, corpus, steps=20 * kills) for name in ("alone", "killed"))
    alone.finish("run", "--until", "student")
    killed.finish("prepare")
    moments = random.Random(kills)
    for _ in range(kills):
        before, process = killed.progress, killed.start("run", "--from", "teacher", "--until", "student")
        if moments.random() < 0.3:  # anywhere, also before the first step
            time.sleep(moments.uniform(0, 4))
        else:
            while killed.progress <= before and process.poll() is None:
                time.sleep(0.02)
            time.sleep(moments.uniform(0, 0.7))
        assert process.poll() is None, f"it ended before it was killed: {process.communicate()}"
        process.kill()
        process.communicate()
        assert killed.progress >= before, "no finished step is lost"
    killed.finish("run", "--until", "student")

    for kind in KINDS:
        first, second = (training.folder / kind / checkpoint.MODEL_FILE for training in (alone, killed))
        assert first.read_bytes() == second.read_bytes(), kind
        first, second = (saved_states(training.folder / kind)[0] for training in (alone, killed))
        assert first.read_bytes() == second.read_bytes(), "average, optimizer and counts too"
        assert len(saved_states(killed.folder / kind)) == KEPT_STATES
    assert not list(killed.folder.rglob("*.partial")), "no remains"
    assert not [path for path in killed.folder.iterdir() if path.suffix == ".1"], "nothing was set aside"


@pytest.mark.slow
def test_a_second_process_in_the_same_folder_is_refused(tmp_path: Path, corpus: Path) -> None:
    training = Training(tmp_path / "exp", corpus, steps=10)
    training.finish("prepare")
    with FileLock(training.folder / ".lock"):
        process = training.start("teacher")
        _, errors = process.communicate()
    assert process.returncode == 1
    assert f"{training.folder}: another process is at work in this folder" in errors
    assert "Traceback" not in errors
    assert (training.folder / ".lock").exists()
    training.finish("teacher")  # the file alone refuses nobody


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_named_and_left_alone(tmp_path: Path, corpus: Path) -> None:
    # Who may write everywhere gives that up.
    unprivileged = ("setpriv", "--bounding-set", "-dac_override") if os.geteuid() == 0 else ()
    if unprivileged and shutil.which("setpriv") is None:
        pytest.skip("root may write everywhere, and there is no setpriv to give that up")
    training = Training(tmp_path / "exp", corpus, steps=10)
    training.finish("run", "--until", "teacher")
    before = {path: path.read_bytes() for path in (training.folder / "teacher").glob("*.safetensors")}
    longer = Training(tmp_path / "exp", corpus, steps=20)
    for folder in (training.folder / ".stamps", training.folder / "teacher"):
        folder.chmod(0o555)
        process = longer.start("teacher", before=unprivileged)
        _, errors = process.communicate()
        folder.chmod(0o755)
        assert process.returncode == 1, errors
        (said,) = [line for line in errors.splitlines() if line.startswith("wavedistill: ")]
        assert str(folder) in said
        assert "Permission denied" in said
        assert "Traceback" not in errors
        assert {path: path.read_bytes() for path in before} == before
    longer.finish("teacher")
    assert longer.progress[0] == 20


@pytest.mark.slow
def test_a_corpus_file_that_vanishes_stops_the_training_with_its_name(tmp_path: Path, corpus: Path) -> None:
    training = Training(tmp_path / "exp", corpus, steps=100_000)
    training.finish("prepare")
    process = training.start("teacher")
    while training.progress[0] < EVERY and process.poll() is None:
        time.sleep(0.02)
    for path in (training.folder / "audio").glob("*.wav"):
        path.unlink()
    _, errors = process.communicate()
    assert process.returncode == 1
    assert ".wav: cannot be read: delete it and run the prepare stage again" in errors
    assert "Traceback" not in errors
    (last, *_) = saved_states(training.folder / "teacher")
    assert checkpoint.load(last)[1]["step"] >= EVERY
