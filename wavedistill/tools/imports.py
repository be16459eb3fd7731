"""Code of the user's own, which a recipe names by an import path "module:name"."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from wavedistill.tools.errors import RecipeError


def imported(path: str, key: str) -> Any:
    """What an import path stands for.

    Args:
        path: "module:name".
        key: of the recipe, for messages.

    Raises:
        RecipeError: if nothing can be imported from there.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise _not_importable(path, key, str(error)) from error


def source_of(path: str, key: str) -> Path:
    """The file of the module at an import path, which is not imported for that; arguments and errors as `imported`."""
    module, _, _ = path.partition(":")
    try:
        found = importlib.util.find_spec(module)
    except ImportError as error:
        raise _not_importable(path, key, str(error)) from error
    if found is None or found.origin is None:
        raise _not_importable(path, key, f"No module named '{module}'")
    return Path(found.origin)


def _not_importable(path: str, key: str, why: str) -> RecipeError:
    return RecipeError(f'{key} = "{path}": {why}; its module must be importable, for instance with PYTHONPATH=.')
