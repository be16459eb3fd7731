"""The one training loop, for teacher and student alike."""

import copy
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

import torch
from pydantic import BaseModel, NonNegativeInt, ValidationError
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from wavedistill.corpus.data import Batch, Heard, Manifest, Segments, Streams, random_stream
from wavedistill.models import checkpoint
from wavedistill.models.models import WaveformModel, build, compile_networks, margin
from wavedistill.networks.threads import settle
from wavedistill.recipe.config import Recipe, Training
from wavedistill.speech.audio import LOG_MEL_FLOOR
from wavedistill.tools.engine import by_first, launch, tensorboard
from wavedistill.tools.errors import CheckpointError, RecipeError, TrainingError
from wavedistill.tools.progress import note, progress
from wavedistill.training.tasks import Task

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

LOG_EVERY = 20
"""Steps between two scalars of the log."""
KEPT_STATES = 2
"""The last states of a training that are kept: should the last be damaged, it goes on from the one before."""
MOST_SKIPPED = 10
"""Steps in a row without a finite gradient, after which a training stops."""
TRAIN, VALID, HEARD = 0, 1, 2
"""Purposes of random streams."""
HEARD_SEGMENTS = 256
"""Of the training split, for what a checkpoint says that its model was trained on."""

Found = TypeVar("Found")


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

    Terms without a weight are learnt too, but have no part in the objective: a model's own predictor of F0 learns
    beside it, from a term `pitch`. A step whose gradient is not finite changes nothing, and is counted.

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
    batches = Batches(task, manifest, audio_folder, recipe, fabric)
    # A GPU would wait for files; a CPU has nobody else to read them.
    batch_of = batches.of_step if device.type == "cpu" else read_ahead(batches.of_step)
    learner = Learner(task, recipe, fabric)
    if settings.compile:
        compile_networks(learner.model)
        note(f"{task.kind}: the networks are compiled first, for a minute or so")
    state = State(learner, fingerprint)
    state.restore(folder, settings.steps)
    wanted = threads if threads or fabric.world_size == 1 else torch.get_num_threads()
    state.threads = settle(wanted, learner.model.networks[0], backward=True, before=state.threads)
    heard = batches.heard()
    started, first_step = time.monotonic(), state.step

    def validate(log: "TensorBoardLogger") -> None:
        values = batches.validate(learner.average)
        if not all(map(math.isfinite, values.values())):
            raise _diverged(f"the validation loss is not finite at step {state.step} ({values})", task, folder)
        log.log_metrics({f"valid/{name}": value for name, value in values.items()}, state.step)
        state.keep_best(values, task, recipe, heard, folder)

    with (
        tensorboard(folder, state.step) as log,
        stop_signals() as stopped,
        progress(
            desc=f"{task.kind} (resumed)" if state.step else task.kind,
            total=settings.steps,
            initial=state.step,
            unit="step",
            disable=not fabric.is_global_zero,
        ) as bar,
    ):
        if state.best_step is None:
            state.save(folder)  # first, so that a checkpoint is never without a state, whenever the process dies
            validate(log)
            state.save(folder)
        while state.step < settings.steps:
            terms, norm = learner.step(batch_of(state.step), state.step)
            state.count(norm)
            bar.update()
            if not math.isfinite(norm):
                log.log_metrics({"train/skipped_steps": state.skipped}, state.step)
                if state.skipped_in_a_row >= MOST_SKIPPED:
                    raise _diverged(
                        f"the gradient was not finite {MOST_SKIPPED} steps in a row, up to step {state.step}",
                        task,
                        folder,
                    )
            elif state.step % LOG_EVERY == 0:
                values = mean_over_processes(fabric, [terms])
                bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
                norms = {"gradient_norm": norm, "parameter_norm": learner.parameter_norm()}
                log.log_metrics({f"train/{name}": value for name, value in {**values, **norms}.items()}, state.step)
            if state.step % settings.validate_every == 0 or state.step == settings.steps:
                validate(log)
                if fabric.is_global_zero:
                    batches.preview(learner.average, log, state.step)
                state.save(folder)
            # A signal may reach one process sooner than another: they stop after the same step.
            if fabric.strategy.reduce_boolean_decision(stopped(), all=False):
                state.save(folder)
                raise TrainingError(
                    f"{task.kind}: interrupted at step {state.step}; run the same command again to go on"
                )
        seconds = time.monotonic() - started
        log.log_metrics({"train/steps_per_second": (state.step - first_step) / seconds}, state.step)
    assert state.best_step is not None
    return Outcome(state.best_step, state.best_valid, seconds, first_step)


class Learner:
    """A model, the moving average of its weights, and the optimizer of those that are not given."""

    def __init__(self, task: Task, recipe: Recipe, fabric: "Fabric") -> None:
        self.task, self.fabric = task, fabric
        self.model = build(task.kind, recipe, recipe.seed).to(fabric.device)
        self.model.load_state_dict(task.given, strict=False)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in task.given)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        learnt = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        optimizer = torch.optim.Adam(learnt.values(), lr=task.settings.learning_rate, betas=(0.9, 0.99), fused=True)
        self._terms, self.optimizer = fabric.setup(_Terms(task, self.model), optimizer)
        # Clipped apart, so that the predictor of F0 leaves the density's steps alone.
        self._predictor = [parameter for name, parameter in learnt.items() if name.startswith("pitch.")]
        self._density = [parameter for name, parameter in learnt.items() if not name.startswith("pitch.")]

    def step(self, parts: Iterable[tuple[Batch, Streams]], step: int) -> tuple[dict[str, Tensor], float]:
        """Follow the gradient of a batch, unless it is not finite.

        Args:
            parts: of the batch, for this process, one for each share of memory.
            step: the number of steps before.

        Returns:
            The mean terms of this process, and the norm of the gradient before clipping, NaN where it is not finite.
        """
        settings = self.task.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        self.optimizer.zero_grad(set_to_none=True)
        found: dict[str, Tensor] = {}
        for number, (batch, streams) in enumerate(parts, 1):
            with self.fabric.no_backward_sync(self._terms, enabled=number < settings.accumulate):
                terms = {name: term / settings.accumulate for name, term in self._terms(batch, streams).items()}
                unweighted = [term for name, term in terms.items() if name not in self.task.weights]
                self.fabric.backward(objective(terms, self.task.weights) + sum(unweighted))
            found = {name: term.detach() + found.get(name, 0) for name, term in terms.items()}
        norms = [
            nn.utils.clip_grad_norm_(part, settings.grad_clip) for part in (self._density, self._predictor) if part
        ]
        norm, *predictor_norm = torch.stack(norms).tolist()  # the one place where a step waits for a GPU
        if not math.isfinite(norm + sum(predictor_norm)):
            return found, math.nan
        self.optimizer.step()
        update_average(self.average, self.model, settings.ema_decay, step + 1)
        return found, norm

    def parameter_norm(self) -> float:
        """The norm of all learnt weights."""
        return float(nn.utils.get_total_norm([*self._density, *self._predictor]))


class _Terms(nn.Module):
    """The loss as the forward pass of a module, which is what an engine makes parallel.

    Reduced precision is torch's autocast, not the engine's, which would round the data too.
    """

    def __init__(self, task: Task, model: WaveformModel) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Batch, streams: Streams) -> Mapping[str, Tensor]:
        lowered = self.task.settings.precision == "bf16-mixed"
        with torch.autocast(batch.audio.device.type, torch.bfloat16, enabled=lowered):
            return self.task.terms(self.model, batch, streams)


class Batches:
    """The data of one training, of which each process draws its share, in parts that fit into memory.

    Every item and its noise are a function of the recipe's seed and the item's number alone.

    Raises:
        RecipeError: if the batch cannot be shared out evenly.
    """

    def __init__(self, task: Task, manifest: Manifest, audio_folder: Path, recipe: Recipe, fabric: "Fabric") -> None:
        self.task, self.recipe, self.fabric = task, recipe, fabric
        settings, shares = task.settings, fabric.world_size * task.settings.accumulate
        if settings.batch_size % shares:
            raise RecipeError(
                f"{task.kind}.training.batch_size = {settings.batch_size}: cannot be shared out evenly over "
                f"{fabric.world_size} processes x accumulate = {settings.accumulate}; for instance batch_size = "
                f"{math.ceil(settings.batch_size / shares) * shares}"
            )
        self.train, self.valid = (
            Segments(
                manifest,
                audio_folder,
                split,
                frames=settings.segment_frames,
                margin=margin(recipe),
                device=fabric.device,
            )
            for split in ("train", "valid")
        )

    def of_step(self, step: int) -> list[tuple[Batch, Streams]]:
        """The parts of a training step's batch."""
        return list(self._parts(self.train, TRAIN, step))

    @torch.no_grad()
    def validate(self, model: WaveformModel) -> dict[str, float]:
        """Mean terms over the same segments and the same noise each time."""
        return mean_over_processes(
            self.fabric,
            [
                self.task.terms(model, *part)
                for number in range(self.task.settings.validate_batches)
                for part in self._parts(self.valid, VALID, number)
            ],
        )

    def heard(self) -> Heard:
        """What the model is trained on, by some segments."""
        return Heard.of(self.train.draw(self._streams(HEARD, 0, range(HEARD_SEGMENTS))))

    @torch.no_grad()
    def preview(self, model: WaveformModel, log: "TensorBoardLogger", step: int) -> None:
        """Log audio and log-mel of one validation segment, as recorded and as the model draws it."""
        batch = self.valid.draw(self._streams(VALID, 0, range(1)))
        for name, wave in (("recorded", batch.audio), ("drawn", self.task.sample(model, batch))):
            log.experiment.add_audio(name, wave[0].clamp(-1, 1), step, self.recipe.audio.sample_rate)
            picture = self.valid.log_mel.of_file(wave)[0].flip(0) / -LOG_MEL_FLOOR + 1
            log.experiment.add_image(f"log-mel {name}", picture.clamp(0, 1), step, dataformats="HW")

    def _parts(self, segments: Segments, purpose: int, number: int) -> Iterator[tuple[Batch, Streams]]:
        settings, processes = self.task.settings, self.fabric.world_size
        size = settings.batch_size // (processes * settings.accumulate)
        for part in range(settings.accumulate):
            first = (part * processes + self.fabric.global_rank) * size
            streams = self._streams(purpose, number, range(first, first + size))
            yield segments.draw(streams), streams

    def _streams(self, purpose: int, number: int, items: range) -> Streams:
        return [random_stream(self.recipe.seed, purpose, number, item) for item in items]


class StateHeader(BaseModel):
    """What a state's file says beside its tensors."""

    fingerprint: str
    step: NonNegativeInt
    skipped: NonNegativeInt
    skipped_in_a_row: NonNegativeInt
    threads: NonNegativeInt
    best: tuple[int, float, dict[str, float]] | None
    """Step, objective and validation terms of the model that is kept."""


def read_ahead(read: Callable[[int], Found]) -> Callable[[int], Found]:
    """A function of a step that is called for the step after in another thread, while its caller is at work."""
    thread = ThreadPoolExecutor(1)
    ahead: dict[int, Future[Found]] = {}

    def of_step(step: int) -> Found:
        wanted = ahead.pop(step, None) or thread.submit(read, step)
        ahead.clear()
        ahead[step + 1] = thread.submit(read, step + 1)
        return wanted.result()

    return of_step


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
        total = sum(weight * valid[name] for name, weight in task.weights.items() if weight)
        if total < self.best_objective:
            self.best_step, self.best_objective, self.best_valid = self.step, total, valid
            if self.fabric.is_global_zero:
                weights = self.learner.average.state_dict()
                path = folder / checkpoint.MODEL_FILE
                checkpoint.save_model(path, task.kind, recipe, self.step, heard, weights)

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


def mean_over_processes(fabric: "Fabric", terms: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The mean of named terms, over a sequence of them and over all processes."""
    names = list(terms[0])
    means = torch.stack([torch.stack([found[name] for name in names]).double() for found in terms]).mean(0)
    return dict(zip(names, cast(Tensor, fabric.all_reduce(means, reduce_op="mean")).tolist(), strict=True))


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
    move = get_ema_multi_avg_fn(decay)
    move(list(average.parameters()), list(model.parameters()), step)


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
