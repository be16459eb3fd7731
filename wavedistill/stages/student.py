"""Distil the parallel student from the teacher."""

from pathlib import Path

from torch import Tensor

from wavedistill.data import Batch, random_stream
from wavedistill.distillation import Distillation
from wavedistill.experiment import Experiment, Stage, fingerprint
from wavedistill.models import WaveformModel, compile_networks
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
    if recipe.student.training.compile:
        compile_networks(teacher)

    distillation = Distillation(teacher, recipe)

    def draw(model: WaveformModel, batch: Batch) -> Tensor:
        noise = model.base.noise(tuple(batch.audio.shape), random_stream(recipe.seed)).to(experiment.device)
        return sample(model(batch.mel), noise)

    # The number of steps is left out: a training may be lengthened.
    trajectory = recipe.model_dump(mode="json", include=READS, exclude={"student": {"training": {"steps"}}})
    predictor = {} if teacher.pitch is None else teacher.pitch.state_dict()
    weights = recipe.student.loss.model_dump(exclude={"kl_estimator", "kl_draws"})
    outcome = fit(
        Task(
            "student",
            recipe.student.training,
            distillation.terms,
            weights,
            draw,
            given={f"pitch.{name}": value for name, value in predictor.items()},
        ),
        experiment.corpus(),
        experiment.audio,
        recipe=recipe,
        folder=experiment.training("student"),
        fingerprint=fingerprint(trajectory, inputs(experiment)),
        device=experiment.device,
    )
    return (
        f"validation KL {outcome.valid['kl']:.3f} nats/sample "
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
