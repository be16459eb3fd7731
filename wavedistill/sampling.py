"""The ways to draw a waveform; every loop that steps a network through time lives here.

An autoregressive bijection has one direction that takes T steps: there, the conditioner reads the very side that is
being produced (x of the teacher, or z of a student flow that is inverted). A `Solver` computes that direction.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from wavedistill.compiled import CompiledLoop
from wavedistill.flows import Autoregressive, Composition, Context, FlowDistribution, Parameters, Transform
from wavedistill.models import ConditionerNetwork
from wavedistill.progress import progress

BLOCK = 4096
"""Steps that the compiled loop takes between two looks at the progress."""
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
    """The sequential direction of one flow, one network step a sample with ring buffers; arguments as in `naive`."""
    conditioner = conditioner_of(flow)
    state = conditioner.initial_state(len(given), context)
    given_steps = given.t().contiguous()  # (B, T) -> (T, B)
    out = torch.empty_like(given_steps)
    previous = torch.zeros_like(given_steps[0])
    for t in _steps(0, len(given_steps), label):
        parameters, state = conditioner.step(previous, state)
        previous = out[t] = _solve(flow, given_steps[t], parameters)
    return out.t()


def compiled(
    flow: Autoregressive, given: Tensor, context: tuple[Tensor | None, ...], label: str | None = None
) -> Tensor:
    """The sequential direction of one flow in a compiled loop, on the CPU; arguments as in `naive`."""
    loop = CompiledLoop(flow, conditioner_of(flow), context, len(given))
    blocks = [loop(given[:, t : t + BLOCK]) for t in _steps(0, given.shape[1], label, BLOCK)]
    return torch.cat(blocks, 1)


def fastest(
    flow: Autoregressive, given: Tensor, context: tuple[Tensor | None, ...], label: str | None = None
) -> Tensor:
    """The sequential direction of one flow by the fastest solver of its device; arguments as in `naive`."""
    return (compiled if given.device.type == "cpu" else cached)(flow, given, context, label)


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


def _solve(flow: Autoregressive, given: Tensor, parameters: Parameters) -> Tensor:
    return (flow.elementwise.to_x if flow.reads == "x" else flow.elementwise.to_z)(given, *parameters)[0]


def _steps(start: int, stop: int, label: str | None, stride: int = 1) -> Iterable[int]:
    if label is None:
        return range(start, stop, stride)
    return progress(iterable=range(start, stop, stride), desc=label, unit="sample", unit_scale=stride, leave=False)
