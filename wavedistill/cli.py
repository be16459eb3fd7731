"""The command line `wavedistill`."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from wavedistill import __version__, audio
from wavedistill.checkpoint import Checkpoint, load_model
from wavedistill.config import load_recipe
from wavedistill.data import random_stream
from wavedistill.engine import launch, processes
from wavedistill.errors import RecipeError, UserError
from wavedistill.experiment import Experiment, run_stage
from wavedistill.foreign import examine, examine_f0
from wavedistill.memory import keep_freed_memory
from wavedistill.progress import note
from wavedistill.sampling import sample, slices, stream
from wavedistill.stages import STAGES
from wavedistill.stages import benchmark as benchmarks
from wavedistill.threads import settle

app = typer.Typer(
    name="wavedistill",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    help="""Distil a sequential WaveNet teacher into a parallel student, and compare the two.

A recipe (a TOML file) describes one experiment; its stages run in order and leave their files in `exp/<recipe name>/`:
**prepare**, **teacher**, **student**, **evaluate**, **benchmark**, **report**.

Examples:

- `wavedistill run recipes/demo.toml` - everything, from a corpus to a report
- `wavedistill run my.toml --from teacher --until student` - the two trainings
- `wavedistill teacher my.toml --set teacher.training.steps=20000` - one stage, one setting changed
- `wavedistill generate exp/demo/student/checkpoint.safetensors speech.wav --out out` - a waveform from a checkpoint
""",
)

MOST_CLIPPED = 0.01
"""Share of the samples drawn beyond which they are no speech."""
MOST_THREADS = 1024
StageName = StrEnum("StageName", {name: name for name in STAGES})  # type: ignore[misc]
FIRST, *_, LAST = StageName
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The TOML file that describes the experiment.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. `teacher.training.steps=500`; repeatable."),
]
Root = Annotated[Path, typer.Option("--exp", metavar="DIR", help="The folder that holds the experiments' folders.")]
Device = Annotated[
    str, typer.Option(metavar="DEVICE", help="`auto` takes a CUDA GPU if there is one; or `cpu`, `cuda`, `cuda:1`.")
]
Threads = Annotated[
    str,
    typer.Option(
        metavar="N", help="Threads of the CPU; `auto` measures which number is faster, and keeps a training's."
    ),
]


@app.command()
def run(
    recipe: RecipePath,
    first: Annotated[StageName, typer.Option("--from", help="The first stage to run.")] = FIRST,
    last: Annotated[StageName, typer.Option("--until", help="The last stage to run.")] = LAST,
    overrides: Overrides = None,
    root: Root = Path("exp"),
    device: Device = "auto",
    threads: Threads = "auto",
) -> None:
    """Run the stages of a recipe in order; those whose inputs and settings have not changed do nothing.

    To run a stage again all the same, delete the file it wrote.
    """
    names = list(STAGES)
    chosen = names[names.index(first) : names.index(last) + 1]
    if not chosen:
        raise typer.BadParameter(f"--from {first} comes after --until {last}; the order is {', '.join(names)}")
    _run(chosen, recipe, overrides, root, device, threads)


def _add_stage(name: str) -> None:
    def command(
        recipe: RecipePath,
        overrides: Overrides = None,
        root: Root = Path("exp"),
        device: Device = "auto",
        threads: Threads = "auto",
    ) -> None:
        _run([name], recipe, overrides, root, device, threads)

    app.command(name, help=STAGES[name].summary, rich_help_panel="Single stages")(command)


for _name in STAGES:
    if _name != "benchmark":
        _add_stage(_name)


@app.command(help=STAGES["benchmark"].summary, rich_help_panel="Single stages")
def benchmark(
    recipe: RecipePath,
    overrides: Overrides = None,
    root: Root = Path("exp"),
    device: Device = "auto",
    threads: Threads = "auto",
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Durations up to a minute, batches, and students of several sizes, in a table beside."
        ),
    ] = False,
    train: Annotated[bool, typer.Option("--train", help="Steps of both trainings, in a table beside.")] = False,
) -> None:
    """One stage, and two more for tables that take longer."""
    experiment = _experiment(recipe, overrides, root, device, threads)
    wanted = [stage for stage, asked in ((benchmarks.full, full), (benchmarks.train, train)) if asked]
    for stage in wanted or [benchmarks.stage]:
        typer.echo(run_stage(stage, experiment))


@app.command()
def generate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="The checkpoint.safetensors of a teacher or a student.")
    ],
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...", help="Audio to synthesise anew, or log-mels as `.npy` of shape (n_mels, frames)."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the wav files go, named after the inputs.")],
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same noise.")] = 0,
    temperature: Annotated[
        float, typer.Option(min=0, help="Scale of the noise; below 1 is cleaner and less varied.")
    ] = 1.0,
    fused: Annotated[
        bool, typer.Option("--fused", help="Compile a student first: half as fast again on a CPU, after half a minute.")
    ] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="A student's networks in bfloat16, for GPUs that are faster at it.")
    ] = False,
    device: Device = "auto",
    threads: Threads = "auto",
) -> None:
    """Draw waveforms from a checkpoint: a teacher sample by sample, a student block by block.

    The output is 16-bit wav of exactly frames x hop samples. Audio may have any rate, format and number of channels; it
    is brought to the level of the training data, measured over the whole file, and the output back.

    Example: `wavedistill generate exp/demo/student/checkpoint.safetensors *.wav mel.npy --out out`
    """
    _refuse_torchrun("generate")
    loaded, wanted_threads = load_model(checkpoint, _device(device)), _threads(threads)
    for name, wanted in (("--fused", fused), ("--bf16", bf16)):
        if wanted and loaded.kind != "student":
            raise typer.BadParameter(f"{name}: is for students, and {checkpoint} is a {loaded.kind}")
    outputs = [out / f"{path.stem}.wav" for path in inputs]
    for path, target in zip(inputs, outputs, strict=True):
        if outputs.count(target) > 1:
            raise UserError(f"{path}: another input of the same name would also become {target}; run them one by one")
        if target.resolve() == path.resolve():
            raise UserError(f"{path}: --out {out} would overwrite this input; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    settle(wanted_threads, loaded.model.networks[0])
    for path, target in zip(inputs, outputs, strict=True):
        wave, clipped = _synthesise(loaded, path, seed, temperature, fused=fused, bf16=bf16)
        audio.write(target, wave, loaded.recipe.audio.sample_rate)
        typer.echo(f"{target}: {len(wave) / loaded.recipe.audio.sample_rate:.2f} s")
        if clipped:
            note(f"{target}: {clipped} samples were louder than 16 bits hold and are clipped")


def _synthesise(
    loaded: Checkpoint, path: Path, seed: int, temperature: float, *, fused: bool, bf16: bool
) -> tuple[Tensor, int]:
    """The waveform (T,) for one input file, and how many of its samples clip."""
    settings, margin = loaded.recipe.audio, loaded.model.margin
    if path.suffix.lower() == ".npy":
        given = audio.read_log_mel(path, settings.n_mels)
        said, gain = examine(path, given, loaded.heard), 1.0
        mel = audio.pad_frames(given.clamp_min(audio.LOG_MEL_FLOOR)[None], margin)
    else:
        samples = audio.pad_to_hops(audio.read(path, settings.sample_rate), settings.hop_length)
        said, gain = examine_f0(samples, settings, loaded.heard), audio.level_gain(samples, settings.level_db)
        mel = audio.LogMel(settings).of_file(samples[None] * gain, margin)
    if said:
        note(f"{path}: {said}")
    model = loaded.model
    mel = mel.to(next(model.parameters()).device)
    length = (mel.shape[-1] - 2 * margin) * settings.hop_length
    noise = model.base.noise((1, length), random_stream(seed)).to(mel) * temperature
    if loaded.kind == "student":
        with torch.autocast(mel.device.type, torch.bfloat16, enabled=bf16):
            wave = torch.cat([block[0].cpu() for block in stream(model, [mel], slices(noise), compiled=fused)])
    else:
        with torch.inference_mode():
            wave = sample(model(mel), noise, label=path.name)[0].cpu()
    wave = wave / gain
    if not wave.isfinite().all():
        raise UserError(f"{path}: the {loaded.kind} drew values that are not finite; try a lower --temperature")
    clipped = int((wave.abs() > 1).sum())
    if clipped > MOST_CLIPPED * len(wave):
        raise UserError(
            f"{path}: {clipped / len(wave):.0%} of the samples drawn from it pass full scale, so nothing is written: a "
            "log-mel has to be the natural logarithm of amplitudes, of sound at the level of the training"
        )
    return wave, clipped


def _run(names: list[str], path: Path, overrides: list[str] | None, root: Path, device: str, threads: str) -> None:
    experiment = _experiment(path, overrides, root, device, threads)
    for name in names:
        launch(experiment.device).print(run_stage(STAGES[name], experiment))  # the first of several processes


def _experiment(path: Path, overrides: list[str] | None, root: Path, device: str, threads: str) -> Experiment:
    recipe = load_recipe(path, overrides or [])
    return Experiment(recipe, root / recipe.name, launch(_device(device)).device, _threads(threads))


def _threads(number: str) -> int | None:
    if number == "auto":
        return None
    if not number.isdecimal() or not 1 <= int(number) <= MOST_THREADS:
        raise typer.BadParameter(f"--threads {number}: give auto, or a number from 1 to {MOST_THREADS}")
    return int(number)


def _device(name: str) -> torch.device:
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


def _refuse_torchrun(command: str) -> None:
    if processes() > 1:
        raise UserError(f"{command}: run it without torchrun: one process does it alone")


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


def main() -> None:
    """Entry point: a user's mistake ends in one clear message, 2 for usage and recipes, 1 for everything else."""
    keep_freed_memory()
    try:
        app()
    except RecipeError as error:
        sys.exit(_fail(error, 2))
    except (UserError, OSError) as error:  # a disk that is full or not ours to write is no fault of the program
        sys.exit(_fail(error, 1))


def _fail(error: Exception, code: int) -> int:
    typer.echo(f"wavedistill: {error}", err=True)
    return code
