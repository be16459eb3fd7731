"""The folder of one experiment: where the stages leave their files, and whether these are still current."""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from wavedistill import __version__
from wavedistill.corpus.data import Manifest
from wavedistill.models.checkpoint import MODEL_FILE, Kind, load_model
from wavedistill.models.models import WaveformModel
from wavedistill.recipe.config import Recipe
from wavedistill.tools.engine import by_first, launch
from wavedistill.tools.errors import CheckpointError, CorpusError, RecipeError, UserError
from wavedistill.tools.files import replacing
from wavedistill.training.distillation import Teacher

SPEED = {"seed", "audio", "conditioning", "linear_prediction", "teacher", "student", "benchmark"}
"""The parts of a recipe that the speed of its models depends on."""


@dataclass(frozen=True)
class Experiment:
    """A recipe, the folder its files live in, the device it computes on, and its threads; None for the fastest."""

    recipe: Recipe
    root: Path
    device: torch.device
    threads: int | None = None

    @property
    def manifest(self) -> Path:
        """The list of prepared utterances."""
        return self.root / "manifest.json"

    @property
    def audio(self) -> Path:
        """The folder of prepared utterances."""
        return self.root / "audio"

    def training(self, kind: Kind) -> Path:
        """The folder of one model's training: checkpoints and TensorBoard logs."""
        return self.root / kind

    def checkpoint(self, kind: Kind) -> Path:
        """The trained model's file."""
        return self.training(kind) / MODEL_FILE

    @property
    def teacher_files(self) -> list[Path]:
        """The trained teacher's file; the source of its module if it is a density of the user's own."""
        path = self.recipe.student.teacher
        return [self.checkpoint("teacher")] if path is None else [_source(path)]

    @property
    def checkpoints(self) -> list[Path]:
        """The files of both models."""
        return [*self.teacher_files, self.checkpoint("student")]

    def corpus(self) -> Manifest:
        """The prepared corpus.

        Raises:
            CorpusError: if it is missing, or was prepared with other units than the recipe's.
        """
        manifest = Manifest.read(self.manifest)
        if manifest.audio != self.recipe.audio:
            raise CorpusError(f"{self.manifest}: its [audio] is not the recipe's: run the prepare stage again")
        return manifest

    def model(self, kind: Kind) -> WaveformModel:
        """The trained model, on the device.

        Raises:
            CheckpointError: if it is missing, or was built by other settings than the recipe's.
        """
        loaded = load_model(self.checkpoint(kind), self.device)
        for section in ("audio", "conditioning", "linear_prediction", kind):
            built, asked = (_architecture(recipe)[section] for recipe in (loaded.recipe, self.recipe))
            if built != asked:
                raise CheckpointError(
                    f"{self.checkpoint(kind)}: its [{section}] is not the recipe's: run the {kind} stage again"
                )
        return loaded.model

    def teacher(self) -> WaveformModel | Teacher:
        """What the student is distilled from: the trained teacher, or what the recipe's import path gives.

        Raises:
            CheckpointError: as `model`.
            RecipeError: if nothing can be imported from there.
        """
        path = self.recipe.student.teacher
        if path is None:
            return self.model("teacher")
        density = _imported(path)(self.recipe, self.device)
        # Even if it is a model of this package: its last transform may be another than the student's, and a KL of
        # residuals is that of waveforms only where both end alike, as `model` sees to.
        return lambda mel: density(mel)

    @property
    def samples(self) -> Path:
        """The folder of synthesised test utterances, a subfolder for each system."""
        return self.root / "samples"

    @property
    def metrics(self) -> Path:
        """Densities and scores."""
        return self.root / "metrics.json"

    @property
    def benchmark(self) -> Path:
        """Sampling speed."""
        return self.root / "benchmark.json"

    def benchmark_of(self, what: str) -> Path:
        """A table of the benchmark that is measured on demand: "full" or "train"."""
        return self.root / f"benchmark_{what}.json"

    @property
    def report(self) -> Path:
        """The page that shows it all."""
        return self.root / "report.html"


def measured_on(experiment: Experiment) -> str:
    """A digest of what a speed was measured on: the program, the models and their settings."""
    settings = experiment.recipe.model_dump(mode="json", include=SPEED)
    return fingerprint([__version__, settings], [experiment.manifest, *experiment.checkpoints])


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline; stages meet only through files.

    Attributes:
        name: of its command.
        summary: one line of help.
        needs: the stages whose files it reads; they must have finished.
        settings: what it depends on besides its input files, as plain values.
        inputs: the files it reads.
        outputs: the files whose presence shows that it is done.
        run: does the work and returns one line of result.
        shared: whether several processes may do it together.
        version: of what it computes, raised where it would make something else of the same inputs and settings.
    """

    name: str
    summary: str
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


def _imported(path: str) -> Callable[[Recipe, torch.device], Teacher]:
    """The user's function at an import path; a recipe names code, a checkpoint never brings any."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise _not_importable(path, str(error)) from error


def _source(path: str) -> Path:
    """The file of the module at an import path."""
    module, _, _ = path.partition(":")
    try:
        found = importlib.util.find_spec(module)
    except ImportError as error:
        raise _not_importable(path, str(error)) from error
    if found is None or found.origin is None:
        raise _not_importable(path, f"No module named '{module}'")
    return Path(found.origin)


def _not_importable(path: str, why: str) -> RecipeError:
    return RecipeError(
        f'student.teacher = "{path}": {why}; its module must be importable, for instance with PYTHONPATH=.'
    )


def _architecture(recipe: Recipe) -> dict[str, Any]:
    """All of a recipe but how its models are trained."""
    how = {"training": True, "loss": True, "spectral_n_ffts": True, "teacher": True}
    return recipe.model_dump(exclude={"teacher": how, "student": how})


def _stamp(experiment: Experiment, stage: str) -> Path:
    return experiment.root / ".stamps" / stage


def fingerprint(settings: Any, inputs: Iterable[Path]) -> str:
    """A digest of plain values and of files' contents."""
    digests = [sha256(path) for path in inputs]
    return hashlib.sha256(json.dumps([settings, digests], sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """The digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write plain values as JSON, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
