"""The distillation objective: what a student is told about its teacher and about the recording, as named terms."""

import torch
from torch import Tensor

from wavedistill.audio import mel_filters
from wavedistill.config import Recipe
from wavedistill.data import Batch, Streams, dequantise, each
from wavedistill.flows import Base, Conditionals
from wavedistill.losses import (
    closed_kl,
    cross_entropy_kl,
    log_mel_distance,
    log_scale_distance,
    spectral_distance,
)
from wavedistill.models import WaveformModel


class Distillation:
    """The terms of a recipe's `student.loss` that have a weight, for a student and a batch.

    Both are given the log-mel alone, as whoever uses the student has it, and predict F0 from it by the same network,
    whose errors matter less than those of a tracker. They end in the same transform of the residual, under which a KL
    is invariant: the densities are compared on the residual, spectra on the waveform.

    Args:
        teacher: the trained teacher, frozen; gradients pass through it to the student's sample.
        recipe: of the experiment.
    """

    def __init__(self, teacher: WaveformModel, recipe: Recipe) -> None:
        self.teacher, self.loss = teacher, recipe.student.loss
        self.n_ffts = recipe.student.spectral_n_ffts
        self.filters = log_mel_filters(recipe, next(teacher.parameters()).device) if self.loss.log_mel else {}

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
            other = self.teacher.residual(batch.mel.roll(batch.mel.shape[-1] // 2, -1))
            found["contrastive"] = -self._kl(q_steps, other.conditionals(residual), residual, streams)
        if weights.z_reconstruction:
            found["z_reconstruction"] = (p_steps.noise(residual) - noise).square()
        if weights.x_reconstruction:
            recorded, _ = self.teacher.analyse(dequantise(batch.with_margins, streams), batch.mel)
            rebuilt, _ = q.transform(p.conditionals(recorded).noise(recorded), q.context)
            found["x_reconstruction"] = (rebuilt - recorded).square()
        if weights.spectral or weights.log_mel:
            x, _ = student.shared(residual, student.shared_context(batch.mel))
            if weights.spectral:
                found["spectral"] = spectral_distance(x, batch.audio, self.n_ffts)
            if weights.log_mel:
                found["log_mel"] = log_mel_distance(x, batch.audio, self.filters)
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


def log_mel_filters(recipe: Recipe, device: torch.device) -> dict[int, Tensor]:
    """The filterbanks of the log-mel distance, without bands that are too narrow to hold a bin."""
    filters = {}
    for n_fft in recipe.student.spectral_n_ffts:
        bank = mel_filters(recipe.audio.model_copy(update={"n_fft": n_fft})).to(device)
        filters[n_fft] = bank[:, bank.sum(0) > 0]
    return filters


def _noise(base: Base, shape: tuple[int, ...], like: Tensor, streams: Streams) -> Tensor:
    """Noise (B, *shape)."""
    return each(streams, lambda stream: base.noise(shape, stream)).to(like)
