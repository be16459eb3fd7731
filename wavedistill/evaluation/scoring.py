"""The scores of every system's clips."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from wavedistill.evaluation import metrics
from wavedistill.evaluation.densities import log_likelihoods
from wavedistill.evaluation.excerpts import Excerpt
from wavedistill.evaluation.verdict import Scores
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.recipe import Recipe
from wavedistill.tools.progress import note, progress


class Scoring:
    """Scores systems against recorded clips, and by what a density makes of them.

    Args:
        recipe: of the experiment.
        clips: with what was recorded.
        model: whose density takes one pass, on a device; None where a recipe has none.
    """

    def __init__(self, recipe: Recipe, clips: Sequence[Excerpt], model: WaveformModel | None) -> None:
        if not metrics.pesq_available():
            note("evaluate: without the package pesq there is no PESQ score: pip install 'wavedistill[demo]'")
        self.recipe, self.clips, self.model = recipe, clips, model
        self.scorers = [metrics.Scorer(clip.audio, recipe.audio) for clip in clips]

    def __call__(self, systems: Mapping[str, Sequence[Tensor]], label: str) -> dict[str, list[Scores]]:
        """Scores of each clip (T,) of every system: those of `Scorer`, and `teacher_log_likelihood`, nats a sample."""
        found = {}
        for name, waves in progress(iterable=systems.items(), desc=label, unit="system"):
            likely: Sequence[float | None] = [None] * len(waves)
            if self.model is not None:
                likely = log_likelihoods(self.recipe, self.model, self.clips, waves)
            found[name] = [
                {**scorer(wave), "teacher_log_likelihood": value}
                for scorer, wave, value in zip(self.scorers, waves, likely, strict=True)
            ]
        return found
