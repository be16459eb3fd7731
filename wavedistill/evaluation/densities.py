"""What models know of speech that they were not trained on: its density, and the F0 in its log-mel."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wavedistill.corpus.segments import dequantise
from wavedistill.evaluation import metrics
from wavedistill.evaluation.excerpts import Excerpt
from wavedistill.flows.bases import StandardNormal
from wavedistill.flows.distributions import FlowDistribution
from wavedistill.flows.transforms import Bound, Scale
from wavedistill.models.kinds import build
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech.audio import PCM16_STEPS, pad_frames, to_pcm16
from wavedistill.speech.conditioning import Conditioning
from wavedistill.speech.pitch import PITCH_CONTEXT, PitchPredictor
from wavedistill.tools.progress import progress
from wavedistill.tools.random import random_stream
from wavedistill.training.distillation import Teacher
from wavedistill.training.losses import Density, negative_log_likelihood, one_draw_kl

DEQUANTISE, DRAW = 10, 11
"""Purposes of random streams."""


@torch.no_grad()
def densities(
    recipe: Recipe,
    models: Mapping[str, WaveformModel],
    teachers: Mapping[str, WaveformModel | Teacher | None],
    clips: Sequence[Excerpt],
    device: torch.device,
) -> dict[str, Any]:
    """Likelihood and KL on the test split, of the trained models and of the same models before training.

    A model whose density takes one pass has an `nll`; one that was distilled has a `kl` from its teacher, and where
    that is the user's own, the teacher has an `nll` here, too. Before training, linear prediction is already there, so
    that `nll_before_training` is that of a Gaussian with the filters of linear prediction; `level_gaussian_nll` is the
    start without them. `nll_shuffled_conditioning` gives the network the log-mel of another utterance, but linear
    prediction its own: a network that ignores its conditioning would not notice.

    All in nats a sample, of 16-bit audio after the recipe's level normalisation, with uniform dequantisation noise. The
    KL's standard error is over utterances, each a mean over its draws.

    Args:
        recipe: of the experiment.
        models: the trained ones by name, on the device.
        teachers: those of the user's own, by the name of the model that was distilled from them.
        clips: the test split.
        device: where to compute.
    """
    untrained = {name: build(recipe, name, recipe.seed).to(device) for name in models}
    # What is known before any model: independent Gaussian samples at the recipe's level.
    level = Scale(10 ** (recipe.audio.level_db / 20)).to(device)
    level_gaussian = FlowDistribution(StandardNormal(), [Bound(level)])
    margin = max(model.margin for model in models.values())
    told = [Conditioning(pad_frames(clip.mel[None].to(device), margin), margin) for clip in clips]
    values: dict[tuple[str, str], list[float]] = defaultdict(list)

    def note_nll(name: str, key: str, density: Density, noisy: Tensor) -> None:
        values[name, key].append(negative_log_likelihood(density, noisy).item())

    for i, (clip, _) in enumerate(progress(iterable=clips, desc="densities", unit="clip")):
        here = told[i]
        noisy = dequantise(clip[None].to(device), [random_stream(recipe.seed, DEQUANTISE, i)])
        length = here.mel.shape[-1]
        repeats = -(-length // told[i - 1].mel.shape[-1])
        # The only clip of its split gets its own, half a clip away.
        away = length // 2 if len(clips) == 1 else 0
        other = Conditioning(told[i - 1].mel.repeat(1, 1, repeats).roll(away, -1)[..., :length], margin)
        note_nll("", "level_gaussian_nll", level_gaussian, noisy)
        for name, model in models.items():
            if model.density_in_parallel:
                note_nll(name, "nll", model(here), noisy)
                note_nll(name, "nll_before_training", untrained[name](here), noisy)
                shuffled = model.synthesised(model.residual(other), here)
                note_nll(name, "nll_shuffled_conditioning", shuffled, noisy)
            known, own = recipe.teacher_of(name), teachers.get(name)
            if own is not None:
                note_nll(f"teacher of {name}", "nll", own(here), noisy)
                note_nll(f"teacher of {name}", "nll_shuffled_conditioning", own(other), noisy)
            elif known is None:
                continue
            # Under their common last transform, the KL of a recipe's models is that of the residuals.
            p: Density = own(here) if own is not None else models[str(known)].residual(here)
            for key, student, draws in (
                ("kl", model, recipe.evaluate.kl_draws),
                ("kl_before_training", untrained[name], 1),
            ):
                q = student(here) if own is not None else student.residual(here)
                noise = student.base.noise((draws, len(clip)), random_stream(recipe.seed, DRAW, i)).to(device)
                estimates = []
                for draw in noise:
                    x, log_q = q.rsample_and_log_prob(draw[None])
                    estimates.append(one_draw_kl(log_q, p, x).item())
                values[name, key].append(sum(estimates) / draws)

    lengths = torch.tensor([len(clip.audio) for clip in clips], dtype=torch.float64)
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for (name, key), each in values.items():
        mean = float((torch.tensor(each, dtype=torch.float64) * lengths).sum() / lengths.sum())
        found[name][key] = mean
        if key == "nll":
            found[name]["bits_per_sample_given_log_mel"] = metrics.bits_per_sample(mean)
        if key == "kl":
            kl = torch.tensor(each)
            found[name]["kl_standard_error"] = float(kl.std() / math.sqrt(len(kl))) if len(kl) > 1 else None
            found[name]["kl_from"] = recipe.teacher_of(name) or f"teacher of {name}"
    return {
        "level_gaussian_nll": found.pop("")["level_gaussian_nll"],
        "models": dict(found),
        "test_seconds": float(lengths.sum()) / recipe.audio.sample_rate,
    }


@torch.no_grad()
def log_likelihoods(
    recipe: Recipe, model: WaveformModel, clips: Sequence[Excerpt], waves: Sequence[Tensor]
) -> list[float]:
    """Log-likelihood in nats a sample of each wave (T,), as a file of 16 bits has it, given the log-mel of its clip.

    Dequantised as in `densities`; of the recordings themselves, it is the negative of the `nll` there.
    """
    device = next(model.parameters()).device
    found = []
    for i, (clip, wave) in enumerate(zip(clips, waves, strict=True)):
        told = Conditioning(pad_frames(clip.mel[None], model.margin), model.margin).to(device)
        stored = torch.from_numpy(to_pcm16(wave)).float() / PCM16_STEPS
        noisy = dequantise(stored[None].to(device), [random_stream(recipe.seed, DEQUANTISE, i)])
        found.append(-negative_log_likelihood(model(told), noisy).item())
    return found


@torch.no_grad()
def pitch_from_mel(
    predictor: PitchPredictor, clips: Sequence[Excerpt], tracked: list[Tensor], device: torch.device
) -> dict[str, float | None]:
    """How well a model predicts F0 from log-mels of clips, over all frames, against F0 (F,) tracked in them."""
    mels = (pad_frames(clip.mel[None], PITCH_CONTEXT).to(device) for clip in clips)
    predicted = [predictor(mel)[0].cpu() for mel in mels]
    return metrics.f0_agreement(torch.cat(tracked), torch.cat(predicted))
