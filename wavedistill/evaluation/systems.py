"""The systems that are scored, which make speech of log-mels: models, and what needs no training."""

from collections.abc import Mapping, Sequence
from typing import Any

import librosa
import numpy as np
import torch
from torch import Tensor

from wavedistill.evaluation import metrics
from wavedistill.evaluation.excerpts import Excerpt
from wavedistill.evaluation.verdict import COMPARED, mean
from wavedistill.models.kinds import build
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.recipe import Recipe
from wavedistill.recipe.sections import Audio
from wavedistill.sampling.sequential import sample
from wavedistill.speech.audio import LOG_MEL_FLOOR, mel_filters, pad_frames
from wavedistill.speech.conditioning import Conditioning
from wavedistill.speech.consistency import MelConsistency
from wavedistill.speech.pitch import PITCH_CONTEXT, PeriodicSource, track_f0
from wavedistill.tools.random import random_stream

SYNTHESISE, SOURCE = 12, 13
"""Purposes of random streams."""
SHARES = (0.5, 0.65, 0.8, 0.9, 0.95)
"""Of the pulse train in the power of a voiced source, that are tried."""


class SourceFilter:
    """Speech without a trained density: pulses and noise through the last transform of a recipe's models.

    F0 is that which a model of the recipe predicts from the log-mel, a parallel one if it can; tracked in the recording
    where none does.

    Args:
        recipe: of the experiment.
        models: the trained ones by name, on a device.
        clips: on which the share of the pulse train is chosen, held out from every training and test.

    Attributes:
        about: the share of the pulse train in the power of voiced sound, what chose it, and where F0 is from.
    """

    def __init__(self, recipe: Recipe, models: Mapping[str, WaveformModel], clips: Sequence[Excerpt]) -> None:
        ordered = sorted(models.values(), key=lambda model: not model.draws_in_parallel)
        self.recipe, self.model = recipe, ordered[0]
        self.pitch = next((model.pitch for model in ordered if model.pitch is not None), None)
        self.source = PeriodicSource(recipe.audio)
        found = {}
        for share in SHARES:
            waves = consistent(recipe, self(clips, share), clips)
            pairs = zip(clips, waves, strict=True)
            found[share] = mean([metrics.likeness(clip.audio, wave, recipe.audio) for clip, wave in pairs])
        name = next(name for name in COMPARED if all(scores[name] is not None for scores in found.values()))
        self.share = max(SHARES, key=lambda share: COMPARED[name].sign * (found[share][name] or 0))
        self.about: dict[str, Any] = {
            "share": self.share,
            "chosen_by": name,
            "f0": "tracked in the recording" if self.pitch is None else "predicted from the log-mel",
        }

    @torch.no_grad()
    def __call__(self, clips: Sequence[Excerpt], share: float | None = None) -> list[Tensor]:
        """Clips anew, each (T,), with another share of the pulse train than the one that was chosen if given."""
        share = self.share if share is None else share
        device = next(self.model.parameters()).device
        waves = []
        for i, clip in enumerate(clips):
            mel = pad_frames(clip.mel[None], PITCH_CONTEXT + 1).to(device)
            if self.pitch is None:
                f0 = torch.nn.functional.pad(track_f0(clip.audio, self.recipe.audio)[None], (1, 1)).to(device)
            else:
                f0 = self.pitch(mel)
            pulse, voiced = self.source(f0)[0][..., 2:].unbind(-1)
            noise = torch.randn(1, len(clip.audio), generator=random_stream(self.recipe.seed, SOURCE, i)).to(device)
            excitation = share**0.5 * pulse + (1 - share * voiced).sqrt() * noise
            wave, _ = self.model.shared(excitation, self.model.shared_context(Conditioning(mel, PITCH_CONTEXT + 1)))
            waves.append(wave[0].cpu().clamp(-1, 1))
        return waves


@torch.inference_mode()
def synthesise(
    recipe: Recipe,
    models: Mapping[str, WaveformModel],
    source_filter: SourceFilter,
    clips: Sequence[Excerpt],
    device: torch.device,
) -> dict[str, Sequence[Tensor]]:
    """Clips, each (T,), as every system draws them, by the name of the system, and as they were recorded.

    Models are given the log-mel alone. `whisper` is what the first parallel one is before training: white noise through
    the last transform, linear prediction for instance.
    """
    # One batch: a sequential sampler takes as many steps for all clips as for the longest.
    mels = [clip.mel.T for clip in clips]
    padded = torch.nn.utils.rnn.pad_sequence(mels, batch_first=True, padding_value=LOG_MEL_FLOOR).transpose(1, 2)
    margin = max(model.margin for model in models.values())
    told = Conditioning(pad_frames(padded, margin), margin).to(device)
    shape = (len(clips), told.frames * recipe.audio.hop_length)

    def drawn(model: WaveformModel, label: str | None = None) -> list[Tensor]:
        noise = model.base.noise(shape, random_stream(recipe.seed, SYNTHESISE)).to(device)
        waves = sample(model(told), noise * recipe.evaluate.temperature, label=label).cpu()
        return [wave[: len(clip.audio)].clamp(-1, 1) for wave, clip in zip(waves, clips, strict=True)]

    systems: dict[str, Sequence[Tensor]] = {"recorded": [clip.audio for clip in clips]}
    for name, model in models.items():
        systems[name] = drawn(model, None if model.draws_in_parallel else f"{name} samples")
    systems["griffin_lim"] = [griffin_lim(clip.mel, recipe.audio) for clip in clips]
    systems["source_filter"] = source_filter(clips)
    if parallel := [name for name, model in models.items() if model.draws_in_parallel]:
        systems["whisper"] = drawn(build(recipe, parallel[0], recipe.seed).to(device))
    return systems


@torch.no_grad()
def consistent(recipe: Recipe, waves: Sequence[Tensor], clips: Sequence[Excerpt]) -> list[Tensor]:
    """Waves (T,) after the recipe's steps towards the log-mels of the clips they were drawn for."""
    towards = MelConsistency(recipe.audio, recipe.consistency.passes)
    pairs = zip(waves, clips, strict=True)
    return [towards(wave[None], clip.mel[None])[0].clamp(-1, 1) for wave, clip in pairs]


def griffin_lim(log_mel: Tensor, settings: Audio, iterations: int = 60) -> Tensor:
    """Speech (F * hop) from log-mel (n_mels, F) without a model: pseudo-inverse filterbank, then Griffin-Lim phases.

    What a user has for nothing; a vocoder has to beat it. Starts from a fixed phase, so that it is reproducible.
    """
    # Frames here are centred on hops, librosa's on their borders: one more frame on either side, then half a hop off.
    mel = pad_frames(log_mel, 1).exp().where(pad_frames(log_mel, 1) > LOG_MEL_FLOOR, 0.0).numpy()
    magnitude = np.maximum(np.linalg.pinv(mel_filters(settings).T.numpy()) @ mel, 0)
    audio = librosa.griffinlim(
        magnitude, n_iter=iterations, hop_length=settings.hop_length, n_fft=settings.n_fft, random_state=0
    )
    start, length = settings.hop_length // 2, log_mel.shape[1] * settings.hop_length
    return torch.from_numpy(audio[start : start + length].astype(np.float32))
