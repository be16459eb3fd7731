"""The data of a training: every process's share of each batch, and what is validated."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from wavedistill.corpus.segments import Batch, Segments
from wavedistill.corpus.utterances import Manifest
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech.heard import Heard
from wavedistill.tools.errors import RecipeError
from wavedistill.tools.random import Streams, random_stream
from wavedistill.training.task import Task

if TYPE_CHECKING:
    from lightning_fabric import Fabric

TRAIN, VALID, HEARD, START = 0, 1, 2, 3
"""Purposes of random streams."""
HEARD_SEGMENTS, START_SEGMENTS = 256, 32
"""Of the training split, for what a checkpoint says that its model was trained on, and for what starts from data."""

Found = TypeVar("Found")


class Batches:
    """The data of one training, of which each process draws its share, in parts that fit into memory.

    Every item and its noise are a function of the recipe's seed and the item's number alone.

    Args:
        task: what is trained.
        manifest: the prepared corpus.
        audio_folder: the folder of its audio files.
        recipe: the experiment.
        fabric: the processes.
        margin: frames of conditioning on either side of a segment.

    Raises:
        RecipeError: if the batch cannot be shared out evenly.
    """

    def __init__(
        self, task: Task, manifest: Manifest, audio_folder: Path, recipe: Recipe, fabric: "Fabric", margin: int
    ) -> None:
        self.task, self.recipe, self.fabric = task, recipe, fabric
        settings, shares = task.settings, fabric.world_size * task.settings.accumulate
        if settings.batch_size % shares:
            raise RecipeError(
                f"training.{task.name}.batch_size = {settings.batch_size}: cannot be shared out evenly over "
                f"{fabric.world_size} processes x accumulate = {settings.accumulate}; for instance batch_size = "
                f"{math.ceil(settings.batch_size / shares) * shares}"
            )
        self.train, self.valid = (
            Segments(manifest, audio_folder, split, frames=settings.segment_frames, margin=margin, device=fabric.device)
            for split in ("train", "valid")
        )

    def of_step(self, step: int) -> list[tuple[Batch, Streams]]:
        """The parts of a training step's batch."""
        return list(self._parts(self.train, TRAIN, step))

    def at_start(self) -> tuple[Batch, Streams]:
        """Segments for what starts from data: the same for any number of processes and any size of a batch."""
        streams = self._streams(START, 0, range(START_SEGMENTS))
        return self.train.draw(streams), streams

    @torch.no_grad()
    def validate(self, model: WaveformModel) -> dict[str, float]:
        """Mean terms over the same segments and the same noise each time."""
        numbers = range(self.task.settings.validate_batches)
        parts = (part for number in numbers for part in self._parts(self.valid, VALID, number))
        return mean_over_processes(self.fabric, [self.task.terms(model, *part) for part in parts])

    def heard(self) -> Heard:
        """What the model is trained on, by some segments."""
        told = self.train.draw(self._streams(HEARD, 0, range(HEARD_SEGMENTS))).conditioning
        assert told.f0 is not None
        return Heard.of(told.mel, told.f0)

    def _parts(self, segments: Segments, purpose: int, number: int) -> Iterator[tuple[Batch, Streams]]:
        settings, processes = self.task.settings, self.fabric.world_size
        size = settings.batch_size // (processes * settings.accumulate)
        for part in range(settings.accumulate):
            first = (part * processes + self.fabric.global_rank) * size
            streams = self._streams(purpose, number, range(first, first + size))
            yield segments.draw(streams), streams

    def _streams(self, purpose: int, number: int, items: range) -> Streams:
        return [random_stream(self.recipe.seed, purpose, number, item) for item in items]


def mean_over_processes(fabric: "Fabric", terms: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The mean of named terms, over a sequence of them and over all processes."""
    names = list(terms[0])
    means = torch.stack([torch.stack([found[name] for name in names]).double() for found in terms]).mean(0)
    return dict(zip(names, cast(Tensor, fabric.all_reduce(means, reduce_op="mean")).tolist(), strict=True))


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
