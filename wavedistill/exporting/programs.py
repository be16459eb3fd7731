"""A student as one program, from log-mel and noise to a waveform: for ONNX runtimes, or for torch alone."""

import io
import json
import logging
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from wavedistill import __version__
from wavedistill.exporting.products import InProducts
from wavedistill.recipe.models import Iaf
from wavedistill.speech import audio
from wavedistill.speech.conditioning import Conditioning
from wavedistill.tools.errors import UserError
from wavedistill.tools.files import replacing, shown
from wavedistill.vocoder.vocoder import Vocoder

OPSET = 20
"""Of ONNX."""
FEWEST_FRAMES = 2
"""Of the log-mel that a program takes."""
EXAMPLE_FRAMES = 50
"""Of the log-mel that a program is traced with; any other number would do."""


class ExportError(UserError):
    """A model that cannot become a program, or a kind of program that there is not."""


class Spoken(nn.Module):
    """A parallel model with the silence before and after it, and with mel consistency behind it.

    Args:
        voice: the model and its units.
    """

    def __init__(self, voice: Vocoder) -> None:
        super().__init__()
        self.model, self.consistency = voice.model, voice.consistency

    def forward(self, log_mel: Tensor, noise: Tensor) -> Tensor:
        """The waveform (1, F * hop_length) of a log-mel (1, n_mels, F) and base noise (1, F * hop_length)."""
        whole = audio.pad_frames(log_mel.clamp_min(audio.LOG_MEL_FLOOR), self.model.margin)
        told = Conditioning(whole, self.model.margin)
        wave, _ = self.model(told).to_x(noise)
        return self.consistency(wave, told.within(0).mel)


def export(voice: Vocoder, path: Path) -> None:
    """Write a student as a program, whole or not at all: `.onnx` for ONNX runtimes, `.pt2` for `torch.export.load`.

    Inputs are `log_mel` (1, n_mels, F) and `noise` (1, F * hop_length) for any F of at least 2, the output is
    `waveform` (1, F * hop_length); its F0, its linear prediction and its passes of mel consistency are inside.

    Raises:
        ExportError: if the model is no inverse autoregressive flow, the path says another kind of program, or the
            packages for ONNX are missing.
    """
    if not voice.model.draws_in_parallel:
        raise ExportError(
            f"the {voice.name} of {voice.recipe.name} draws sample by sample, each from the ones before, and is no "
            "program of one pass: export a student that was distilled from it"
        )
    if not voice.model.streams:
        raise ExportError(
            f"the {voice.name} of {voice.recipe.name} is a coupling flow, or of a kind of your own, and programs are "
            "written of inverse autoregressive flows: export a student that was distilled from it"
        )
    if path.suffix not in WRITERS:
        raise ExportError(f"{shown(path)}: give a name that ends in {' or '.join(WRITERS)}")
    content = WRITERS[path.suffix](voice)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(content)


def described(voice: Vocoder) -> dict[str, str]:
    """What whoever runs a program has to know of it, as plain words."""
    units, settings = voice.recipe.audio, voice.recipe.models[voice.name]
    base = settings.base if isinstance(settings, Iaf) else type(voice.model.base).__name__
    return {
        **{key: str(value) for key, value in units.model_dump().items()},
        "log_mel": "natural logarithm of mel-filtered STFT magnitudes, Hann window, Slaney's scale and area norm",
        "log_mel_floor": str(audio.LOG_MEL_FLOOR),
        "noise": f"standard {base}",
        "passes": str(voice.consistency.passes),
        "licence": voice.recipe.corpus.licence or "not stated",
        "model": voice.name,
        "recipe": voice.recipe.name,
        "wavedistill": __version__,
    }


def _onnx(voice: Vocoder) -> bytes:
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise ExportError(
            f"ONNX needs {' and '.join(missing)}, which this installation lacks: install wavedistill[onnx]"
        )
    logging.getLogger("torch.onnx._internal.exporter._registration").addFilter(_is_about_us)
    with InProducts():
        program = _traced(voice)
    made = torch.onnx.export(program, opset_version=OPSET, optimize=False, verbose=False, output_names=["waveform"])
    assert made is not None
    inner = (function.all_nodes() for function in made.model.functions.values())
    for node in chain(made.model.graph.all_nodes(), *inner):
        node.metadata_props.clear()  # which lines of which files it comes from: most of a program's size
    made.model.metadata_props.update(described(voice))
    return made.model_proto.SerializeToString()


def _pt2(voice: Vocoder) -> bytes:
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of weights that share memory, which are kept once
        torch.export.save(_traced(voice), content, extra_files={"wavedistill.json": json.dumps(described(voice))})
    return content.getvalue()


WRITERS: dict[str, Callable[[Vocoder], bytes]] = {".onnx": _onnx, ".pt2": _pt2}
"""The kinds of programs, by the suffix of their file."""


def _traced(voice: Vocoder) -> ExportedProgram:
    units, frames = voice.recipe.audio, Dim("frames", min=FEWEST_FRAMES)
    noise = torch.zeros(1, EXAMPLE_FRAMES * units.hop_length)
    log_mel = torch.full((1, units.n_mels, EXAMPLE_FRAMES), audio.LOG_MEL_FLOOR)
    shapes = {"log_mel": {2: frames}, "noise": {1: units.hop_length * frames}}
    with torch.no_grad():
        return torch.export.export(Spoken(voice).eval(), (log_mel, noise), dynamic_shapes=shapes, strict=False)


def _is_about_us(record: logging.LogRecord) -> bool:
    """Whether a warning is of use here, as that of a package that nothing asks for is not."""
    return "torchvision" not in record.getMessage()
