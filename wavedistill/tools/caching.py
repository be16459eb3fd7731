"""Where compiled code is cached: numba gives up where it can write neither beside the code nor in a home."""

import hashlib
import os
import stat
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def cache_compiled_code() -> None:
    """Let numba cache in a folder of this package and of the code that is compiled, below any folder it is told.

    Left alone, it would run stale code: it looks at the file of a cached function, not at those of the functions and
    overloads that are compiled into it. The folder is the user's cache, or the system's temporary folder where that
    cannot be written. To be called before numba is imported. Cached code is run unseen, so the folder is nobody else's
    to write.
    """
    current, told = digest(PACKAGE), os.environ.get("NUMBA_CACHE_DIR")
    if told is None or Path(told).name != current:  # a child is told its parent's
        os.environ["NUMBA_CACHE_DIR"] = str((Path(told) if told else _folder()) / current)


def digest(package: Path) -> str:
    """Of a package's files that may hold compiled code."""
    whole = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        if b"numba" in (source := path.read_bytes()):
            whole.update(repr((path.relative_to(package).as_posix(), source)).encode())
    return whole.hexdigest()[:16]


def _folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "wavedistill"
    nearest = next((folder for folder in (cache, *cache.parents) if os.path.exists(folder)), cache)
    if cache.is_absolute() and os.access(nearest, os.W_OK | os.X_OK):
        return cache
    folder = Path(tempfile.gettempdir()) / f"wavedistill-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o022:
        folder = Path(tempfile.mkdtemp(prefix="wavedistill-"))
    return folder
