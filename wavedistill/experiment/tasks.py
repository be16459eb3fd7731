"""What each training of an experiment is."""

from wavedistill.experiment.folder import Experiment
from wavedistill.experiment.starts import start_of
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
        CheckpointError: if the teacher that it distils has not been trained, or by other settings, or if what it is to
            begin as does not fit.
        RecipeError: if it names code that cannot be imported.
    """
    start = start_of(experiment, name)
    task = _task(experiment, name)
    return task if start is None else task._replace(start=start.model.state_dict())


def _task(experiment: Experiment, name: str) -> Task:
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
