"""The steps of a pipeline, which meet through files, and whether a step is to be done again."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from wavedistill.experiment.folder import Experiment
from wavedistill.tools.engine import by_first, launch
from wavedistill.tools.errors import UserError
from wavedistill.tools.files import fingerprint


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline; stages meet only through files.

    Attributes:
        name: of its command.
        needs: the stages whose files it reads; they must have finished.
        settings: what it depends on besides its input files, as plain values.
        inputs: the files it reads.
        outputs: the files whose presence shows that it is done.
        run: does the work and returns one line of result.
        shared: whether several processes may do it together.
        version: of what it computes, raised where it would make something else of the same inputs and settings.
    """

    name: str
    needs: tuple[str, ...]
    settings: Callable[[Experiment], Any]
    inputs: Callable[[Experiment], Iterable[Path]]
    outputs: Callable[[Experiment], Iterable[Path]]
    run: Callable[[Experiment], str]
    shared: bool = False
    version: str = "1"


def run_stage(stage: Stage, experiment: Experiment) -> str:
    """Run a stage unless its inputs and settings are those of its last run; returns one line that says what happened.

    Of several processes, the first decides for all.

    Raises:
        UserError: if a stage before it has not finished, its files are gone, another process works in the folder, or
            several processes were started for a stage that one does alone.
    """
    fabric = launch(experiment.device)
    with ExitStack() as held:

        def begin() -> str | None:
            held.enter_context(_lock(experiment.root))
            return _needed(stage, experiment)

        needed = by_first(fabric, begin)
        if needed is None:
            return f"{stage.name}: up to date"
        if fabric.world_size > 1 and not stage.shared:
            raise UserError(
                f"{experiment.root}: run the {stage.name} stage without torchrun: one process does it alone"
            )
        stamp = _stamp(experiment, stage.name)
        if fabric.is_global_zero:
            stamp.parent.mkdir(parents=True, exist_ok=True)
            # From here until it ends, the stage's files are those of no settings at all.
            stamp.unlink(missing_ok=True)
        result = stage.run(experiment)
        if fabric.is_global_zero:
            stamp.write_text(needed)
        return f"{stage.name}: {result}"


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")  # which the system takes back from a process that dies
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"{folder}: another process is at work in this folder: wait for it, or give another --exp"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _needed(stage: Stage, experiment: Experiment) -> str | None:
    """The fingerprint of what a stage is to be run on; None if it was."""
    for name in stage.needs:
        if not _stamp(experiment, name).exists():
            raise UserError(
                f"{experiment.root}: the {name} stage has not finished; run it before the {stage.name} stage"
            )
    for path in stage.inputs(experiment):
        if not path.exists():
            raise UserError(f"{path}: missing, and the {stage.name} stage needs it: run the stages before it again")
    now = fingerprint([stage.version, stage.settings(experiment)], stage.inputs(experiment))
    stamp = _stamp(experiment, stage.name)
    done = stamp.is_file() and stamp.read_text() == now and all(path.exists() for path in stage.outputs(experiment))
    return None if done else now


def _stamp(experiment: Experiment, stage: str) -> Path:
    return experiment.root / ".stamps" / stage
