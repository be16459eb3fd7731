"""Measure densities, and score copy-synthesis of the test split."""

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from wavedistill import __version__
from wavedistill.corpus.utterances import Utterance, read_f0
from wavedistill.evaluation import metrics, others
from wavedistill.evaluation.densities import densities, pitch_from_mel
from wavedistill.evaluation.excerpts import excerpts
from wavedistill.evaluation.scoring import Scoring
from wavedistill.evaluation.systems import SourceFilter, consistent, synthesise
from wavedistill.evaluation.verdict import against_untrained, gates, in_words, mean
from wavedistill.experiment.folder import AS_DRAWN, SHARED, Experiment
from wavedistill.experiment.stage import Stage
from wavedistill.networks.threads import settle
from wavedistill.speech import audio
from wavedistill.tools.files import sha256, write_json
from wavedistill.tools.machine import machine
from wavedistill.tools.progress import note

CHOSEN_ON = 6
"""Clips of the validation split, at most, on which the baseline's one setting is chosen."""
Folders = Mapping[str, Path]
"""Of other systems' clips, by the systems' names."""


def run(experiment: Experiment, also: Folders) -> str:
    """Write `metrics.json` and the synthesised clips; returns a line of result."""
    recipe, device = experiment.recipe, experiment.device
    models = {name: experiment.model(name) for name in recipe.training}
    settle(experiment.threads, next(iter(models.values())).networks[0])
    test, valid = (experiment.corpus().of(split) for split in ("test", "valid"))
    clips = excerpts(experiment.audio, test, recipe.audio)
    teachers = {name: experiment.teacher(name) for name in models if recipe.teacher_of(name) is None}
    density = densities(recipe, models, teachers, clips, device)
    limit = int(recipe.evaluate.max_seconds * recipe.audio.sample_rate) // recipe.audio.hop_length
    heard, chosen_on = (
        excerpts(experiment.audio, some, recipe.audio, limit)
        for some in (test[: recipe.evaluate.clips], valid[:CHOSEN_ON])
    )
    source_filter = SourceFilter(recipe, models, chosen_on)
    drawn = synthesise(recipe, models, source_filter, heard, device)
    recorded, beside = drawn["recorded"], _files(experiment, also)
    drawn |= {name: others.read(files, recorded, recipe.audio) for name, files in beside.items()}
    likely = next((name for name, model in models.items() if model.density_in_parallel), None)
    scored = Scoring(recipe, heard, models[likely] if likely else None)
    sound = {name: waves if name == "recorded" else consistent(recipe, waves, heard) for name, waves in drawn.items()}
    del drawn["recorded"]
    first = drawn if recipe.consistency.passes else {}
    write_clips(experiment, test[: len(heard)], sound | {f"{AS_DRAWN}/{name}": waves for name, waves in first.items()})
    scores = scored(sound, "scores")
    as_drawn = {"recorded": scores["recorded"], **scored(first, "scores as drawn")} if first else scores
    synthesis = {system: mean(each) for system, each in scores.items()}
    judged = [name for name, model in models.items() if model.draws_in_parallel]
    compared = {name: against_untrained(synthesis, name) for name in judged}
    found = {name: gates(scores[name], scores["recorded"], compared[name], recipe.gates) for name in judged}
    result = {
        "about": {
            **about(experiment, len(heard), also),
            "source_filter": source_filter.about,
            "teacher_log_likelihood": likely,
        },
        "recipe": recipe.model_dump(mode="json"),
        "density": density,
        "synthesis": synthesis,
        "as_drawn": {system: mean(each) for system, each in as_drawn.items()},
        "against_untrained": compared,
        "gates": found,
        "pitch_from_mel": {
            name: pitch_from_mel(model.pitch, clips, [read_f0(experiment.audio, u) for u in test], device)
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


def about(experiment: Experiment, clips: int, also: Folders) -> dict[str, Any]:
    """What the figures were measured on and by, and what they depend on besides the models."""
    recipe = experiment.recipe
    return {
        "machine": machine(experiment.device),
        "implementations": metrics.implementations(),
        "seed": recipe.seed,
        "temperature": recipe.evaluate.temperature,
        "clips": clips,
        "seconds_a_clip": recipe.evaluate.max_seconds,
        "also": {
            name: {"folder": str(also[name]), "inputs": {path.name: sha256(path) for path in paths}}
            for name, paths in _files(experiment, also).items()
        },
        "inputs": {f"{path.parent.name}/{path.name}": sha256(path) for path in inputs(experiment, {})},
    }


def write_clips(experiment: Experiment, test: Sequence[Utterance], systems: Mapping[str, Sequence[Tensor]]) -> None:
    """Write the clips of every system to files, in place of those of an earlier run."""
    # Swapped in when complete, so that no clip of an earlier run stays.
    fresh = experiment.samples.with_name("samples.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    for name, waves in systems.items():
        folder = fresh / name
        folder.mkdir(parents=True)
        for utterance, wave in zip(test, waves, strict=True):
            audio.write(folder / f"{utterance.name}.wav", wave, experiment.recipe.audio.sample_rate)
    shutil.rmtree(experiment.samples, ignore_errors=True)
    fresh.rename(experiment.samples)


def settings(experiment: Experiment, also: Folders) -> Any:
    """What the scores depend on besides files, as plain values."""
    parts = {"seed", *SHARED, "consistency", "models", "training", "evaluate", "gates"}
    return [experiment.recipe.model_dump(mode="json", include=parts), metrics.pesq_available(), sorted(also)]


def inputs(experiment: Experiment, also: Folders) -> list[Path]:
    """The files that the scores depend on."""
    clips = [path for files in _files(experiment, also).values() for path in files]
    return [experiment.manifest, *experiment.checkpoints, *clips]


def _files(experiment: Experiment, also: Folders) -> dict[str, list[Path]]:
    """The files of other systems' clips, in the order of the test's."""
    names = [u.name for u in experiment.corpus().of("test")[: experiment.recipe.evaluate.clips]] if also else []
    return {name: others.files(folder, names) for name, folder in sorted(also.items())}


def stage(trainings: list[str], also: Folders | None = None) -> Stage:
    """The stage of a recipe with these trainings, and of other systems' clips."""
    also = also or {}
    return Stage(
        name="evaluate",
        needs=("prepare", *trainings),
        settings=partial(settings, also=also),
        inputs=partial(inputs, also=also),
        outputs=lambda experiment: [experiment.metrics, experiment.samples],
        run=partial(run, also=also),
        version=__version__,
    )
