"""Train the autoregressive teacher by maximum likelihood."""

from collections.abc import Mapping

import torch
from torch import Tensor

from wavedistill.data import Batch, dequantise, random_stream
from wavedistill.experiment import Experiment, Stage, fingerprint
from wavedistill.models import WaveformModel
from wavedistill.sampling import sample
from wavedistill.training import Task, fit

READS = {"seed", "audio", "conditioning", "linear_prediction", "teacher"}
"""The parts of the recipe that the teacher's training depends on."""
PREVIEW_SECONDS = 0.25
"""Sequential sampling is slow: the log hears this much."""


def run(experiment: Experiment) -> str:
    """Train, or go on training; returns a line of result."""
    recipe = experiment.recipe

    def terms(model: WaveformModel, batch: Batch, generator: torch.Generator) -> Mapping[str, Tensor]:
        residual, ladj = model.analyse(dequantise(batch.with_margins, generator), batch.mel)
        log_prob = model.residual(batch.mel, batch.f0).log_prob_steps(residual) + ladj
        found = {"nll": -log_prob.mean()}
        if model.pitch is not None:
            found["pitch"] = model.pitch.loss(batch.mel, batch.f0)
        return found

    def draw(model: WaveformModel, batch: Batch) -> Tensor:
        length = min(
            int(PREVIEW_SECONDS * recipe.audio.sample_rate),
            recipe.teacher.training.segment_frames * recipe.audio.hop_length,
        )
        noise = model.base.noise((len(batch.mel), length), random_stream(recipe.seed)).to(batch.mel.device)
        return sample(model(batch.mel, batch.f0), noise)

    # The number of steps is left out: a training may be lengthened.
    trajectory = recipe.model_dump(mode="json", include=READS, exclude={"teacher": {"training": {"steps"}}})
    outcome = fit(
        Task("teacher", recipe.teacher.training, terms, {"nll": 1.0}, draw),
        experiment.corpus(),
        experiment.audio,
        recipe=recipe,
        folder=experiment.training("teacher"),
        fingerprint=fingerprint(trajectory, [experiment.manifest]),
        device=experiment.device,
    )
    return (
        f"validation NLL {outcome.valid['nll']:.3f} nats/sample at step {outcome.step}, "
        f"{outcome.seconds:.0f} s: {experiment.checkpoint('teacher')}"
    )


stage = Stage(
    name="teacher",
    summary=__doc__,
    needs=("prepare",),
    settings=lambda experiment: experiment.recipe.model_dump(mode="json", include=READS),
    inputs=lambda experiment: [experiment.manifest],
    outputs=lambda experiment: [experiment.checkpoint("teacher")],
    run=run,
)
