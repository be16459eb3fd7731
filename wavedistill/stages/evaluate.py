"""Measure densities, and score copy-synthesis of the test split."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from wavedistill import __version__
from wavedistill.corpus.utterances import Utterance, read_f0, read_samples
from wavedistill.evaluation import metrics
from wavedistill.evaluation.densities import densities, pitch_from_mel
from wavedistill.evaluation.systems import synthesise
from wavedistill.evaluation.verdict import Scores, against_untrained, gates, in_words, mean
from wavedistill.experiment.folder import SHARED, Experiment
from wavedistill.experiment.stage import Stage
from wavedistill.networks.threads import settle
from wavedistill.speech import audio
from wavedistill.tools.files import sha256, write_json
from wavedistill.tools.machine import machine
from wavedistill.tools.progress import note, progress


def run(experiment: Experiment) -> str:
    """Write `metrics.json` and the synthesised clips; returns a line of result."""
    recipe = experiment.recipe
    models = {name: experiment.model(name) for name in recipe.training}
    settle(experiment.threads, next(iter(models.values())).networks[0])
    test, device = experiment.corpus().of("test"), experiment.device
    clips = [read_samples(experiment.audio, utterance) for utterance in test]
    teachers = {name: experiment.teacher(name) for name in models if recipe.teacher_of(name) is None}
    density = densities(recipe, models, teachers, clips, device)
    limit = int(recipe.evaluate.max_seconds * recipe.audio.sample_rate) // recipe.audio.hop_length
    heard = [clip[: limit * recipe.audio.hop_length] for clip in clips[: recipe.evaluate.clips]]
    scores = score(experiment, test[: len(heard)], synthesise(recipe, models, heard, device))
    synthesis = {system: mean(each) for system, each in scores.items()}
    judged = [name for name, model in models.items() if model.draws_in_parallel]
    compared = {name: against_untrained(synthesis, name) for name in judged}
    found = {name: gates(scores[name], scores["recorded"], compared[name], recipe.gates) for name in judged}
    result = {
        "about": about(experiment, len(heard)),
        "recipe": recipe.model_dump(mode="json"),
        "density": density,
        "synthesis": synthesis,
        "against_untrained": compared,
        "gates": found,
        "pitch_from_mel": {
            name: pitch_from_mel(model.pitch, recipe.audio, clips, [read_f0(experiment.audio, u) for u in test], device)
            for name, model in models.items()
            if model.pitch is not None
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


def score(
    experiment: Experiment, test: Sequence[Utterance], systems: Mapping[str, Sequence[Tensor]]
) -> dict[str, list[Scores]]:
    """Write the clips of every system to files, and score them against the recorded; the scores of each clip."""
    settings = experiment.recipe.audio
    if not metrics.pesq_available():
        note("evaluate: the package pesq is not installed, so there is no PESQ score: pip install 'wavedistill[demo]'")
    scorers = [metrics.Scorer(clip, settings) for clip in systems["recorded"]]
    results = {}
    # Swapped in when complete, so that no clip of an earlier run stays.
    fresh = experiment.samples.with_name("samples.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    for name, waves in progress(iterable=systems.items(), desc="scores", unit="system"):
        folder = fresh / name
        folder.mkdir(parents=True)
        for utterance, wave in zip(test, waves, strict=True):
            audio.write(folder / f"{utterance.name}.wav", wave, settings.sample_rate)
        results[name] = [scorer(wave) for scorer, wave in zip(scorers, waves, strict=True)]
    shutil.rmtree(experiment.samples, ignore_errors=True)
    fresh.rename(experiment.samples)
    return results


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
