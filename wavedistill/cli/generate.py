"""The command that draws waveforms from a checkpoint."""

import os
from pathlib import Path
from typing import Annotated

import typer

from wavedistill.cli import arguments as given
from wavedistill.tools.errors import AudioError, UserError


def generate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="The checkpoint.safetensors of a trained model.")
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
    passes: Annotated[
        int | None,
        typer.Option(min=0, max=64, help="Steps of mel consistency; those of the checkpoint's recipe by default."),
    ] = None,
    fused: Annotated[
        bool, typer.Option("--fused", help="Compile a parallel model first, half a minute: faster on most CPUs.")
    ] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="A parallel model's networks in bfloat16, for GPUs that are faster at it.")
    ] = False,
    device: given.Device = "auto",
    threads: given.Threads = "auto",
) -> None:
    """Draw waveforms from a checkpoint: a teacher sample by sample, a student block by block.

    The output is 16-bit wav of exactly frames x hop samples. Audio may have any rate, format and number of channels;
    its speech is brought to the level of the training data, and the output back. Inputs that cannot be used are named
    at the end.

    Example: `wavedistill generate exp/demo/student/checkpoint.safetensors *.wav mel.npy --out out`
    """
    from wavedistill.networks.threads import settle
    from wavedistill.speech import audio
    from wavedistill.tools.engine import processes
    from wavedistill.tools.files import named, shown
    from wavedistill.tools.progress import note
    from wavedistill.vocoder.vocoder import load

    if processes() > 1:
        raise UserError("generate: run it without torchrun: one process does it alone")
    vocoder, wanted_threads = load(checkpoint, given.device_of(device), passes), given.threads_of(threads)
    for name, wanted in (("--fused", fused), ("--bf16", bf16)):
        if wanted and not vocoder.model.draws_in_parallel:
            raise typer.BadParameter(f"{name}: is for parallel models, and {checkpoint} draws sample by sample")
    outputs = [out / named(path.stem, ".wav") for path in inputs]
    for path, target in zip(inputs, outputs, strict=True):
        if outputs.count(target) > 1:
            raise UserError(
                f"{shown(path)}: another input of the same name would also become {shown(target)}; run them one by one"
            )
        if os.path.realpath(target) == os.path.realpath(path):
            raise UserError(f"{shown(path)}: --out {shown(out)} would overwrite this input; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    settle(wanted_threads, vocoder.model.networks[0])
    if fused:
        note("the networks are compiled first, for half a minute or so")
    failures = []
    for path, target in zip(inputs, outputs, strict=True):
        try:
            wave, clipped = vocoder.of_file(path, seed, temperature, fused=fused, bf16=bf16)
        except AudioError as error:
            failures.append(str(error))
            continue
        audio.write(target, wave, vocoder.sample_rate)
        typer.echo(f"{shown(target)}: {len(wave) / vocoder.sample_rate:.2f} s")
        if clipped:
            note(f"{shown(target)}: {clipped} samples were louder than 16 bits hold and are clipped")
    if failures and len(inputs) > 1:
        failures.insert(0, f"{len(failures)} of {len(inputs)} inputs could not be synthesised:")
    if failures:
        raise AudioError("\n".join(failures))
