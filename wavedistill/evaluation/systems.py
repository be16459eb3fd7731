"""The systems that are scored, which make speech of log-mels: models, and what needs no training."""

from collections.abc import Mapping, Sequence

import librosa
import numpy as np
import torch
from torch import Tensor

from wavedistill.models.kinds import build
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.recipe import Recipe
from wavedistill.recipe.sections import Audio
from wavedistill.sampling.sequential import sample
from wavedistill.speech.audio import LOG_MEL_FLOOR, LogMel, mel_filters, pad_frames
from wavedistill.speech.conditioning import Conditioning
from wavedistill.tools.random import random_stream

SYNTHESISE = 12
"""A purpose of random streams."""


@torch.inference_mode()
def synthesise(
    recipe: Recipe, models: Mapping[str, WaveformModel], clips: Sequence[Tensor], device: torch.device
) -> dict[str, Sequence[Tensor]]:
    """Clips (T,) as every system copies them, by the name of the system, and as they were recorded.

    Models are given the log-mel alone. `whisper` is what the first parallel one is before training: white noise through
    the last transform, linear prediction for instance.
    """
    # One batch: a sequential sampler takes as many steps for all clips as for the longest.
    padded = torch.nn.utils.rnn.pad_sequence(list(clips), batch_first=True)
    margin = max(model.margin for model in models.values())
    log_mel = LogMel(recipe.audio)
    told = Conditioning(log_mel.of_file(padded, margin), margin).to(device)

    def drawn(model: WaveformModel, label: str | None = None) -> list[Tensor]:
        noise = model.base.noise(tuple(padded.shape), random_stream(recipe.seed, SYNTHESISE)).to(device)
        waves = sample(model(told), noise * recipe.evaluate.temperature, label=label).cpu()
        return [wave[: len(clip)].clamp(-1, 1) for wave, clip in zip(waves, clips, strict=True)]

    systems = {"recorded": clips}
    for name, model in models.items():
        systems[name] = drawn(model, None if model.draws_in_parallel else f"{name} samples")
    systems["griffin_lim"] = [griffin_lim(log_mel.of_file(clip[None])[0], recipe.audio) for clip in clips]
    if parallel := [name for name, model in models.items() if model.draws_in_parallel]:
        systems["whisper"] = drawn(build(recipe, parallel[0], recipe.seed).to(device))
    return systems


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
