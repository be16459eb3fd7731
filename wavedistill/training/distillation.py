"""The distillation objective: what a student is told about its teacher and about the recording, as named terms."""

from typing import Protocol

import torch
from torch import Tensor

from wavedistill.corpus.data import Batch, Streams, dequantise, each
from wavedistill.flows.flows import Base, Conditionals
from wavedistill.models.models import WaveformModel
from wavedistill.recipe.config import Recipe
from wavedistill.speech.audio import mel_filters
from wavedistill.tools.errors import RecipeError
from wavedistill.training.losses import (
    Density,
    closed_kl,
    cross_entropy_kl,
    log_mel_distance,
    log_scale_distance,
    spectral_distance,
)


class Teacher(Protocol):
    """A density to distil from, known by its log_prob alone: a coupling flow, an energy, a model of another library."""

    def __call__(self, mel: Tensor, /) -> Density:
        """The density of waveforms (B, F * hop_length) given log-mel (B, n_mels, F + 2 margin).

        Its `log_prob` is differentiable in the waveform. Parameters of its own should not require a gradient.
        """


class Objective:
    """What is common to distillation from any teacher: spectral distances of the student's waveform.

    Args:
        recipe: of the experiment.
        device: of the batches.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.loss = recipe.student.loss
        self.n_ffts = recipe.student.spectral_n_ffts
        self.filters = log_mel_filters(recipe, device) if self.loss.log_mel else {}

    def spectra(self, x: Tensor, recorded: Tensor) -> dict[str, Tensor]:
        """The terms (B,) that have a weight, for the student's waveform and the recording (B, T)."""
        found = {}
        if self.loss.spectral:
            found["spectral"] = spectral_distance(x, recorded, self.n_ffts)
        if self.loss.log_mel:
            found["log_mel"] = log_mel_distance(x, recorded, self.filters)
        return found


class Distillation(Objective):
    """The terms of a recipe's `student.loss` that have a weight, for a student and a batch.

    Both are given the log-mel alone, as whoever uses the student has it, and predict F0 from it by the same network,
    whose errors matter less than those of a tracker. They end in the same transform of the residual, under which a KL
    is invariant: the densities are compared on the residual, spectra on the waveform.

    Args:
        teacher: the trained teacher, frozen; gradients pass through it to the student's sample.
        recipe: of the experiment.
    """

    def __init__(self, teacher: WaveformModel, recipe: Recipe) -> None:
        super().__init__(recipe, next(teacher.parameters()).device)
        self.teacher = teacher

    def terms(self, student: WaveformModel, batch: Batch, streams: Streams) -> dict[str, Tensor]:
        """The mean of each term that has a weight, and of the KL; all randomness comes from the items' streams."""
        weights = self.loss
        q, p = (model.residual(batch.mel) for model in (student, self.teacher))
        noise = _noise(q.base, (batch.audio.shape[1],), batch.audio, streams)
        residual, q_steps = q.rsample_and_conditionals(noise)
        p_steps = p.conditionals(residual)

        found = {"kl": self._kl(q_steps, p_steps, residual, streams)}
        if weights.log_scale:
            found["log_scale"] = log_scale_distance(q_steps, p_steps)
        if weights.contrastive:
            other = self.teacher.residual(_elsewhere(batch.mel))
            found["contrastive"] = -self._kl(q_steps, other.conditionals(residual), residual, streams)
        if weights.z_reconstruction:
            found["z_reconstruction"] = (p_steps.noise(residual) - noise).square()
        if weights.x_reconstruction:
            recorded, _ = self.teacher.analyse(dequantise(batch.with_margins, streams), batch.mel)
            rebuilt, _ = q.transform(p.conditionals(recorded).noise(recorded), q.context)
            found["x_reconstruction"] = (rebuilt - recorded).square()
        if weights.spectral or weights.log_mel:
            x, _ = student.shared(residual, student.shared_context(batch.mel))
            found |= self.spectra(x, batch.audio)
        return {name: term.mean() for name, term in found.items()}

    def _kl(self, q: Conditionals, p: Conditionals, x: Tensor, streams: Streams) -> Tensor:
        """Terms (B, T) of the recipe's estimate of the KL of q from p, given q's sample x (B, T)."""
        match self.loss.kl_estimator:
            case "mc":
                return q.log_prob(x) - p.log_prob(x)
            case "mc-k":
                noise = _noise(q.base, (self.loss.kl_draws, x.shape[1]), x, streams)  # (B, k, T)
                return cross_entropy_kl(q, p, noise.transpose(0, 1))
            case "closed":
                return closed_kl(q, p)


class DistillationFromDensity(Objective):
    """The same from a teacher whose log_prob alone is known: the KL from one draw, on the waveform.

    The student is given F0 as it was tracked, and its own predictor of F0 learns beside it.

    Args:
        teacher: log-mel -> density.
        recipe: of the experiment.
        device: of the batches.
    """

    def __init__(self, teacher: Teacher, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.teacher = teacher

    def terms(self, student: WaveformModel, batch: Batch, streams: Streams) -> dict[str, Tensor]:
        """The mean of each term that has a weight, of the KL, and of the F0 predictor's loss.

        Raises:
            RecipeError: if the teacher's log_prob is not one number for each waveform.
        """
        q = student(batch.mel, batch.f0)
        noise = _noise(q.base, (batch.audio.shape[1],), batch.audio, streams)
        x, log_q = q.rsample_and_log_prob(noise)

        def kl(mel: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                log_p = self.teacher(mel).log_prob(x)
            if log_p.shape != log_q.shape:
                raise RecipeError(
                    f"student.teacher: its log_prob gave shape {tuple(log_p.shape)} for waveforms {tuple(x.shape)}; it "
                    f"must give {tuple(log_q.shape)}, the log density of each in nats"
                )
            return (log_q - log_p) / x.shape[1]

        found = {"kl": kl(batch.mel), **self.spectra(x, batch.audio)}
        if self.loss.contrastive:
            found["contrastive"] = -kl(_elsewhere(batch.mel))
        if student.pitch is not None:
            found["pitch"] = student.pitch.loss(batch.mel, batch.f0)
        return {name: term.mean() for name, term in found.items()}


def _elsewhere(mel: Tensor) -> Tensor:
    """The conditioning of another place."""
    return mel.roll(mel.shape[-1] // 2, -1)


def log_mel_filters(recipe: Recipe, device: torch.device) -> dict[int, Tensor]:
    """The filterbanks of the log-mel distance, without bands that are too narrow to hold a bin."""
    filters = {}
    for n_fft in recipe.student.spectral_n_ffts:
        bank = mel_filters(recipe.audio.model_copy(update={"n_fft": n_fft}))
        filters[n_fft] = bank[:, bank.sum(0) > 0].to(device)
    return filters


def _noise(base: Base, shape: tuple[int, ...], like: Tensor, streams: Streams) -> Tensor:
    """Noise (B, *shape)."""
    return each(streams, lambda stream: base.noise(shape, stream)).to(like)
