"""Files that hold weights, the recipe they belong to, and the state of a training; written whole or not at all.

They are safetensors: tensors, and a header of plain values. Nothing in such a file can be run.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from pydantic import BaseModel, NonNegativeInt, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wavedistill.models.kinds import build
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.loading import validate_recipe
from wavedistill.recipe.models import OwnModel
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech.heard import Heard
from wavedistill.tools.errors import CheckpointError, RecipeError
from wavedistill.tools.files import replacing

HEADER = "wavedistill"
"""The one key of the file's metadata; its value is JSON. One, because the order of several is left to chance."""
VERSION = 6
"""Of the format; raised when files of the old one can no longer be read."""
SUFFIX = ".safetensors"
MODEL_FILE = f"checkpoint{SUFFIX}"


class Checkpoint(NamedTuple):
    """A trained model and what is known of it."""

    name: str
    recipe: Recipe
    step: int
    heard: Heard
    model: WaveformModel


class ModelHeader(BaseModel):
    """What a model's file says beside its weights; the recipe is validated by its own rules."""

    name: str
    recipe: dict[str, Any]
    step: NonNegativeInt
    heard: Heard


def save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and plain values; a file already there is replaced only once the new one is safe on the disk.

    Raises:
        CheckpointError: if it cannot be written, for instance because the disk is full; nothing is left behind.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"version": VERSION, **header}, allow_nan=False)  # trainings have an order
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(safetensors.torch.save(whole, {HEADER: text}))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written: {error.strerror}; make room or give another --exp, and run the same command "
            "again: what was saved before is untouched"
        ) from error


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors, onto the CPU, and plain values from a file written by `save`.

    Raises:
        CheckpointError: if it is missing, damaged, of a newer version, or something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint{' (it is a folder)' if path.is_dir() else ''}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError) as error:
        if _first_bytes(path) in (b"PK", *(bytes([0x80, protocol]) for protocol in range(6))):  # torch's, or bare
            raise CheckpointError(
                f"{path}: a pickled file, which could run code and is not read; give a {SUFFIX} file"
            ) from error
        raise CheckpointError(f"{path}: not a wavedistill checkpoint, or a damaged one") from error
    try:
        header = json.loads(metadata[HEADER])
        version = int(header["version"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a wavedistill checkpoint: another program's tensors") from error
    if version != VERSION:
        older = "move the folder of its training away and train again, or use the wavedistill it is of"
        advice = "install a newer wavedistill" if version > VERSION else older
        raise CheckpointError(f"{path}: of version {version} of the format, and this one reads {VERSION}: {advice}")
    return tensors, header


def save_model(path: Path, name: str, recipe: Recipe, step: int, heard: Heard, weights: Mapping[str, Tensor]) -> None:
    """Write the weights of a model after a training step, with the recipe that builds it and what it was trained on."""
    header = {"name": name, "recipe": recipe.model_dump(mode="json"), "step": step, "heard": heard.model_dump()}
    save(path, weights, header)


def load_model(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a model written by `save_model`, ready for use: on the device, in evaluation mode, without gradients.

    Raises:
        CheckpointError: if it is missing, something else, holds weights that are not finite, or does not fit this
            version of wavedistill.
    """
    weights, content = load(path)
    if "name" not in content:
        raise CheckpointError(f"{path}: the state of a training, not a model; give the {MODEL_FILE} beside it")
    try:
        header = ModelHeader.model_validate(content)
        recipe = validate_recipe(header.recipe, f"{path}, recipe inside")
        model = _built(path, recipe, header.name)
        model.load_state_dict(weights)
    except (RecipeError, RuntimeError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: does not fit this version of wavedistill: {reason}") from error
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise CheckpointError(f"{path}: holds weights that are not finite ({name}): take an earlier one")
    model.to(device).eval().requires_grad_(False)
    return Checkpoint(header.name, recipe, header.step, header.heard, model)


def _built(path: Path, recipe: Recipe, name: str) -> WaveformModel:
    """The model that a checkpoint's recipe describes; a file brings no code, so its own kinds are imported before."""
    settings = recipe.models.get(name)
    if settings is None:
        raise RecipeError(f"its recipe has no models.{name}")
    if isinstance(settings, OwnModel) and settings.kind.partition(":")[0] not in sys.modules:
        raise CheckpointError(
            f"{path}: its model is of the kind {settings.kind}, which is code of somebody's own: import it before, if "
            "you trust it"
        )
    return build(recipe, name, seed=0)


def set_aside(path: Path) -> Path:
    """Rename a file or folder to the first free name of the form `name.1`, so that nothing in it is lost."""
    number = 1
    while (kept := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return path.rename(kept)


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2)
