"""The one training loop, for every model and objective."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

from wavedistill.corpus.utterances import Manifest
from wavedistill.models.compiling import compile_networks
from wavedistill.networks.threads import settle
from wavedistill.recipe.recipe import Recipe
from wavedistill.tools.engine import launch, tensorboard
from wavedistill.tools.errors import TrainingError
from wavedistill.tools.progress import note, progress
from wavedistill.training.batches import Batches, mean_over_processes, read_ahead
from wavedistill.training.learner import Learner
from wavedistill.training.log import Log
from wavedistill.training.pace import Pace, forecast
from wavedistill.training.preview import Preview
from wavedistill.training.state import State
from wavedistill.training.task import Task

LOG_EVERY = 20
"""Steps between two scalars of the log."""
MOST_SKIPPED = 10
"""Steps in a row without a finite gradient, after which a training stops."""


class Outcome(NamedTuple):
    """The end of a training: the step and validation terms of the model that was kept, and how long this call took."""

    step: int
    valid: dict[str, float]
    seconds: float
    first_step: int

    def __str__(self) -> str:
        since = f" from step {self.first_step} on" if self.first_step else ""
        return f"at step {self.step}, {self.seconds:.0f} s{since}"


def fit(
    task: Task,
    manifest: Manifest,
    audio_folder: Path,
    *,
    recipe: Recipe,
    folder: Path,
    fingerprint: str,
    device: torch.device,
    threads: int | None = None,
) -> Outcome:
    """Train a model, or go on where an earlier call was interrupted, and keep the weights that validate best.

    Every random number is a function of the recipe's seed, the step and the place in the batch: a training that was
    interrupted and resumed ends with the same weights as one that was not, and one by several processes, each of which
    computes its share of every batch, with those of a single one, but for rounding. The first of them writes files.

    A step of which any player's gradient is not finite changes nothing, and is counted.

    Args:
        task: what to train, and how.
        manifest: the prepared corpus.
        audio_folder: the folder of its audio files.
        recipe: the experiment; stored in the checkpoint.
        folder: where the model to use, the states to resume from and TensorBoard logs go.
        fingerprint: of all that the trajectory depends on; only a state with the same one is resumed.
        device: where to compute; each of several processes has one of its kind.
        threads: of a CPU; None for those that an earlier call began with, or else the fastest.

    Raises:
        TrainingError: if the loss is not finite for long, or the training is interrupted.
        RecipeError: if the batch cannot be shared out evenly, or there is no compiler where one is wanted.
        CorpusError: if no utterance is as long as a segment.
        CheckpointError: if every state of the earlier call is damaged, or none can be written.
    """
    settings, fabric = task.settings, launch(device)
    learner = Learner(task, recipe, fabric)
    batches = Batches(task, manifest, audio_folder, recipe, fabric, learner.model.margin)
    # A GPU would wait for files; a CPU has nobody else to read them.
    batch_of = batches.of_step if device.type == "cpu" else read_ahead(batches.of_step)
    if settings.compile:
        compile_networks(learner.model)
        note(f"{task.name}: the networks are compiled first, for a minute or so")
    state = State(learner, fingerprint)
    state.restore(folder, settings.steps)
    wanted = threads if threads or fabric.world_size == 1 else torch.get_num_threads()
    state.threads = settle(wanted, learner.model.networks[0], backward=True, before=state.threads)
    heard = batches.heard()
    preview = Preview(task, manifest, audio_folder, recipe, learner.model.margin, fabric.device)
    started, first_step, pace = time.monotonic(), state.step, Pace()

    def validate(log: Log) -> None:
        values = batches.validate(learner.average)
        if not all(map(math.isfinite, values.values())):
            raise _diverged(f"the validation loss is not finite at step {state.step} ({values})", task, folder)
        log.figures("valid", values, state.step)
        state.keep_best(values, task, recipe, heard, folder)
        if fabric.is_global_zero:
            preview.generated(learner.average, log, state.step)

    with (
        tensorboard(folder, state.step) as logger,
        stop_signals() as stopped,
        progress(
            desc=f"{task.name} (resumed)" if state.step else task.name,
            total=settings.steps,
            initial=state.step,
            unit="step",
            disable=not fabric.is_global_zero,
        ) as bar,
    ):
        log = Log(logger, fabric)
        if state.best_step is None:
            learner.start_from_data(batches.at_start)
            state.save(folder)  # first, so that a checkpoint is never without a state, whenever the process dies
            preview.recorded(log, state.step)
            validate(log)
            state.save(folder)
        while state.step < settings.steps:
            begun = time.monotonic()
            terms, norm = learner.step(batch_of(state.step), state.step)
            state.count(norm)
            if (step_s := pace.count(time.monotonic() - begun)) and fabric.is_global_zero:
                left = timedelta(seconds=step_s * (settings.steps - state.step))
                if said := forecast(recipe, task.name, left, datetime.now()):
                    note(said)
            bar.update()
            if not math.isfinite(norm):
                log.figures("train", {"skipped_steps": state.skipped}, state.step)
                if state.skipped_in_a_row >= MOST_SKIPPED:
                    why = f"the gradient was not finite {MOST_SKIPPED} steps in a row, up to step {state.step}"
                    raise _diverged(why, task, folder)
            elif state.step % LOG_EVERY == 0:
                values = mean_over_processes(fabric, [terms])
                bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
                norms = {"gradient_norm": norm, "parameter_norm": learner.parameter_norm()}
                log.figures("train", {**values, **norms}, state.step)
            if state.step % settings.validate_every == 0 or state.step == settings.steps:
                validate(log)
                state.save(folder)
            # A signal may reach one process sooner than another: they stop after the same step.
            if fabric.strategy.reduce_boolean_decision(stopped(), all=False):
                state.save(folder)
                raise TrainingError(
                    f"{task.name}: interrupted at step {state.step}; run the same command again to go on"
                )
        seconds = time.monotonic() - started
        log.figures("train", {"steps_per_second": (state.step - first_step) / seconds}, state.step)
    assert state.best_step is not None
    return Outcome(state.best_step, state.best_valid, seconds, first_step)


def _diverged(what: str, task: Task, folder: Path) -> TrainingError:
    return TrainingError(
        f"{task.name}: {what}: lower training.{task.name}.learning_rate or grad_clip; {folder} "
        "keeps the last good state"
    )


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within, an interrupt or termination is only noted, so that a step in progress ends; gives a test for it."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
