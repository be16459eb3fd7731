"""Networks that torch compiles, and the compiler that it needs on a CPU."""

import logging
import os
import shutil
import sys

from torch import nn

from wavedistill.networks.network import Network
from wavedistill.tools.errors import RecipeError


def compiler() -> str | None:
    """The C++ compiler that torch.compile uses on a CPU, None where there is none."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return name if shutil.which(name) else None


def _is_about_us(record: logging.LogRecord) -> bool:
    """Whether a warning is of use to somebody without a GPU, as that of a CUDA without one is not."""
    return "No CUDA runtime is found" not in record.getMessage()


def compile_networks(model: nn.Module) -> None:
    """Compile the conditioners of a model in place, for training; its weights and their names stay the same.

    Raises:
        RecipeError: if the model is on the CPU, and there is no compiler.
    """
    if next(model.parameters()).device.type == "cpu":
        if compiler() is None:
            raise RecipeError(
                "training.compile = true needs a C++ compiler, g++ or the one that CXX names: install one, "
                "or do without"
            )
        logging.getLogger("torch.utils.cpp_extension").addFilter(_is_about_us)
    for module in model.modules():
        if isinstance(module, Network):
            module.compile(dynamic=False)
