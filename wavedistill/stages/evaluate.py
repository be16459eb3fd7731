"""Measure densities, and score copy-synthesis of the test split."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wavedistill import audio, metrics
from wavedistill.config import Recipe
from wavedistill.data import Utterance, dequantise, random_stream, read_samples
from wavedistill.experiment import Experiment, Stage, write_json
from wavedistill.flows import FlowDistribution, Scale, StandardNormal
from wavedistill.losses import monte_carlo_kl, negative_log_likelihood
from wavedistill.models import WaveformModel, build
from wavedistill.progress import note, progress
from wavedistill.sampling import sample

READS = {"seed", "audio", "conditioning", "linear_prediction", "teacher", "student", "evaluate"}
DEQUANTISE, DRAW, SYNTHESISE = 10, 11, 12
"""Purposes of random streams."""


def run(experiment: Experiment) -> str:
    """Write `metrics.json` and the synthesised clips; returns a line of result."""
    recipe = experiment.recipe
    teacher, student = experiment.model("teacher"), experiment.model("student")
    test = experiment.corpus().of("test")
    density = densities(experiment, teacher, student, test)
    synthesis = synthesise(experiment, teacher, student, test[: recipe.evaluate.clips])
    write_json(experiment.metrics, {"density": density, "synthesis": synthesis})
    student_scores = ", ".join(
        f"{name} {value:.2f}" for name, value in synthesis["student"].items() if isinstance(value, float)
    )
    return (
        f"teacher {density['teacher_nll_nats_per_sample']:.3f} nats/sample, "
        f"student KL {density['student_kl_nats_per_sample']:.3f}, {student_scores}: {experiment.metrics}"
    )


@torch.no_grad()
def densities(
    experiment: Experiment, teacher: WaveformModel, student: WaveformModel, test: list[Utterance]
) -> dict[str, Any]:
    """Likelihood and KL on the test split, of the trained models and of the same models before training.

    Before training, linear prediction is already there; `level_gaussian_nll_nats_per_sample` is the start without it.

    The likelihood is of 16-bit audio after the recipe's level normalisation and with uniform dequantisation noise. The
    KL's standard error is over utterances, each a mean over its draws.
    """
    recipe, device = experiment.recipe, experiment.device
    log_mel = audio.LogMel(recipe.audio).to(device)
    untrained_teacher, untrained_student = (
        build(kind, recipe, recipe.seed).to(device) for kind in ("teacher", "student")
    )
    # What is known before any model: independent Gaussian samples at the recipe's level.
    level_gaussian = FlowDistribution(Scale(10 ** (recipe.audio.level_db / 20)).to(device), StandardNormal())
    clips = [read_samples(experiment.audio, utterance) for utterance in test]
    nll: list[float] = []
    nll_before: list[float] = []
    nll_of_level: list[float] = []
    kl: list[float] = []
    kl_before: list[float] = []
    for i, clip in enumerate(progress(iterable=clips, desc="densities", unit="clip")):
        x = clip[None].to(device)
        mel = log_mel.of_file(x, recipe.conditioning.context)
        noisy = dequantise(x, random_stream(recipe.seed, DEQUANTISE, i))
        nll.append(negative_log_likelihood(teacher(mel), noisy).item())
        nll_before.append(negative_log_likelihood(untrained_teacher(mel), noisy).item())
        nll_of_level.append(negative_log_likelihood(level_gaussian, noisy).item())
        for model, values, draws in ((student, kl, recipe.evaluate.kl_draws), (untrained_student, kl_before, 1)):
            noise = model.base.noise((draws, x.shape[1]), random_stream(recipe.seed, DRAW, i)).to(device)
            estimates = [monte_carlo_kl(model(mel), teacher(mel), draw[None])[0].item() for draw in noise]
            values.append(sum(estimates) / draws)

    lengths = torch.tensor([len(clip) for clip in clips], dtype=torch.float64)

    def mean(values: list[float]) -> float:
        return float((torch.tensor(values, dtype=torch.float64) * lengths).sum() / lengths.sum())

    return {
        "teacher_nll_nats_per_sample": mean(nll),
        "teacher_bits_per_sample": metrics.bits_per_sample(mean(nll)),
        "teacher_nll_before_training": mean(nll_before),
        "level_gaussian_nll_nats_per_sample": mean(nll_of_level),
        "student_kl_nats_per_sample": mean(kl),
        "student_kl_standard_error": float(torch.tensor(kl).std() / math.sqrt(len(kl))) if len(kl) > 1 else None,
        "student_kl_before_training": mean(kl_before),
        "flac_bits_per_sample": metrics.flac_bits_per_sample(clips, recipe.audio.sample_rate),
        "test_seconds": float(lengths.sum()) / recipe.audio.sample_rate,
    }


def synthesise(
    experiment: Experiment, teacher: WaveformModel, student: WaveformModel, test: list[Utterance]
) -> dict[str, dict[str, float | None]]:
    """Copy-synthesise clips with every system, write them to files, and score them; returns mean scores."""
    recipe, device = experiment.recipe, experiment.device
    limit = int(recipe.evaluate.max_seconds * recipe.audio.sample_rate) // recipe.audio.hop_length
    clips = [read_samples(experiment.audio, u, 0, min(u.frames, limit) * recipe.audio.hop_length) for u in test]
    longest = max(len(clip) for clip in clips)
    # One batch: the sequential sampler takes as many steps for all clips as for the longest.
    padded = torch.stack([torch.nn.functional.pad(clip, (0, longest - len(clip))) for clip in clips])
    log_mel = audio.LogMel(recipe.audio)
    mel = log_mel.of_file(padded, recipe.conditioning.context).to(device)

    def drawn(model: WaveformModel, label: str | None) -> list[Tensor]:
        noise = model.base.noise(tuple(padded.shape), random_stream(recipe.seed, SYNTHESISE)).to(device)
        waves = sample(model(mel), noise * recipe.evaluate.temperature, label=label).cpu()
        return [wave[: len(clip)].clamp(-1, 1) for wave, clip in zip(waves, clips, strict=True)]

    systems = {
        "recorded": clips,
        "teacher": drawn(teacher, "teacher samples"),
        "student": drawn(student, None),
        "griffin_lim": [metrics.griffin_lim(log_mel.of_file(clip[None])[0], recipe.audio) for clip in clips],
    }
    if not metrics.pesq_available():
        note("evaluate: the package pesq is not installed, so there is no PESQ score: pip install 'wavedistill[demo]'")
    results = {}
    # Swapped in when complete, so that no clip of an earlier run stays.
    fresh = experiment.samples.with_name("samples.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    for name, waves in progress(iterable=systems.items(), desc="scores", unit="system"):
        folder = fresh / name
        folder.mkdir(parents=True)
        for utterance, wave in zip(test, waves, strict=True):
            audio.write(folder / f"{utterance.name}.wav", wave, recipe.audio.sample_rate)
        pairs = zip(clips, waves, strict=True)
        results[name] = _mean([metrics.scores(clip, wave, recipe.audio.sample_rate) for clip, wave in pairs])
    shutil.rmtree(experiment.samples, ignore_errors=True)
    fresh.rename(experiment.samples)
    return results


def _mean(scores: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Mean of each score over the clips that have it; None where none has."""
    means: dict[str, float | None] = {}
    for name in scores[0]:
        values = [value for score in scores if (value := score[name]) is not None]
        means[name] = sum(values) / len(values) if values else None
    return means


def _checkpoints(experiment: Experiment) -> list[Path]:
    return [experiment.checkpoint("teacher"), experiment.checkpoint("student")]


def _settings(recipe: Recipe) -> Any:
    return [recipe.model_dump(mode="json", include=READS), metrics.pesq_available()]


stage = Stage(
    name="evaluate",
    summary=__doc__,
    needs=("prepare", "teacher", "student"),
    settings=lambda experiment: _settings(experiment.recipe),
    inputs=lambda experiment: [experiment.manifest, *_checkpoints(experiment)],
    outputs=lambda experiment: [experiment.metrics, experiment.samples],
    run=run,
)
