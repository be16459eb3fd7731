"""Commands for taking a student elsewhere, and for seeing whether an installation works."""

from pathlib import Path
from typing import Annotated

import typer

from wavedistill.cli import arguments as given
from wavedistill.tools.errors import UserError


def export(
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="`student.onnx` for ONNX runtimes, or `student.pt2` for torch alone.")
    ],
    checkpoint: given.Checkpoint = None,
    passes: Annotated[
        int | None,
        typer.Option(min=0, max=64, help="Steps of mel consistency; those of the checkpoint's recipe by default."),
    ] = None,
) -> None:
    """Write a student as one program, for runtimes that know nothing of this package; a minute's work.

    It takes a log-mel (1, n_mels, frames) and noise (1, frames x hop), and gives the waveform (1, frames x hop).

    Example: `wavedistill export exp/demo/student/checkpoint.safetensors --out student.onnx`
    """
    from wavedistill.exporting.programs import export as write
    from wavedistill.tools.files import shown
    from wavedistill.vocoder.vocoder import SHIPPED, load

    write(load(checkpoint or SHIPPED, passes=passes), out)
    typer.echo(f"{shown(out)}: {out.stat().st_size / 1e6:.1f} MB")


def doctor(device: given.Device = "auto") -> None:
    """See whether this installation works, in half a minute: one line a check; 1 is the exit code where one fails."""
    from wavedistill.checking.doctor import examine

    failed = 0
    for finding in examine(given.device_of(device)):
        typer.echo(str(finding))
        failed += finding.state == "FAIL"
    if failed:
        raise UserError(f"{failed} of the checks above failed")
    typer.echo("all is well")
