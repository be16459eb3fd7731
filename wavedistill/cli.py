"""The command line `wavedistill`."""

import os
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from wavedistill import __version__
from wavedistill.corpus import recordings
from wavedistill.corpus.data import random_stream
from wavedistill.experiment.experiment import Experiment, run_stage
from wavedistill.models.checkpoint import Checkpoint, load_model
from wavedistill.models.foreign import examine, examine_f0
from wavedistill.networks.threads import settle
from wavedistill.recipe.config import load_recipe
from wavedistill.sampling.sampling import sample, slices, stream
from wavedistill.speech import audio
from wavedistill.stages import STAGES
from wavedistill.stages import benchmark as benchmarks
from wavedistill.tools.engine import launch, processes
from wavedistill.tools.errors import AudioError, RecipeError, UserError
from wavedistill.tools.files import named, shown
from wavedistill.tools.memory import keep_freed_memory
from wavedistill.tools.progress import note

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
TRACKED = 6
"""Pieces of a recording, of ten seconds for instance, whose F0 is compared with that of the training."""
OTHER_ARRAYS = {
    ".npz": "numpy.save('m.npy', numpy.load('m.npz')['its name'])",
    **dict.fromkeys((".pt", ".pth"), "numpy.save('m.npy', torch.load('m.pt').numpy())"),
}
"""What log-mels come in, too, and how to make a `.npy` file of it."""
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
        bool, typer.Option("--fused", help="Compile a student first, half a minute: faster on most CPUs.")
    ] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="A student's networks in bfloat16, for GPUs that are faster at it.")
    ] = False,
    device: Device = "auto",
    threads: Threads = "auto",
) -> None:
    """Draw waveforms from a checkpoint: a teacher sample by sample, a student block by block.

    The output is 16-bit wav of exactly frames x hop samples. Audio may have any rate, format and number of channels;
    its speech is brought to the level of the training data, and the output back. Inputs that cannot be used are named
    at the end.

    Example: `wavedistill generate exp/demo/student/checkpoint.safetensors *.wav mel.npy --out out`
    """
    _refuse_torchrun("generate")
    loaded, wanted_threads = load_model(checkpoint, _device(device)), _threads(threads)
    for name, wanted in (("--fused", fused), ("--bf16", bf16)):
        if wanted and loaded.kind != "student":
            raise typer.BadParameter(f"{name}: is for students, and {checkpoint} is a {loaded.kind}")
    outputs = [out / named(path.stem, ".wav") for path in inputs]
    for path, target in zip(inputs, outputs, strict=True):
        if outputs.count(target) > 1:
            raise UserError(
                f"{shown(path)}: another input of the same name would also become {shown(target)}; run them one by one"
            )
        if os.path.realpath(target) == os.path.realpath(path):
            raise UserError(f"{shown(path)}: --out {shown(out)} would overwrite this input; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    settle(wanted_threads, loaded.model.networks[0])
    if fused:
        note("the networks are compiled first, for half a minute or so")
    failures = []
    for path, target in zip(inputs, outputs, strict=True):
        try:
            wave, clipped = _synthesise(loaded, path, seed, temperature, fused=fused, bf16=bf16)
        except AudioError as error:
            failures.append(str(error))
            continue
        audio.write(target, wave, loaded.recipe.audio.sample_rate)
        typer.echo(f"{shown(target)}: {len(wave) / loaded.recipe.audio.sample_rate:.2f} s")
        if clipped:
            note(f"{shown(target)}: {clipped} samples were louder than 16 bits hold and are clipped")
    if failures and len(inputs) > 1:
        failures.insert(0, f"{len(failures)} of {len(inputs)} inputs could not be synthesised:")
    if failures:
        raise AudioError("\n".join(failures))


def _synthesise(
    loaded: Checkpoint, path: Path, seed: int, temperature: float, *, fused: bool, bf16: bool
) -> tuple[Tensor, int]:
    """The waveform (T,) for one input file, and how many of its samples clip.

    Raises:
        AudioError: if the file holds nothing to synthesise, or what is drawn from it is no sound.
    """
    settings, margin, suffix = loaded.recipe.audio, loaded.model.margin, path.suffix.lower()
    if suffix in OTHER_ARRAYS:
        raise AudioError(f"{shown(path)}: log-mels are read from .npy files; convert it: {OTHER_ARRAYS[suffix]}")
    if suffix == ".npy":
        given = audio.read_log_mel(path, settings.n_mels)
        said, gain, frames = examine(path, given, loaded.heard), 1.0, given.shape[1]
        mel = iter([audio.pad_frames(given.clamp_min(audio.LOG_MEL_FLOOR)[None], margin)])
    else:
        samples = audio.pad_to_hops(recordings.read(path, settings.sample_rate), settings.hop_length)
        pieces, gain = recordings.speech(samples, loaded.recipe)
        speech = audio.pad_to_hops(torch.cat(pieces[:TRACKED]), settings.hop_length)
        said, frames = examine_f0(speech, settings, loaded.heard), len(samples) // settings.hop_length
        mel = audio.LogMel(settings).of_blocks(samples.mul_(gain)[None], margin)
    if said:
        note(f"{shown(path)}: {said}")
    model, device = loaded.model, next(loaded.model.parameters()).device
    mel = (piece.to(device) for piece in mel)
    length = frames * settings.hop_length
    noise = model.base.noise((1, length), random_stream(seed)).to(device).mul_(temperature)
    wave, end, clipped = torch.empty(length), 0, 0
    for block in _drawn(loaded, mel, noise, path.name, fused=fused, bf16=bf16):
        block = block[0].cpu() / gain
        if not block.isfinite().all():
            raise AudioError(
                f"{shown(path)}: the {loaded.kind} drew values that are not finite; try a lower --temperature"
            )
        clipped += int((block.abs() > 1).sum())
        wave[end : end + len(block)], end = block, end + len(block)
    if clipped > MOST_CLIPPED * length:
        raise AudioError(
            f"{shown(path)}: {clipped / length:.0%} of what is drawn from it passes full scale, so nothing is written: "
            "a log-mel has to be the natural logarithm of amplitudes, of sound at the level of the training"
        )
    return wave, clipped


def _drawn(
    loaded: Checkpoint, mel: Iterator[Tensor], noise: Tensor, label: str, *, fused: bool, bf16: bool
) -> Iterator[Tensor]:
    """Blocks (1, n) of the waveform that a model draws from pieces of a log-mel, with all noise (1, T)."""
    if loaded.kind == "student":
        with torch.autocast(noise.device.type, torch.bfloat16, enabled=bf16):
            yield from stream(loaded.model, mel, slices(noise), compiled=fused)
    else:
        with torch.inference_mode():
            yield sample(loaded.model(torch.cat(list(mel), -1)), noise, label=label)


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
