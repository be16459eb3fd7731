"""What each training of an experiment is."""

from wavedistill.experiment.folder import Experiment
from wavedistill.models.compiling import compile_networks
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.trainings import Likelihood, OwnTraining
from wavedistill.tools.imports import imported
from wavedistill.training.distillation import distillation_task
from wavedistill.training.likelihood import likelihood_task
from wavedistill.training.task import Task


def task_of(experiment: Experiment, name: str) -> Task:
    """What a recipe's training is.

    Raises:
        CheckpointError: if the teacher that it distils has not been trained, or by other settings.
        RecipeError: if it names code that cannot be imported.
    """
    recipe, training = experiment.recipe, experiment.recipe.training[name]
    if isinstance(training, Likelihood):
        return likelihood_task(recipe, name)
    if isinstance(training, OwnTraining):
        return imported(training.objective, f"training.{name}.objective")(experiment, name)
    teacher = experiment.teacher(name)
    assert teacher is not None
    if training.compile and isinstance(teacher, WaveformModel):
        compile_networks(teacher)
    return distillation_task(recipe, name, teacher, experiment.device)
