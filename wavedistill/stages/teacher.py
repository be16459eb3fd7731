"""Train the autoregressive teacher by maximum likelihood."""

from wavedistill.experiment.experiment import Experiment, Stage, fingerprint
from wavedistill.training.tasks import teacher_task
from wavedistill.training.training import fit

READS = {"seed", "audio", "conditioning", "linear_prediction", "teacher"}
"""The parts of the recipe that the teacher's training depends on."""


def run(experiment: Experiment) -> str:
    """Train, or go on training; returns a line of result."""
    recipe = experiment.recipe
    if recipe.student.teacher:
        return f"nothing to train: the student is distilled from {recipe.student.teacher}"
    # The number of steps is left out: a training may be lengthened, or cut short.
    trajectory = recipe.model_dump(mode="json", include=READS, exclude={"teacher": {"training": {"steps"}}})
    outcome = fit(
        teacher_task(recipe),
        experiment.corpus(),
        experiment.audio,
        recipe=recipe,
        folder=experiment.training("teacher"),
        fingerprint=fingerprint(trajectory, [experiment.manifest]),
        device=experiment.device,
        threads=experiment.threads,
    )
    return f"validation NLL {outcome.valid['nll']:.3f} nats/sample {outcome}: {experiment.checkpoint('teacher')}"


stage = Stage(
    name="teacher",
    summary=__doc__,
    needs=("prepare",),
    settings=lambda experiment: [
        experiment.recipe.model_dump(mode="json", include=READS),
        experiment.recipe.student.teacher,
    ],
    inputs=lambda experiment: [experiment.manifest],
    outputs=lambda experiment: experiment.teacher_files,
    run=run,
    shared=True,
)
