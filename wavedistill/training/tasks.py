"""What distinguishes the training of a teacher from that of a student: the terms of the loss, and their weights."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from wavedistill.corpus.data import Batch, Streams, dequantise, random_stream
from wavedistill.models.checkpoint import Kind
from wavedistill.models.models import WaveformModel
from wavedistill.recipe.config import Recipe, Training
from wavedistill.sampling.sampling import sample
from wavedistill.training.distillation import Distillation, DistillationFromDensity, Teacher

PREVIEW_SECONDS = 0.25
"""Sequential sampling is slow: the log of a teacher hears this much."""


class Task(NamedTuple):
    """One training.

    Attributes:
        kind: the model that is trained.
        settings: of the optimisation.
        terms: the named scalar terms of the loss of a model for a batch; all randomness comes from the streams of
            its items.
        weights: of the terms in the objective, which also decides which weights are kept.
        sample: draws audio (B, T) from a model, with the conditioning of a batch, for the log.
        given: weights of the model, by name, that are known and stay as they are.
    """

    kind: Kind
    settings: Training
    terms: Callable[[WaveformModel, Batch, Streams], Mapping[str, Tensor]]
    weights: Mapping[str, float]
    sample: Callable[[WaveformModel, Batch], Tensor]
    given: Mapping[str, Tensor] = {}


def teacher_task(recipe: Recipe) -> Task:
    """Maximum likelihood; beside it, the predictor of F0 learns from F0 tracked in the recordings."""

    def terms(model: WaveformModel, batch: Batch, streams: Streams) -> Mapping[str, Tensor]:
        residual, ladj = model.analyse(dequantise(batch.with_margins, streams), batch.mel)
        log_prob = model.residual(batch.mel, batch.f0).log_prob_steps(residual) + ladj
        found = {"nll": -log_prob.mean()}
        if model.pitch is not None:
            found["pitch"] = model.pitch.loss(batch.mel, batch.f0)
        return found

    def draw(model: WaveformModel, batch: Batch) -> Tensor:
        length = min(
            int(PREVIEW_SECONDS * recipe.audio.sample_rate),
            recipe.teacher.training.segment_frames * recipe.audio.hop_length,
        )
        noise = model.base.noise((len(batch.mel), length), random_stream(recipe.seed)).to(batch.mel.device)
        return sample(model(batch.mel, batch.f0), noise)

    return Task("teacher", recipe.teacher.training, terms, {"nll": 1.0}, draw)


def student_task(recipe: Recipe, teacher: WaveformModel | Teacher, device: torch.device) -> Task:
    """Distillation; the student's predictor of F0 is the recipe's teacher's, or learns beside it."""

    def draw(model: WaveformModel, batch: Batch) -> Tensor:
        noise = model.base.noise(tuple(batch.audio.shape), random_stream(recipe.seed)).to(batch.audio.device)
        return sample(model(batch.mel), noise)

    predictor: Mapping[str, Tensor] = {}
    if isinstance(teacher, WaveformModel):
        terms = Distillation(teacher, recipe).terms
        predictor = {} if teacher.pitch is None else teacher.pitch.state_dict()
    else:
        terms = DistillationFromDensity(teacher, recipe, device).terms
    return Task(
        "student",
        recipe.student.training,
        terms,
        recipe.student.loss.model_dump(exclude={"kl_estimator", "kl_draws"}),
        draw,
        given={f"pitch.{name}": value for name, value in predictor.items()},
    )
