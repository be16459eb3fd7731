"""Recipes from files: by path or by the name of one that is shipped, with what they extend, and with overrides."""

import difflib
import itertools
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from wavedistill.recipe.models import KINDS as MODEL_KINDS
from wavedistill.recipe.recipe import Recipe
from wavedistill.recipe.sections import BACKSLASHES, DebianCorpus, FolderCorpus, NanottsCorpus, Section, SeveralCorpora
from wavedistill.recipe.trainings import Distillation, Likelihood
from wavedistill.tools.errors import RecipeError

PATHS = {"corpus": ("text", "path", "mels"), "training": ("start",)}
"""Keys of a corpus, and of each training, that are paths: relative ones are so to the recipe's file."""
KINDS = ("kind", "objective")
"""Keys that say what else a table holds."""

TAGGED: dict[str, type[BaseModel]] = {
    **{"nanotts": NanottsCorpus, "debian": DebianCorpus, "folder": FolderCorpus, "several": SeveralCorpora},
    **MODEL_KINDS,
    **{"likelihood": Likelihood, "distillation": Distillation, "own": Section},
}
"""The sections of unions, by their tags."""
TAG_AT = {"corpus": 1, "models": 2, "training": 2}
"""Where a tag stands in the location of a fault, by its first key."""


def shipped() -> Path:
    """The folder of the recipes that come with the package."""
    inside = Path(__file__).parents[1] / "recipes"  # as it is installed
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def find(recipe: str) -> Path:
    """The file of a recipe that is given as a path, or as the name of one that is shipped.

    Raises:
        RecipeError: if a name is none of these.
    """
    if recipe.endswith(".toml") or os.sep in recipe or Path(recipe).is_file():
        return Path(recipe)
    path = shipped() / f"{recipe}.toml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in shipped().glob("*.toml")))
        raise RecipeError(f"{recipe}: give a recipe's file, or one of those that are shipped: {known}")
    return path


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: the TOML file, or the name of a shipped recipe.
        overrides: settings of the form `section.key=value`, the value in TOML; a bare word is a string.

    Raises:
        RecipeError: if the file cannot be read, or does not describe an experiment; names every faulty key.
    """
    path = find(str(path))
    data = _read(path, [])
    for override in overrides:
        _override(data, override)
    if "name" in data:
        raise RecipeError(f"{path}: name: unknown key; the file's own name names the experiment: remove it")
    return validate_recipe({**data, "name": path.stem}, str(path))


def validate_recipe(data: dict[str, Any], source: str) -> Recipe:
    """Validate a recipe given as nested dictionaries; `source` names it in errors.

    Raises:
        RecipeError: if it does not describe an experiment; names every faulty key.
    """
    if old := {"teacher", "student"} & data.keys():
        raise RecipeError(
            f"{source}: {sorted(old)[0]}: models stand in [models.NAME] now, with a kind, and how they are trained in "
            "[training.NAME]: rename the tables as in recipes/demo.toml, or write a new recipe with `wavedistill new`"
        )
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        places = [item["loc"] for item in error.errors()]

        def lacks(loc: tuple[int | str, ...]) -> bool:
            return any(len(place) > len(loc) and place[: len(loc)] == loc for place in places)

        # A list whose items are wrong is said to be too short as well, because it lacks them.
        items = [item for item in error.errors() if item["type"] != "too_short" or not lacks(item["loc"])]
        lines = [_explain(item["type"], item["loc"], item["msg"], item["input"]) for item in items]
        raise RecipeError("\n".join(f"{source}: {line}" for line in lines)) from error


def _corpora(table: Any) -> list[dict[str, Any]]:
    """The tables of a corpus that may hold paths: its own, and those of its parts."""
    if not isinstance(table, dict):
        return []
    parts = table.get("parts")
    inner = [part.get("corpus") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return [table, *(each for each in inner if isinstance(each, dict))]


def _read(path: Path, extending: list[Path]) -> dict[str, Any]:
    """The tables of a recipe's file, over those of the one that it extends."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        data = tomllib.loads(text)
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from error
    except tomllib.TOMLDecodeError as error:
        number = re.search(r"at line (\d+)", str(error))
        hint = f"; {BACKSLASHES}" if number and "\\" in text.split("\n")[int(number[1]) - 1] else ""
        raise RecipeError(f"{path}: not valid TOML: {error}{hint}") from error
    trainings = data.get("training")
    of_each = [each for each in trainings.values() if isinstance(each, dict)] if isinstance(trainings, dict) else []
    for part, tables in (("corpus", _corpora(data.get("corpus"))), ("training", of_each)):
        for table, key in itertools.product(tables, PATHS[part]):
            if isinstance(value := table.get(key), str) and value and not value.startswith("~"):
                table[key] = str(path.parent / value)
    base = data.pop("extends", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise RecipeError(f"{path}: extends = {base!r}: give a recipe's file, or the name of a shipped one")
    other = path.parent / base if base.endswith(".toml") else find(base)
    if other.resolve() in (each.resolve() for each in [*extending, path]):
        raise RecipeError(f"{path}: extends = {base!r}: goes round in a circle")
    return _over(_read(other, [*extending, path]), data)


def _over(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Tables over others, key by key; one of another kind takes the place of the whole."""
    found = dict(base)
    for key, value in own.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            alike = all(name not in value or value[name] == below.get(name) for name in KINDS)
            value = _over(below, value) if alike else value
        found[key] = value
    return found


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise RecipeError(f"--set {override}: expected key=value, for instance --set training.teacher.steps=500")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = (part.strip() for part in key.split("."))
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise RecipeError(f"--set {override}: {section} is a value, not a section")
    data[last] = value


def _explain(kind: str, location: tuple[int | str, ...], message: str, value: object) -> str:
    """One line for one fault: the key, the value, and the fix."""
    section, keys = _place(location)
    key, message = ".".join(keys), message.removeprefix("Value error, ")
    match kind:
        case "extra_forbidden":
            known = [name for name in section.model_fields if section is not Recipe or name != "name"]
            close = difflib.get_close_matches(keys[-1], known, n=1)
            return f"{key}: unknown key; " + (
                f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
            )
        case "missing":
            return f"{key}: missing; add it"
        case "union_tag_invalid" | "union_tag_not_found":
            return f"{key}: {message}"
        case "value_error":
            return f"{key}: {message}" if key else message
        case _:
            return f"{key} = {value!r}: {message[0].lower()}{message[1:]}"


def _place(location: Sequence[int | str]) -> tuple[type[BaseModel], list[str]]:
    """The section that a fault is in, and its keys, among which pydantic counts the tags of unions."""
    section: type[BaseModel] = Recipe
    keys: list[str] = []
    for place, part in enumerate(map(str, location)):
        if part in TAGGED and (place == TAG_AT.get(str(location[0])) or keys[-1:] == ["corpus"]):
            section = TAGGED[part]
        elif part != "[key]":
            keys.append(part)
            field = section.model_fields.get(part)
            for inner in (field.annotation, *get_args(field.annotation)) if field else ():
                if isinstance(inner, type) and issubclass(inner, BaseModel):
                    section = inner
    return section, keys
