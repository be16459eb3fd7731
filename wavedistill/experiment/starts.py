"""What a training begins as, if not as chance has it, and whose recordings are behind a model."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wavedistill.experiment.folder import SHARED, Experiment
from wavedistill.models import checkpoint
from wavedistill.recipe.models import OwnModel
from wavedistill.recipe.recipe import Recipe
from wavedistill.tools.errors import CheckpointError
from wavedistill.tools.imports import imported

UNSTATED = "Recordings whose licence was not stated"
SHOWN = 3
"""Differences that an error names."""


def start_of(experiment: Experiment, name: str) -> checkpoint.Checkpoint | None:
    """The trained model whose weights a training begins with; None where it begins with random ones.

    Raises:
        CheckpointError: if it cannot be read, or is of other units or sizes than the recipe's model.
    """
    path = experiment.start(name)
    if path is None:
        return None
    here, asked = f"training.{name}.start", experiment.recipe.models[name]
    if isinstance(asked, OwnModel):  # which the recipe may name, and a checkpoint may not
        imported(asked.kind, f"models.{name}.kind")
    try:
        found = checkpoint.load_model(path)
    except CheckpointError as error:
        raise CheckpointError(f"{here}: {error}") from error
    there, own = _built_by(found.recipe, found.name), _built_by(experiment.recipe, name)
    differ = [key for key in {**own, **there} if own.get(key) != there.get(key)]
    if differ:
        keys = [key.replace("models.", f"models.{name}.", 1) for key in differ[:SHOWN]]
        told = [f"{key} = {there.get(k)!r}, here {own.get(k)!r}" for key, k in zip(keys, differ, strict=False)]
        more = f"; {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        raise CheckpointError(
            f"{here}: {path}: a model of other units or sizes: there {'; '.join(told)}{more}: set them as they are "
            "there, or give a checkpoint of this recipe's sizes"
        )
    return found


def licence(experiment: Experiment, name: str) -> str | None:
    """Of every recording that a model learns from, one a line: by itself, from its teacher, and by what it began as."""
    teacher = experiment.recipe.teacher_of(name)
    before = [experiment.start(name), experiment.checkpoint(teacher) if teacher else None]
    return joined(experiment.recipe.corpus.licence, *(licence_in(path) for path in before if path))


def licence_in(path: Path) -> str | None:
    """The licence that a model's checkpoint carries."""
    return checkpoint.load(path)[1]["recipe"]["corpus"].get("licence")


def joined(*licences: str | None) -> str | None:
    """Each licence once, one a line; None where none is known."""
    lines = dict.fromkeys(line for text in licences for line in (text or UNSTATED).splitlines())
    return "\n".join(lines) if any(licences) else None


def _built_by(recipe: Recipe, name: str) -> dict[str, Any]:
    """What a recipe's model is built by, by key."""
    content = recipe.model_dump(mode="json")
    return dict(_keys({**{part: content[part] for part in SHARED}, "models": content["models"][name]}))


def _keys(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{before}{key}.")
        else:
            yield before + key, value
