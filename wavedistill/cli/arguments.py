"""What commands are given, and what it stands for."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from wavedistill.experiment.folder import Experiment

MOST_THREADS = 1024

RecipePath = Annotated[
    str, typer.Argument(metavar="RECIPE", help="The TOML file that describes the experiment, or a shipped one's name.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. `training.teacher.steps=500`; repeatable."),
]
Checkpoint = Annotated[
    Path | None,
    typer.Argument(
        metavar="[CHECKPOINT]",
        help="The checkpoint.safetensors of a trained model; the one that comes with the package by default.",
    ),
]
Root = Annotated[Path, typer.Option("--exp", metavar="DIR", help="The folder that holds the experiments' folders.")]
Device = Annotated[
    str, typer.Option(metavar="DEVICE", help="`auto` takes a CUDA GPU if there is one; or `cpu`, `cuda`, `cuda:1`.")
]
Threads = Annotated[
    str,
    typer.Option(
        metavar="N",
        help="Threads of the CPU; `auto` takes all cores or one, whichever is faster, and keeps a training's number.",
    ),
]


def also_of(systems: list[str], trainings: list[str]) -> dict[str, Path]:
    """The folders of other systems' clips, by the names that `--also` gives them."""
    from wavedistill.evaluation.verdict import UNTRAINED

    return folders_of("--also", systems, ("recorded", *trainings, *UNTRAINED))


def folders_of(option: str, named: list[str], taken: Sequence[str] = ()) -> dict[str, Path]:
    """The folders that an option names, each once, and none by a name that is taken."""
    found: dict[str, Path] = {}
    for each in named:
        name, _, folder = each.partition("=")
        if not re.fullmatch("[a-z][a-z0-9_]*", name) or not folder:
            raise typer.BadParameter(f"{option} {each}: give NAME=FOLDER, with a name of small letters, digits and _")
        if name in (*taken, *found):
            raise typer.BadParameter(f"{option} {each}: there is a {name} already; give another name")
        found[name] = Path(folder).expanduser()
        if not found[name].is_dir():
            raise typer.BadParameter(f"{option} {each}: {folder} is no folder")
    return found


def known(name: str, names: list[str]) -> str:
    """A name that is one of a recipe's stages."""
    if name not in names:
        raise typer.BadParameter(f"{name}: no stage of this recipe; there are {', '.join(names)}")
    return name


def between(names: list[str], first: str, last: str) -> list[str]:
    """The names of stages from one to another."""
    begin, end = (names.index(known(name, names)) for name in (first, last))
    if begin > end:
        raise typer.BadParameter(f"--from {first} comes after --until {last}; the order is {', '.join(names)}")
    return names[begin : end + 1]


def experiment_of(
    path: str,
    overrides: list[str] | None,
    root: Path,
    device: str,
    threads: str,
    chosen: Callable[[list[str]], list[str]] = list,
) -> "Experiment":
    """The experiment that a command is about; what is wrong in the command is said before anything slow is imported."""
    from wavedistill.recipe.loading import load_recipe

    recipe, number = load_recipe(path, overrides or []), threads_of(threads)
    chosen(["prepare", *recipe.training, "evaluate", "benchmark", "report"])
    from wavedistill.experiment.folder import Experiment
    from wavedistill.tools.engine import launch

    return Experiment(recipe, root / recipe.name, launch(device_of(device)).device, number)


def threads_of(number: str) -> int | None:
    """How many threads `--threads` asks for; None for `auto`."""
    if number == "auto":
        return None
    if not number.isdecimal() or not 1 <= int(number) <= MOST_THREADS:
        raise typer.BadParameter(f"--threads {number}: give auto, or a number from 1 to {MOST_THREADS}")
    return int(number)


def device_of(name: str) -> "torch.device":
    """The device that `--device` names."""
    import torch

    from wavedistill.tools.engine import processes

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(f"--device {name}: not a device; try cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device {name}: not supported; try cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs; try cpu")
    if device.index is not None and processes() > 1:
        raise typer.BadParameter(
            f"--device {name}: of several processes each takes a GPU of its own; try {device.type}"
        )
    return device
