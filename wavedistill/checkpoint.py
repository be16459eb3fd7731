"""Files that hold weights, the recipe they belong to, and the state of a training; written whole or not at all.

Loading runs no code from the file: only tensors and plain values are accepted.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from wavedistill.config import Recipe, validate_recipe
from wavedistill.errors import CheckpointError, RecipeError
from wavedistill.models import WaveformModel, build

FORMAT = "wavedistill-checkpoint-1"
Kind = Literal["teacher", "student"]


class Checkpoint(NamedTuple):
    """A trained model and what is known of it."""

    kind: Kind
    recipe: Recipe
    step: int
    model: WaveformModel


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a file of tensors and plain values; a file already there is replaced only once the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:  # which says what is wrong with a place that cannot be written
        torch.save(content, file)
    partial.replace(path)


def save_model(path: Path, kind: Kind, recipe: Recipe, step: int, model: dict[str, torch.Tensor]) -> None:
    """Write the weights of a model after a training step, with the recipe that builds it."""
    save(
        path,
        {"format": FORMAT, "kind": kind, "recipe": recipe.model_dump(mode="json"), "step": step, "model": model},
    )


def set_aside(path: Path) -> Path:
    """Rename a file or folder to the first free name of the form `name.1`, so that nothing in it is lost."""
    number = 1
    while (kept := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return path.rename(kept)


def load(path: Path) -> dict[str, Any]:
    """Read a file written by `save`, onto the CPU.

    Raises:
        CheckpointError: if it is missing, or something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint{' (it is a folder)' if path.is_dir() else ''}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a foreign file raises depends on its first bytes
        raise CheckpointError(f"{path}: not a wavedistill checkpoint, or a damaged one") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a wavedistill checkpoint: it holds a {type(content).__name__}")
    return content


def load_model(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a model written by `save_model`, ready for use: on the device, in evaluation mode, without gradients.

    Raises:
        CheckpointError: if it is missing, something else, or does not fit this version of wavedistill.
    """
    content = load(path)
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a model checkpoint of this version (format {content.get('format')!r}, expected {FORMAT!r}); "
            "give the checkpoint.pt of a teacher or student folder"
        )
    try:
        recipe = validate_recipe(content["recipe"], f"{path}, recipe inside")
        model = build(content["kind"], recipe, seed=0)
        model.load_state_dict(content["model"])
    except (RecipeError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path}: does not fit this version of wavedistill: {error}") from error
    model.to(device).eval().requires_grad_(False)
    return Checkpoint(content["kind"], recipe, content["step"], model)
