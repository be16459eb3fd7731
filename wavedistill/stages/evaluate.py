"""Measure densities, and score copy-synthesis of the test split."""

import math
import shutil
from typing import Any

import torch
from torch import Tensor

from wavedistill import __version__
from wavedistill.corpus.data import Utterance, dequantise, random_stream, read_f0, read_samples
from wavedistill.evaluation import metrics
from wavedistill.evaluation.verdict import Scores, against_untrained, gates, in_words, mean
from wavedistill.experiment.experiment import Experiment, Stage, sha256, write_json
from wavedistill.flows.flows import FlowDistribution, Scale, StandardNormal
from wavedistill.models.models import WaveformModel, build
from wavedistill.networks.threads import settle
from wavedistill.recipe.config import Recipe
from wavedistill.sampling.sampling import sample
from wavedistill.speech import audio
from wavedistill.speech.pitch import PITCH_CONTEXT
from wavedistill.tools.machine import machine
from wavedistill.tools.progress import note, progress
from wavedistill.training.distillation import Teacher
from wavedistill.training.losses import Density, monte_carlo_kl, negative_log_likelihood

READS = {"seed", "audio", "conditioning", "linear_prediction", "teacher", "student", "evaluate", "gates"}
DEQUANTISE, DRAW, SYNTHESISE = 10, 11, 12
"""Purposes of random streams."""


def run(experiment: Experiment) -> str:
    """Write `metrics.json` and the synthesised clips; returns a line of result."""
    recipe = experiment.recipe
    teacher, student = experiment.teacher(), experiment.model("student")
    settle(experiment.threads, student.networks[0])
    test = experiment.corpus().of("test")
    density = densities(experiment, teacher, student, test)
    clips = synthesise(experiment, teacher, student, test[: recipe.evaluate.clips])
    synthesis = {system: mean(scores) for system, scores in clips.items()}
    compared = against_untrained(synthesis)
    found = gates(clips["student"], clips["recorded"], compared, recipe.gates)
    result: dict[str, Any] = {
        "about": about(experiment, len(clips["student"])),
        "density": density,
        "synthesis": synthesis,
        "against_untrained": compared,
        "gates": found,
    }
    if student.pitch is not None:
        result["pitch_from_mel"] = pitch_from_mel(experiment, student, test)
    write_json(experiment.metrics, result)
    failed = [name for name, gate in found.items() if not gate["passed"]]
    for name in failed:
        measured = "not measurable" if found[name]["value"] is None else f"{found[name]['value']:.3g}"
        note(f"evaluate: the student fails the gate {name}: {measured}, threshold {found[name]['threshold']:g}")
    return (
        f"teacher {density['teacher_nll_nats_per_sample']:.3f} nats/sample, "
        f"student KL {density['student_kl_nats_per_sample']:.3f}; {in_words(compared)}; "
        f"{'gates FAILED: ' + ', '.join(failed) if failed else 'all gates passed'}: {experiment.metrics}"
    )


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
        "inputs": {f"{path.parent.name}/{path.name}": sha256(path) for path in stage.inputs(experiment)},
    }


@torch.no_grad()
def densities(
    experiment: Experiment, teacher: WaveformModel | Teacher, student: WaveformModel, test: list[Utterance]
) -> dict[str, Any]:
    """Likelihood and KL on the test split, of the trained models and of the same models before training.

    Before training, linear prediction is already there, so that `teacher_nll_before_training` is that of a Gaussian
    with the filters of linear prediction; `level_gaussian_nll_nats_per_sample` is the start without them.
    `teacher_nll_shuffled_conditioning` gives the network the log-mel of another utterance, but linear prediction its
    own: a network that ignores its conditioning would not notice.

    The likelihood is of 16-bit audio after the recipe's level normalisation and with uniform dequantisation noise. The
    KL's standard error is over utterances, each a mean over its draws. A teacher of which only the density is known
    has no state before training.
    """
    recipe, device = experiment.recipe, experiment.device
    log_mel = audio.LogMel(recipe.audio).to(device)
    known = isinstance(teacher, WaveformModel)
    untrained_teacher, untrained_student = (
        build(kind, recipe, recipe.seed).to(device) for kind in ("teacher", "student")
    )
    # What is known before any model: independent Gaussian samples at the recipe's level.
    level_gaussian = FlowDistribution(Scale(10 ** (recipe.audio.level_db / 20)).to(device), StandardNormal())
    clips = [read_samples(experiment.audio, utterance) for utterance in test]
    mels = [log_mel.of_file(clip[None].to(device), student.margin) for clip in clips]
    values: dict[str, list[float]] = {}
    for i, clip in enumerate(progress(iterable=clips, desc="densities", unit="clip")):
        mel = mels[i]
        noisy = dequantise(clip[None].to(device), [random_stream(recipe.seed, DEQUANTISE, i)])
        repeats = -(-mel.shape[-1] // mels[i - 1].shape[-1])
        # The only clip of its split gets its own, half a clip away.
        away = mel.shape[-1] // 2 if len(clips) == 1 else 0
        other = mels[i - 1].repeat(1, 1, repeats).roll(away, -1)[..., : mel.shape[-1]]
        if isinstance(teacher, WaveformModel):
            # Under their common last transform, the KL is that of the residuals.
            p: Density = teacher.residual(mel)
            likelihoods: dict[str, Density] = {
                "teacher_nll_nats_per_sample": teacher(mel),
                "teacher_nll_before_training": untrained_teacher(mel),
                "teacher_nll_shuffled_conditioning": teacher.synthesised(teacher.residual(other), mel),
            }
        else:
            p = teacher(mel)
            likelihoods = {"teacher_nll_nats_per_sample": p, "teacher_nll_shuffled_conditioning": teacher(other)}
        for name, density in {**likelihoods, "level_gaussian_nll_nats_per_sample": level_gaussian}.items():
            values.setdefault(name, []).append(negative_log_likelihood(density, noisy).item())
        for name, model, draws in (
            ("student_kl_nats_per_sample", student, recipe.evaluate.kl_draws),
            ("student_kl_before_training", untrained_student, 1),
        ):
            noise = model.base.noise((draws, len(clip)), random_stream(recipe.seed, DRAW, i)).to(device)
            q = model.residual(mel) if known else model(mel)
            estimates = [monte_carlo_kl(q, p, draw[None])[0].item() for draw in noise]
            values.setdefault(name, []).append(sum(estimates) / draws)

    lengths = torch.tensor([len(clip) for clip in clips], dtype=torch.float64)
    means = {
        name: float((torch.tensor(each, dtype=torch.float64) * lengths).sum() / lengths.sum())
        for name, each in values.items()
    }
    kl = torch.tensor(values["student_kl_nats_per_sample"])
    return {
        **means,
        "student_kl_standard_error": float(kl.std() / math.sqrt(len(kl))) if len(kl) > 1 else None,
        "teacher_bits_per_sample_given_log_mel": metrics.bits_per_sample(means["teacher_nll_nats_per_sample"]),
        "test_seconds": float(lengths.sum()) / recipe.audio.sample_rate,
    }


def synthesise(
    experiment: Experiment, teacher: WaveformModel | Teacher, student: WaveformModel, test: list[Utterance]
) -> dict[str, list[Scores]]:
    """Copy-synthesise clips with every system, write them to files, and score them; returns the scores of each clip.

    Teacher and student are given the log-mel alone; a teacher of which only the density is known draws none. `whisper`
    is what the student is before training: white noise through the last transform, linear prediction for instance.
    """
    recipe, device = experiment.recipe, experiment.device
    limit = int(recipe.evaluate.max_seconds * recipe.audio.sample_rate) // recipe.audio.hop_length
    clips = [read_samples(experiment.audio, u, 0, min(u.frames, limit) * recipe.audio.hop_length) for u in test]
    longest = max(len(clip) for clip in clips)
    # One batch: the sequential sampler takes as many steps for all clips as for the longest.
    padded = torch.stack([torch.nn.functional.pad(clip, (0, longest - len(clip))) for clip in clips])
    log_mel = audio.LogMel(recipe.audio)
    mel = log_mel.of_file(padded, student.margin).to(device)

    def drawn(model: WaveformModel, label: str | None = None) -> list[Tensor]:
        noise = model.base.noise(tuple(padded.shape), random_stream(recipe.seed, SYNTHESISE)).to(device)
        waves = sample(model(mel), noise * recipe.evaluate.temperature, label=label).cpu()
        return [wave[: len(clip)].clamp(-1, 1) for wave, clip in zip(waves, clips, strict=True)]

    with torch.inference_mode():
        systems = {
            "recorded": clips,
            **({"teacher": drawn(teacher, "teacher samples")} if isinstance(teacher, WaveformModel) else {}),
            "student": drawn(student),
            "griffin_lim": [metrics.griffin_lim(log_mel.of_file(clip[None])[0], recipe.audio) for clip in clips],
            "whisper": drawn(build("student", recipe, recipe.seed).to(device)),
        }
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
def pitch_from_mel(experiment: Experiment, student: WaveformModel, test: list[Utterance]) -> dict[str, float | None]:
    """How well the student predicts F0 from log-mels, against F0 tracked in the audio, over all frames of the split."""
    assert student.pitch is not None
    log_mel = audio.LogMel(experiment.recipe.audio)
    tracked, predicted = [], []
    for utterance in test:
        mel = log_mel.of_file(read_samples(experiment.audio, utterance)[None], PITCH_CONTEXT).to(experiment.device)
        tracked.append(read_f0(experiment.audio, utterance))
        predicted.append(student.pitch(mel)[0].cpu())
    return metrics.f0_agreement(torch.cat(tracked), torch.cat(predicted))


def _settings(recipe: Recipe) -> Any:
    return [recipe.model_dump(mode="json", include=READS), metrics.pesq_available()]


stage = Stage(
    name="evaluate",
    summary=__doc__,
    needs=("prepare", "teacher", "student"),
    settings=lambda experiment: _settings(experiment.recipe),
    inputs=lambda experiment: [experiment.manifest, *experiment.checkpoints],
    outputs=lambda experiment: [experiment.metrics, experiment.samples],
    run=run,
    version=__version__,
)
