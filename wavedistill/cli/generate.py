"""The command that draws waveforms from a checkpoint: of files into a folder, or through a pipe."""

import errno
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wavedistill.cli import arguments as given
from wavedistill.tools.errors import AudioError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from wavedistill.vocoder.jobs import Job
    from wavedistill.vocoder.vocoder import Vocoder

PIPE = "-"
"""Standard input, or standard output."""
LISTENED_SECONDS, SILENCE_DB, LEVEL_DB = 3, -60, 10
"""Of a pipe's sound above silence, whose level is measured, and by how much it may differ from the training's."""
MelKind = Literal["ln", "log10", "db", "unit", "symmetric"]


def generate(
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="DIR", help="Where the wav files go; `-` is standard output.")
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CHECKPOINT] INPUT...",
            help="The checkpoint.safetensors of a trained model, or nothing for the one that comes with the package; "
            "then what it is to speak: audio to synthesise anew, log-mels (n_mels, frames) as `.npy`, `.npz` or "
            "`.pt`, folders of these, patterns such as `'a/*.wav'`, or `-` for a wav stream from standard input.",
        ),
    ] = None,
    listed: Annotated[
        Path | None, typer.Option("--list", metavar="FILE", help="A text file with more inputs, one a line.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files in DIR that `generate` has not written.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same noise.")] = 0,
    temperature: Annotated[
        float, typer.Option(min=0, help="Scale of the noise; below 1 is cleaner and less varied.")
    ] = 1.0,
    passes: Annotated[
        int | None,
        typer.Option(min=0, max=64, help="Steps of mel consistency; those of the checkpoint's recipe by default."),
    ] = None,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="A parallel model's networks in bfloat16, for GPUs that are faster at it.")
    ] = False,
    mel_format: Annotated[
        MelKind | None,
        typer.Option(
            help="What log-mels are: natural or decimal logarithms of amplitudes, decibels, or decibels normalised to "
            "[0, 1] or [-4, 4]; `ln` by default, and then others are refused."
        ),
    ] = None,
    mel_ref_db: Annotated[
        float | None,
        typer.Option(metavar="DB", help="What was taken off decibels; 0 by default, and 20 if they are normalised."),
    ] = None,
    mel_stats: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="`.npz` or `.npy` with the mean and scale that log-mels were normalised by."),
    ] = None,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="For `-`: 16-bit little-endian mono samples at the model's rate, without a wav header."
        ),
    ] = False,
    gain_db: Annotated[
        float,
        typer.Option(
            min=-60, max=60, help="For `-` as input: dB by which it is brought to the level of the training, and back."
        ),
    ] = 0.0,
    device: given.Device = "auto",
    threads: given.Threads = "auto",
) -> None:
    """Draw waveforms for recordings or log-mels, by the voice that comes with the package or one of your own.

    A student draws block by block, a teacher sample by sample.

    The output is 16-bit wav of exactly frames x hop samples, named after the input. Audio may have any rate, format and
    number of channels; its speech is brought to the level of the training data, and the output back. All inputs are
    looked at before the first is drawn. What was made before, of the same inputs with the same settings, is not made
    again.

    With `-` as INPUT, sound is drawn while it comes, a third of a second behind: nobody can measure its level, so it is
    taken as it is, or `--gain-db` louder.

    Examples:

    - `wavedistill generate speech.wav -o out`
    - `wavedistill generate exp/demo/student/checkpoint.safetensors recordings mel.npy -o out`
    - `arecord -f S16_LE -r 16000 | wavedistill generate - -o - | aplay`
    """
    from wavedistill import __version__
    from wavedistill.speech import audio
    from wavedistill.speech.mels import mel_format as format_of
    from wavedistill.tools.engine import processes
    from wavedistill.tools.files import fingerprint
    from wavedistill.vocoder import jobs
    from wavedistill.vocoder.vocoder import SHIPPED, load

    if processes() > 1:
        raise UserError("generate: run it without torchrun: one process does it alone")
    words = list(inputs or [])
    checkpoint = Path(words.pop(0)) if words and words[0].endswith(SHIPPED.suffix) else SHIPPED
    words += jobs.words_in(listed) if listed else []
    if not words:
        raise typer.BadParameter("give an INPUT, or --list with a file that names some")
    piped = PIPE in (*words, out)
    if piped and len(words) > 1:
        raise typer.BadParameter(f"{PIPE}: standard input or output is for one INPUT alone, and there are {len(words)}")
    if words[0] == PIPE != out:
        raise typer.BadParameter(f"INPUT {PIPE}: goes to standard output: give -o {PIPE}, and > FILE to keep it")
    if out == PIPE and sys.stdout.isatty():
        raise typer.BadParameter(f"--out {PIPE}: standard output is a terminal; add | PROGRAM, or > FILE")
    for name, wanted, needs in (("--raw", raw, piped), ("--gain-db", gain_db != 0, words[0] == PIPE)):
        if wanted and not needs:
            raise typer.BadParameter(f"{name}: is for {PIPE}, standard input or output")
    vocoder, wanted_threads = load(checkpoint, given.device_of(device), passes), given.threads_of(threads)
    for name, wanted in (("--bf16", bf16), (f"INPUT {PIPE}", words[0] == PIPE)):
        if wanted and not vocoder.model.draws_in_parallel:
            raise typer.BadParameter(f"{name}: is for parallel models, and {checkpoint} draws sample by sample")
        if wanted and name != "--bf16" and not vocoder.model.streams:
            raise typer.BadParameter(f"{name}: is for models that draw block by block, and {checkpoint} draws at once")
    if mel_ref_db is not None and mel_format in (None, "ln", "log10"):
        raise typer.BadParameter("--mel-ref-db: goes with --mel-format db, unit or symmetric")
    form = format_of(mel_format or "ln", mel_ref_db, mel_stats) if mel_format or mel_stats else None
    how: dict[str, Any] = {"seed": seed, "temperature": temperature, "bf16": bf16}
    begin = partial(_begin, vocoder, wanted_threads, bf16=bf16, piped=words[0] == PIPE)
    if words[0] == PIPE:
        begin()
        _from_pipe(vocoder, how, 10 ** (gain_db / 20), raw=raw)
    elif out == PIPE:
        source = Path(words[0])
        vocoder.check(source, form)
        begin()
        wave, _ = vocoder.of_file(source, form=form, **how)
        sys.stdout.buffer.write(audio.to_pcm16(wave).tobytes() if raw else audio.encoded(wave, vocoder.sample_rate))
    else:
        about = [__version__, how, vocoder.consistency.passes, mel_format, mel_ref_db]
        files = [checkpoint, *([mel_stats] if mel_stats else [])]
        found = jobs.found(words, Path(out))
        if said := jobs.faults(found, partial(vocoder.check, form=form), overwrite=overwrite):
            raise AudioError(
                _counted(said, f"nothing was drawn, because of {len(said)} faults in {len(found)} inputs:")
            )
        _into_folder(vocoder, found, partial(vocoder.of_file, form=form, **how), fingerprint(about, files), begin)


def _into_folder(
    vocoder: "Vocoder",
    wanted: list["Job"],
    draw: Callable[[Path], tuple["Tensor", int]],
    settings: str,
    begin: Callable[[], None],
) -> None:
    """Draw files from files, but those that were made before of the same input and settings; go on after a bad one."""
    from wavedistill.speech import audio
    from wavedistill.tools.files import fingerprint, shown
    from wavedistill.tools.progress import note
    from wavedistill.vocoder import jobs

    for folder in dict.fromkeys(target.parent for _, target in wanted):
        jobs.make_room(folder)
    begun, failures = False, []
    for source, target in wanted:
        comment = jobs.OURS + fingerprint(settings, [source])
        if audio.comment_of(target) == comment:
            typer.echo(f"{shown(target)}: unchanged")
            continue
        if not begun:
            begin()
            begun = True
        try:
            wave, clipped = draw(source)
        except AudioError as error:
            failures.append(str(error))
            continue
        try:
            audio.write(target, wave, vocoder.sample_rate, comment)
        except OSError as error:
            raise UserError(
                f"{shown(target)}: cannot be written: {(error.strerror or str(error)).lower()}; make room or give "
                "another --out, and run the same command again: what was written before is not made again"
            ) from error
        typer.echo(f"{shown(target)}: {len(wave) / vocoder.sample_rate:.2f} s")
        if clipped:
            note(f"{shown(target)}: {clipped} samples were louder than 16 bits hold and are clipped")
    if failures:
        raise AudioError(_counted(failures, f"{len(failures)} of {len(wanted)} inputs could not be synthesised:"))


def _counted(faults: list[str], count: str) -> str:
    """Faults, under a line that counts them where there are several."""
    return "\n".join([count, *faults] if len(faults) > 1 else faults)


def _from_pipe(vocoder: "Vocoder", how: dict[str, Any], gain: float, *, raw: bool) -> None:
    """Draw from standard input to standard output, as it comes."""
    from wavedistill.corpus import pipes
    from wavedistill.tools.progress import note

    rate = vocoder.sample_rate
    sound = pipes.read_raw(sys.stdin.buffer, rate) if raw else pipes.read_wav(sys.stdin.fileno(), rate)
    note(f"drawing from standard input, {vocoder.latency / rate:.2f} s behind it")
    heard = _level_told(sound, rate, vocoder.recipe.audio.level_db, gain)
    try:
        length = pipes.write(sys.stdout.buffer, vocoder.stream(heard, gain=gain, **how), rate, raw=raw)
    except OSError as error:
        # What is left in the buffer is to go nowhere, or it fails once more when the program ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # whoever listened has heard enough
            raise
        raise UserError(f"standard output: cannot be written: {(error.strerror or str(error)).lower()}") from error
    note(f"standard output: {length / rate:.2f} s")


def _level_told(sound: Iterable["Tensor"], rate: int, level_db: float, gain: float) -> Iterator["Tensor"]:
    """The same sound; once some seconds of it are known, says if it is far from the level of the training."""
    import torch

    from wavedistill.speech.audio import rms_db
    from wavedistill.tools.progress import note

    loud: list[Tensor] = []
    length, enough = 0, LISTENED_SECONDS * rate
    for block in sound:
        yield block
        if length < enough and len(block) and rms_db(block) > SILENCE_DB:
            loud.append(block)
            length += len(block)
            if length >= enough:
                lack = level_db - rms_db(torch.cat(loud) * gain)
                if abs(lack) > LEVEL_DB:
                    wanted = 20 * math.log10(gain) + lack
                    note(f"its level differs by {-lack:+.0f} dB from the training's: try --gain-db {wanted:.0f}")


def _begin(vocoder: "Vocoder", threads: int | None, *, bf16: bool, piped: bool) -> None:
    from wavedistill.networks.threads import CORES, settle

    # Blocks abreast do not wait for each other at every step: with all cores they are fastest beside other work, too.
    usual = None if bf16 or not vocoder.model.streams else 1 if piped else CORES
    settle(threads or usual, vocoder.model.networks[0])
