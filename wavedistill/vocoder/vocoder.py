"""Waveforms from recordings and log-mels, by a model that was trained."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from wavedistill.corpus import recordings
from wavedistill.flows.distributions import FlowDistribution
from wavedistill.models.checkpoint import load_model
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.recipe import Recipe
from wavedistill.sampling.sequential import sample
from wavedistill.sampling.streaming import slices, stream
from wavedistill.speech import audio
from wavedistill.speech.conditioning import Conditioning
from wavedistill.speech.consistency import MelConsistency
from wavedistill.speech.foreign import examine, examine_f0
from wavedistill.speech.heard import Heard
from wavedistill.tools.errors import AudioError
from wavedistill.tools.files import shown
from wavedistill.tools.progress import note
from wavedistill.tools.random import random_stream

MOST_CLIPPED = 0.01
"""Share of the samples drawn beyond which they are no speech."""
TRACKED = 6
"""Pieces of a recording, of ten seconds for instance, whose F0 is compared with that of the training."""
OTHER_ARRAYS = {
    ".npz": "numpy.save('m.npy', numpy.load('m.npz')['its name'])",
    **dict.fromkeys((".pt", ".pth"), "numpy.save('m.npy', torch.load('m.pt').numpy())"),
}
"""What log-mels come in, too, and how to make a `.npy` file of it."""


def load(path: str | Path, device: torch.device | str = "cpu", passes: int | None = None) -> "Vocoder":
    """A trained model from its checkpoint, ready for use on a device, with so many passes or its recipe's.

    Raises:
        CheckpointError: if there is none at the path, or none that fits this version.
    """
    loaded = load_model(Path(path), device)
    return Vocoder(loaded.name, loaded.recipe, loaded.heard, loaded.model, passes)


class Vocoder:
    """A trained model and the units it is in; what it is given is padded inside.

    Args:
        name: of the model in its recipe.
        recipe: that it was trained by.
        heard: what it was trained on.
        model: the density.
        passes: steps of mel consistency after a draw; those of the recipe by default.

    Attributes:
        sample_rate: of its waveforms, in Hz.
    """

    def __init__(
        self, name: str, recipe: Recipe, heard: Heard, model: WaveformModel, passes: int | None = None
    ) -> None:
        self.name, self.recipe, self.heard, self.model = name, recipe, heard, model
        self.sample_rate = recipe.audio.sample_rate
        steps = recipe.consistency.passes if passes is None else passes
        self.consistency = MelConsistency(recipe.audio, steps).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def __repr__(self) -> str:
        units = self.recipe.audio
        return (
            f"Vocoder({self.name} of {self.recipe.name}: {units.n_mels} mel bands every {units.hop_length} samples at "
            f"{units.sample_rate} Hz, {'one pass' if self.model.draws_in_parallel else 'sample by sample'})"
        )

    def log_mel(self, wave: Tensor) -> Tensor:
        """The log-mel (n_mels, F) of a waveform (T,) in [-1, 1] at the model's rate, filled up to a whole hop."""
        whole = audio.pad_to_hops(wave[None], self.recipe.audio.hop_length)
        return audio.LogMel(self.recipe.audio).of_file(whole)[0]

    def given(self, mel: Tensor) -> FlowDistribution:
        """The density of waveforms (1, F * hop_length) given a log-mel (n_mels, F)."""
        return self.model(Conditioning(self._padded(mel).to(self.device), self.model.margin))

    def vocode(self, source: Tensor | str | Path, seed: int = 0, temperature: float = 1.0) -> Tensor:
        """A waveform (F * hop_length,) for a log-mel (n_mels, F), or for a file of audio or of one, that has it.

        Args:
            source: the log-mel, or the file.
            seed: of the noise.
            temperature: scale of the noise.

        Raises:
            AudioError: if a file holds nothing to synthesise.
        """
        if not isinstance(source, Tensor):
            return self.of_file(Path(source), seed, temperature)[0]
        drawn = self.sample(source, seed, temperature)[None].to(self.device)
        with torch.inference_mode():
            return self.consistency(drawn, source[None].clamp_min(audio.LOG_MEL_FLOOR).to(drawn))[0].cpu()

    def sample(self, mel: Tensor, seed: int = 0, temperature: float = 1.0) -> Tensor:
        """A draw (F * hop_length,) from the density given a log-mel (n_mels, F); arguments as in `vocode`."""
        noise = self.model.base.noise((1, mel.shape[1] * self.recipe.audio.hop_length), random_stream(seed))
        return sample(self.given(mel), noise.to(self.device) * temperature)[0].cpu()

    def log_prob(self, wave: Tensor, mel: Tensor | None = None) -> Tensor:
        """The log density of a waveform (F * hop_length,) in nats, given a log-mel (n_mels, F) or its own.

        Raises:
            SequentialDirectionError: for a model that knows the density of its own samples only.
        """
        mel = self.log_mel(wave) if mel is None else mel
        return self.given(mel).log_prob(wave[None].to(self.device))[0]

    def of_file(
        self, path: Path, seed: int = 0, temperature: float = 1.0, *, fused: bool = False, bf16: bool = False
    ) -> tuple[Tensor, int]:
        """The waveform (T,) for one input file, and how many of its samples clip.

        Raises:
            AudioError: if the file holds nothing to synthesise, or what is drawn from it is no sound.
        """
        settings, suffix = self.recipe.audio, path.suffix.lower()
        if suffix in OTHER_ARRAYS:
            raise AudioError(f"{shown(path)}: log-mels are read from .npy files; convert it: {OTHER_ARRAYS[suffix]}")
        if suffix == ".npy":
            given = audio.read_log_mel(path, settings.n_mels)
            said, gain, frames = examine(path, given, self.heard), 1.0, given.shape[1]
            mel = iter([self._padded(given)])
        else:
            samples = audio.pad_to_hops(recordings.read(path, settings.sample_rate), settings.hop_length)
            pieces, gain = recordings.speech(samples, self.recipe)
            speech = audio.pad_to_hops(torch.cat(pieces[:TRACKED]), settings.hop_length)
            said, frames = examine_f0(speech, settings, self.heard), len(samples) // settings.hop_length
            mel = audio.LogMel(settings).of_blocks(samples.mul_(gain)[None], self.model.margin)
        if said:
            note(f"{shown(path)}: {said}")
        told = (Conditioning(piece.to(self.device), 0) for piece in mel)
        length = frames * settings.hop_length
        noise = self.model.base.noise((1, length), random_stream(seed)).to(self.device).mul_(temperature)
        wave, end, clipped = torch.empty(length), 0, 0
        for block in self._drawn(told, noise, path.name, fused=fused, bf16=bf16):
            block = block[0].cpu() / gain
            if not block.isfinite().all():
                raise AudioError(
                    f"{shown(path)}: the {self.name} drew values that are not finite; try a lower --temperature"
                )
            clipped += int((block.abs() > 1).sum())
            wave[end : end + len(block)], end = block, end + len(block)
        if clipped > MOST_CLIPPED * length:
            raise AudioError(
                f"{shown(path)}: {clipped / length:.0%} of what is drawn from it passes full scale, so nothing is "
                "written: a log-mel has to be the natural logarithm of amplitudes, of sound at the training's level"
            )
        return wave, clipped

    def _padded(self, mel: Tensor) -> Tensor:
        """A log-mel (n_mels, F) with the silence around it that the model needs (1, n_mels, F + 2 margin)."""
        return audio.pad_frames(mel.clamp_min(audio.LOG_MEL_FLOOR)[None], self.model.margin)

    def _drawn(
        self, told: Iterator[Conditioning], noise: Tensor, label: str, *, fused: bool, bf16: bool
    ) -> Iterator[Tensor]:
        """Blocks (1, n) of the waveform that the model draws from pieces of conditioning, with all noise (1, T)."""
        if self.model.draws_in_parallel:
            with torch.autocast(noise.device.type, torch.bfloat16, enabled=bf16):
                yield from stream(self.model, told, slices(noise), compiled=fused, consistency=self.consistency)
        else:
            whole = Conditioning(torch.cat([piece.mel for piece in told], -1), self.model.margin)
            with torch.inference_mode():
                yield self.consistency(sample(self.model(whole), noise, label=label), whole.within(0).mel)
