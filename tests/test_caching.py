"""Where numba caches compiled code: a place that can be written, for one state of the code."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from wavedistill.tools.caching import cache_compiled_code, digest

NOWHERE = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"}
COMPILE = """
import wavedistill
code = compile("import numba\\n@numba.njit(cache=True)\\ndef one():\\n return 1\\none()", "/proc/version", "exec")
exec(code)
"""


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder of a user without a home."""
    for name, value in NOWHERE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_compiled_code_goes_to_a_folder_of_ones_own(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_compiled_code()
    (folder,) = nowhere.iterdir()
    current = digest(REPOSITORY / "wavedistill")
    assert os.environ["NUMBA_CACHE_DIR"] == str(folder / current)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name, value, expected in (
        ("NUMBA_CACHE_DIR", "mine", Path("mine")),
        ("XDG_CACHE_HOME", str(nowhere), nowhere / "wavedistill"),
    ):
        monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
        monkeypatch.setenv(name, value)
        for _ in range(2):  # the second as in a child, which is told what its parent found
            cache_compiled_code()
            assert os.environ["NUMBA_CACHE_DIR"] == str(expected / current)


def test_a_folder_that_others_may_write_is_not_trusted(nowhere: Path) -> None:
    (nowhere / f"wavedistill-{os.getuid()}").mkdir()
    (nowhere / f"wavedistill-{os.getuid()}").chmod(0o777)
    cache_compiled_code()
    folder = Path(os.environ["NUMBA_CACHE_DIR"]).parent
    assert folder != nowhere / f"wavedistill-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.slow
def test_numba_caches_where_neither_home_nor_code_can_be_written(tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    env |= {**NOWHERE, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*.nbi"))


def test_a_folder_is_for_one_state_of_the_compiled_code(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "wavedistill", tmp_path / "wavedistill")
    found = [digest(tmp_path / "wavedistill")]
    assert found[0] == digest(REPOSITORY / "wavedistill")
    for edited in ("flows/bases.py", "flows/elementwise.py", "sampling/tiles.py"):
        path = tmp_path / "wavedistill" / edited
        path.write_text(path.read_text() + "\n")
        found.append(digest(tmp_path / "wavedistill"))
    assert found[1] == found[0], "nothing in this file is compiled"
    assert len(set(found)) == 3


STEP = """
import sys
import numba
import numpy as np
from wavedistill.flows.elementwise import Affine, solve_step

@numba.njit(cache=True)
def step(raw, given, constants):
    return solve_step(raw, given, constants)

print(step(np.array([1.0, 0.0]), 2.0, Affine(-40.0).step(True)), sum(step.stats.cache_hits.values()))
"""


@pytest.mark.slow
def test_an_edited_step_is_not_run_stale(tmp_path: Path) -> None:
    """The cached function is in another file, which stays as it is, with its time."""
    shutil.copytree(REPOSITORY / "wavedistill", tmp_path / "wavedistill")
    (tmp_path / "step.py").write_text("import wavedistill\n" + STEP)
    env = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    env |= {"PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run() -> list[str]:
        command = [sys.executable, str(tmp_path / "step.py")]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()

    assert [run(), run()] == [["3.0", "0"], ["3.0", "1"]]
    path = tmp_path / "wavedistill" / "flows" / "elementwise.py"
    path.write_text(path.read_text().replace("return raw[0] + scale * given if", "return raw[0] - scale * given if"))
    assert run() == ["-1.0", "0"]
