"""Where numba may write nowhere of its own accord, it is given a place."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from wavedistill.tools.caching import cache_compiled_code

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
    assert os.environ["NUMBA_CACHE_DIR"] == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name, value in (("NUMBA_CACHE_DIR", "mine"), ("XDG_CACHE_HOME", str(nowhere))):
        monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
        monkeypatch.setenv(name, value)
        cache_compiled_code()
        assert os.environ.get("NUMBA_CACHE_DIR") == ("mine" if name == "NUMBA_CACHE_DIR" else None)


def test_a_folder_that_others_may_write_is_not_trusted(nowhere: Path) -> None:
    (nowhere / f"wavedistill-{os.getuid()}").mkdir()
    (nowhere / f"wavedistill-{os.getuid()}").chmod(0o777)
    cache_compiled_code()
    assert os.environ["NUMBA_CACHE_DIR"] != str(nowhere / f"wavedistill-{os.getuid()}")
    assert stat.S_IMODE(Path(os.environ["NUMBA_CACHE_DIR"]).stat().st_mode) == 0o700


@pytest.mark.slow
def test_numba_caches_where_neither_home_nor_code_can_be_written(tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    env |= {**NOWHERE, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*.nbi"))
