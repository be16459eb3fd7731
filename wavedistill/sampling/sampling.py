"""The ways to draw a waveform; every loop that steps a network through time lives here.

An autoregressive bijection has one direction that takes T steps: there, the conditioner reads the very side that is
being produced (x of the teacher, or z of a student flow that is inverted). A `Solver` computes that direction.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import torch
from torch import Tensor

from wavedistill.flows.flows import (
    Affine,
    Autoregressive,
    Composition,
    Context,
    FlowDistribution,
    Parameters,
    Transform,
)
from wavedistill.models.models import ConditionerNetwork, WaveformModel, require_compiler
from wavedistill.networks.wavenet import WaveNetState
from wavedistill.sampling.compiled import CompiledLoop
from wavedistill.speech.linear_prediction import LinearPrediction
from wavedistill.tools.progress import progress

BLOCK = 4096
"""Steps that the compiled loop takes between two looks at the progress."""
STEPS_BLOCK = 128
"""Steps that the cached sampler takes on the same buffers, at least."""
STREAM_VALUES = {"cpu": 100_000, "cuda": 4_000_000}
"""Activations of a layer in a student's block, about: they fit into a core's cache, or occupy a GPU."""
Solver = Callable[[Autoregressive, Tensor, tuple[Tensor | None, ...], str | None], Tensor]


def naive(
    flow: Autoregressive,
    given: Tensor,
    context: tuple[Tensor | None, ...],
    label: str | None = None,
    start: int = 0,
) -> Tensor:
    """The sequential direction of one flow, by running the network over its receptive field again for every sample.

    The reference that every faster solver must equal; never optimised.

    Args:
        flow: the autoregressive flow.
        given: the known side (B, T).
        context: conditioning features (B, F', C) and source (B, T, S), as the network takes them.
        label: of a progress bar, or None for none.
        start: the first position computed, after zeros; lets the cost be timed where it no longer grows.

    Returns:
        The other side (B, T).
    """
    wavenet = conditioner_of(flow).wavenet
    out = torch.zeros_like(given)
    for t in _steps(start, given.shape[1], label):
        # A window that starts on a feature boundary and holds at least the receptive field, and t itself.
        first = max(0, t - wavenet.receptive_field) // wavenet.repeat
        starts = (first, first * wavenet.repeat)
        window = tuple(part if part is None else part[:, begin:] for part, begin in zip(context, starts, strict=False))
        parameters = flow.conditioner(out[:, starts[1] : t + 1], window)
        out[:, t] = _solve(flow, given[:, t], tuple(parameter[:, -1] for parameter in parameters))
    return out


def cached(flow: Autoregressive, given: Tensor, context: tuple[Tensor | None, ...], label: str | None = None) -> Tensor:
    """The sequential direction of one flow, one network step a sample on buffers of the past; arguments as `naive`."""
    features, source = _covering(flow, given, context)
    steps = _Steps(flow, len(given), 0 if source is None else source.shape[-1])
    return steps.all(given, features, source, label, steps.run)


def graphed(
    flow: Autoregressive, given: Tensor, context: tuple[Tensor | None, ...], label: str | None = None
) -> Tensor:
    """As `cached`, with a block of its steps recorded once as a CUDA graph and replayed: for affine flows on a GPU.

    A flow's last recording is kept for as long as the flow lives, and serves again for the same batch size.

    Raises:
        ValueError: for a mixture, whose inverse is found by a search that looks at values.
    """
    if not isinstance(flow.elementwise, Affine):
        raise ValueError("only the steps of an affine flow can be recorded; use `cached` for a mixture")
    features, source = _covering(flow, given, context)
    # A recording is good for as long as the weights stay in their place.
    place = conditioner_of(flow).wavenet.input.weight.data_ptr()
    use = (place, len(given), 0 if source is None else source.shape[-1])
    if flow not in _RECORDINGS or _RECORDINGS[flow][0] != use:
        _RECORDINGS[flow] = (use, *_recorded(flow, *use[1:]))
    _, steps, replay = _RECORDINGS[flow]
    steps.reset()
    return steps.all(given, features, source, label, lambda count: replay())


def _recorded(flow: Autoregressive, batch_size: int, source_channels: int) -> tuple["_Steps", Callable[[], None]]:
    """Steps, and their recording."""
    with torch.inference_mode(False), torch.no_grad():  # buffers that may be written in any mode
        steps = _Steps(flow, batch_size, source_channels)
        return steps, _record(lambda: steps.run(steps.size), steps.given.device)


_RECORDINGS: weakref.WeakKeyDictionary[Autoregressive, tuple[tuple[int, ...], "_Steps", Callable[[], None]]]
_RECORDINGS = weakref.WeakKeyDictionary()
"""Of each flow: what it was made for, its steps, and what replays them. None of them may hold the flow."""


def _record(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What does on a GPU, in one go, what a function does without ever looking at a value."""
    if device.type != "cuda":
        raise ValueError(f"steps are recorded on a CUDA GPU, and the network is on {device}")
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries set themselves up before a recording, not in it
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Only what this thread does: another may be waiting for other GPUs meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
    return graph.replay


def compiled(
    flow: Autoregressive, given: Tensor, context: tuple[Tensor | None, ...], label: str | None = None
) -> Tensor:
    """The sequential direction of one flow in a compiled loop, on the CPU; arguments as in `naive`."""
    loop = CompiledLoop(flow, conditioner_of(flow), _covering(flow, given, context), len(given))
    blocks = [loop(given[:, t : t + BLOCK]) for t in _steps(0, given.shape[1], label, BLOCK)]
    return torch.cat(blocks, 1)


def fastest(
    flow: Autoregressive, given: Tensor, context: tuple[Tensor | None, ...], label: str | None = None
) -> Tensor:
    """The sequential direction of one flow by the fastest solver of its device; arguments as in `naive`."""
    if given.device.type == "cpu":
        return compiled(flow, given, context, label)
    # The search of a mixture's inverse ends where its values say so, which a recording cannot.
    return (graphed if isinstance(flow.elementwise, Affine) else cached)(flow, given, context, label)


@torch.inference_mode()
def sample(distribution: FlowDistribution, noise: Tensor, solver: Solver = fastest, label: str | None = None) -> Tensor:
    """The waveform x (B, T) that the base noise (B, T) maps to: in parallel where the flow allows, else by the solver.

    A lower temperature is noise scaled by it.
    """
    x = noise
    for part, context in _flat(distribution.transform, distribution.context):
        if isinstance(part, Autoregressive) and part.reads == "x":
            x = solver(part, x, context, label)
        else:
            x, _ = part(x, context)
    return x


@torch.inference_mode()
def stream(
    model: WaveformModel, mel: Iterable[Tensor], noise: Callable[[int], Tensor], *, compiled: bool = False
) -> Iterator[Tensor]:
    """The waveform of a parallel model block by block, equal to that of one pass, in memory that does not grow.

    Every block goes through all flows while it is in the processor's caches, which makes this the fastest way on a CPU
    too. The frames of a model's margin that follow a frame have to be known before its samples are.

    Args:
        model: a student.
        mel: pieces (B, n_mels, any number of frames) of what the model would be called with, padding included.
        noise: gives the next n values (B, n) of the base noise.
        compiled: whether torch compiles the networks first, for blocks of full length: faster after half a minute.

    Yields:
        Blocks (B, n) of the waveform, each a whole number of hops; together F * hop_length samples.

    Raises:
        ValueError: if the model has a flow that is not inverse autoregressive.
        RecipeError: if it is to be compiled, and there is no compiler.
    """
    draw, margin = _ParallelBlocks(model, noise, compiled), model.margin
    known: Tensor | None = None  # and not drawn yet, but for the margin before it
    for piece in mel:
        known = piece if known is None else torch.cat([known, piece], -1)
        while (ready := known.shape[-1] - 2 * margin) > 0:
            count = min(draw.most_frames, ready)
            yield draw(known[..., : count + 2 * margin])
            known = known[..., count:]


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
        for part in model.flows.parts:
            if not (isinstance(part, Autoregressive) and part.reads == "z"):
                raise ValueError(
                    "only inverse autoregressive flows can be streamed, which remember their past, and "
                    f"this model has {type(part).__name__} among its flows"
                )
            self.flows.append(part)
        widest = max(conditioner_of(flow).wavenet.channels for flow in self.flows)
        values_a_frame = model.encoder.hop_length * widest
        self.most_frames = max(1, STREAM_VALUES[next(model.parameters()).device.type] // values_a_frame)
        self._nets = [conditioner_of(flow) for flow in self.flows]
        # Every other length would be compiled anew.
        self._nets_of_full_blocks = self._nets
        if compiled:
            require_compiler(next(model.parameters()).device)
            self._nets_of_full_blocks = [
                cast(ConditionerNetwork, torch.compile(net, dynamic=False)) for net in self._nets
            ]
        self._states: list[WaveNetState] = []
        self._phase: Tensor | None = None
        self._tail: Tensor | None = None

    def __call__(self, mel: Tensor) -> Tensor:
        """The next F * hop_length samples, from log-mel (B, n_mels, F + 2 margin)."""
        model, frames = self.model, mel.shape[-1] - 2 * self.model.margin
        context, self._phase = model.context(mel, phase=self._phase)
        # What is compiled for one layout in memory, a view for instance, is compiled anew for another.
        x = self.noise(frames * model.encoder.hop_length).clone(memory_format=torch.contiguous_format)
        if not self._states:
            room = self.most_frames * model.encoder.hop_length
            self._states = [WaveNetState(net.wavenet, len(x), room) for net in self._nets]
        nets = self._nets_of_full_blocks if frames == self.most_frames else self._nets
        for flow, net, state in zip(self.flows, nets, self._states, strict=True):
            x, _ = flow.elementwise.to_x(x, *net(x, context, state))
        if not isinstance(model.shared, LinearPrediction):
            return model.shared(x)[0]
        coefficients, log_gain = model.shared_context(mel)
        tail = x.new_zeros(len(x), 0, dtype=torch.float64) if self._tail is None else self._tail
        wave = model.shared.synthesise(x, (coefficients, log_gain), tail)
        self._tail = torch.cat([tail, wave], 1)[:, -coefficients.shape[-1] :]
        return wave.to(x.dtype)


@torch.inference_mode()
def invert(distribution: FlowDistribution, x: Tensor, solver: Solver = fastest) -> tuple[Tensor, Tensor]:
    """The noise z (B, T) of a waveform x (B, T) and the per-step log density (B, T) of x, for a flow of any kind."""
    log_prob = torch.zeros_like(x)
    for part, context in reversed(_flat(distribution.transform, distribution.context)):
        if isinstance(part, Autoregressive) and part.reads == "z":
            z = solver(part, x, context, None)
            _, ladj = part(z, context)
            x, log_prob = z, log_prob - ladj
        else:
            x, ladj = part.inverse(x, context)
            log_prob = log_prob + ladj
    return x, log_prob + distribution.base.log_prob(x)


def _flat(transform: Transform, context: Context) -> list[tuple[Transform, Context]]:
    """The simple transforms of a composition, each with its context, from z to x."""
    if not isinstance(transform, Composition):
        return [(transform, context)]
    return [simple for part, own in transform.conditioned(context) for simple in _flat(part, own)]


def conditioner_of(flow: Autoregressive) -> ConditionerNetwork:
    """The network of a flow, which can be evaluated step by step.

    Raises:
        TypeError: if the flow has another kind of conditioner.
    """
    if not isinstance(flow.conditioner, ConditionerNetwork):
        raise TypeError(f"sequential sampling steps a ConditionerNetwork, not a {type(flow.conditioner).__name__}")
    return flow.conditioner


class _Steps:
    """A block of steps in the sequential direction of a flow, on buffers that stay in place, as a recording needs them.

    Attributes:
        given, out: (size, B) the known side, and the other.
        context: (size / repeat, layers, B, 2 channels) projected features, or None.
        source: (size, B, S), or None.
    """

    def __init__(self, flow: Autoregressive, batch_size: int, source_channels: int) -> None:
        self.conditioner = conditioner_of(flow)
        self._solve = flow.elementwise.to_x if flow.reads == "x" else flow.elementwise.to_z
        net = self.conditioner.wavenet
        self.repeat = net.repeat
        self.size = -(-STEPS_BLOCK // net.repeat) * net.repeat
        self.state = WaveNetState(net, batch_size, self.size)
        zeros = net.input.weight.new_zeros
        self.given, self.out = (zeros(self.size, batch_size) for _ in range(2))
        shape = (self.size // net.repeat, len(net.dilations), batch_size, 2 * net.channels)
        self.context = None if net.context is None else zeros(shape)
        self.source = zeros(self.size, batch_size, source_channels) if source_channels else None
        self.previous = zeros(batch_size)

    def load(self, given: Tensor, features: Tensor | None, source: Tensor | None) -> None:
        """Put in what the next steps need, each (B, ...) and for at most `size` of them."""
        self.given[: given.shape[1]] = given.t()
        projected = self.conditioner.wavenet.project(features)
        if self.context is not None and projected is not None:
            self.context[: len(projected)] = projected
        if self.source is not None and source is not None:
            self.source[: source.shape[1]] = source.transpose(0, 1)

    def run(self, count: int) -> None:
        """The next steps."""
        previous = self.previous
        for i in range(count):
            context = None if self.context is None else self.context[i // self.repeat]
            source = None if self.source is None else self.source[i]
            parameters = self.conditioner.step(previous, self.state, context, source)
            previous = self.out[i] = self._solve(self.given[i], *parameters)[0]
        self.previous.copy_(previous)
        self.state.advance(count)

    def reset(self) -> None:
        """Forget the past."""
        for buffer in (self.previous, *self.state.history):
            buffer.zero_()

    def all(
        self,
        given: Tensor,
        features: Tensor | None,
        source: Tensor | None,
        label: str | None,
        run: Callable[[int], None],
    ) -> Tensor:
        """The other side (B, T) of a whole known side (B, T), where `run` takes the steps that are loaded."""
        out = torch.empty_like(given)
        for t in _steps(0, given.shape[1], label, self.size):
            block = slice(t, t + self.size)
            rows = slice(t // self.repeat, (t + self.size) // self.repeat)
            here = given[:, block]
            self.load(
                here, None if features is None else features[:, rows], None if source is None else source[:, block]
            )
            run(here.shape[1])
            out[:, block] = self.out[: here.shape[1]].t()
        return out


def _covering(
    flow: Autoregressive, given: Tensor, context: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Features and source of a context, if there are enough for the known side (B, T).

    Raises:
        ValueError: if there are not.
    """
    features, source = (*context, None, None)[:2]
    for part, steps in ((features, conditioner_of(flow).wavenet.repeat), (source, 1)):
        if part is not None and (len(part) != len(given) or part.shape[1] * steps < given.shape[1]):
            raise ValueError(
                f"conditioning {tuple(part.shape)}, each for {steps} steps, does not cover {tuple(given.shape)}"
            )
    return features, source


def _solve(flow: Autoregressive, given: Tensor, parameters: Parameters) -> Tensor:
    return (flow.elementwise.to_x if flow.reads == "x" else flow.elementwise.to_z)(given, *parameters)[0]


def _steps(start: int, stop: int, label: str | None, stride: int = 1) -> Iterable[int]:
    if label is None:
        return range(start, stop, stride)
    return progress(iterable=range(start, stop, stride), desc=label, unit="sample", unit_scale=stride, leave=False)
