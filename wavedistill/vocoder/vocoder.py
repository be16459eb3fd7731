"""Waveforms from recordings and log-mels, by a model that was trained."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from wavedistill.corpus import recordings
from wavedistill.flows.distributions import FlowDistribution
from wavedistill.models.checkpoint import load_model
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.recipe import Recipe
from wavedistill.sampling.sequential import sample
from wavedistill.sampling.streaming import stream
from wavedistill.speech import audio, mels
from wavedistill.speech.conditioning import Conditioning
from wavedistill.speech.consistency import MelConsistency
from wavedistill.speech.foreign import examine, examine_f0
from wavedistill.speech.heard import Heard
from wavedistill.speech.mels import MelFormat, mel_format
from wavedistill.tools.errors import AudioError, UserError
from wavedistill.tools.files import shown
from wavedistill.tools.progress import note, progress
from wavedistill.tools.random import random_stream

MOST_CLIPPED = 0.01
"""Share of the samples drawn beyond which they are no speech."""
TRACKED = 6
"""Pieces of a recording, of ten seconds for instance, whose F0 is compared with that of the training."""
PATIENCE_SECONDS = 3
"""That an input may take before a bar shows what is left of it."""
LOG_MEL_RANGE = (-30, 10)
"""What the log-mel of audio in [-1, 1] lies well within, whatever floor it was made with."""


SHIPPED = Path(__file__).parent / "shipped" / "voice.safetensors"
"""A student for any voice; `CARD.md` beside it says what it was trained on, and what it is worth."""


def load(path: str | Path = SHIPPED, device: torch.device | str = "cpu", passes: int | None = None) -> "Vocoder":
    """A trained model from its checkpoint, ready for use on a device, with so many passes or its recipe's.

    The one that comes with the package is for any voice.

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
        self._log_mel = audio.LogMel(recipe.audio)
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
        return self._log_mel.of_file(whole)[0]

    def given(self, mel: Tensor) -> FlowDistribution:
        """The density of waveforms (1, F * hop_length) given a log-mel (n_mels, F)."""
        return self.model(Conditioning(self._padded(mel).to(self.device), self.model.margin))

    def vocode(
        self,
        source: Tensor | str | Path,
        seed: int = 0,
        temperature: float = 1.0,
        format: str | MelFormat | None = None,
    ) -> Tensor:
        """A waveform (F * hop_length,) for a log-mel (n_mels, F), or for a file of audio or of one, that has it.

        Args:
            source: the log-mel, or the file.
            seed: of the noise.
            temperature: scale of the noise.
            format: what a log-mel's numbers mean, "log10" for instance, or what `wavedistill.speech.mels.mel_format`
                gives; natural logarithms of amplitudes by default, and then what looks like another format is refused.

        Raises:
            AudioError: if a file holds nothing to synthesise, or a log-mel is none or looks like another format.
        """
        form = mel_format(format) if isinstance(format, str) else format
        if not isinstance(source, Tensor):
            return self.of_file(Path(source), seed, temperature, form)[0]
        mel, said = self._understood(source, form, "log-mel")
        for word in said:
            warnings.warn(f"log-mel: {word}", stacklevel=2)
        blocks = self._drawn([self._padded(mel)], self._noise(seed, temperature), bf16=False)
        return torch.cat([block[0].cpu() for block in blocks])

    def sample(self, mel: Tensor, seed: int = 0, temperature: float = 1.0) -> Tensor:
        """A draw (F * hop_length,) from the density given a log-mel (n_mels, F); arguments as in `vocode`."""
        noise = self._noise(seed, temperature)(mel.shape[1] * self.recipe.audio.hop_length)
        return sample(self.given(mel), noise)[0].cpu()

    def log_prob(self, wave: Tensor, mel: Tensor | None = None) -> Tensor:
        """The log density of a waveform (F * hop_length,) in nats, given a log-mel (n_mels, F) or its own.

        Raises:
            SequentialDirectionError: for a model that knows the density of its own samples only.
        """
        mel = self.log_mel(wave) if mel is None else mel
        return self.given(mel).log_prob(wave[None].to(self.device))[0]

    def stream(
        self,
        sound: Iterable[Tensor],
        seed: int = 0,
        temperature: float = 1.0,
        *,
        gain: float = 1.0,
        bf16: bool = False,
    ) -> Iterator[Tensor]:
        """The waveform for sound that comes piece by piece, equal to that of one pass, in memory that does not grow.

        Args:
            sound: pieces (n,) of any length, in [-1, 1] at the model's rate.
            seed: of the noise.
            temperature: scale of the noise.
            gain: to the level of the training, which is taken back from what is drawn; a file's is measured, while of
                what has not been heard nobody knows it.
            bf16: whether the networks compute in bfloat16.

        Yields:
            Blocks (n,), `latency` samples behind what is given, and together as long, filled up to a whole hop.

        Raises:
            AudioError: if what is drawn is no sound.
        """
        pieces = (piece[None] * gain for piece in sound)
        mel = self._log_mel.of_blocks(pieces, self.model.margin)
        for block in self._drawn(mel, self._noise(seed, temperature), bf16=bf16, abreast=False):
            yield self._sound(block, gain, "what comes")

    @property
    def latency(self) -> int:
        """Samples that `stream` has to know after one that it gives, and at most a hop more for each pass."""
        units = self.recipe.audio
        return units.overlap + (self.model.margin + 1) * units.hop_length + self.consistency.latency

    def check(self, path: Path, form: MelFormat | None = None) -> None:
        """Look whether a file can be one to synthesise, by its header or, of a log-mel, by all of it.

        Raises:
            AudioError: if not.
        """
        if _is_mel(path):
            self._understood(mels.read(path), form, shown(path))
        else:
            recordings.rate(path)

    def of_file(
        self,
        path: Path,
        seed: int = 0,
        temperature: float = 1.0,
        form: MelFormat | None = None,
        *,
        bf16: bool = False,
    ) -> tuple[Tensor, int]:
        """The waveform (T,) for one input file, and how many of its samples clip.

        Raises:
            AudioError: if the file holds nothing to synthesise, or what is drawn from it is no sound.
        """
        units = self.recipe.audio
        if _is_mel(path):
            given, said = self._understood(mels.read(path), form, shown(path))
            gain, frames = 1.0, given.shape[1]
            mel = iter([self._padded(given)])
        else:
            samples = audio.pad_to_hops(recordings.read(path, units.sample_rate), units.hop_length)
            pieces, gain = recordings.speech(samples, self.recipe)
            speech = audio.pad_to_hops(torch.cat([samples[piece] for piece in pieces[:TRACKED]]), units.hop_length)
            pitch, frames = examine_f0(speech, units, self.heard), len(samples) // units.hop_length
            said = [pitch] if pitch else []
            blocks = samples.mul_(gain)[None].split(audio.BLOCK_FRAMES * units.hop_length, 1)
            mel = self._log_mel.of_blocks(blocks, self.model.margin)
        for word in said:
            note(f"{shown(path)}: {word}")
        length = frames * units.hop_length
        wave, end, clipped = torch.empty(length), 0, 0
        with progress(
            desc=path.name, total=length, unit="sample", unit_scale=True, leave=False, delay=PATIENCE_SECONDS
        ) as bar:
            for drawn in self._drawn(mel, self._noise(seed, temperature), path.name, bf16=bf16):
                block = self._sound(drawn, gain, shown(path))
                clipped += int((block.abs() > 1).sum())
                wave[end : end + len(block)], end = block, end + len(block)
                bar.update(len(block))
        if clipped > MOST_CLIPPED * length:
            raise AudioError(
                f"{shown(path)}: {clipped / length:.0%} of what is drawn from it passes full scale, so nothing is "
                "written: a log-mel has to be the natural logarithm of amplitudes, of sound at the training's level"
            )
        return wave, clipped

    def _understood(self, mel: Tensor, form: MelFormat | None, name: str) -> tuple[Tensor, list[str]]:
        """A log-mel as natural logarithm of amplitudes (n_mels, F), and what is to be said of it.

        Raises:
            AudioError: if it is none, or looks like one of another format and nobody has said that it is of this one.
        """
        units, given = self.recipe.audio, form or MelFormat()
        try:
            turned, said = mels.upright(mel, units.n_mels)
            natural = given.natural(turned)
        except UserError as error:
            raise AudioError(f"{name}: {error}") from error
        words = [said] if said else []
        if finding := examine(turned, self.heard, units, given):
            if finding.other and form is None:
                raise AudioError(f"{name}: {finding.said}")
            words.append(finding.said)
        low, high = LOG_MEL_RANGE
        if natural.min() < low or natural.max() > high:
            raise AudioError(
                f"{name}: holds values from {natural.min():.1f} to {natural.max():.1f}; natural logarithms of "
                f"amplitudes lie between {low} and {high}: is it in decibels, or of powers? --mel-format says which"
            )
        return natural, words

    def _padded(self, mel: Tensor) -> Tensor:
        """A log-mel (n_mels, F) with the silence around it that the model needs (1, n_mels, F + 2 margin)."""
        return audio.pad_frames(mel.clamp_min(audio.LOG_MEL_FLOOR)[None], self.model.margin)

    def _noise(self, seed: int, temperature: float) -> Callable[[int], Tensor]:
        """Gives the noise (1, n) of the next n samples, whole hops, which is the same in blocks of any length."""
        hop, random = self.recipe.audio.hop_length, random_stream(seed)

        def following(count: int) -> Tensor:
            # A generator's numbers depend on how many are asked for at a time.
            drawn = [self.model.base.noise((1, hop), random) for _ in range(count // hop)]
            return torch.cat(drawn, 1).to(self.device) * temperature

        return following

    def _drawn(
        self,
        mel: Iterable[Tensor],
        noise: Callable[[int], Tensor],
        label: str | None = None,
        *,
        bf16: bool,
        abreast: bool = True,
    ) -> Iterator[Tensor]:
        """Blocks (1, n) of the waveform that the model draws from pieces of a log-mel with its margins."""
        threads = torch.get_num_threads() if abreast else 1
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            if self.model.streams:
                told = (Conditioning(piece.to(self.device), 0) for piece in mel)
                yield from stream(self.model, told, noise, consistency=self.consistency, threads=threads)
                return
            whole = Conditioning(torch.cat(list(mel), -1).to(self.device), self.model.margin)
            bar = None if self.model.draws_in_parallel else label
            with torch.inference_mode():
                drawn = sample(self.model(whole), noise(whole.frames * self.recipe.audio.hop_length), label=bar)
                yield self.consistency(drawn, whole.within(0).mel)

    def _sound(self, block: Tensor, gain: float, source: str) -> Tensor:
        """A block (n,) of a waveform at the level of what it is made of, if it is one."""
        wave = block[0].cpu() / gain
        if not wave.isfinite().all():
            raise AudioError(f"{source}: the {self.name} drew values that are not finite; try a lower --temperature")
        return wave


def _is_mel(path: Path) -> bool:
    return path.suffix.lower() in mels.SUFFIXES
