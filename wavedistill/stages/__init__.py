"""The stages of a recipe, in the order they run; a stage reads files, calls the library and writes files."""

from wavedistill.experiment.experiment import Stage
from wavedistill.stages import benchmark, evaluate, prepare, report, student, teacher

STAGES: dict[str, Stage] = {
    module.stage.name: module.stage for module in (prepare, teacher, student, evaluate, benchmark, report)
}
