"""Trainings that begin with the weights of a checkpoint: another voice from one that is trained."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from tests.conftest import HEARD, RECIPES, changed
from tests.test_audio import corpus
from wavedistill.cli.commands import app
from wavedistill.corpus.utterances import Manifest
from wavedistill.experiment.folder import Experiment
from wavedistill.experiment.stage import run_stage
from wavedistill.experiment.starts import joined, start_of
from wavedistill.experiment.tasks import task_of
from wavedistill.models import checkpoint
from wavedistill.models.kinds import build
from wavedistill.recipe.loading import load_recipe, validate_recipe
from wavedistill.recipe.recipe import Recipe
from wavedistill.stages import train
from wavedistill.tools.engine import launch
from wavedistill.tools.errors import CheckpointError, RecipeError, TrainingError
from wavedistill.tools.files import write_json
from wavedistill.training.learner import Learner
from wavedistill.training.state import saved_states

CPU = torch.device("cpu")
STEPS = 6


@pytest.fixture
def recipe(tiny_data: dict[str, Any]) -> Recipe:
    tiny_data["corpus"]["licence"] = "Recordings of A"
    tiny_data["linear_prediction"]["order"] = 0  # which leaves the network more to learn
    tiny_data["models"]["teacher"]["layers"] = 3
    tiny_data["models"]["student"]["flow_layers"] = [2]
    for name in ("teacher", "student"):
        tiny_data["training"][name].update(steps=STEPS, batch_size=2, segment_frames=6, validate_every=4)
        tiny_data["training"][name]["validate_batches"] = 1
    return validate_recipe(tiny_data, "tiny.toml")


@pytest.fixture
def trained(tmp_path: Path, recipe: Recipe) -> dict[str, Path]:
    """Checkpoints of weights that are those of no recipe's seed."""
    paths = {}
    for name in ("teacher", "student"):
        weights = build(recipe, name, seed=99).state_dict()
        varied = {key: w + 0.01 if w.is_floating_point() else w for key, w in weights.items()}
        paths[name] = tmp_path / f"{name}.safetensors"
        checkpoint.save_model(paths[name], name, recipe, 7, HEARD, varied)
    return paths


Make = Callable[..., Experiment]


@pytest.fixture
def make(tmp_path: Path, recipe: Recipe, blank_pictures: None) -> Make:
    """An experiment in a folder, prepared, some of whose trainings begin with checkpoints."""

    def made(folder: str, **starts: Path | str) -> Experiment:
        root, own = tmp_path / folder, changed(recipe, "corpus", licence="Recordings of B")
        for name, path in starts.items():
            own = changed(own, f"training.{name}", start=str(path))
        if not root.exists():
            first, second = corpus(root / "audio", own, [20, 20]).utterances
            both = Manifest(audio=own.audio, utterances=[first, second.model_copy(update={"split": "valid"})])
            write_json(root / "manifest.json", both.model_dump(mode="json"))
            (root / ".stamps").mkdir()
            (root / ".stamps" / "prepare").touch()
        return Experiment(own, root, CPU)

    return made


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_model(path).model.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def test_a_model_and_its_average_begin_as_the_checkpoint(make: Make, trained: dict[str, Path]) -> None:
    """The predictor of F0, too; the optimizer knows nothing yet."""
    experiment, start = make("a", teacher=trained["teacher"]), weights(trained["teacher"])
    learner = Learner(task_of(experiment, "teacher"), experiment.recipe, launch(CPU))
    assert any(key.startswith("pitch.") for key in start)
    assert same(start, learner.model.state_dict())
    assert same(start, learner.average.state_dict())
    assert not learner.optimizer.state
    assert all(parameter.requires_grad for parameter in learner.model.parameters())


def test_a_student_hears_f0_as_its_teacher_does_whatever_it_begins_as(
    make: Make, trained: dict[str, Path], recipe: Recipe
) -> None:
    experiment = make("a", student=trained["student"])
    checkpoint.save_model(
        experiment.checkpoint("teacher"), "teacher", recipe, 1, HEARD, build(recipe, "teacher", 5).state_dict()
    )
    learner = Learner(task_of(experiment, "student"), experiment.recipe, launch(CPU))
    teacher, start = weights(experiment.checkpoint("teacher")), weights(trained["student"])
    for key, value in learner.model.state_dict().items():
        assert torch.equal(value, (teacher if key.startswith("pitch.") else start)[key]), key
    assert not all(torch.equal(start[key], value) for key, value in teacher.items() if key.startswith("pitch."))


def test_a_trained_start_is_ahead_from_the_first_validation_on(make: Make) -> None:
    def before_any_step(experiment: Experiment) -> float:
        longer = changed(experiment.recipe, "training.teacher", steps=24)
        train.run("teacher", replace(experiment, recipe=longer))
        log = EventAccumulator(str(experiment.training("teacher") / "tensorboard"))
        log.Reload()
        return log.Scalars("valid/nll")[0].value

    scratch = make("scratch")
    without = before_any_step(scratch)
    assert before_any_step(make("more", teacher=scratch.checkpoint("teacher"))) < without - 0.05


def test_a_start_that_is_interrupted_ends_with_the_same_weights(
    make: Make, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: what is resumed is the state, not the start."""
    whole, parts = (make(name, teacher=trained["teacher"]) for name in ("whole", "parts"))
    train.run("teacher", whole)
    step = Learner.step

    def interrupted(learner: Learner, batch: Any, number: int) -> Any:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(learner, batch, number)

    monkeypatch.setattr(Learner, "step", interrupted)
    with pytest.raises(TrainingError, match="interrupted at step 3"):
        train.run("teacher", parts)
    monkeypatch.setattr(Learner, "step", step)
    train.run("teacher", parts)
    a, b = (checkpoint.load(saved_states(e.training("teacher"))[0]) for e in (whole, parts))
    assert same(a[0], b[0])
    assert a[1] == b[1]


def test_a_start_counts_by_what_is_in_it(make: Make, trained: dict[str, Path], tmp_path: Path, recipe: Recipe) -> None:
    stage, moved = train.stage("teacher", recipe), tmp_path / "moved.safetensors"
    run_stage(stage, make("a", teacher=trained["teacher"]))
    shutil.copy(trained["teacher"], moved)
    assert run_stage(stage, make("a", teacher=moved)) == "teacher: up to date"
    checkpoint.save_model(moved, "teacher", recipe, 7, HEARD, build(recipe, "teacher", 3).state_dict())
    assert "validation" in run_stage(stage, make("a", teacher=moved))
    assert (tmp_path / "a" / "teacher.1").is_dir(), "set aside, not gone on with"
    assert "validation" in run_stage(stage, make("a"))
    assert (tmp_path / "a" / "teacher.2").is_dir()


def test_a_checkpoint_names_the_recordings_of_all_it_has_learnt_from(make: Make, trained: dict[str, Path]) -> None:
    """Of its own, of what it began as, and of its teacher's."""
    experiment = make("a", teacher=trained["teacher"])
    for name in ("teacher", "student"):
        train.run(name, experiment)
        licence = checkpoint.load_model(experiment.checkpoint(name)).recipe.corpus.licence
        assert licence == "Recordings of B\nRecordings of A", name
    assert joined(None, None) is None
    assert joined(None, "A\nB", "B") == "Recordings whose licence was not stated\nA\nB"


@pytest.mark.parametrize(
    ("table", "values", "said"),
    [
        ("audio", {"f_max": 7000.0}, "there audio.f_max = 7000.0, here 8000.0: set them as they are there"),
        ("audio", {"f0_max": 300.0, "f_max": 7000.0}, "audio.f_max = 7000.0, here 8000.0; audio.f0_max = 300.0"),
        ("conditioning", {"context": 2}, "conditioning.context = 2, here 1"),
        ("linear_prediction", {"order": 10}, "linear_prediction.order = 10, here 0"),
        ("models.teacher", {"layers": 4}, "models.teacher.layers = 4, here 3"),
    ],
)
def test_a_start_of_other_units_or_sizes_is_refused_by_its_keys(
    make: Make, trained: dict[str, Path], recipe: Recipe, table: str, values: dict[str, Any], said: str
) -> None:
    other = changed(recipe, table, **values)
    checkpoint.save_model(trained["teacher"], "teacher", other, 7, HEARD, build(other, "teacher", 1).state_dict())
    with pytest.raises(CheckpointError) as caught:
        start_of(make("a", teacher=trained["teacher"]), "teacher")
    assert str(caught.value).startswith(f"training.teacher.start: {trained['teacher']}: a model of other units")
    assert said in str(caught.value)


def test_a_start_of_another_kind_or_of_none_is_refused(make: Make, trained: dict[str, Path], tmp_path: Path) -> None:
    experiment = make("a", teacher=trained["student"])
    with pytest.raises(CheckpointError, match=r"models\.teacher\.kind = 'iaf', here 'maf'; .*; \d+ more: set"):
        start_of(experiment, "teacher")
    (tmp_path / "text").write_text("hello")
    for path, said in (("nowhere", "no such checkpoint"), ("text", "not a wavedistill checkpoint")):
        with pytest.raises(CheckpointError, match=rf"training\.teacher\.start: .*{path}: {said}"):
            start_of(make("a", teacher=tmp_path / path), "teacher")


def test_a_start_that_does_not_fit_is_named_before_any_work(tmp_path: Path) -> None:
    words = ["run", "tiny", "--exp", str(tmp_path), "--set", "training.student.start=nowhere.safetensors"]
    with pytest.raises(CheckpointError, match=r"training\.student\.start: nowhere\.safetensors: no such checkpoint"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert not (tmp_path / "tiny" / "manifest.json").exists()


def test_a_start_is_looked_for_beside_the_recipe_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "more.toml"
    for given, expected in (("a.safetensors", tmp_path / "a.safetensors"), ("/b", "/b"), ("~/c", "~/c")):
        path.write_text(f'extends = "{RECIPES / "tiny.toml"}"\n[training.teacher]\nstart = "{given}"\n')
        assert load_recipe(path).training["teacher"].start == str(expected)
    path.write_text('extends = "tiny"\n[training]\nteacher = 3\n')
    with pytest.raises(RecipeError, match=r"training\.teacher = 3"):
        load_recipe(path)
