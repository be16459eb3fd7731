"""Waveforms of parallel models block by block, as their conditioning becomes known."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from wavedistill.flows.transforms import Autoregressive
from wavedistill.models.compiling import require_compiler
from wavedistill.models.waveform import WaveformModel
from wavedistill.networks.wavenet import WaveNetState
from wavedistill.sampling.sequential import conditioner_of
from wavedistill.speech.conditioning import Conditioning
from wavedistill.speech.consistency import MelConsistency
from wavedistill.speech.linear_prediction import LinearPrediction

STREAM_VALUES = {"cpu": 200_000, "cuda": 4_000_000}
"""Of a layer in a student's block, and its samples, about: they fit into a core's cache, or occupy a GPU."""
COMPILED_FRAMES = 80
"""In a block of networks compiled for a CPU: what is left at the end of a sound is shorter, and not compiled."""


@torch.inference_mode()
def stream(
    model: WaveformModel,
    told: Iterable[Conditioning],
    noise: Callable[[int], Tensor],
    *,
    compiled: bool = False,
    consistency: MelConsistency | None = None,
) -> Iterator[Tensor]:
    """The waveform of a parallel model block by block, equal to that of one pass, in memory that does not grow.

    Every block goes through all flows while it is in the processor's caches, which makes this the fastest way on a CPU
    too. The frames of a model's margin that follow a frame have to be known before its samples are.

    Args:
        model: a student.
        told: pieces of any number of frames, none around them, of what the model would be called with, its margins
            included.
        noise: gives the next n values (B, n) of the base noise.
        compiled: whether torch compiles the networks first, for blocks of full length: faster after half a minute.
        consistency: brings what is drawn to its log-mel, as much later as its latency says.

    Yields:
        Blocks (B, n) of the waveform; together F * hop_length samples.

    Raises:
        ValueError: if the model has a flow that is not inverse autoregressive, or a piece has frames around it.
        RecipeError: if it is to be compiled, and there is no compiler.
    """
    blocks = _blocks(_ParallelBlocks(model, noise, compiled), told, model.margin)
    if consistency is not None:
        yield from consistency.stream(blocks)
    else:
        yield from (wave for wave, _ in blocks)


def _blocks(draw: "_ParallelBlocks", told: Iterable[Conditioning], margin: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks (B, n * hop_length) of the waveform, and their log-mels (B, n_mels, n)."""
    known: Conditioning | None = None  # and not drawn yet, but for the margin before it
    for piece in told:
        if piece.margin:
            raise ValueError(f"a piece of a stream has no frames around it, and this one has {piece.margin}")
        known = piece if known is None else known.followed_by(piece)
        while (ready := known.frames - 2 * margin) > 0:
            count = min(draw.most_frames, ready)
            here = known.block(margin, count, margin)
            yield draw(here), here.within(0).mel
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


class _ParallelBlocks:
    """Consecutive blocks of a parallel model's waveform; arguments as in `stream`."""

    def __init__(self, model: WaveformModel, noise: Callable[[int], Tensor], compiled: bool) -> None:
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
        kind = next(model.parameters()).device.type
        most = int(STREAM_VALUES[kind] / values_a_frame)
        self.most_frames = max(1, min(most, COMPILED_FRAMES) if compiled and kind == "cpu" else most)
        self._parameters = [flow.step_parameters for flow in self.flows]
        # Every other length would be compiled anew.
        self._parameters_of_full_blocks = self._parameters
        if compiled:
            require_compiler(next(model.parameters()).device)
            self._parameters_of_full_blocks = [torch.compile(each, dynamic=False) for each in self._parameters]
        self._states: list[WaveNetState] = []
        self._phase: Tensor | None = None
        self._tail: Tensor | None = None

    def __call__(self, told: Conditioning) -> Tensor:
        """The next F * hop_length samples, from F frames and those around them."""
        model, frames = self.model, told.frames
        context, self._phase = model.context(told, phase=self._phase)
        features, source = (*context, None)[:2]
        # What is compiled for one layout in memory, a view for instance, is compiled anew for another.
        x = self.noise(frames * model.encoder.hop_length).clone(memory_format=torch.contiguous_format)
        if not self._states:
            room = self.most_frames * model.encoder.hop_length
            self._states = [WaveNetState(conditioner_of(flow), len(x), room) for flow in self.flows]
        parameters = self._parameters_of_full_blocks if frames == self.most_frames else self._parameters
        for flow, parameters_of, state in zip(self.flows, parameters, self._states, strict=True):
            x, _ = flow.elementwise.to_x(x, *parameters_of(x, (features, source, state)))
        if not isinstance(model.shared, LinearPrediction):
            return model.shared(x)[0]
        coefficients, log_gain = model.shared_context(told)
        tail = x.new_zeros(len(x), 0, dtype=torch.float64) if self._tail is None else self._tail
        wave = model.shared.synthesise(x, (coefficients, log_gain), tail)
        self._tail = torch.cat([tail, wave], 1)[:, -coefficients.shape[-1] :]
        return wave.to(x.dtype)
