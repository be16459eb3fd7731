"""A density of the user's own as the teacher: any object with log_prob(x), named by an import path in the recipe."""

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.conftest import HEARD, REPOSITORY, margin, noise, one_draw, randomise, told, write_voice
from tests.test_audio import corpus
from tests.test_losses import density_parameters
from wavedistill.corpus.segments import Batch, Segments
from wavedistill.evaluation.densities import DRAW, densities
from wavedistill.evaluation.excerpts import excerpts
from wavedistill.experiment.folder import Experiment
from wavedistill.models.checkpoint import load_model, save_model
from wavedistill.models.kinds import build
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.loading import validate_recipe
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech.audio import LogMel
from wavedistill.speech.pitch import PITCH_CONTEXT
from wavedistill.stages import stages_of
from wavedistill.tools.errors import RecipeError
from wavedistill.tools.random import random_stream
from wavedistill.training.distillation import Distillation, FromDensity, distillation_task

MODULE = '''
"""Independent Gaussian samples, half as loud as the recordings, whatever the log-mel: a density of someone's own."""

import math
import torch

class Quiet:
    def __init__(self, log_scale):
        self.log_scale = log_scale

    def log_prob(self, x):
        z = x * math.exp(-self.log_scale)
        return (-0.5 * (z.square() + math.log(2 * math.pi)) - self.log_scale).sum(-1)

def load(recipe, device):
    log_scale = recipe.audio.level_db / 20 * math.log(10) - math.log(2)
    return lambda mel: Quiet(log_scale)

def wrong(recipe, device):
    class Wrong:
        def log_prob(self, x):
            return x
    return lambda mel: Wrong()
'''


@pytest.fixture
def own(tiny_data: dict[str, Any]) -> dict[str, Any]:
    """A recipe without linear prediction, whose student can become independent Gaussian samples."""
    tiny_data["linear_prediction"]["order"] = 0
    del tiny_data["models"]["teacher"], tiny_data["training"]["teacher"]
    tiny_data["training"]["student"]["of"] = "someones:load"
    tiny_data["models"]["student"]["flow_layers"] = [2]
    tiny_data["training"]["student"]["loss"].update(kl_estimator="mc", spectral=0.0, log_mel=0.0)
    tiny_data["training"]["student"].update(steps=60, batch_size=2, learning_rate=0.02, warmup_steps=0)
    return tiny_data


class Shell:
    """A folder with the user's module, a voice and a recipe, in which commands are given."""

    def __init__(self, folder: Path, recipe: dict[str, Any]) -> None:
        self.folder = folder
        write_voice(folder / "voice", 5)
        (folder / "someones.py").write_text(MODULE)
        recipe["corpus"] = {"kind": "folder", "path": "voice"}
        (folder / "own.toml").write_text(toml({k: v for k, v in recipe.items() if k != "name"}))

    def __call__(self, *words: str, path: str = ".") -> "subprocess.CompletedProcess[str]":
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([path, str(REPOSITORY)])}
        command = [sys.executable, "-P", "-c", "from wavedistill.cli import main; main()", *words]
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, check=False)


def toml(tables: dict[str, Any], prefix: str = "") -> str:
    """Nested dictionaries as TOML, with dotted keys."""
    lines = [
        toml(value, f"{prefix}{key}.") if isinstance(value, dict) else f"{prefix}{key} = {json.dumps(value)}"
        for key, value in tables.items()
        if value is not None
    ]
    return "\n".join(lines)


@pytest.mark.slow
def test_a_users_density_is_distilled_scored_and_forgotten(tmp_path: Path, own: dict[str, Any]) -> None:
    """From the recipe to the report; then the checkpoint serves where the user's module does not exist."""
    shell = Shell(tmp_path, own)
    done = shell("run", "own.toml", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "exp/own/metrics.json").read_text())
    density, synthesis = found["density"]["models"], found["as_drawn"]
    # Of Gaussians with log-scales that differ by ln 2, in closed form.
    start = 0.5 * (4 - 1) - math.log(2)
    assert abs(density["student"]["kl_before_training"] - start) < 0.1
    assert density["student"]["kl"] < 0.1 * start
    assert density["student"]["kl_from"] == "teacher of student"
    assert set(density["teacher of student"]) == {"nll", "nll_shuffled_conditioning", "bits_per_sample_given_log_mel"}
    assert set(synthesis) == {"recorded", "student", "griffin_lim", "source_filter", "whisper"}
    assert {scores["teacher_log_likelihood"] for scores in synthesis.values()} == {None}, "no model of the recipe"
    level = synthesis["student"]["level_difference_db"]
    assert level is not None
    assert abs(level + 20 * math.log10(2)) < 1.5, "half as loud, as the teacher is"
    rows = json.loads((tmp_path / "exp/own/benchmark.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"student"}
    assert (tmp_path / "exp/own/report.html").stat().st_size > 0

    student = "exp/own/student/checkpoint.safetensors"
    (tmp_path / "someones.py").write_text("raise SystemExit('imported')")
    made = shell("generate", student, "voice/0.wav", "--out", "out")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "out/0.wav").exists()


@pytest.mark.slow
def test_a_density_that_cannot_be_used_is_named(tmp_path: Path, own: dict[str, Any]) -> None:
    shell = Shell(tmp_path, own)
    assert shell("prepare", "own.toml").returncode == 0
    for path, name, message in (
        ("elsewhere", "someones:load", "No module named 'someones'; its module must be importable"),
        (".", "someones:lode", "has no attribute 'lode'"),
        (".", "someones:wrong", r"its log_prob gave shape (2, "),
    ):
        done = shell("run", "own.toml", "--until", "student", "--set", f"training.student.of={name}", path=path)
        assert done.returncode == 2, done.stderr
        assert "training.student.of" in done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_the_source_of_its_module_is_an_input(
    tmp_path: Path, own: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a student of another version of it is not up to date."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "flow.py").write_text("load = None")
    monkeypatch.syspath_prepend(str(tmp_path))
    own["training"]["student"]["of"] = "package.flow:load"
    experiment = Experiment(validate_recipe(own, "own.toml"), tmp_path, torch.device("cpu"))
    assert tmp_path / "package" / "flow.py" in stages_of(experiment.recipe)["student"].inputs(experiment)
    assert tmp_path / "package" / "flow.py" in stages_of(experiment.recipe)["evaluate"].inputs(experiment)


def test_it_computes_as_precisely_as_it_likes_beside_networks_in_bfloat16(
    own: dict[str, Any], tiny_model: Callable[[str], WaveformModel]
) -> None:
    recipe = validate_recipe(own, "own.toml")
    seen = []

    class Density:
        def log_prob(self, x: torch.Tensor) -> torch.Tensor:
            product = x @ torch.eye(x.shape[1])
            seen.append((x.dtype, product.dtype))
            return product.square().sum(-1)

    frames, context, hop = 6, margin(recipe), recipe.audio.hop_length
    audio = 0.1 * noise(1, (frames + 2 * context) * hop).float()
    mel = LogMel(recipe.audio).of_file(audio)
    known = told(recipe, mel, torch.zeros(1, mel.shape[2]))
    batch = Batch(audio[:, context * hop : -context * hop], audio, known)
    objective = FromDensity(lambda told: Density(), recipe, "student", audio.device)
    with torch.autocast("cpu", torch.bfloat16):
        found = objective.terms(build(recipe, "student", 0), batch, [random_stream(0)])
    assert seen == [(torch.float32, torch.float32)]
    assert {term.dtype for term in found.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("loss", "kl_estimator", "closed"),
        ("loss", "log_scale", 1.0),
        ("loss", "x_reconstruction", 1.0),
        ("loss", "z_reconstruction", 1.0),
        (None, "of", "nobody"),
        (None, "of", ".relative:load"),
    ],
)
def test_a_recipe_that_asks_more_of_it_is_refused(own: dict[str, Any], section: str, key: str, value: Any) -> None:
    training = own["training"]["student"]
    (training[section] if section else training)[key] = value
    with pytest.raises(RecipeError, match=r"training\.student\.(of|loss)"):
        validate_recipe(own, "own.toml")


def test_a_model_of_this_package_is_a_density_like_any_other(
    tmp_path: Path, tiny_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without linear prediction behind a recipe with it: the KL is that of waveforms, in training and evaluation.

    A student that is compared with it on residuals would look as if it had learnt it all.
    """
    plain = copy.deepcopy(tiny_data)
    plain["linear_prediction"]["order"] = 0
    teacher = build(validate_recipe(plain, "plain.toml"), "teacher", 0).requires_grad_(False)
    module = ModuleType("someones_maf")
    module.load = lambda recipe, device: teacher
    monkeypatch.setitem(sys.modules, "someones_maf", module)
    tiny_data["training"]["student"]["of"] = "someones_maf:load"
    tiny_data["training"]["student"]["loss"].update(kl_estimator="mc", spectral=0.0)
    recipe = validate_recipe(tiny_data, "tiny.toml")
    experiment, student = Experiment(recipe, tmp_path, torch.device("cpu")), build(recipe, "student", 0)
    manifest = corpus(experiment.audio, recipe, [40])
    task = distillation_task(recipe, "student", experiment.teacher("student"), experiment.device)
    assert not task.given, "nor is its predictor of F0 taken"
    segments = Segments(manifest, experiment.audio, "train", frames=20, margin=student.margin)
    batch = segments.draw([random_stream(0)])
    found = task.terms(student, batch, [random_stream(1)])["kl"]
    z = student.base.noise(tuple(batch.audio.shape), random_stream(1))
    expected, _ = one_draw(student(batch.conditioning), teacher(batch.conditioning.mel_alone()), z)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert found > 0.1

    clips = excerpts(experiment.audio, manifest.utterances, recipe.audio)
    teachers = {"student": experiment.teacher("student")}
    density = densities(recipe, {"student": student}, teachers, clips, experiment.device)["models"]["student"]
    clip = clips[0].audio
    mel = told(recipe, LogMel(recipe.audio).of_file(clip[None], student.margin))
    draws = student.base.noise((recipe.evaluate.kl_draws, len(clip)), random_stream(recipe.seed, DRAW, 0))
    expected = sum(one_draw(student(mel), teacher(mel), z[None])[0].item() for z in draws) / len(draws)
    assert density["kl"] == pytest.approx(expected, rel=1e-4)


def test_the_recipes_teacher_as_a_mere_density_gives_the_same_kl(
    tiny_data: dict[str, Any], tiny_model: Callable[[str], WaveformModel]
) -> None:
    """On the waveform with linear prediction, as on the residual without: a KL is invariant."""
    tiny_data["training"]["student"]["loss"].update(kl_estimator="mc", spectral=0.5, log_mel=0.5, contrastive=0.1)
    recipe: Recipe = validate_recipe(tiny_data, "tiny.toml")
    student, teacher = (tiny_model(kind).double() for kind in ("student", "teacher"))
    generator = torch.Generator().manual_seed(0)
    for model in (student, teacher):
        for network in model.networks:
            with torch.no_grad():
                network.head.weight.copy_(0.5 * torch.randn(network.head.weight.shape, generator=generator))
    teacher.requires_grad_(False)
    teacher.pitch.load_state_dict(student.pitch.state_dict())
    hop, frames, context = recipe.audio.hop_length, 12, margin(recipe)
    audio = 0.1 * noise(2, (frames + 2 * context) * hop)
    mel = LogMel(recipe.audio).double().of_file(audio)
    f0 = torch.nn.functional.pad(student.pitch(mel), (PITCH_CONTEXT,) * 2)
    batch = Batch(audio[:, context * hop : -context * hop], audio, told(recipe, mel, f0))
    streams = [[random_stream(0, item) for item in range(2)] for _ in range(2)]
    pair, density = (
        Distillation(teacher, recipe, "student", audio.device),
        FromDensity(teacher, recipe, "student", audio.device),
    )
    for objective in (pair, density):
        objective.filters = {n_fft: filters.double() for n_fft, filters in objective.filters.items()}
    expected, found = pair.terms(student, batch, streams[0]), density.terms(student, batch, streams[1])
    assert set(found) == {*expected, "pitch"}
    assert expected["kl"].abs() > 0.01
    for name in ("kl", "spectral", "log_mel"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6, msg=name)
    assert found["contrastive"] < -found["kl"], "elsewhere, the density's linear prediction is another too"
    found["kl"].backward()
    for name, parameter in density_parameters(student):
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_a_checkpoint_brings_no_code(tmp_path: Path, own: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recipe may name any import path: loading it imports nothing."""
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    own["training"]["student"]["of"] = "planted:load"
    recipe = validate_recipe(own, "own.toml")
    save_model(tmp_path / "a.safetensors", "student", recipe, 1, HEARD, build(recipe, "student", 0).state_dict())
    load_model(tmp_path / "a.safetensors")
    assert not (tmp_path / "ran").exists()
    assert "planted" not in sys.modules
    __import__("planted")
    assert (tmp_path / "ran").exists(), "the trap works"


def test_beside_a_mere_density_the_student_is_given_f0_as_it_was_tracked(tiny_data: dict[str, Any]) -> None:
    tiny_data["training"]["student"]["loss"].update(kl_estimator="mc", spectral=0.0)
    recipe = validate_recipe(tiny_data, "tiny.toml")
    student, teacher = (randomise(build(recipe, kind, 0)) for kind in ("student", "teacher"))
    mel = noise(1, recipe.audio.n_mels, 12 + 2 * student.margin) - 5
    tracked = torch.full((1, mel.shape[2]), 100.0).double()
    audio = noise(1, 12 * recipe.audio.hop_length)
    objective = FromDensity(teacher, recipe, "student", audio.device)
    found = objective.terms(student, Batch(audio, audio, told(recipe, mel, tracked)), [random_stream(0)])
    z = student.base.noise(tuple(audio.shape), random_stream(0)).double()
    by_tracked, by_predicted = (
        one_draw(student(told(recipe, mel, f0)), teacher(told(recipe, mel)), z)[0][0] for f0 in (tracked, None)
    )
    torch.testing.assert_close(found["kl"], by_tracked)
    assert (by_tracked - by_predicted).abs() > 1e-3
