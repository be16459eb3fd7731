"""The folder of one experiment: where the stages leave their files, and what is read back from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wavedistill import __version__
from wavedistill.corpus.utterances import Manifest
from wavedistill.models.checkpoint import MODEL_FILE, load_model
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.models import OwnModel
from wavedistill.recipe.recipe import Recipe
from wavedistill.recipe.trainings import Distillation, OwnTraining
from wavedistill.tools.errors import CheckpointError, CorpusError
from wavedistill.tools.files import fingerprint
from wavedistill.tools.imports import imported, source_of
from wavedistill.training.distillation import Teacher

SHARED = ("audio", "conditioning", "linear_prediction")
"""The parts of a recipe that all its models are built by."""
AS_DRAWN = "as_drawn"
"""The folder, below that of the synthesised utterances, of what they were before mel consistency."""


@dataclass(frozen=True)
class Experiment:
    """A recipe, the folder its files live in, the device it computes on, and its threads; None for the fastest."""

    recipe: Recipe
    root: Path
    device: torch.device
    threads: int | None = None

    @property
    def manifest(self) -> Path:
        """The list of prepared utterances."""
        return self.root / "manifest.json"

    @property
    def audio(self) -> Path:
        """The folder of prepared utterances."""
        return self.root / "audio"

    def training(self, name: str) -> Path:
        """The folder of one model's training: checkpoints and TensorBoard logs."""
        return self.root / name

    def checkpoint(self, name: str) -> Path:
        """The trained model's file."""
        return self.training(name) / MODEL_FILE

    @property
    def checkpoints(self) -> list[Path]:
        """All that the trained models depend on: their files, and the sources of what is the user's own."""
        return [path for name in self.recipe.training for path in [*self.sources(name), self.checkpoint(name)]]

    def start(self, name: str) -> Path | None:
        """The file of the weights that a model's training begins with, if it does not begin with random ones."""
        start = self.recipe.training[name].start
        return Path(start).expanduser() if start else None

    def sources(self, name: str) -> list[Path]:
        """The sources of what is the user's own in a model and its training."""
        model, training = self.recipe.models[name], self.recipe.training[name]
        found = [source_of(model.kind, f"models.{name}.kind")] if isinstance(model, OwnModel) else []
        if isinstance(training, OwnTraining):
            found.append(source_of(training.objective, f"training.{name}.objective"))
        if isinstance(training, Distillation) and training.own:
            found.append(source_of(training.own, f"training.{name}.of"))
        return found

    def corpus(self) -> Manifest:
        """The prepared corpus.

        Raises:
            CorpusError: if it is missing, or was prepared with other units than the recipe's.
        """
        manifest = Manifest.read(self.manifest)
        if manifest.audio != self.recipe.audio:
            raise CorpusError(f"{self.manifest}: its [audio] is not the recipe's: run the prepare stage again")
        return manifest

    def model(self, name: str) -> WaveformModel:
        """The trained model, on the device.

        Raises:
            CheckpointError: if it is missing, or was built by other settings than the recipe's.
        """
        asked = self.recipe.models[name]
        if isinstance(asked, OwnModel):  # which the recipe may name, and a checkpoint may not
            imported(asked.kind, f"models.{name}.kind")
        loaded = load_model(self.checkpoint(name), self.device)
        others = [section for section in SHARED if getattr(loaded.recipe, section) != getattr(self.recipe, section)]
        if loaded.recipe.models[loaded.name] != asked:
            others.append(f"models.{name}")
        if others:
            raise CheckpointError(
                f"{self.checkpoint(name)}: its [{others[0]}] is not the recipe's: run the {name} stage again"
            )
        return loaded.model

    def teacher(self, name: str) -> WaveformModel | Teacher | None:
        """What a model is distilled from: a trained model, or what the recipe's import path gives; or nothing.

        Raises:
            CheckpointError: as `model`.
            RecipeError: if nothing can be imported from there.
        """
        training = self.recipe.training[name]
        if not isinstance(training, Distillation):
            return None
        if not training.own:
            return self.model(training.of)
        density = imported(training.own, f"training.{name}.of")(self.recipe, self.device)
        # Even if it is a model of this package: its last transform may be another than the student's, and a KL of
        # residuals is that of waveforms only where both end alike, as `model` sees to.
        return lambda conditioning: density(conditioning)

    @property
    def samples(self) -> Path:
        """The folder of synthesised test utterances, a subfolder for each system."""
        return self.root / "samples"

    @property
    def metrics(self) -> Path:
        """Densities and scores."""
        return self.root / "metrics.json"

    @property
    def benchmark(self) -> Path:
        """Sampling speed."""
        return self.root / "benchmark.json"

    def benchmark_of(self, what: str) -> Path:
        """A table of the benchmark that is measured on demand: "full" or "train"."""
        return self.root / f"benchmark_{what}.json"

    @property
    def report(self) -> Path:
        """The page that shows it all."""
        return self.root / "report.html"


def speed_settings(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe that the speed of its models depends on, as plain values."""
    return recipe.model_dump(mode="json", include={"seed", *SHARED, "consistency", "models", "training", "benchmark"})


def measured_on(experiment: Experiment) -> str:
    """A digest of what a speed was measured on: the program, the models and their settings."""
    settings = speed_settings(experiment.recipe)
    return fingerprint([__version__, settings], [experiment.manifest, *experiment.checkpoints])
