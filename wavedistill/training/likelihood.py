"""Maximum likelihood, of a model whose density takes one pass."""

from torch import Tensor

from wavedistill.corpus.segments import Batch, dequantise
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.recipe import Recipe
from wavedistill.sampling.sequential import sample
from wavedistill.tools.random import Streams, random_stream
from wavedistill.training.task import Task, Terms

GPU_SECONDS = 1
"""A step of the network takes a GPU far longer than a CPU's compiled loop: the log hears this much there."""


def likelihood_task(recipe: Recipe, name: str) -> Task:
    """Beside the density, the predictor of F0 learns from F0 tracked in the recordings."""
    settings = recipe.training[name]

    def terms(model: WaveformModel, batch: Batch, streams: Streams) -> Terms:
        told = batch.conditioning
        residual, ladj = model.analyse(dequantise(batch.with_margins, streams), told)
        log_prob = model.residual(told).log_prob_steps(residual) + ladj
        found = {"nll": -log_prob.mean()}
        if model.pitch is not None:
            found["pitch"] = model.pitch.loss(told)
        return found

    def draw(model: WaveformModel, batch: Batch) -> Tensor:
        told, frames, hop = batch.conditioning.mel_alone(), batch.conditioning.frames, recipe.audio.hop_length
        if batch.audio.is_cuda:
            frames = min(frames, GPU_SECONDS * recipe.audio.sample_rate // hop)
        noise = model.base.noise((len(batch.audio), frames * hop), random_stream(recipe.seed))
        return sample(model(told.block(0, frames)), noise.to(batch.audio.device))

    return Task(name, settings, terms, {"nll": 1.0}, draw)
