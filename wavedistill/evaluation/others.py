"""Clips that another system made, from a folder, to be scored beside a recipe's own."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.nn.functional import pad

from wavedistill.corpus import recordings
from wavedistill.recipe.sections import Audio
from wavedistill.tools.errors import AudioError, UserError
from wavedistill.tools.files import shown
from wavedistill.tools.progress import note

MOST_HOPS = 4
"""By which a clip may be longer or shorter than the recording."""


def files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The wav files of clips by their names.

    Raises:
        UserError: if one is missing.
    """
    found = [folder / f"{name}.wav" for name in names]
    if missing := [path for path in found if not path.is_file()]:
        raise UserError(
            f"{shown(missing[0])}: no such file; {shown(folder)} needs a wav file for each clip that is scored, and "
            f"lacks {len(missing)} of {len(found)}"
        )
    return found


def read(paths: Sequence[Path], clips: Sequence[Tensor], settings: Audio) -> list[Tensor]:
    """What files hold, of mean 0, as long as the clips (T,) they stand for, and no louder or softer than it is.

    Raises:
        AudioError: if one is not audio, or more than some hops longer or shorter than its clip.
    """
    rates = {recordings.rate(path) for path in paths} - {settings.sample_rate}
    if rates:
        said = ", ".join(map(str, sorted(rates)))
        note(f"evaluate: {shown(paths[0].parent)}: brought from {said} Hz to {settings.sample_rate}")
    waves = []
    for path, clip in zip(paths, clips, strict=True):
        wave = recordings.read(path, settings.sample_rate)
        if abs(len(wave) - len(clip)) > MOST_HOPS * settings.hop_length:
            raise AudioError(
                f"{shown(path)}: has {len(wave)} samples at {settings.sample_rate} Hz, and the clip {len(clip)}: make "
                f"it of the clip in samples/recorded, at most {MOST_HOPS} hops longer or shorter"
            )
        waves.append(pad(wave, (0, max(0, len(clip) - len(wave))))[: len(clip)].clamp(-1, 1))
    return waves
