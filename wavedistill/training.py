"""The one training loop, for teacher and student alike."""

import copy
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
from wavedistill.errors import TrainingError
from wavedistill.models import WaveformModel, build, compile_networks
from wavedistill.progress import note, progress
from wavedistill.tasks import Task

LOG_EVERY = 20
"""Steps between two scalars of the log."""
STATE_FILE = "training.pt"
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
    beside it, from a term `pitch`.

    Args:
        task: what to train, and how.
        manifest: the prepared corpus.
        audio_folder: the folder of its audio files.
        recipe: the experiment; stored in the checkpoint.
        folder: where `checkpoint.pt`, the resumable `training.pt` and TensorBoard logs go.
        fingerprint: of all that the trajectory depends on; only a state with the same one is resumed.
        device: where to compute.

    Raises:
        TrainingError: if the loss stops being finite, or the training is interrupted.
        CorpusError: if no utterance is as long as a segment.
        CheckpointError: if the state of the earlier call is damaged.
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
        _require_finite(values, task, state.step, folder)
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
        if not state.step:
            validate()
            state.save(folder)
        while state.step < settings.steps:
            terms = batches.terms(model, state.step)
            norm = learner.step(terms, state.step)
            state.step += 1
            bar.update()

            if state.step % LOG_EVERY == 0:
                values = {name: term.item() for name, term in terms.items()}
                _require_finite(values, task, state.step, folder)
                bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
                for name, value in {**values, "gradient_norm": norm.item()}.items():
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

    def step(self, terms: Mapping[str, Tensor], step: int) -> Tensor:
        """Follow the gradient of the terms of one step; returns its norm, before clipping."""
        settings = self.task.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        unweighted = [term for name, term in terms.items() if name not in self.task.weights]
        self.optimizer.zero_grad(set_to_none=True)
        (objective(terms, self.task.weights) + sum(unweighted)).backward()
        norm = nn.utils.clip_grad_norm_(self._density, settings.grad_clip)
        nn.utils.clip_grad_norm_(self._predictor, settings.grad_clip)
        self.optimizer.step()
        update_average(self.average, self.model, settings.ema_decay, step + 1)
        return norm


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

    def __init__(
        self, model: WaveformModel, average: WaveformModel, optimizer: torch.optim.Optimizer, fingerprint: str
    ) -> None:
        self.parts: dict[str, Any] = {"model": model, "average": average, "optimizer": optimizer}
        self.average, self.fingerprint = average, fingerprint
        self.step, self.best_step, self.best_objective = 0, 0, math.inf
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
            checkpoint.save_model(folder / "checkpoint.pt", task.kind, recipe, self.step, self.average.state_dict())

    def save(self, folder: Path) -> None:
        """Write the state, whole or not at all."""
        scalars = {name: value for name, value in vars(self).items() if name not in ("parts", "average")}
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        checkpoint.save(folder / STATE_FILE, {**scalars, **parts})

    def restore(self, folder: Path, steps: int) -> None:
        """Take up the state in a folder; a folder of another training, or one beyond `steps`, is set aside."""
        files = [(folder / name).exists() for name in (STATE_FILE, "checkpoint.pt")]
        if not any(files):
            return
        content = checkpoint.load(folder / STATE_FILE) if all(files) else {}
        if content.get("fingerprint") != self.fingerprint or content["step"] > steps:
            kept = checkpoint.set_aside(folder)
            note(f"{folder}: holds a training with other settings or data, or only a part of one; kept as {kept}")
            return
        for name, part in self.parts.items():
            part.load_state_dict(content.pop(name))
        vars(self).update(content)


def _require_finite(values: Mapping[str, float], task: Task, step: int, folder: Path) -> None:
    if not all(map(math.isfinite, values.values())):
        raise TrainingError(
            f"{task.kind}: the loss is not finite at step {step} ({values}): lower {task.kind}.training.learning_rate "
            f"or grad_clip; {folder} keeps the last good checkpoint"
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
