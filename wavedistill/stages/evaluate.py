"""Measure densities, and score copy-synthesis of the test split."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wavedistill import __version__
from wavedistill.corpus.segments import dequantise
from wavedistill.corpus.utterances import Utterance, read_f0, read_samples
from wavedistill.evaluation import metrics
from wavedistill.evaluation.verdict import Scores, against_untrained, gates, in_words, mean
from wavedistill.experiment.folder import SHARED, Experiment
from wavedistill.experiment.stage import Stage
from wavedistill.flows.bases import StandardNormal
from wavedistill.flows.distributions import FlowDistribution
from wavedistill.flows.transforms import Bound, Scale
from wavedistill.models.kinds import build
from wavedistill.models.waveform import WaveformModel
from wavedistill.networks.threads import settle
from wavedistill.sampling.sequential import sample
from wavedistill.speech import audio
from wavedistill.speech.conditioning import Conditioning
from wavedistill.speech.pitch import PITCH_CONTEXT
from wavedistill.tools.files import sha256, write_json
from wavedistill.tools.machine import machine
from wavedistill.tools.progress import note, progress
from wavedistill.tools.random import random_stream
from wavedistill.training.losses import Density, negative_log_likelihood, one_draw_kl

DEQUANTISE, DRAW, SYNTHESISE = 10, 11, 12
"""Purposes of random streams."""
Models = dict[str, WaveformModel]
"""By name, in the recipe's order."""


def run(experiment: Experiment) -> str:
    """Write `metrics.json` and the synthesised clips; returns a line of result."""
    recipe = experiment.recipe
    models = {name: experiment.model(name) for name in recipe.training}
    settle(experiment.threads, next(iter(models.values())).networks[0])
    test = experiment.corpus().of("test")
    density = densities(experiment, models, test)
    clips = synthesise(experiment, models, test[: recipe.evaluate.clips])
    synthesis = {system: mean(scores) for system, scores in clips.items()}
    judged = [name for name, model in models.items() if model.draws_in_parallel]
    compared = {name: against_untrained(synthesis, name) for name in judged}
    found = {name: gates(clips[name], clips["recorded"], compared[name], recipe.gates) for name in judged}
    result = {
        "about": about(experiment, len(clips["recorded"])),
        "recipe": recipe.model_dump(mode="json"),
        "density": density,
        "synthesis": synthesis,
        "against_untrained": compared,
        "gates": found,
        "pitch_from_mel": {
            name: pitch_from_mel(experiment, model, test) for name, model in models.items() if model.pitch is not None
        },
    }
    write_json(experiment.metrics, result)
    said = []
    for name, values in density["models"].items():
        if "nll" in values:
            said.append(f"{name} {values['nll']:.3f} nats/sample")
        if "kl" in values:
            said.append(f"{name} KL {values['kl']:.3f} from {values['kl_from']}")
    for name in judged:
        failed = [gate for gate, value in found[name].items() if not value["passed"]]
        for gate in failed:
            value = found[name][gate]
            measured = "not measurable" if value["value"] is None else f"{value['value']:.3g}"
            note(f"evaluate: the {name} fails the gate {gate}: {measured}, threshold {value['threshold']:g}")
        verdict = f"gates FAILED: {', '.join(failed)}" if failed else "all gates passed"
        said.append(f"{name}: {in_words(compared[name])}; {verdict}")
    return f"{'; '.join(said)}: {experiment.metrics}"


def about(experiment: Experiment, clips: int) -> dict[str, Any]:
    """What the figures were measured on and by, and what they depend on besides the models."""
    recipe = experiment.recipe
    return {
        "machine": machine(experiment.device),
        "implementations": metrics.implementations(),
        "seed": recipe.seed,
        "temperature": recipe.evaluate.temperature,
        "clips": clips,
        "seconds_a_clip": recipe.evaluate.max_seconds,
        "inputs": {f"{path.parent.name}/{path.name}": sha256(path) for path in inputs(experiment)},
    }


@torch.no_grad()
def densities(experiment: Experiment, models: Models, test: list[Utterance]) -> dict[str, Any]:
    """Likelihood and KL on the test split, of the trained models and of the same models before training.

    A model whose density takes one pass has an `nll`; one that was distilled has a `kl` from its teacher, and where
    that is the user's own, the teacher has an `nll` here, too. Before training, linear prediction is already there, so
    that `nll_before_training` is that of a Gaussian with the filters of linear prediction; `level_gaussian_nll` is the
    start without them. `nll_shuffled_conditioning` gives the network the log-mel of another utterance, but linear
    prediction its own: a network that ignores its conditioning would not notice.

    All in nats a sample, of 16-bit audio after the recipe's level normalisation, with uniform dequantisation noise. The
    KL's standard error is over utterances, each a mean over its draws.
    """
    recipe, device = experiment.recipe, experiment.device
    untrained = {name: build(recipe, name, recipe.seed).to(device) for name in models}
    teachers = {name: experiment.teacher(name) for name in models if recipe.teacher_of(name) is None}
    # What is known before any model: independent Gaussian samples at the recipe's level.
    level = Scale(10 ** (recipe.audio.level_db / 20)).to(device)
    level_gaussian = FlowDistribution(StandardNormal(), [Bound(level)])
    clips = [read_samples(experiment.audio, utterance) for utterance in test]
    margin = max(model.margin for model in models.values())
    log_mel = audio.LogMel(recipe.audio).to(device)
    told = [Conditioning(log_mel.of_file(clip[None].to(device), margin), margin) for clip in clips]
    values: dict[tuple[str, str], list[float]] = {}

    def note_nll(name: str, key: str, density: Density, noisy: Tensor) -> None:
        values.setdefault((name, key), []).append(negative_log_likelihood(density, noisy).item())

    for i, clip in enumerate(progress(iterable=clips, desc="densities", unit="clip")):
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
                values.setdefault((name, key), []).append(sum(estimates) / draws)

    lengths = torch.tensor([len(clip) for clip in clips], dtype=torch.float64)
    found: dict[str, dict[str, Any]] = {}
    for (name, key), each in values.items():
        mean = float((torch.tensor(each, dtype=torch.float64) * lengths).sum() / lengths.sum())
        own_values = found.setdefault(name, {})
        own_values[key] = mean
        if key == "nll":
            own_values["bits_per_sample_given_log_mel"] = metrics.bits_per_sample(mean)
        if key == "kl":
            kl = torch.tensor(each)
            own_values["kl_standard_error"] = float(kl.std() / math.sqrt(len(kl))) if len(kl) > 1 else None
            own_values["kl_from"] = recipe.teacher_of(name) or f"teacher of {name}"
    return {
        "level_gaussian_nll": found.pop("")["level_gaussian_nll"],
        "models": found,
        "test_seconds": float(lengths.sum()) / recipe.audio.sample_rate,
    }


def synthesise(experiment: Experiment, models: Models, test: list[Utterance]) -> dict[str, list[Scores]]:
    """Copy-synthesise clips with every system, write them to files, and score them; returns the scores of each clip.

    Models are given the log-mel alone. `whisper` is what the first parallel one is before training: white noise through
    the last transform, linear prediction for instance.
    """
    recipe, device = experiment.recipe, experiment.device
    limit = int(recipe.evaluate.max_seconds * recipe.audio.sample_rate) // recipe.audio.hop_length
    clips = [read_samples(experiment.audio, u, 0, min(u.frames, limit) * recipe.audio.hop_length) for u in test]
    longest = max(len(clip) for clip in clips)
    # One batch: a sequential sampler takes as many steps for all clips as for the longest.
    padded = torch.stack([torch.nn.functional.pad(clip, (0, longest - len(clip))) for clip in clips])
    margin = max(model.margin for model in models.values())
    log_mel = audio.LogMel(recipe.audio)
    told = Conditioning(log_mel.of_file(padded, margin), margin).to(device)

    def drawn(model: WaveformModel, label: str | None = None) -> list[Tensor]:
        noise = model.base.noise(tuple(padded.shape), random_stream(recipe.seed, SYNTHESISE)).to(device)
        waves = sample(model(told), noise * recipe.evaluate.temperature, label=label).cpu()
        return [wave[: len(clip)].clamp(-1, 1) for wave, clip in zip(waves, clips, strict=True)]

    with torch.inference_mode():
        systems = {"recorded": clips}
        for name, model in models.items():
            systems[name] = drawn(model, None if model.draws_in_parallel else f"{name} samples")
        systems["griffin_lim"] = [metrics.griffin_lim(log_mel.of_file(clip[None])[0], recipe.audio) for clip in clips]
        if parallel := [name for name, model in models.items() if model.draws_in_parallel]:
            systems["whisper"] = drawn(build(recipe, parallel[0], recipe.seed).to(device))
    if not metrics.pesq_available():
        note("evaluate: the package pesq is not installed, so there is no PESQ score: pip install 'wavedistill[demo]'")
    scorers = [metrics.Scorer(clip, recipe.audio) for clip in clips]
    results = {}
    # Swapped in when complete, so that no clip of an earlier run stays.
    fresh = experiment.samples.with_name("samples.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    for name, waves in progress(iterable=systems.items(), desc="scores", unit="system"):
        folder = fresh / name
        folder.mkdir(parents=True)
        for utterance, wave in zip(test, waves, strict=True):
            audio.write(folder / f"{utterance.name}.wav", wave, recipe.audio.sample_rate)
        results[name] = [score(wave) for score, wave in zip(scorers, waves, strict=True)]
    shutil.rmtree(experiment.samples, ignore_errors=True)
    fresh.rename(experiment.samples)
    return results


@torch.no_grad()
def pitch_from_mel(experiment: Experiment, model: WaveformModel, test: list[Utterance]) -> dict[str, float | None]:
    """How well a model predicts F0 from log-mels, against F0 tracked in the audio, over all frames of the split."""
    assert model.pitch is not None
    log_mel = audio.LogMel(experiment.recipe.audio)
    tracked, predicted = [], []
    for utterance in test:
        mel = log_mel.of_file(read_samples(experiment.audio, utterance)[None], PITCH_CONTEXT).to(experiment.device)
        tracked.append(read_f0(experiment.audio, utterance))
        predicted.append(model.pitch(mel)[0].cpu())
    return metrics.f0_agreement(torch.cat(tracked), torch.cat(predicted))


def settings(experiment: Experiment) -> Any:
    """What the scores depend on besides files, as plain values."""
    parts = {"seed", *SHARED, "models", "training", "evaluate", "gates"}
    return [experiment.recipe.model_dump(mode="json", include=parts), metrics.pesq_available()]


def inputs(experiment: Experiment) -> list[Path]:
    """The files that the scores depend on."""
    return [experiment.manifest, *experiment.checkpoints]


def stage(trainings: list[str]) -> Stage:
    """The stage of a recipe with these trainings."""
    return Stage(
        name="evaluate",
        needs=("prepare", *trainings),
        settings=settings,
        inputs=inputs,
        outputs=lambda experiment: [experiment.metrics, experiment.samples],
        run=run,
        version=__version__,
    )
