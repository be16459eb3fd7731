"""Distillation: what a student is told about its teacher and about the recording, as named terms."""

from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from wavedistill.corpus.segments import Batch, dequantise
from wavedistill.flows.bases import Base
from wavedistill.flows.distributions import Conditionals, FlowDistribution
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.recipe import Recipe
from wavedistill.recipe.trainings import Distillation as Settings
from wavedistill.sampling.sequential import sample
from wavedistill.speech.audio import mel_filters
from wavedistill.speech.conditioning import Conditioning
from wavedistill.speech.consistency import MelConsistency
from wavedistill.tools.errors import RecipeError
from wavedistill.tools.random import Streams, each, random_stream
from wavedistill.training.losses import (
    Density,
    closed_kl,
    cross_entropy_kl,
    log_mel_distance,
    log_scale_distance,
    one_draw_kl,
    spectral_distance,
)
from wavedistill.training.task import Task, Terms

Known = TypeVar("Known")
"""The kind of a teacher."""


class Teacher(Protocol):
    """A density to distil from, known by its log_prob alone: a coupling flow, an energy, a model of another library."""

    def __call__(self, conditioning: Conditioning, /) -> Density:
        """The density of waveforms (B, F * hop_length) given what is known of them.

        Its `log_prob` is differentiable in the waveform. Parameters of its own should not require a gradient.
        """


def distillation_task(recipe: Recipe, name: str, teacher: WaveformModel | Teacher, device: torch.device) -> Task:
    """The training of a student; its predictor of F0 is that of the recipe's own teacher, or learns beside it.

    Args:
        recipe: the experiment.
        name: of the student, and of its training.
        teacher: the trained and frozen one, or a density of the user's own.
        device: of the batches.
    """
    settings = recipe.training[name]
    assert isinstance(settings, Settings)

    def draw(model: WaveformModel, batch: Batch) -> Tensor:
        noise = model.base.noise(tuple(batch.audio.shape), random_stream(recipe.seed)).to(batch.audio.device)
        return sample(model(batch.conditioning.mel_alone()), noise)

    loss = settings.loss
    if not isinstance(teacher, WaveformModel):
        terms = FromDensity(teacher, recipe, name, device).terms
        return Task(name, settings, terms, loss.weights, draw, factors=loss.factors)
    known = {} if teacher.pitch is None else teacher.pitch.state_dict()
    given = {f"pitch.{key}": value for key, value in known.items()}
    terms = Distillation(teacher, recipe, name, device).terms
    return Task(name, settings, terms, loss.weights, draw, given, loss.factors)


class Objective(Generic[Known]):
    """What is common to distillation from any teacher: spectral distances of the student's waveform.

    Args:
        teacher: frozen; gradients pass through it to the student's sample.
        recipe: of the experiment.
        name: of the training.
        device: of the batches.
    """

    def __init__(self, teacher: Known, recipe: Recipe, name: str, device: torch.device) -> None:
        settings = recipe.training[name]
        assert isinstance(settings, Settings)
        self.teacher, self.name, self.loss, self.n_ffts = teacher, name, settings.loss, settings.spectral_n_ffts
        log_mels = self.loss.log_mel or self.loss.drawn_log_mel
        self.filters = log_mel_filters(recipe, self.n_ffts, device) if log_mels else {}
        self.consistency = MelConsistency(recipe.audio, self.loss.passes).to(device)

    def spectra(self, x: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The terms (B,) that have a weight, for the student's waveform (B, T) and the recording."""
        found, recorded = {}, batch.audio
        if self.loss.drawn_log_mel:
            found["drawn_log_mel"] = log_mel_distance(x, recorded, self.filters)
        heard = self.consistent(x, batch) if self.loss.spectral or self.loss.log_mel else x
        if self.loss.spectral:
            found["spectral"] = spectral_distance(heard, recorded, self.n_ffts)
        if self.loss.log_mel:
            found["log_mel"] = log_mel_distance(heard, recorded, self.filters)
        return found

    def consistent(self, x: Tensor, batch: Batch) -> Tensor:
        """The student's waveform (B, T) brought to its log-mel, whose frames see the recording on either side of it.

        As far as a step looks, or as the margin of the conditioning goes: without F0, it may be less, and the edges of
        a crop are heard a little softer.
        """
        told, hop = batch.conditioning, self.consistency.hop_length
        frames = min(told.margin, 2 * -(-self.consistency.overlap // hop))
        before, after = ((told.margin + shift) * hop for shift in (-frames, told.frames))
        around = batch.with_margins
        pieces = [around[:, before : told.margin * hop], x, around[:, after : after + frames * hop]]
        inside = slice(frames * hop, frames * hop + x.shape[1])
        return self.consistency(torch.cat(pieces, 1), told.within(frames).mel)[:, inside]


class Distillation(Objective[WaveformModel]):
    """The terms of a recipe's loss that have a weight, for a student and a batch.

    Both are given the log-mel alone, as whoever uses the student has it, and predict F0 from it by the same network,
    whose errors matter less than those of a tracker. They end in the same transform of the residual, under which a KL
    is invariant: the densities are compared on the residual, spectra on the waveform.
    """

    def terms(self, student: WaveformModel, batch: Batch, streams: Streams) -> Terms:
        """The mean of each term that has a weight, and of the KL; all randomness comes from the items' streams."""
        weights, told = self.loss, batch.conditioning.mel_alone()
        q, p = (model.residual(told) for model in (student, self.teacher))
        noise = _noise(q.base, (batch.audio.shape[1],), batch.audio, streams)
        steps: tuple[Conditionals, Conditionals] | None = None
        if weights.kl_estimator != "mc" or weights.log_scale or weights.z_reconstruction:
            residual, q_steps = q.rsample_and_conditionals(noise)
            steps, log_q = (q_steps, p.conditionals(residual)), q_steps.log_prob(residual)
        else:  # which a teacher of any form can tell
            residual, log_q = q.rsample_and_log_prob(noise)

        found = {"kl": self._kl(steps, log_q, p, residual, streams)}
        if weights.contrastive:
            other = self.teacher.residual(told.elsewhere())
            beside = (steps[0], other.conditionals(residual)) if steps and weights.kl_estimator != "mc" else None
            found["contrastive"] = -self._kl(beside, log_q, other, residual, streams)
        if steps and weights.log_scale:
            found["log_scale"] = log_scale_distance(*steps)
        if steps and weights.z_reconstruction:
            found["z_reconstruction"] = (steps[1].noise(residual) - noise).square()
        if weights.x_reconstruction:
            recorded, _ = self.teacher.analyse(dequantise(batch.with_margins, streams), told)
            rebuilt, _ = q.to_x(p.conditionals(recorded).noise(recorded))
            found["x_reconstruction"] = (rebuilt - recorded).square()
        if weights.spectral or weights.log_mel or weights.drawn_log_mel:
            x, _ = student.shared(residual, student.shared_context(told))
            found |= self.spectra(x, batch)
        return {name: term.mean() for name, term in found.items()}

    def _kl(
        self,
        steps: tuple[Conditionals, Conditionals] | None,
        log_q: Tensor,
        p: FlowDistribution,
        x: Tensor,
        streams: Streams,
    ) -> Tensor:
        """Terms (B, T) or (B,) of the recipe's estimate of the KL of q from p, given q's sample x (B, T)."""
        match self.loss.kl_estimator, steps:
            case "mc-k", (q_steps, p_steps):
                noise = _noise(q_steps.base, (self.loss.kl_draws, x.shape[1]), x, streams)  # (B, k, T)
                return cross_entropy_kl(q_steps, p_steps, noise.transpose(0, 1))
            case "closed", (q_steps, p_steps):
                return closed_kl(q_steps, p_steps)
        return one_draw_kl(log_q, p, x)


class FromDensity(Objective[Teacher]):
    """The same from a teacher whose log_prob alone is known: the KL from one draw, on the waveform.

    The student is given F0 as it was tracked, and its own predictor of F0 learns beside it.
    """

    def terms(self, student: WaveformModel, batch: Batch, streams: Streams) -> Terms:
        """The mean of each term that has a weight, of the KL, and of the F0 predictor's loss.

        Raises:
            RecipeError: if the teacher's log_prob is not one number for each waveform.
        """
        told = batch.conditioning
        q = student(told)
        x, log_q = q.rsample_and_log_prob(_noise(q.base, (batch.audio.shape[1],), batch.audio, streams))

        def kl(told: Conditioning) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                return one_draw_kl(log_q, _Checked(self.teacher(told.mel_alone()), self.name), x)

        found = {"kl": kl(told), **self.spectra(x, batch)}
        if self.loss.contrastive:
            found["contrastive"] = -kl(told.elsewhere())
        if student.pitch is not None:
            found["pitch"] = student.pitch.loss(told)
        return {name: term.mean() for name, term in found.items()}


class _Checked(NamedTuple):
    """A density of the user's own, whose log_prob is one number for each waveform."""

    density: Density
    training: str

    def log_prob(self, x: Tensor) -> Tensor:
        found = self.density.log_prob(x)
        if found.shape != x.shape[:1]:
            raise RecipeError(
                f"training.{self.training}.of: its log_prob gave shape {tuple(found.shape)} for waveforms "
                f"{tuple(x.shape)}; it must give {tuple(x.shape[:1])}, the log density of each in nats"
            )
        return found


def log_mel_filters(recipe: Recipe, n_ffts: tuple[int, ...], device: torch.device) -> dict[int, Tensor]:
    """The filterbanks of the log-mel distance, without bands that are too narrow to hold a bin."""
    filters = {}
    for n_fft in n_ffts:
        bank = mel_filters(recipe.audio.model_copy(update={"n_fft": n_fft}))
        filters[n_fft] = bank[:, bank.sum(0) > 0].to(device)
    return filters


def _noise(base: Base, shape: tuple[int, ...], like: Tensor, streams: Streams) -> Tensor:
    """Noise (B, *shape)."""
    return each(streams, lambda stream: base.noise(shape, stream)).to(like)
