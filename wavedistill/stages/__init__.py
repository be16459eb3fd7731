"""The stages of a recipe, in the order they run; a stage reads files, calls the library and writes files."""

from wavedistill.experiment.stage import Stage
from wavedistill.recipe.recipe import Recipe
from wavedistill.stages import benchmark, evaluate, prepare, report, train


def stages_of(recipe: Recipe) -> dict[str, Stage]:
    """The stages of a recipe by name: preparation, each training in its order, evaluation, benchmark and report."""
    names = list(recipe.training)
    every = [prepare.stage(), *(train.stage(name, recipe) for name in names)]
    every += [module.stage(names) for module in (evaluate, benchmark, report)]
    return {stage.name: stage for stage in every}
