"""The directions of flows that take T steps; every loop that steps a network through time lives here.

An autoregressive bijection has one direction that takes T steps: there, the conditioner reads the very side that is
being produced (x of the teacher, or z of a student flow that is inverted). A `Solver` computes that direction.
"""

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from wavedistill.flows.distributions import FlowDistribution
from wavedistill.flows.elementwise import Parameters
from wavedistill.flows.transforms import Autoregressive, Context
from wavedistill.networks.wavenet import WaveNet, WaveNetState
from wavedistill.sampling.compiled import CompiledLoop
from wavedistill.tools.progress import progress

BLOCK = 4096
"""Steps that the compiled loop takes between two looks at the progress."""
STEPS_BLOCK = 128
"""Steps that the cached sampler takes on the same buffers, at least."""
Solver = Callable[[Autoregressive, Tensor, Context, str | None], Tensor]


def naive(flow: Autoregressive, given: Tensor, context: Context, label: str | None = None, start: int = 0) -> Tensor:
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
    wavenet = conditioner_of(flow)
    out = torch.zeros_like(given)
    for t in _steps(start, given.shape[1], label):
        # A window that starts on a feature boundary and holds at least the receptive field, and t itself.
        first = max(0, t - wavenet.receptive_field) // wavenet.repeat
        starts = (first, first * wavenet.repeat)
        window = tuple(part if part is None else part[:, begin:] for part, begin in zip(context, starts, strict=False))
        parameters = flow.step_parameters(out[:, starts[1] : t + 1], window)
        out[:, t] = flow.solve(given[:, t], tuple(parameter[:, -1] for parameter in parameters))
    return out


def repeated(flow: Autoregressive, given: Tensor) -> tuple[Tensor, Parameters]:
    """The sequential direction of one flow of few steps, with any conditioner, by T passes over all of them.

    Pass t makes step t right, whatever the steps after it are, and the last leaves all of them right; unlike a
    `Solver`, it has a gradient.

    Args:
        flow: the autoregressive flow, which is conditioned on nothing.
        given: the known side (B, T).

    Returns:
        The other side (B, T), and the parameters at every step.
    """
    out = torch.zeros_like(given)
    parameters: Parameters = ()
    for _ in range(given.shape[1]):
        parameters = flow.step_parameters(out)
        out = flow.solve(given, parameters)
    return out, parameters


def cached(flow: Autoregressive, given: Tensor, context: Context, label: str | None = None) -> Tensor:
    """The sequential direction of one flow, one network step a sample on buffers of the past; arguments as `naive`."""
    features, source = _covering(flow, given, context)
    steps = _Steps(flow, len(given), 0 if source is None else source.shape[-1])
    return steps.all(given, features, source, label, steps.run)


def graphed(flow: Autoregressive, given: Tensor, context: Context, label: str | None = None) -> Tensor:
    """As `cached`, with a block of its steps recorded once as a CUDA graph and replayed: for affine flows on a GPU.

    Arguments as `naive`. A flow's last recording is kept for as long as the flow lives, and serves again for the same
    batch size.

    Raises:
        ValueError: for a flow whose steps look at values, as a mixture's do.
    """
    if not flow.elementwise.recordable:
        raise ValueError(f"{type(flow.elementwise).__name__} looks at values, and cannot be recorded; use `cached`")
    features, source = _covering(flow, given, context)
    # A recording is good for as long as the weights stay in their place.
    place = conditioner_of(flow).input.weight.data_ptr()
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


def compiled(flow: Autoregressive, given: Tensor, context: Context, label: str | None = None) -> Tensor:
    """The sequential direction of one flow in a compiled loop, on the CPU; arguments as in `naive`."""
    loop = CompiledLoop(flow, conditioner_of(flow), _covering(flow, given, context), len(given))
    blocks = [loop(given[:, t : t + BLOCK]) for t in _steps(0, given.shape[1], label, BLOCK)]
    return torch.cat(blocks, 1)


def fastest(flow: Autoregressive, given: Tensor, context: Context, label: str | None = None) -> Tensor:
    """The sequential direction of one flow by the fastest solver for it and its device; arguments as in `naive`."""
    if conditioner_of(flow).squeeze > 1:
        return naive(flow, given, context, label)
    if given.device.type == "cpu":
        return compiled(flow, given, context, label)
    return (graphed if flow.elementwise.recordable else cached)(flow, given, context, label)


@torch.inference_mode()
def sample(distribution: FlowDistribution, noise: Tensor, solver: Solver = fastest, label: str | None = None) -> Tensor:
    """The waveform x (B, T) that the base noise (B, T) maps to: in parallel where the flow allows, else by the solver.

    A lower temperature is noise scaled by it.
    """
    x = noise
    for transform, context in distribution.steps:
        if isinstance(transform, Autoregressive) and transform.reads == "x":
            x = solver(transform, x, context, label)
        else:
            x, _ = transform(x, context)
    return x


@torch.inference_mode()
def invert(distribution: FlowDistribution, x: Tensor, solver: Solver = fastest) -> tuple[Tensor, Tensor]:
    """The noise z (B, T) of a waveform x (B, T) and the per-step log density (B, T) of x, for a flow of any kind."""
    log_prob = torch.zeros_like(x)
    for transform, context in reversed(distribution.steps):
        if isinstance(transform, Autoregressive) and transform.reads == "z":
            z = solver(transform, x, context, None)
            _, ladj = transform(z, context)
            x, log_prob = z, log_prob - ladj
        else:
            x, ladj = transform.inverse(x, context)
            log_prob = log_prob + ladj
    return x, log_prob + distribution.base.log_prob(x)


def conditioner_of(flow: Autoregressive) -> WaveNet:
    """The network of a flow, which can be evaluated step by step.

    Raises:
        TypeError: if the flow has another kind of conditioner.
    """
    if not isinstance(flow.conditioner, WaveNet):
        raise TypeError(f"sequential sampling steps a WaveNet, not a {type(flow.conditioner).__name__}")
    return flow.conditioner


class _Steps:
    """A block of steps in the sequential direction of a flow, on buffers that stay in place, as a recording needs them.

    Attributes:
        given, out: (size, B) the known side, and the other.
        context: (size / repeat, layers, B, 2 channels) projected features, or None.
        source: (size, B, S), or None.
    """

    def __init__(self, flow: Autoregressive, batch_size: int, source_channels: int) -> None:
        self._flow = weakref.proxy(flow)  # which a recording must not keep
        self.net = net = conditioner_of(flow)
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
        projected = self.net.project(features)
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
            parameters = self._flow.elementwise.parameters(self.net.step(previous, self.state, context, source))
            previous = self.out[i] = self._flow.solve(self.given[i], parameters)
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


def _covering(flow: Autoregressive, given: Tensor, context: Context) -> tuple[Tensor | None, Tensor | None]:
    """Features and source of a context, if there are enough for the known side (B, T).

    Raises:
        ValueError: if there are not, or if the network takes no steps of one sample.
    """
    if conditioner_of(flow).squeeze > 1:
        raise ValueError("a squeezed network takes no steps of one sample: use `naive`")
    features, source = (*context, None, None)[:2]
    for part, steps in ((features, conditioner_of(flow).repeat), (source, 1)):
        if part is not None and (len(part) != len(given) or part.shape[1] * steps < given.shape[1]):
            raise ValueError(
                f"conditioning {tuple(part.shape)}, each for {steps} steps, does not cover {tuple(given.shape)}"
            )
    return features, source


def _steps(start: int, stop: int, label: str | None, stride: int = 1) -> Iterable[int]:
    if label is None:
        return range(start, stop, stride)
    return progress(iterable=range(start, stop, stride), desc=label, unit="sample", unit_scale=stride, leave=False)
