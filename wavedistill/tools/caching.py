"""Where compiled code is cached: numba gives up where it can write neither beside the code nor in a home."""

import os
import stat
import tempfile
from pathlib import Path


def cache_compiled_code() -> None:
    """Let numba use the system's temporary folder where the user's cache cannot be written, unless it is told another.

    To be called before numba is imported. Cached code is run unseen, so the folder is nobody else's to write.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "numba"
    nearest = next((folder for folder in (cache, *cache.parents) if os.path.exists(folder)), cache)
    if "NUMBA_CACHE_DIR" in os.environ or (cache.is_absolute() and os.access(nearest, os.W_OK | os.X_OK)):
        return
    folder = Path(tempfile.gettempdir()) / f"wavedistill-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o022:
        folder = Path(tempfile.mkdtemp(prefix="wavedistill-"))
    os.environ["NUMBA_CACHE_DIR"] = str(folder)
