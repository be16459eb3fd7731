"""Distil the parallel student from the teacher."""

from pathlib import Path

from wavedistill.experiment.experiment import Experiment, Stage, fingerprint
from wavedistill.models.models import WaveformModel, compile_networks
from wavedistill.training.tasks import student_task
from wavedistill.training.training import fit

READS = {"seed", "audio", "conditioning", "linear_prediction", "student"}
"""The parts of the recipe that the student's training depends on."""


def inputs(experiment: Experiment) -> list[Path]:
    """The files the student's training depends on."""
    return [experiment.manifest, *experiment.teacher_files]


def run(experiment: Experiment) -> str:
    """Distil, or go on distilling; returns a line of result."""
    recipe = experiment.recipe
    teacher = experiment.teacher()
    if recipe.student.training.compile and isinstance(teacher, WaveformModel):
        compile_networks(teacher)

    # The number of steps is left out: a training may be lengthened, or cut short.
    trajectory = recipe.model_dump(mode="json", include=READS, exclude={"student": {"training": {"steps"}}})
    outcome = fit(
        student_task(recipe, teacher, experiment.device),
        experiment.corpus(),
        experiment.audio,
        recipe=recipe,
        folder=experiment.training("student"),
        fingerprint=fingerprint(trajectory, inputs(experiment)),
        device=experiment.device,
        threads=experiment.threads,
    )
    return f"validation KL {outcome.valid['kl']:.3f} nats/sample {outcome}: {experiment.checkpoint('student')}"


stage = Stage(
    name="student",
    summary=__doc__,
    needs=("prepare", "teacher"),
    settings=lambda experiment: experiment.recipe.model_dump(mode="json", include=READS),
    inputs=inputs,
    outputs=lambda experiment: [experiment.checkpoint("student")],
    run=run,
    shared=True,
)
