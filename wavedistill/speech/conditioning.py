"""The one value that models, batches and streams are given: what is known of a waveform before it is drawn."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What a waveform of F frames is drawn from, with frames around it.

    Attributes:
        mel: log-mel (B, n_mels, F + 2 margin).
        margin: frames on either side, of which a model needs as many as its own `margin`.
        f0: (B, F + 2 margin) in Hz, 0 where unvoiced; None where it is not known, and models predict it.
    """

    mel: Tensor
    margin: int
    f0: Tensor | None = None

    @property
    def frames(self) -> int:
        """F: those that a waveform is drawn for."""
        return self.mel.shape[-1] - 2 * self.margin

    def within(self, margin: int) -> "Conditioning":
        """The same frames, with fewer around them.

        Raises:
            ValueError: if there are fewer already.
        """
        if margin > self.margin:
            raise ValueError(f"{margin} frames around are needed, and there are {self.margin}")
        return self if margin == self.margin else self.block(0, self.frames, margin)

    def block(self, first: int, count: int, margin: int | None = None) -> "Conditioning":
        """Some of the frames, with those around them."""
        margin = self.margin if margin is None else margin
        start = self.margin - margin + first
        f0 = None if self.f0 is None else self.f0[..., start : start + count + 2 * margin]
        return Conditioning(self.mel[..., start : start + count + 2 * margin], margin, f0)

    def followed_by(self, other: "Conditioning") -> "Conditioning":
        """These frames and others that come after them, none of either around."""
        f0 = None if self.f0 is None or other.f0 is None else torch.cat([self.f0, other.f0], -1)
        return replace(self, mel=torch.cat([self.mel, other.mel], -1), f0=f0)

    def mel_alone(self) -> "Conditioning":
        """Without F0, as whoever has no recording knows it."""
        return replace(self, f0=None)

    def elsewhere(self) -> "Conditioning":
        """The conditioning of another place: the frames half the length away, round the end."""
        away = self.mel.shape[-1] // 2
        return replace(self, mel=self.mel.roll(away, -1), f0=None if self.f0 is None else self.f0.roll(away, -1))

    def to(self, device: torch.device | str) -> "Conditioning":
        """On a device."""
        return replace(self, mel=self.mel.to(device), f0=None if self.f0 is None else self.f0.to(device))
