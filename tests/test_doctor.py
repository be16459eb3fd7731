"""`wavedistill doctor`: what works is ok, what is missing is said, and what is broken fails by name."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.test_cli import wavedistill
from wavedistill.checking import doctor, exactness
from wavedistill.sampling import sequential
from wavedistill.speech import audio

CPU = torch.device("cpu")


def states() -> dict[str, doctor.Finding]:
    return {finding.about: finding for finding in doctor.examine(CPU)}


def test_an_installation_that_works_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "new" / "cache"))
    done = wavedistill("doctor", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "all is well"
    assert "FAIL" not in done.stdout
    said = " ".join(lines)
    for expected in ("torch ", "numba ", "CPUs", "stream and one pass", "1 s of sound", "pesq", "onnx", "C compiler"):
        assert expected in said, expected
    assert str(tmp_path / "new" / "cache") in said


def test_a_sampler_that_is_wrong_fails_and_the_rest_is_still_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sequential.compiled
    monkeypatch.setattr(sequential, "compiled", lambda *given: 1.01 * right(*given))
    done = wavedistill("doctor", "--device", "cpu")
    assert done.returncode == 1
    (failed,) = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert "fastest sampler and naive differ by" in failed
    assert "synthesis: 1 s of sound" in done.stdout
    assert "1 of the checks above failed" in done.stderr


@pytest.mark.parametrize("what", ["stream", "silence", "cache", "torchaudio"])
def test_what_is_broken_fails_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str) -> None:
    monkeypatch.setattr(exactness, "STEPS", 8)
    (tmp_path / "file").touch()
    if what == "stream":
        right = exactness.streaming.stream
        monkeypatch.setattr(
            exactness.streaming, "stream", lambda *given, **options: (0.99 * b for b in right(*given, **options))
        )
    elif what == "silence":
        monkeypatch.setattr(audio, "write", lambda path, wave, rate: path.write_bytes(bytes(44)))
    elif what == "torchaudio":
        monkeypatch.setitem(sys.modules, "torchaudio", None)
    else:
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    about = {
        "stream": "exactness",
        "silence": "synthesis",
        "cache": "cache of numba, NUMBA_CACHE_DIR",
        "torchaudio": "versions",
    }[what]
    found = states()
    assert [name for name, finding in found.items() if finding.state == "FAIL"] == [about], found[about]


def test_what_is_missing_and_may_be_is_said_with_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "pesq" else object())
    monkeypatch.setenv("PATH", os.devnull)
    found = {finding.about: finding for finding in (*doctor._extras(), *doctor._compilers())}
    assert str(found["extra demo, pesq"]) == (
        'none  extra demo, pesq: not installed; for PESQ, one of the scores of speech: pip install "wavedistill[demo]"'
    )
    assert found["extra onnx, onnx"].state == "ok"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"])
    assert found["C compiler"].state == found["C++ compiler"].state == "none"
    assert "pesq" in found["C compiler"].words


def test_a_package_that_cannot_be_loaded_is_named_and_ends_nothing() -> None:
    """As where torchaudio does not fit its torch, whose library then fails with an OSError."""
    script = (
        "import sys, importlib.abc\n"
        "class Broken(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torchaudio': raise OSError('Could not load this library')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "sys.argv = ['wavedistill', 'doctor', '--device', 'cpu']\n"
        "from wavedistill.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FAIL  versions: OSError: Could not load this library" in done.stdout
    assert "C compiler" in done.stdout
