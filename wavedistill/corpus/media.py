"""Sound in files that libsndfile does not read, m4a and webm for instance: by PyAV, where it is installed."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np

from wavedistill.tools.errors import AudioError
from wavedistill.tools.files import shown

INSTALLED = find_spec("av") is not None
TRUSTWORTHY = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
"""What ffmpeg calls the containers that say how long they are; of others it guesses."""
SLACK_SECONDS = 0.1
"""By which a container's own word on its length may be too large: encoders fill up their last block."""


class Media:
    """The first sound in a file, read from beginning to end, as far as it goes; as `soundfile.SoundFile`.

    Args:
        path: the file.

    Raises:
        AudioError: if there is no sound in it, or PyAV is not installed.

    Attributes:
        samplerate: in Hz.
        channels: how many.
        frames: samples of each channel, at the least; 0 where the file does not say.
        format, subtype: that it is none of libsndfile's, and that decoders may go beyond full scale.
    """

    format, subtype = "MEDIA", "FLOAT"

    def __init__(self, path: Path) -> None:
        if not INSTALLED:
            raise AudioError(
                f"{shown(path)}: {path.suffix} files are read by the package av: pip install 'wavedistill[media]', or "
                "convert it to wav, flac or ogg"
            )
        import av

        self._path, self._file = path, path.open("rb")
        try:
            self._container = av.open(self._file, "r")
            if not self._container.streams.audio:
                raise AudioError(f"{shown(path)}: holds no sound")
        except av.FFmpegError as error:
            self._file.close()
            raise self._unreadable(error) from error
        except BaseException:
            self._file.close()
            raise
        self._stream = self._container.streams.audio[0]
        self.samplerate, self.channels = int(self._stream.rate), int(self._stream.channels)
        told = self._container.duration if self._container.format.name in TRUSTWORTHY else None
        seconds = (told or 0) / av.time_base
        self.frames = max(0, int((seconds - SLACK_SECONDS) * self.samplerate))
        self._decoded, self._known = self._blocks(), np.zeros((0, self.channels), np.float32)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._container.close()
        self._file.close()

    def read(self, count: int, **_: Any) -> np.ndarray:
        """The next samples (n, channels) in float32, fewer than asked for at the end."""
        while len(self._known) < count and (block := next(self._decoded, None)) is not None:
            self._known = np.concatenate([self._known, block])
        found, self._known = self._known[:count], self._known[count:]
        return found

    def _blocks(self) -> Iterator[np.ndarray]:
        """Samples (n, channels), until there are none or a decoder stumbles."""
        import av

        planes, given = av.AudioResampler(format="fltp"), False
        try:
            for frame in self._container.decode(self._stream):
                for block in planes.resample(frame):
                    yield block.to_ndarray().T
                    given = True
        except av.FFmpegError as error:
            if not given:
                raise self._unreadable(error) from error

    def _unreadable(self, error: Any) -> AudioError:
        return AudioError(
            f"{shown(self._path)}: not readable as audio: {error.strerror.lower()}; convert it to wav, flac or ogg"
        )
