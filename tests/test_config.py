"""Recipes: what is wrong is named, with the key, the value and the fix."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import ValidationError

from tests.conftest import RECIPES
from wavedistill.cli.commands import app
from wavedistill.recipe.loading import load_recipe, validate_recipe
from wavedistill.recipe.recipe import COMMANDS, Recipe
from wavedistill.recipe.sections import FolderCorpus
from wavedistill.tools.errors import RecipeError


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d["models"]["teacher"].update(layrs=3),
            r"teacher\.layrs: unknown key; did you mean layers\?",
        ),
        (lambda d: d["training"]["teacher"].update(zzz=3), r"training\.teacher\.zzz: unknown key; known here: steps, "),
        (lambda d: d.update(modles={}), r"modles: unknown key; did you mean models\?"),
        (lambda d: d.update(teacher={}), r"teacher: models stand in \[models\.NAME\] now, .* `wavedistill new`"),
        (
            lambda d: d["models"].update(prepare=d["models"]["teacher"]),
            r"models\.prepare: 'prepare' is .* choose another",
        ),
        (lambda d: d["models"].update(other=d["models"]["teacher"]), r"models\.other: there is no training\.other"),
        (lambda d: d["models"]["teacher"].update(kind="glow"), r"models\.teacher\.kind = 'glow': "),
        (lambda d: d["training"]["teacher"].update(objective="beauty"), r"training\.teacher\.objective = 'beauty': "),
        (
            lambda d: d["training"]["student"].update(of="nobody"),
            r"student\.of = .*no model .*there are teacher",
        ),
        (
            lambda d: d["training"]["student"].update(of="student"),
            r"student\.of = .*no model that is trained",
        ),
        (
            lambda d: d["training"]["student"].update(objective="likelihood", of=None),
            r"training\.student\.of: unknown key",
        ),
        (lambda d: d["models"]["teacher"]["network"].update(dilation_cycle=40), r"dilation_cycle = 40: .*less than"),
        (lambda d: d["models"]["teacher"].update(layers=10**6), r"models\.teacher\.layers = 1000000: .*less than"),
        (
            lambda d: d["models"]["teacher"].update(layers=14, network={"dilation_cycle": 14}),
            r"models\.teacher: a network sees 16384 samples back.*segment_frames = 82 or more",
        ),
        (lambda d: d["training"]["student"]["loss"].update(kl_draws=10**12), r"kl_draws = 1000000000000: .*less than"),
        (lambda d: d["corpus"].update(txt="a"), r"corpus\.txt: unknown key; did you mean text\?"),
        (
            lambda d: d["audio"].update(sample_rate="16k"),
            r"audio\.sample_rate = '16k': input should be a valid integer",
        ),
        (lambda d: d["audio"].update(n_mels=80.5), r"audio\.n_mels = 80\.5: input should be a valid integer"),
        (lambda d: d["models"]["teacher"].update(base="cauchy"), r"teacher\.base = 'cauchy': .*'normal' or 'logistic'"),
        (lambda d: d["training"]["teacher"].pop("steps"), r"training\.teacher\.steps: missing; add it"),
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
            lambda d: d["training"]["student"].update(spectral_n_ffts=[8192]),
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
            r"training\.student\.loss\.log_scale compares log-scales of densities of one kind",
        ),
        (
            lambda d: (
                d["models"]["teacher"].update(components=2),
                d["training"]["student"]["loss"].update(kl_estimator="mc", x_reconstruction=1),
            ),
            r'tie the noise of teacher and student: set models\.student\.base = "logistic"',
        ),
        (
            lambda d: d["training"]["student"]["loss"].update(kl=0, spectral=0, log_mel=0),
            r"training\.student\.loss: every weight is 0, so there is nothing to learn",
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
        ("training.teacher.stepz=7", r"training\.teacher\.stepz: unknown key; did you mean steps\?"),
        ("steps", r"--set steps: expected key=value"),
        ("=3", r"--set =3: expected key=value"),
        ("audio.n_fft.deep=3", r"n_fft is a value, not a section"),
        ("training.teacher.steps=many", r"training\.teacher\.steps = 'many': input should be a valid integer"),
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


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_a_recipe_extends_another_and_says_what_differs(tmp_path: Path) -> None:
    base, gpu = (load_recipe(RECIPES / f"festvox_ru{suffix}.toml") for suffix in ("", "_gpu"))
    assert gpu.models["teacher"].layers == 30
    assert gpu.models["teacher"].network.dilation_cycle == base.models["teacher"].network.dilation_cycle
    assert gpu.training["student"].loss == base.training["student"].loss
    assert gpu.corpus == base.corpus
    own = write(tmp_path, "own.toml", 'extends = "demo"\n[corpus]\nkind = "folder"\npath = "voice"\n')
    found = load_recipe(own)
    assert found.corpus == FolderCorpus(kind="folder", path=str(tmp_path / "voice")), "another kind takes the place"
    assert found.name == "own"
    assert found.training == load_recipe("demo").training
    again = load_recipe(write(tmp_path, "again.toml", 'extends = "own.toml"\nseed = 4\n'))
    assert again == found.model_copy(update={"name": "again", "seed": 4})


def test_extending_in_a_circle_or_nothing_is_named(tmp_path: Path) -> None:
    for name, base, said in (("a", "b.toml", "in a circle"), ("c", "d.toml", "cannot read"), ("e", "f", "are shipped")):
        write(tmp_path, "b.toml", 'extends = "a.toml"')
        with pytest.raises(RecipeError, match=said):
            load_recipe(write(tmp_path, f"{name}.toml", f'extends = "{base}"'))


def test_paths_are_relative_to_the_file_that_says_them(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    corpus = '[corpus]\nkind = "folder"\npath = {}\n'
    for given, expected in (("'voice'", str(tmp_path / "deep" / "voice")), ("'/voice'", "/voice"), ("'~/v'", "~/v")):
        write(tmp_path / "deep", "base.toml", 'extends = "demo"\n' + corpus.format(given))
        found = load_recipe(write(tmp_path, "mine.toml", 'extends = "deep/base.toml"'))
        assert found.corpus.path == expected
    assert load_recipe(tmp_path / "mine.toml", ["corpus.path=typed"]).corpus.path == "typed", "to where one types"


def test_what_own_voice_comments_out_is_the_default() -> None:
    """Each `# key = value` of its tables, uncommented, changes nothing."""
    text = (RECIPES / "own_voice.toml").read_text()
    optional = ("licence", "mels", "limit", "together", "extends", "preemphasis", "start")
    lines = text.split("\n")
    stated = [re.sub(r"^# (?=\[?[a-z0-9_]+(\]| = ))", "", line) for line in lines]
    kept = [
        line if any(line.startswith(f"# {key}") for key in optional) else new
        for line, new in zip(lines, stated, strict=True)
    ]
    assert sum(a != b for a, b in zip(lines, kept, strict=True)) > 30
    assert validate_recipe({**tomllib.loads("\n".join(kept)), "name": "a"}, "a") == validate_recipe(
        {**tomllib.loads(text), "name": "a"}, "a"
    )


def test_the_names_of_all_commands_are_taken() -> None:
    """But for those that are trainings, of the shipped recipes."""
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert commands - COMMANDS == {"teacher", "student"}
    assert commands >= COMMANDS
