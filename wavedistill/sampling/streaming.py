"""Waveforms of parallel models block by block, as their conditioning becomes known."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Event

import torch
from torch import Tensor

from wavedistill.flows.transforms import Autoregressive
from wavedistill.models.waveform import WaveformModel
from wavedistill.networks.threads import one_thread
from wavedistill.sampling.blocks import Blocks, BlocksByTorch, CompiledBlocks
from wavedistill.sampling.sequential import conditioner_of
from wavedistill.speech.conditioning import Conditioning
from wavedistill.speech.consistency import ConsistentStream, MelConsistency
from wavedistill.speech.linear_prediction import LinearPrediction

STREAM_VALUES = {"cpu": 200_000, "cuda": 4_000_000}
"""Of a layer in a student's block, and its samples, about: few enough for a core's cache, and many beside what a call
costs; or they occupy a GPU."""


@torch.inference_mode()
def stream(
    model: WaveformModel,
    told: Iterable[Conditioning],
    noise: Callable[[int], Tensor],
    *,
    consistency: MelConsistency | None = None,
    threads: int = 1,
) -> Iterator[Tensor]:
    """The waveform of a parallel model block by block, equal to that of one pass, in memory that does not grow.

    Every block goes through all flows while it is in the processor's caches, which makes this the fastest way on a CPU
    too. The frames of a model's margin that follow a frame have to be known before its samples are.

    Args:
        model: a student.
        told: pieces of any number of frames, none around them, of what the model would be called with, its margins
            included.
        noise: gives the next n values (B, n) of the base noise.
        consistency: brings what is drawn to its log-mel, as much later as its latency says.
        threads: of a CPU, which draw as many blocks abreast, each a flow behind the one before: what is drawn is the
            same, and comes as many blocks later. While such a stream is open, torch computes with one thread in each.
            Under autocast or in half precision, one block is drawn at a time all the same.

    Yields:
        Blocks (B, n) of the waveform; together F * hop_length samples.

    Raises:
        ValueError: if the model has a flow that is not inverse autoregressive, or a piece has frames around it.
    """
    draw = _ParallelBlocks(model, noise, consistency)
    pieces = _cut(told, model.margin, draw.most_frames)
    abreast = min(threads, len(draw.flows) + 1) if draw.in_compiled_code else 1
    for wave in map(draw, pieces) if abreast == 1 else _abreast(draw, pieces, abreast):
        if wave.shape[1]:
            yield wave
    yield from draw.rest()


def _cut(told: Iterable[Conditioning], margin: int, most_frames: int) -> Iterator[Conditioning]:
    """Blocks of at most so many frames, with those around them, as soon as they are known; in equal parts."""
    known: Conditioning | None = None  # and not cut off yet, but for the margin before it
    for piece in told:
        if piece.margin:
            raise ValueError(f"a piece of a stream has no frames around it, and this one has {piece.margin}")
        known = piece if known is None else known.followed_by(piece)
        while (ready := known.frames - 2 * margin) > 0:
            count = -(-ready // -(-ready // most_frames))
            yield known.block(margin, count, margin)
            known = known.block(count, known.frames - count)


def slices(noise: Tensor) -> Callable[[int], Tensor]:
    """For `stream`: gives noise (B, T) that is drawn already, piece by piece; a `ValueError` where it ends too soon."""
    position = 0

    def following(count: int) -> Tensor:
        nonlocal position
        position += count
        if position > noise.shape[1]:
            raise ValueError(f"noise for {noise.shape[1]} steps, and the log-mel is of {position} or more")
        return noise[:, position - count : position]

    return following


class _Turn:
    """The turn of a block, which takes each stage after the block before it has."""

    def __init__(self, before: "_Turn | None", stages: int) -> None:
        self._before, self._done = before, [Event() for _ in range(stages)]

    @contextmanager
    def at(self, stage: int) -> Iterator[None]:
        """Wait for one's turn, and give it away at the end, or with all that are left where something fails."""
        if self._before is not None:
            self._before._done[stage].wait()
        try:
            yield
        except BaseException:
            for left in self._done[stage:]:
                left.set()
            raise
        self._done[stage].set()
        if stage == len(self._done) - 1:
            self._before = None  # nor those before it


class _ParallelBlocks:
    """Consecutive blocks of a parallel model's waveform; arguments as in `stream`.

    Attributes:
        most_frames: of a block.
        in_compiled_code: whether the networks are computed by `CompiledBlocks`.
    """

    def __init__(
        self, model: WaveformModel, noise: Callable[[int], Tensor], consistency: MelConsistency | None
    ) -> None:
        self.model, self.noise, self.flows = model, noise, []
        for flow in model.flows:
            if not (isinstance(flow, Autoregressive) and flow.reads == "z"):
                raise ValueError(
                    "only inverse autoregressive flows can be streamed, which remember their past, and "
                    f"this model has {type(flow).__name__} among its flows"
                )
            self.flows.append(flow)
        nets = [conditioner_of(flow) for flow in self.flows]
        # Beside a layer's, a sample has values of its own, its noise and source for instance.
        values_a_frame = model.encoder.hop_length * (1 + max(net.channels / net.squeeze for net in nets))
        weight = next(model.parameters())
        kind = weight.device.type
        self.most_frames = max(1, int(STREAM_VALUES[kind] / values_a_frame))
        precise = weight.dtype in (torch.float32, torch.float64)
        self.in_compiled_code = kind == "cpu" and precise and not torch.is_autocast_enabled(kind)
        self._conditioners: list[Blocks] = []
        self._consistent = None if consistency is None else ConsistentStream(consistency)
        self._phase: Tensor | None = None
        self._tail: Tensor | None = None
        self._turn: _Turn | None = None

    def __call__(self, told: Conditioning) -> Tensor:
        """What is done of the waveform (B, any number), from F frames more and those around."""
        return self.begin(told)()

    def rest(self) -> Iterator[Tensor]:
        """What is left of it (B, any number)."""
        if self._consistent is not None:
            yield from self._consistent.rest()

    def begin(self, told: Conditioning) -> Callable[[], Tensor]:
        """What draws the next block, in any thread while another draws those before it; its noise is drawn now."""
        noise = self.noise(told.frames * self.model.encoder.hop_length)
        if not self._conditioners:
            room = self.most_frames * self.model.encoder.hop_length
            by = CompiledBlocks if self.in_compiled_code else BlocksByTorch
            self._conditioners = [by(conditioner_of(flow), len(noise), room) for flow in self.flows]
        self._turn = _Turn(self._turn, len(self.flows) + 2)
        return partial(self._draw, told, noise, self._turn)

    def _draw(self, told: Conditioning, x: Tensor, turn: _Turn) -> Tensor:
        model = self.model
        with turn.at(0):
            context, self._phase = model.context(told, phase=self._phase)
        features, source = (*context, None)[:2]
        for stage, (flow, conditioner) in enumerate(zip(self.flows, self._conditioners, strict=True), 1):
            with turn.at(stage):
                x, _ = flow.elementwise.to_x(x, *flow.elementwise.parameters(conditioner(x, features, source)))
        with turn.at(len(self.flows) + 1):
            wave = self._waveform(told, x)
            return wave if self._consistent is None else self._consistent.given(wave, told.within(0).mel)

    def _waveform(self, told: Conditioning, residual: Tensor) -> Tensor:
        if not isinstance(self.model.shared, LinearPrediction):
            return self.model.shared(residual)[0]
        coefficients, log_gain = self.model.shared_context(told)
        tail = residual.new_zeros(len(residual), 0, dtype=torch.float64) if self._tail is None else self._tail
        wave = self.model.shared.synthesise(residual, (coefficients, log_gain), tail)
        self._tail = torch.cat([tail, wave], 1)[:, -coefficients.shape[-1] :]
        return wave.to(residual.dtype)


def _abreast(draw: _ParallelBlocks, pieces: Iterable[Conditioning], threads: int) -> Iterator[Tensor]:
    """The blocks of pieces, as many at a time as there are threads."""
    waiting: deque[Future[Tensor]] = deque()
    pool, failed = ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)), None
    begun = (pool.submit(torch.inference_mode()(draw.begin(piece))) for piece in pieces)
    with one_thread():
        try:
            while failed is None:
                try:
                    waiting.append(next(begun))
                except StopIteration:
                    break
                except Exception as error:  # after the blocks that are begun
                    failed = error
                while len(waiting) > threads or (waiting and waiting[0].done()):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
            if failed is not None:
                raise failed
        finally:
            pool.shutdown(cancel_futures=True)
