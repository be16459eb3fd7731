"""Train one of a recipe's models: by maximum likelihood, by distillation, or by an objective of the user's own."""

from functools import partial
from pathlib import Path
from typing import Any

from wavedistill.experiment.folder import SHARED, Experiment
from wavedistill.experiment.stage import Stage
from wavedistill.experiment.starts import licence
from wavedistill.experiment.tasks import task_of
from wavedistill.recipe.recipe import Recipe
from wavedistill.tools.files import fingerprint
from wavedistill.training.loop import fit


def run(name: str, experiment: Experiment) -> str:
    """Train, or go on training; returns a line of result."""
    task = task_of(experiment, name)
    # The number of steps is left out: a training may be lengthened, or cut short.
    trajectory = settings(name, experiment)
    del trajectory["training"]["steps"]
    corpus = experiment.recipe.corpus.model_copy(update={"licence": licence(experiment, name)})
    outcome = fit(
        task,
        experiment.corpus(),
        experiment.audio,
        recipe=experiment.recipe.model_copy(update={"corpus": corpus}),
        folder=experiment.training(name),
        fingerprint=fingerprint(trajectory, inputs(name, experiment)),
        device=experiment.device,
        threads=experiment.threads,
    )
    first = next(iter(task.weights))
    valid = outcome.valid[first]
    return f"validation {first} {valid:.3f} {outcome}: {experiment.checkpoint(name)}"


def settings(name: str, experiment: Experiment) -> dict[str, Any]:
    """The parts of the recipe that a training depends on, as plain values."""
    recipe = experiment.recipe
    found = recipe.model_dump(mode="json", include={"seed", *SHARED})
    own = {key: getattr(recipe, key)[name].model_dump(mode="json") for key in ("models", "training")}
    del own["training"]["start"]  # a file, which may be moved; what is in it counts
    return {**found, **own}


def inputs(name: str, experiment: Experiment) -> list[Path]:
    """The files that a training depends on."""
    teacher = experiment.recipe.teacher_of(name)
    known = [experiment.checkpoint(teacher) if teacher else None, experiment.start(name)]
    return [experiment.manifest, *experiment.sources(name), *(path for path in known if path)]


def stage(name: str, recipe: Recipe) -> Stage:
    """The stage of one of a recipe's trainings."""
    teacher = recipe.teacher_of(name)
    return Stage(
        name=name,
        needs=("prepare", *([teacher] if teacher else [])),
        settings=partial(settings, name),
        inputs=partial(inputs, name),
        outputs=lambda experiment: [experiment.checkpoint(name)],
        run=partial(run, name),
        shared=True,
    )
