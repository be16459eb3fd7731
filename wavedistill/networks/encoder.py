"""From the frames of a log-mel to the features that a conditioner reads."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def normalise_log_mel(mel: Tensor) -> Tensor:
    """The log-mel of speech (any shape), about [-11.5, 2], brought near [-2, 2], where networks like their inputs."""
    return (mel + 5) / 3


class MelEncoder(nn.Module):
    """Turns log-mel frames into conditioning features at a rate between the frames' and the samples'.

    One convolution looks at `context` frames on either side and is never padded: the caller gives real neighbours, so
    that a crop has the features of the whole file. Every scale but the last is a learned sub-frame upsampling without
    overlap; the last is plain repetition, which `WaveNet` applies after projecting, where it is cheap.

    Args:
        n_mels: bands of the log-mel.
        channels: width of the features.
        context: frames seen on either side.
        upsample: factors whose product is the hop length; the last one is left to `WaveNet`.
        others: channels beside the log-mel, of order one.
    """

    def __init__(self, n_mels: int, channels: int, context: int, upsample: tuple[int, ...], others: int = 0) -> None:
        super().__init__()
        self.context = context
        self.frames = nn.Conv1d(n_mels + others, channels, 2 * context + 1)
        self.hop_length = math.prod(upsample)
        self.upsample = nn.ModuleList(nn.Linear(channels, scale * channels) for scale in upsample[:-1])

    def forward(self, mel: Tensor, others: Tensor | None = None) -> Tensor:
        """Log-mel and others (B, ..., F + 2 context) -> features (B, F * prod(upsample[:-1]), channels)."""
        frames = normalise_log_mel(mel)
        frames = frames if others is None else torch.cat([frames, others], 1)
        features = F.leaky_relu(self.frames(frames), 0.2).transpose(1, 2)  # (B, F, C)
        for stage in self.upsample:
            scaled = F.leaky_relu(stage(features), 0.2)  # (B, F, scale * C)
            features = scaled.view(len(features), -1, features.shape[-1])  # (B, F * scale, C)
        return features
