"""The commands."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from wavedistill import __version__
from wavedistill.cli import arguments as given
from wavedistill.cli import delivery
from wavedistill.cli.generate import generate
from wavedistill.cli.zoo import zoo
from wavedistill.tools.errors import RecipeError, UserError


class Commands(TyperGroup):
    """The commands, and, by its name, each training of a recipe."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = super().get_command(ctx, cmd_name)
        words = sys.argv[sys.argv.index(cmd_name) + 1 :] if cmd_name in sys.argv else []
        return found or (typer.main.get_command(_only(cmd_name)) if any(map(_recipe, words)) else None)


app = typer.Typer(
    name="wavedistill",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    help="""Distil a sequential WaveNet teacher into a parallel student, and compare the two.

A recipe (a TOML file) describes one experiment; its stages run in order and leave their files in `exp/<recipe name>/`:
**prepare**, each of its trainings (**teacher**, **student**), **evaluate**, **benchmark**, **report**.

Examples:

- `wavedistill run demo` - everything, from a corpus to a report
- `wavedistill new my.toml` - a recipe for a voice of your own
- `wavedistill run my.toml --from teacher --until student` - the two trainings
- `wavedistill teacher my.toml --set training.teacher.steps=20000` - one training, one setting changed
- `wavedistill generate speech.wav --out out` - speech from a log-mel, by the voice that comes with the package
- `wavedistill generate exp/demo/student/checkpoint.safetensors speech.wav --out out` - by one of your own
""",
)


@app.command()
def run(
    recipe: given.RecipePath,
    first: Annotated[str, typer.Option("--from", metavar="STAGE", help="The first stage to run.")] = "prepare",
    last: Annotated[str, typer.Option("--until", metavar="STAGE", help="The last stage to run.")] = "report",
    overrides: given.Overrides = None,
    root: given.Root = Path("exp"),
    device: given.Device = "auto",
    threads: given.Threads = "auto",
) -> None:
    """Run the stages of a recipe in order; those whose inputs and settings have not changed do nothing.

    To run a stage again all the same, delete the file it wrote.
    """
    _run(lambda names: given.between(names, first, last), recipe, overrides, root, device, threads)


@app.command()
def new(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The recipe to write, my_voice.toml for instance.")],
) -> None:
    """Write a recipe for a voice of your own, with a word on every key."""
    from wavedistill.recipe.loading import shipped

    if path.suffix != ".toml":
        raise typer.BadParameter(f"{path}: a recipe's name ends in .toml")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write((shipped() / "own_voice.toml").read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise UserError(f"{path}: is there already; give another name, or remove it") from error
    typer.echo(f"{path}: say in [corpus] where your recordings are; then: wavedistill run {path}")


def _single(name: str) -> Callable[..., None]:
    def command(
        recipe: given.RecipePath,
        overrides: given.Overrides = None,
        root: given.Root = Path("exp"),
        device: given.Device = "auto",
        threads: given.Threads = "auto",
    ) -> None:
        _run(lambda every: [given.known(name, every)], recipe, overrides, root, device, threads)

    return command


def _recipe(word: str) -> bool:
    """Whether a word is a recipe, beside which another may be the name of one of its trainings."""
    from wavedistill.recipe.loading import find

    try:
        return find(word).is_file()
    except RecipeError:
        return False


def _only(name: str) -> typer.Typer:
    """A command for one training, whose name only its recipe knows."""
    single = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
    single.command(name, help=f"The training of a recipe that is called {name}.")(_single(name))
    return single


SINGLE = {
    "prepare": "Turn a corpus into mono, trimmed, level-normalised utterances with train, valid and test splits.",
    "teacher": "Train the model of this name; so does the name of any other training of a recipe.",
    "student": "Train the model of this name, of what its recipe says.",
    "report": "Show the experiment on one self-contained page: sound, spectrograms, losses, speed and scores.",
}
for _name, _help in SINGLE.items():
    app.command(_name, help=_help, rich_help_panel="Single stages")(_single(_name))


@app.command(rich_help_panel="Single stages")
def evaluate(
    recipe: given.RecipePath,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="Score another system's clips, too: wav files named and cut as in `samples/recorded`; repeatable.",
        ),
    ] = None,
    overrides: given.Overrides = None,
    root: given.Root = Path("exp"),
    device: given.Device = "auto",
    threads: given.Threads = "auto",
) -> None:
    """Measure densities, and score copy-synthesis of the test split."""
    experiment = given.experiment_of(recipe, overrides, root, device, threads)
    names = list(experiment.recipe.training)
    others = given.also_of(also or [], names)
    from wavedistill.experiment.stage import run_stage
    from wavedistill.stages.evaluate import stage
    from wavedistill.tools.engine import launch

    launch(experiment.device).print(run_stage(stage(names, others), experiment))  # the first of several processes


@app.command(rich_help_panel="Single stages")
def benchmark(
    recipe: given.RecipePath,
    overrides: given.Overrides = None,
    root: given.Root = Path("exp"),
    device: given.Device = "auto",
    threads: given.Threads = "auto",
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Durations up to a minute, batches, and students of several sizes, in a table beside."
        ),
    ] = False,
    train: Annotated[bool, typer.Option("--train", help="Steps of the trainings, in a table beside.")] = False,
) -> None:
    """Time the samplers of a recipe's models: naive, cached, compiled or graphed; parallel, streamed."""
    experiment = given.experiment_of(recipe, overrides, root, device, threads)
    from wavedistill.experiment.stage import run_stage
    from wavedistill.stages import benchmark as benchmarks

    names = list(experiment.recipe.training)
    wanted = [stage for stage, asked in ((benchmarks.full, full), (benchmarks.train, train)) if asked]
    for stage in wanted or [benchmarks.stage]:
        typer.echo(run_stage(stage(names), experiment))


app.command()(generate)


@app.command()
def release(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="The checkpoint.safetensors of a student.")],
    on: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=FOLDER", help="Recordings of a voice that it never heard, to score it on; repeatable."
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The checkpoint to write; `CARD.md` goes beside it.")
    ] = Path("voice.safetensors"),
) -> None:
    """Write a student for others: its weights at half precision, and a card with its scores on strangers' voices.

    Example: `wavedistill release exp/voices/student/checkpoint.safetensors --on female=ann/ --on male=bob/`
    """
    speakers = given.folders_of("--on", on)
    from wavedistill.vocoder.release import release as release_voice

    typer.echo(release_voice(checkpoint, out, speakers))


@app.command()
def info(
    checkpoint: given.Checkpoint = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="As JSON, with the mean and deviation of each mel band of the training.")
    ] = False,
) -> None:
    """Show what log-mels a checkpoint expects, and what it gives: rate, hop, bands, scale, level, size, licence."""
    from wavedistill.vocoder.contract import contract, in_words
    from wavedistill.vocoder.vocoder import SHIPPED

    figures = contract(checkpoint or SHIPPED)
    typer.echo(json.dumps(figures, indent=1) if as_json else in_words(figures))


app.command()(delivery.export)
app.command()(delivery.doctor)
app.command()(zoo)


def _run(
    chosen: Callable[[list[str]], list[str]],
    recipe: str,
    overrides: list[str] | None,
    root: Path,
    device: str,
    threads: str,
) -> None:
    """Run some of a recipe's stages, chosen from the names of all."""
    experiment = given.experiment_of(recipe, overrides, root, device, threads, chosen)
    from wavedistill.experiment.stage import run_stage
    from wavedistill.experiment.starts import start_of
    from wavedistill.stages import stages_of
    from wavedistill.tools.engine import launch

    stages = stages_of(experiment.recipe)
    wanted = chosen(list(stages))
    for name in filter(experiment.recipe.training.__contains__, wanted):
        start_of(experiment, name)  # a file that does not fit is named before hours of work, not after
    for name in wanted:
        launch(experiment.device).print(run_stage(stages[name], experiment))  # the first of several processes


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"wavedistill {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """Options of every command."""
