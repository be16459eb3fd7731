"""The one training loop, for teacher and student alike."""

import copy
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from wavedistill import checkpoint
from wavedistill.audio import LOG_MEL_FLOOR
from wavedistill.config import Recipe, Training
from wavedistill.data import Manifest, Segments, random_stream
from wavedistill.errors import CheckpointError, TrainingError
from wavedistill.models import WaveformModel, build, compile_networks
from wavedistill.progress import note, progress
from wavedistill.tasks import Task

LOG_EVERY = 20
"""Steps between two scalars of the log."""
KEPT_STATES = 2
"""The last states of a training that are kept: should the last be damaged, it goes on from the one before."""
MOST_SKIPPED = 10
"""Steps in a row without a finite gradient, after which a training stops."""
TRAIN, VALID = 0, 1
"""Purposes of random streams."""


class Outcome(NamedTuple):
    """The end of a training: the step and validation terms of the model that was kept, and the seconds of this call."""

    step: int
    valid: dict[str, float]
    seconds: float


def fit(
    task: Task,
    manifest: Manifest,
    audio_folder: Path,
    *,
    recipe: Recipe,
    folder: Path,
    fingerprint: str,
    device: torch.device,
) -> Outcome:
    """Train a model, or go on where an earlier call was interrupted, and keep the weights that validate best.

    Every random number of a step is a function of the recipe's seed and the step, so that a training that was
    interrupted and resumed ends with the same weights as one that was not.

    Terms without a weight are learnt too, but have no part in the objective: a model's own predictor of F0 learns
    beside it, from a term `pitch`. A step whose gradient is not finite changes nothing, and is counted.

    Args:
        task: what to train, and how.
        manifest: the prepared corpus.
        audio_folder: the folder of its audio files.
        recipe: the experiment; stored in the checkpoint.
        folder: where the model to use, the states to resume from and TensorBoard logs go.
        fingerprint: of all that the trajectory depends on; only a state with the same one is resumed.
        device: where to compute.

    Raises:
        TrainingError: if the loss is not finite for long, or the training is interrupted.
        CorpusError: if no utterance is as long as a segment.
        CheckpointError: if every state of the earlier call is damaged, or none can be written.
    """
    settings, batches = task.settings, Batches(task, manifest, audio_folder, recipe, device)
    learner = Learner(task, recipe, device)
    model, average = learner.model, learner.average
    state = State(model, average, learner.optimizer, fingerprint)
    state.restore(folder, settings.steps)
    if settings.compile:
        compile_networks(model)
    started, first_step = time.monotonic(), state.step

    def validate() -> None:
        values = batches.validate(average)
        if not all(map(math.isfinite, values.values())):
            raise _diverged(f"the validation loss is not finite at step {state.step} ({values})", task, folder)
        state.keep_best(values, task, recipe, folder, writer)

    with (
        SummaryWriter(folder / "tensorboard", purge_step=state.step + 1 if state.step else 0) as writer,
        stop_signals() as stopped,
        progress(
            desc=f"{task.kind} (resumed)" if state.step else task.kind,
            total=settings.steps,
            initial=state.step,
            unit="step",
        ) as bar,
    ):
        if state.best_step is None:
            state.save(folder)  # first, so that a checkpoint is never without a state, whenever the process dies
            validate()
            state.save(folder)
        while state.step < settings.steps:
            terms = batches.terms(model, state.step)
            norm = learner.step(terms, state.step)
            state.step += 1
            bar.update()

            if not math.isfinite(norm):
                state.skipped += 1
                state.skipped_in_a_row += 1
                writer.add_scalar("train/skipped_steps", state.skipped, state.step)
                if state.skipped_in_a_row >= MOST_SKIPPED:
                    raise _diverged(
                        f"the gradient was not finite {MOST_SKIPPED} steps in a row, up to step {state.step}",
                        task,
                        folder,
                    )
            else:
                state.skipped_in_a_row = 0
            if state.step % LOG_EVERY == 0 and math.isfinite(norm):
                values = {name: term.item() for name, term in terms.items()}
                bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
                for name, value in {
                    **values,
                    "gradient_norm": norm,
                    "parameter_norm": learner.parameter_norm(),
                }.items():
                    writer.add_scalar(f"train/{name}", value, state.step)
            if state.step % settings.validate_every == 0 or state.step == settings.steps:
                validate()
                batches.preview(average, writer, state.step)
                state.save(folder)
            if stopped():
                state.save(folder)
                raise TrainingError(
                    f"{task.kind}: interrupted at step {state.step}; run the same command again to go on"
                )
        seconds = time.monotonic() - started
        writer.add_scalar("train/steps_per_second", (state.step - first_step) / seconds, state.step)
    assert state.best_step is not None
    return Outcome(state.best_step, state.best_valid, seconds)


class Learner:
    """A model, the moving average of its weights, and the optimizer of those that are not given."""

    def __init__(self, task: Task, recipe: Recipe, device: torch.device) -> None:
        self.task, self.model = task, build(task.kind, recipe, recipe.seed).to(device)
        self.model.load_state_dict(task.given, strict=False)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in task.given)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        learnt = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.optimizer = torch.optim.Adam(
            learnt.values(), lr=task.settings.learning_rate, betas=(0.9, 0.99), fused=True
        )
        # Clipped apart, so that the predictor of F0 leaves the density's steps alone.
        self._predictor = [parameter for name, parameter in learnt.items() if name.startswith("pitch.")]
        self._density = [parameter for name, parameter in learnt.items() if not name.startswith("pitch.")]

    def step(self, terms: Mapping[str, Tensor], step: int) -> float:
        """Follow the gradient of the terms of one step, unless it is not finite; returns its norm, before clipping."""
        settings = self.task.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        unweighted = [term for name, term in terms.items() if name not in self.task.weights]
        self.optimizer.zero_grad(set_to_none=True)
        (objective(terms, self.task.weights) + sum(unweighted)).backward()
        norm, predictor_norm = (
            float(nn.utils.clip_grad_norm_(parameters, settings.grad_clip))
            for parameters in (self._density, self._predictor)
        )
        if not math.isfinite(norm + predictor_norm):
            return math.nan
        self.optimizer.step()
        update_average(self.average, self.model, settings.ema_decay, step + 1)
        return norm

    def parameter_norm(self) -> float:
        """The norm of all learnt weights."""
        return float(nn.utils.get_total_norm([*self._density, *self._predictor]))


class Batches:
    """The data of one training, as terms of the loss: each a function of the recipe's seed and a number alone."""

    def __init__(
        self, task: Task, manifest: Manifest, audio_folder: Path, recipe: Recipe, device: torch.device
    ) -> None:
        self.task, self.recipe = task, recipe
        self.train, self.valid = (
            Segments(
                manifest,
                audio_folder,
                split,
                frames=task.settings.segment_frames,
                context=recipe.conditioning.context,
                device=device,
            )
            for split in ("train", "valid")
        )

    def terms(self, model: WaveformModel, step: int) -> Mapping[str, Tensor]:
        """The terms of a training step."""
        return self._terms(model, self.train, random_stream(self.recipe.seed, TRAIN, step))

    @torch.no_grad()
    def validate(self, model: WaveformModel) -> dict[str, float]:
        """Mean terms over the same segments and the same noise each time."""
        count = self.task.settings.validate_batches
        sums: dict[str, float] = {}
        for i in range(count):
            for name, term in self._terms(model, self.valid, random_stream(self.recipe.seed, VALID, i)).items():
                sums[name] = sums.get(name, 0.0) + term.item() / count
        return sums

    @torch.no_grad()
    def preview(self, model: WaveformModel, writer: SummaryWriter, step: int) -> None:
        """Log audio and log-mel of one validation segment, as recorded and as the model draws it."""
        batch = self.valid.draw(1, random_stream(self.recipe.seed, VALID, 0))
        for name, wave in (("recorded", batch.audio), ("drawn", self.task.sample(model, batch))):
            writer.add_audio(name, wave[0].clamp(-1, 1), step, self.recipe.audio.sample_rate)
            picture = self.valid.log_mel.of_file(wave)[0].flip(0) / -LOG_MEL_FLOOR + 1
            writer.add_image(f"log-mel {name}", picture.clamp(0, 1), step, dataformats="HW")

    def _terms(self, model: WaveformModel, segments: Segments, generator: torch.Generator) -> Mapping[str, Tensor]:
        batch = segments.draw(self.task.settings.batch_size, generator)
        return self.task.terms(model, batch, generator)


class State:
    """All that a training needs to go on: weights, their average, the optimizer, the step, and the best so far."""

    COUNTS = ("step", "skipped", "skipped_in_a_row")

    def __init__(
        self, model: WaveformModel, average: WaveformModel, optimizer: torch.optim.Optimizer, fingerprint: str
    ) -> None:
        self.model, self.average, self.optimizer, self.fingerprint = model, average, optimizer, fingerprint
        self.step, self.skipped, self.skipped_in_a_row = 0, 0, 0
        self.best_step: int | None = None
        self.best_objective = math.inf
        self.best_valid: dict[str, float] = {}

    def keep_best(
        self, valid: dict[str, float], task: Task, recipe: Recipe, folder: Path, writer: SummaryWriter
    ) -> None:
        """Log validation terms; write the averaged weights as the model to use if they are the best so far."""
        for name, value in valid.items():
            writer.add_scalar(f"valid/{name}", value, self.step)
        total = sum(weight * valid[name] for name, weight in task.weights.items() if weight)
        if total < self.best_objective:
            self.best_step, self.best_objective, self.best_valid = self.step, total, valid
            checkpoint.save_model(
                folder / checkpoint.MODEL_FILE, task.kind, recipe, self.step, self.average.state_dict()
            )

    def save(self, folder: Path) -> None:
        """Write the state, whole or not at all, and delete the oldest."""
        tensors = {
            **{f"model.{name}": value for name, value in self.model.state_dict().items()},
            **{f"average.{name}": value for name, value in self.average.state_dict().items()},
            **{
                f"optimizer.{index}.{name}": value
                for index, values in self.optimizer.state_dict()["state"].items()
                for name, value in values.items()
            },
        }
        best = None if self.best_step is None else [self.best_step, self.best_objective, self.best_valid]
        header = {name: getattr(self, name) for name in ("fingerprint", *self.COUNTS)}
        checkpoint.save(folder / f"state-{self.step:08d}{checkpoint.SUFFIX}", tensors, {**header, "best": best})
        for path in saved_states(folder)[KEPT_STATES:]:
            path.unlink()

    def restore(self, folder: Path, steps: int) -> None:
        """Take up the state in a folder; a folder of another training, or one beyond `steps`, is set aside."""
        for partial in folder.glob("*.partial"):  # of a process that died
            partial.unlink()
        states, model = saved_states(folder), folder / checkpoint.MODEL_FILE
        if not states and not model.exists():
            return
        tensors, header = _last_readable(states) if states else ({}, {})
        if (
            header.get("fingerprint") != self.fingerprint
            or header["step"] > steps
            or (header["best"] and not model.exists())
        ):
            kept = checkpoint.set_aside(folder)
            note(f"{folder}: holds a training with other settings or data, or only a part of one; kept as {kept}")
            return
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        self.model.load_state_dict(parts["model"])
        self.average.load_state_dict(parts["average"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in parts["optimizer"].items():
            index, _, name = key.partition(".")
            moments.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        for name in self.COUNTS:
            setattr(self, name, header[name])
        if header["best"]:
            self.best_step, self.best_objective, self.best_valid = header["best"]


def saved_states(folder: Path) -> list[Path]:
    """The states of a training, the last first."""
    return sorted(folder.glob(f"state-*{checkpoint.SUFFIX}"), reverse=True)


def _last_readable(states: list[Path]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    for path, before in itertools.zip_longest(states, states[1:]):
        try:
            return checkpoint.load(path)
        except CheckpointError as error:
            if before is None:
                raise
            note(f"{error}; going on from {before.name}, the one before")
    raise AssertionError("there is at least one state")


def _diverged(what: str, task: Task, folder: Path) -> TrainingError:
    return TrainingError(
        f"{task.kind}: {what}: lower {task.kind}.training.learning_rate or grad_clip; {folder} "
        "keeps the last good state"
    )


def objective(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum of the named terms that have a weight."""
    return torch.stack([weight * terms[name] for name, weight in weights.items() if weight]).sum()


def learning_rate(settings: Training, step: int) -> float:
    """Linear warm-up, then a half cosine down to a twentieth."""
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    return settings.learning_rate * warmup * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / settings.steps)))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    r"""Move the average towards the model: :math:`\bar w \leftarrow d \bar w + (1 - d) w`, d smaller in early steps."""
    decay = min(decay, step / (step + 10))
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


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
