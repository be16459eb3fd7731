"""What distinguishes one training from another: a task, and the players in it."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wavedistill.corpus.segments import Batch
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.trainings import Training
from wavedistill.tools.random import Streams

Terms = Mapping[str, Tensor]
"""Named scalar terms of a loss."""
LATE = 0.75
"""Share of a training's steps after which some terms may have other weights."""


class Player(NamedTuple):
    """A group of parameters that follows an objective of its own, with its own steps, schedule and clipping.

    A term's gradient has to reach the parameters of one player only.

    Attributes:
        name: of the player.
        parameters: that it moves.
        weights: of the terms in its objective, at a step.
        schedule: its learning rate at a step.
        grad_clip: the largest norm of its gradient.
    """

    name: str
    parameters: list[nn.Parameter]
    weights: Callable[[int], Mapping[str, float]]
    schedule: Callable[[int], float]
    grad_clip: float

    def objective(self, terms: Terms, step: int) -> Tensor:
        """The weighted sum of its terms, a scalar."""
        return torch.stack([weight * terms[name] for name, weight in self.weights(step).items() if weight]).sum()


class Task(NamedTuple):
    """One training.

    Attributes:
        name: of the training, and of the model that is trained.
        settings: of the optimisation.
        terms: of the loss of a model for a batch; all randomness comes from the streams of its items.
        weights: of the terms that the model is to lessen.
        factors: of some of these, in the last quarter of the steps. The weights to keep are chosen by what weighs then.
        sample: draws audio (B, T) from a model, with the conditioning of a batch, for the log.
        given: weights of the model, by name, that are known and stay as they are.
        players: of a model, the first of which lessens the weighted terms; by default its density and its predictor.
        start: weights of the model, by name, that it begins with, but for those that are given.
    """

    name: str
    settings: Training
    terms: Callable[[WaveformModel, Batch, Streams], Terms]
    weights: Mapping[str, float]
    sample: Callable[[WaveformModel, Batch], Tensor]
    given: Mapping[str, Tensor] = {}
    factors: Mapping[str, float] = {}
    players: "Callable[[Task, WaveformModel], list[Player]] | None" = None
    start: Mapping[str, Tensor] = {}


def players(task: Task, model: WaveformModel) -> list[Player]:
    """Those of a task: its own, or the density, and beside it the predictor of F0, which leaves its steps alone."""
    if task.players is not None:
        return task.players(task, model)
    schedule, clip = partial(learning_rate, task.settings), task.settings.grad_clip
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    predictor = set() if model.pitch is None else set(model.pitch.parameters())
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter in predictor].append(parameter)
    density = Player("density", groups[False], partial(weights_at, task), schedule, clip)
    predictor_alone = Player("predictor", groups[True], lambda step: {"pitch": 1.0}, schedule, clip)
    return [density, *([predictor_alone] if groups[True] else [])]


def weights_at(task: Task, step: int) -> Mapping[str, float]:
    """The weights of a task's terms at a step."""
    if step < LATE * task.settings.steps:
        return task.weights
    return {name: weight * task.factors.get(name, 1) for name, weight in task.weights.items()}


def learning_rate(settings: Training, step: int) -> float:
    """Linear warm-up, then a half cosine down to a twentieth."""
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    return settings.learning_rate * warmup * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / settings.steps)))
