"""What one hears of a training while it runs: whole utterances, as recorded and as the model speaks them."""

from pathlib import Path

import torch

from wavedistill.corpus.segments import Segments
from wavedistill.corpus.utterances import Manifest
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech.consistency import MelConsistency
from wavedistill.training.log import Log
from wavedistill.training.task import Task

UTTERANCES, SECONDS = 2, 6
"""Of the validation split that are heard, and the longest."""


class Preview:
    """The first utterances of the validation split, which every recipe of a corpus has in common.

    Args:
        task: what is trained.
        manifest: the prepared corpus.
        audio_folder: the folder of its audio files.
        recipe: the experiment.
        margin: frames of conditioning on either side.
        device: of the model.
    """

    def __init__(
        self, task: Task, manifest: Manifest, audio_folder: Path, recipe: Recipe, margin: int, device: torch.device
    ) -> None:
        self.task, self.audio, self.passes = task, recipe.audio, recipe.consistency.passes
        self.consistency = MelConsistency(recipe.audio, self.passes).to(device)
        longest = SECONDS * recipe.audio.sample_rate // recipe.audio.hop_length
        self.utterances = {}
        for utterance in manifest.of("valid")[:UTTERANCES]:
            frames = min(utterance.frames, longest)
            whole = Segments(manifest, audio_folder, "valid", frames=frames, margin=margin, device=device)
            self.utterances[utterance.name] = whole.cut([(utterance, 0)])

    def recorded(self, log: Log, step: int) -> None:
        """Log the recordings, once."""
        for number, (name, batch) in enumerate(self.utterances.items(), 1):
            about = f"{name}, of the validation split, as recorded and prepared."
            log.sound(f"utterance_{number}/recorded", batch.audio[0], self.audio.sample_rate, about, step)

    @torch.no_grad()
    def generated(self, model: WaveformModel, log: Log, step: int) -> None:
        """Log what the model makes of the same log-mels, as `wavedistill generate` would."""
        for number, (name, batch) in enumerate(self.utterances.items(), 1):
            wave = self.task.sample(model, batch)
            heard = batch.conditioning.block(0, wave.shape[1] // self.audio.hop_length, 0).mel
            about = (
                f"{name}, as the {self.task.name} speaks it from its log-mel: by the averaged weights, after "
                f"{self.passes} passes of mel consistency."
            )
            spoken = self.consistency(wave, heard)[0]
            log.sound(f"utterance_{number}/generated", spoken, self.audio.sample_rate, about, step)
