"""A kind of model and an objective of the user's own, as CONTRIBUTING shows them: trained by the command line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, write_voice
from wavedistill.models.checkpoint import load_model
from wavedistill.tools.errors import CheckpointError


def shown(language: str, first: str) -> str:
    """The block of CONTRIBUTING that begins with a line."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    (found,) = re.findall(rf"```{language}\n({re.escape(first)}\n.*?)```", text, re.DOTALL)
    return found


@pytest.mark.slow
def test_what_contributing_shows_is_trained_and_distilled(tmp_path: Path) -> None:
    module, recipe = shown("python", "# mine.py"), shown("toml", "# mine.toml")
    assert len((module + recipe).splitlines()) <= 60
    (tmp_path / "mine.py").write_text(module)
    write_voice(tmp_path / "voice", 5)
    corpus = '[corpus]\nkind = "folder"\npath = "voice"\n'
    (tmp_path / "mine.toml").write_text(recipe + corpus)
    command = ["run", "mine.toml", "--device", "cpu", "--until", "evaluate"]
    small = ["--set", "training.teacher.steps=40", "--set", "training.student.steps=4"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([".", str(REPOSITORY)])}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "wavedistill", *command, *small],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    models = json.loads((tmp_path / "exp/mine/metrics.json").read_text())["density"]["models"]
    assert models["teacher"]["nll"] < models["teacher"]["nll_before_training"]
    assert models["student"]["kl_from"] == "teacher"
    # The file names code, and brings none: it is to be imported by whoever trusts it.
    path = tmp_path / "exp/mine/teacher/checkpoint.safetensors"
    with pytest.raises(CheckpointError, match=r"of the kind mine:two_taps_more.* import it before"):
        load_model(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        __import__("mine")
        assert load_model(path).model.networks[0].kernel_size == 4
