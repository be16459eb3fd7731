"""Distil the parallel student from the teacher."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from wavedistill.data import Batch, random_stream
from wavedistill.experiment import Experiment, Stage, fingerprint
from wavedistill.losses import monte_carlo_kl, spectral_distance
from wavedistill.models import WaveformModel
from wavedistill.sampling import sample
from wavedistill.training import Task, fit

READS = {"seed", "audio", "conditioning", "linear_prediction", "student"}
"""The parts of the recipe that the student's training depends on."""


def inputs(experiment: Experiment) -> list[Path]:
    """The files the student's training depends on."""
    return [experiment.manifest, experiment.checkpoint("teacher")]


def run(experiment: Experiment) -> str:
    """Distil, or go on distilling; returns a line of result."""
    recipe = experiment.recipe
    teacher = experiment.model("teacher")

    def noise_for(model: WaveformModel, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return model.base.noise(shape, generator).to(experiment.device)

    def terms(model: WaveformModel, batch: Batch, generator: torch.Generator) -> Mapping[str, Tensor]:
        noise = noise_for(model, tuple(batch.audio.shape), generator)
        # Both end in the same transform of the residual, under which a KL is invariant.
        kl, residual = monte_carlo_kl(model.residual(batch.mel), teacher.residual(batch.mel), noise)
        x, _ = model.shared(residual, model.shared_context(batch.mel))
        spectral = spectral_distance(x, batch.audio, recipe.student.spectral_n_ffts)
        return {"kl": kl.mean(), "spectral": spectral.mean()}

    def draw(model: WaveformModel, mel: Tensor) -> Tensor:
        length = recipe.student.training.segment_frames * recipe.audio.hop_length
        return sample(model(mel), noise_for(model, (len(mel), length), random_stream(recipe.seed)))

    # The number of steps is left out: a training may be lengthened.
    trajectory = recipe.model_dump(mode="json", include=READS, exclude={"student": {"training": {"steps"}}})
    outcome = fit(
        Task("student", recipe.student.training, terms, recipe.student.loss.model_dump(), draw),
        experiment.corpus(),
        experiment.audio,
        recipe=recipe,
        folder=experiment.training("student"),
        fingerprint=fingerprint(trajectory, inputs(experiment)),
        device=experiment.device,
    )
    return (
        f"validation KL {outcome.valid['kl']:.3f} nats/sample, spectral distance {outcome.valid['spectral']:.3f} "
        f"at step {outcome.step}, {outcome.seconds:.0f} s: {experiment.checkpoint('student')}"
    )


stage = Stage(
    name="student",
    summary=__doc__,
    needs=("prepare", "teacher"),
    settings=lambda experiment: experiment.recipe.model_dump(mode="json", include=READS),
    inputs=inputs,
    outputs=lambda experiment: [experiment.checkpoint("student")],
    run=run,
)
