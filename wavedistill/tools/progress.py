"""Progress bars with rate and time left: moving on a terminal, a line now and then in a log file."""

import sys
from typing import Any

from tqdm import tqdm

if not sys.stderr.isatty():
    tqdm.monitor_interval = 0  # a thread of its own would draw each bar again without anything new


def progress(**options: Any) -> "tqdm[Any]":
    """A `tqdm` bar; the options are tqdm's own."""
    return tqdm(**{"mininterval": 0.5 if sys.stderr.isatty() else 20, "dynamic_ncols": True, **options})


def note(line: str) -> None:
    """Print a line without disturbing a bar."""
    tqdm.write(line, file=sys.stderr)
