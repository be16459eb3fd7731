"""Recipes: what is wrong is named, with the key, the value and the fix."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.conftest import RECIPES
from wavedistill.recipe.loading import load_recipe, validate_recipe
from wavedistill.recipe.recipe import Recipe
from wavedistill.tools.errors import RecipeError


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["models"]["teacher"].update(layrs=3), r"teacher\.layrs: unknown key; did you mean layers\?"),
        (lambda d: d["training"]["teacher"].update(zzz=3), r"teacher\.training\.zzz: unknown key; known here: steps, "),
        (lambda d: d.update(techer={}), r"techer: unknown key; did you mean teacher\?"),
        (lambda d: d["corpus"].update(txt="a"), r"corpus\.txt: unknown key; did you mean text\?"),
        (
            lambda d: d["audio"].update(sample_rate="16k"),
            r"audio\.sample_rate = '16k': input should be a valid integer",
        ),
        (lambda d: d["audio"].update(n_mels=80.5), r"audio\.n_mels = 80\.5: input should be a valid integer"),
        (lambda d: d["models"]["teacher"].update(base="cauchy"), r"teacher\.base = 'cauchy': .*'normal' or 'logistic'"),
        (lambda d: d["models"]["teacher"].pop("layers"), r"teacher\.layers: missing; add it"),
        (
            lambda d: d["models"]["teacher"]["network"].update(kernel_size=1),
            r"kernel_size = 1: .*greater than or equal to 2",
        ),
        (lambda d: d["corpus"].update(kind="tape"), r"corpus: .*'tape'.*'nanotts', 'debian', 'folder'"),
        (lambda d: d["conditioning"].update(upsample=[4, 40]), r"upsample = \[4, 40\] multiplies to 160.*\[4, 50\]"),
        (lambda d: d["conditioning"].update(upsample=[]), r"conditioning\.upsample = \[\]: .*at least 1 item"),
        (lambda d: d["audio"].update(n_fft=801), r"audio: n_fft = 801 must exceed hop_length = 200 by an even number"),
        (lambda d: d["audio"].update(f_max=9000), r"audio: .*f_max = 9000.*for instance f_max = 8000"),
        (
            lambda d: d["models"]["student"].update(spectral_n_ffts=[8192]),
            r"window of 8192 samples.*segment_frames = 41 or more",
        ),
        (
            lambda d: d["linear_prediction"].update(order=201),
            r"linear_prediction\.order = 201 looks .* use 200 or less",
        ),
        (lambda d: d["audio"].update(f0_min=300), r"audio: f0_min = 300.*must satisfy .*for instance f0_min = 60"),
        (lambda d: d["linear_prediction"].update(preemphasis=0.9), r"linear_prediction\.preemphasis superfluous"),
        (lambda d: d["conditioning"].update(pitch=False), r"periodic_source = true needs F0: set conditioning\.pitch"),
        (lambda d: d["models"]["teacher"].update(base="logistic"), r'kl_estimator = "closed" needs .*; use "mc-k"'),
        (
            lambda d: (
                d["models"]["teacher"].update(components=2),
                d["training"]["student"]["loss"].update(kl_estimator="mc", log_scale=1),
            ),
            r"student\.loss\.log_scale compares log-scales of densities of one kind",
        ),
        (
            lambda d: (
                d["models"]["teacher"].update(components=2),
                d["training"]["student"]["loss"].update(kl_estimator="mc", x_reconstruction=1),
            ),
            r'tie the noise of teacher and student: set student\.base = "logistic"',
        ),
        (
            lambda d: d["training"]["student"]["loss"].update(kl=0, spectral=0, log_mel=0),
            r"student\.loss: every weight is 0, so there is nothing to learn",
        ),
        (
            lambda d: d.update(corpus={"kind": "debian", "package": "voice", "sha256": "12", "path": "data"}),
            r"corpus\.sha256 = '12': string should match",
        ),
        (lambda d: d["prepare"].update(max_seconds=float("inf")), r"prepare\.max_seconds = inf: .*finite number"),
        (lambda d: d["prepare"].update(test_fraction=0.6), r"prepare\.test_fraction = 0\.6: .*less than 0\.5"),
    ],
)
def test_faults_are_named(tiny_data: dict[str, Any], change: Callable[[dict[str, Any]], Any], message: str) -> None:
    change(tiny_data)
    with pytest.raises(RecipeError, match=message) as error:
        validate_recipe(tiny_data, "mine.toml")
    assert all(line.startswith("mine.toml: ") for line in str(error.value).splitlines())


def test_all_faults_are_named_at_once(tiny_data: dict[str, Any]) -> None:
    tiny_data["audio"]["n_mels"] = -1
    tiny_data["models"]["teacher"]["layrs"] = 3
    with pytest.raises(RecipeError) as error:
        validate_recipe(tiny_data, "mine.toml")
    assert len(str(error.value).splitlines()) == 2


def test_overrides_change_single_settings() -> None:
    recipe = load_recipe(
        RECIPES / "tiny.toml",
        ["training.teacher.steps=7", "models.student.flow_layers=[2, 3]", "corpus.text=other words.txt", "seed = 4"],
    )
    assert recipe.training["teacher"].steps == 7
    assert recipe.models["student"].flow_layers == (2, 3)
    assert recipe.corpus.text == "other words.txt"
    assert recipe.seed == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.teacher.stepz=7", r"teacher\.training\.stepz: unknown key; did you mean steps\?"),
        ("steps", r"--set steps: expected key=value"),
        ("=3", r"--set =3: expected key=value"),
        ("seed.deep=3", r"seed is a value, not a section"),
        ("training.teacher.steps=many", r"teacher\.training\.steps = 'many': input should be a valid integer"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(RECIPES / "tiny.toml", [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read the recipe"), ("seed = ", "not valid TOML"), ('name = "x"', "name: unknown key")],
)
def test_unreadable_recipes_are_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError, match=f"{re.escape(str(path))}: .*{message}"):
        load_recipe(path)


def test_a_recipe_survives_its_checkpoint(tiny: Recipe) -> None:
    assert validate_recipe(tiny.model_dump(mode="json"), "again") == tiny


def test_a_recipe_cannot_change(tiny: Recipe) -> None:
    with pytest.raises(ValidationError):
        tiny.seed = 3
