"""All that a training needs to go on after its process has died, and its files."""

import itertools
import math
from pathlib import Path

from pydantic import BaseModel, NonNegativeInt, ValidationError
from torch import Tensor

from wavedistill.models import checkpoint
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech.heard import Heard
from wavedistill.tools.engine import by_first
from wavedistill.tools.errors import CheckpointError
from wavedistill.tools.progress import note
from wavedistill.training.learner import Learner
from wavedistill.training.task import Task, weights_at

KEPT_STATES = 2
"""The last states of a training that are kept: should the last be damaged, it goes on from the one before."""


class StateHeader(BaseModel):
    """What a state's file says beside its tensors."""

    fingerprint: str
    step: NonNegativeInt
    skipped: NonNegativeInt
    skipped_in_a_row: NonNegativeInt
    threads: NonNegativeInt
    best: tuple[int, float, dict[str, float]] | None
    """Step, objective and validation terms of the model that is kept."""


class State:
    """All that a training needs to go on: weights, their average, the optimizer, the step, and the best so far."""

    COUNTS = ("step", "skipped", "skipped_in_a_row", "threads")

    def __init__(self, learner: Learner, fingerprint: str) -> None:
        self.learner, self.fabric, self.fingerprint = learner, learner.fabric, fingerprint
        self.step, self.skipped, self.skipped_in_a_row, self.threads = 0, 0, 0, 0
        self.best_step: int | None = None
        self.best_objective = math.inf
        self.best_valid: dict[str, float] = {}

    def count(self, norm: float) -> None:
        """Count a step, and whether it was skipped because the norm of its gradient is not finite."""
        self.step += 1
        self.skipped += not math.isfinite(norm)
        self.skipped_in_a_row = 0 if math.isfinite(norm) else self.skipped_in_a_row + 1

    def keep_best(self, valid: dict[str, float], task: Task, recipe: Recipe, heard: Heard, folder: Path) -> None:
        """Write the averaged weights as the model to use if their validation terms are the best so far."""
        weights = weights_at(task, task.settings.steps)
        total = sum(weight * valid[name] for name, weight in weights.items() if weight)
        if total < self.best_objective:
            self.best_step, self.best_objective, self.best_valid = self.step, total, valid
            if self.fabric.is_global_zero:
                path = folder / checkpoint.MODEL_FILE
                checkpoint.save_model(path, task.name, recipe, self.step, heard, self.learner.average.state_dict())

    def save(self, folder: Path) -> None:
        """Write the state, whole or not at all, and delete the oldest."""
        if not self.fabric.is_global_zero:
            return
        tensors = {
            **{f"model.{name}": value for name, value in self.learner.model.state_dict().items()},
            **{f"average.{name}": value for name, value in self.learner.average.state_dict().items()},
            **{
                f"optimizer.{index}.{name}": value
                for index, values in self.learner.optimizer.state_dict()["state"].items()
                for name, value in values.items()
            },
        }
        header = StateHeader(
            fingerprint=self.fingerprint,
            best=None if self.best_step is None else (self.best_step, self.best_objective, self.best_valid),
            **{name: getattr(self, name) for name in self.COUNTS},
        )
        path = folder / f"state-{self.step:08d}{checkpoint.SUFFIX}"
        checkpoint.save(path, tensors, header.model_dump(mode="json"))
        for path in saved_states(folder)[KEPT_STATES:]:
            path.unlink()

    def restore(self, folder: Path, steps: int) -> None:
        """Take up the state in a folder; a folder of another training, or one beyond `steps`, is set aside."""
        tensors, header = by_first(self.fabric, lambda: self._saved(folder, steps))
        if header is None:
            return
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        self.learner.model.load_state_dict(parts["model"])
        self.learner.average.load_state_dict(parts["average"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in parts["optimizer"].items():
            index, _, name = key.partition(".")
            moments.setdefault(int(index), {})[name] = value
        optimizer = self.learner.optimizer
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        for name in self.COUNTS:
            setattr(self, name, getattr(header, name))
        if header.best:
            self.best_step, self.best_objective, self.best_valid = header.best

    def _saved(self, folder: Path, steps: int) -> tuple[dict[str, Tensor], StateHeader | None]:
        """The state to go on from, if there is one."""
        for partial in folder.glob("*.partial"):  # of a process that died
            partial.unlink()
        states, model = saved_states(folder), folder / checkpoint.MODEL_FILE
        if not states and not model.exists():
            return {}, None
        tensors, header = _last_readable(states) if states else ({}, None)
        if (
            header is None
            or header.fingerprint != self.fingerprint
            or header.step > steps
            or (header.best and not model.exists())
        ):
            kept = checkpoint.set_aside(folder)
            note(f"{folder}: holds a training with other settings or data, or only a part of one; kept as {kept}")
            return {}, None
        return tensors, header


def saved_states(folder: Path) -> list[Path]:
    """The states of a training, the last first."""
    return sorted(folder.glob(f"state-*{checkpoint.SUFFIX}"), reverse=True)


def _last_readable(states: list[Path]) -> tuple[dict[str, Tensor], StateHeader]:
    for path, before in itertools.zip_longest(states, states[1:]):
        try:
            return load_state(path)
        except CheckpointError as error:
            if before is None:
                raise
            note(f"{error}; going on from {before.name}, the one before")
    raise AssertionError("there is at least one state")


def load_state(path: Path) -> tuple[dict[str, Tensor], StateHeader]:
    """The tensors of a state, and what it says of itself.

    Raises:
        CheckpointError: if it is damaged, or no state of a training.
    """
    tensors, content = checkpoint.load(path)
    try:
        return tensors, StateHeader.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{path}: not the state of a training, or a damaged one") from error
