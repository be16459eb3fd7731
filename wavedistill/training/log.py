"""A training's TensorBoard log: figures, sounds and spectrograms, each with a word on what it shows."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

FIGURES = {
    "nll": "Negative log-likelihood of recordings, in nats a sample: lower is better.",
    "kl": "Kullback-Leibler divergence of the student from its teacher, in nats a sample: 0 where both are alike.",
    "spectral": "Distance of short-time spectra from the recording's, relative to these: what is loud counts most.",
    "log_mel": "Distance of log-mels from the recording's, in nats of amplitude: loud and soft count alike.",
    "drawn_log_mel": "The distance of log-mels before mel consistency.",
    "log_scale": "Squared distance of the student's log-scales from the teacher's.",
    "contrastive": "Less the divergence from the teacher when it is told of another place: lower is better.",
    "x_reconstruction": "Mean square error of a recording through the teacher to noise and through the student back.",
    "z_reconstruction": "Mean square error of noise through the student to sound and through the teacher back.",
    "pitch": "Loss of the predictor of F0 from the log-mel.",
    "gradient_norm": "Norm of the gradient before clipping.",
    "parameter_norm": "Norm of all learnt weights.",
    "skipped_steps": "Steps so far that changed nothing, because their gradient was not finite.",
    "steps_per_second": "Pace of the whole call, validation included.",
}
"""What the figures mean; those of an objective of one's own have their names alone."""
PICTURE = (10.0, 4.5)
"""Inches of a spectrogram, at 100 pixels each."""
PLACE = (0.08, 0.12, 0.9, 0.8)
"""Of its axes, in shares of it: left, bottom, width, height."""
DB_RANGE = (-120.0, -40.0)
"""Of the power that a spectrogram shows, relative to full scale."""
READERS = {"simple_value": "scalars", "audio": "audio", "image": "images"}
"""What TensorBoard calls that which shows a figure, a sound or a picture."""


class Log:
    """Writes into a log of TensorBoard, of the first process alone.

    Args:
        logger: that the files are of.
        fabric: the processes.
    """

    def __init__(self, logger: "TensorBoardLogger", fabric: "Fabric") -> None:
        self._logger, self._first = logger, fabric.is_global_zero

    def figures(self, part: str, values: Mapping[str, float], step: int) -> None:
        """Named figures of a part, "train" or "valid"."""
        from torch.utils.tensorboard import summary

        for name, value in values.items():
            self._write(summary.scalar(f"{part}/{name}", value), FIGURES.get(name, ""), step)

    def sound(self, tag: str, wave: Tensor, sample_rate: int, about: str, step: int) -> None:
        """A waveform (T,) to hear, and its spectrogram to see."""
        from torch.utils.tensorboard import summary

        wave = wave.clamp(-1, 1).cpu()
        self._write(summary.audio(tag, wave, sample_rate), about, step)
        picture = spectrogram(wave.numpy(), sample_rate, f"{tag}, step {step}")
        self._write(summary.image(tag, picture, dataformats="HWC"), about, step)

    def _write(self, found: Any, about: str, step: int) -> None:
        if self._first:
            for value in found.value:
                value.metadata.summary_description = about
                # Readers complain of a description that belongs to none of their kinds.
                value.metadata.plugin_data.plugin_name = READERS[value.WhichOneof("value")]
            self._logger.experiment.file_writer.add_summary(found, step)


def spectrogram(wave: np.ndarray[Any, np.dtype[np.float32]], sample_rate: int, title: str) -> np.ndarray[Any, Any]:
    """The picture (height, width, 3) of a waveform's power over time in s and frequency in Hz."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=PICTURE, dpi=100)
    canvas, axes = FigureCanvasAgg(figure), figure.add_axes(PLACE)
    window = min(2 ** round(np.log2(0.05 * sample_rate)), len(wave) // 2)
    low, high = DB_RANGE
    with np.errstate(divide="ignore"):  # of digital silence
        axes.specgram(wave, NFFT=window, Fs=sample_rate, noverlap=3 * window // 4, vmin=low, vmax=high, cmap="magma")
    axes.set(title=f"{title} (dark {low:g}, bright {high:g} dB/Hz)", xlabel="s", ylabel="Hz")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
