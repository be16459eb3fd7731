"""One pair of the zoo: a family is fitted to a density, a student is distilled from it, and both are measured."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from wavedistill.tools.random import random_stream
from wavedistill.training.losses import one_draw_kl
from wavedistill.zoo.families import FAMILIES, NETWORKS
from wavedistill.zoo.layers import Bend
from wavedistill.zoo.targets import TARGETS, KnownDensity, Table, Target, Waves
from wavedistill.zoo.teachers import Ours, Teacher

BATCH, RATE, LARGEST_GRADIENT = 256, 4e-3, 5.0
TABLE_SHARE = 0.3
"""Of the steps, for the table, whose few rows a longer fit would learn by heart."""
MISSED = 5.0
"""Nats by which a draw of the teacher is less likely under the student, to count as missed by it."""
MEASURED = 2000
"""Draws and held-out points that figures are means over."""
DRAWN = 20000
"""Points in a picture, of what is drawn fast."""
TIMED = 200
"""Points whose draws are counted and timed."""


class Pair(NamedTuple):
    """A family and a density, by their names, and how they are to be fitted.

    Attributes:
        steps: of the fit, and of the distillation, of a family whose pace is 1.
    """

    family: str
    target: str
    seed: int
    steps: int


class Shown(NamedTuple):
    """Points (N, D) of a density that no fit saw, and draws of the teacher and of the student."""

    target: Tensor
    teacher: Tensor
    student: Tensor


def examine(pair: Pair) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Fit, distil and measure a pair: plain values, and points (N, D) of the density, the teacher and the student."""
    began_cpu = time.process_time()
    family, target = FAMILIES[pair.family], TARGETS[pair.target].make()
    numbers = list(FAMILIES).index(pair.family), list(TARGETS).index(pair.target)
    stream = random_stream(pair.seed, *numbers)
    steps = max(1, round(pair.steps * family.pace * (TABLE_SHARE if isinstance(target, Table) else 1)))
    by_density = isinstance(target, Waves) and family.differentiable
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream.initial_seed())
        teacher, student = family.make(target.features), new_student(target.features)
    began = time.perf_counter()
    fit(teacher, target, steps, stream, by_density=by_density)
    fitted = time.perf_counter()
    teacher.eval().requires_grad_(False)
    distil(student, teacher, steps, stream)
    student.requires_grad_(False)
    distilled = time.perf_counter()
    held_out = target.held_out(MEASURED, random_stream(pair.seed, numbers[1]))  # the same for every family
    shown = Shown(held_out, teacher.sample(family.drawn, stream), student.sample(DRAWN, stream))
    figures = {
        "family": pair.family,
        "target": pair.target,
        "fitted_by": "reverse KL" if by_density else "likelihood",
        "steps": steps,
        **measure(teacher, student, target, shown, stream),
        **{f"teacher_{key}": value for key, value in cost(teacher, stream).items()},
        **{f"student_{key}": value for key, value in cost(student, stream).items()},
        "fit_seconds": fitted - began,
        "distil_seconds": distilled - fitted,
        "cpu_seconds": time.process_time() - began_cpu,
    }
    return figures, [points.numpy() for points in (target.sample(DRAWN, stream), shown.teacher, shown.student)]


def new_student(features: int) -> Ours:
    """The student that every family is distilled into, untrained: an inverse autoregressive flow of two steps."""
    return Ours(features, "z", steps=2, bins=8)


def fit(teacher: Teacher, target: Target, steps: int, stream: torch.Generator, *, by_density: bool) -> None:
    """Fit a density by the likelihood of points, or, where only a density is known, by the KL from its own draws."""

    def loss() -> Tensor:
        if by_density:
            assert isinstance(target, KnownDensity)
            x, log_q = teacher.rsample_and_log_prob(torch.randn(BATCH, target.features, generator=stream))
            return one_draw_kl(log_q, target, x).mean() * target.features
        return teacher.loss(target.sample(BATCH, stream))

    _train(teacher, loss, steps)


def distil(student: Ours, teacher: Teacher, steps: int, stream: torch.Generator) -> None:
    """Lessen KL(student || teacher) by the student's own draws, as a student of speech does."""

    def loss() -> Tensor:
        x, log_q = student.rsample_and_log_prob(torch.randn(BATCH, student.features, generator=stream))
        return one_draw_kl(log_q, teacher, x).mean() * student.features

    _train(student, loss, steps)


def _train(model: nn.Module, loss: Callable[[], Tensor], steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
        if norm.isfinite():  # a step without a finite gradient changes nothing
            optimizer.step()
        schedule.step()


@torch.no_grad()
def measure(teacher: Teacher, student: Ours, target: Target, shown: Shown, stream: torch.Generator) -> dict[str, Any]:
    """Figures of a teacher and its student, in nats a point; each KL with its standard error.

    Args:
        teacher: the density that was fitted.
        student: what was distilled from it.
        target: what the teacher was fitted to.
        shown: points of the density that no fit saw, and draws of both.
        stream: of noise.
    """
    x, log_q = student.rsample_and_log_prob(torch.randn(MEASURED, target.features, generator=stream))
    own = shown.teacher[:MEASURED]
    return {
        "entropy": float(-target.log_prob(shown.target).mean()) if isinstance(target, KnownDensity) else None,
        "teacher_nll": float(-teacher.log_prob(shown.target).mean()),
        "student_nll": float(-student.log_prob(shown.target).mean()),
        **_mean("kl", one_draw_kl(log_q, teacher, x) * target.features),
        "missed": float((teacher.log_prob(own) - student.log_prob(own) > MISSED).float().mean()),
    }


def _mean(name: str, values: Tensor) -> dict[str, float]:
    """A mean, and its standard error."""
    return {name: float(values.mean()), f"{name}_error": float(values.std() / len(values) ** 0.5)}


def cost(model: Teacher, stream: torch.Generator) -> dict[str, Any]:
    """Evaluations of networks for one draw and for one density, seconds for a draw, and the number of parameters."""
    began = time.perf_counter()
    with _counted(model) as to_draw, torch.no_grad():
        x = model.sample(TIMED, stream)
    seconds = time.perf_counter() - began
    with _counted(model) as to_evaluate, torch.no_grad():
        model.log_prob(x)
    return {
        "evaluations_to_draw": to_draw[0],
        "evaluations_to_evaluate": to_evaluate[0],
        "seconds_a_draw": seconds / TIMED,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


@contextmanager
def _counted(model: nn.Module) -> Iterator[list[int]]:
    """How often the networks of a model are evaluated for each of `TIMED` points, in the one item of a list."""
    count = [0]

    def add(module: nn.Module, given: tuple[Tensor, ...], found: Any) -> None:
        # Many evaluations may be one call; of a bend, whose input has no dimension of values, each call is one.
        count[0] += 1 if isinstance(module, Bend) else given[0].shape.numel() // given[0].shape[-1] // TIMED

    networks = [module for module in model.modules() if isinstance(module, NETWORKS)]
    inner = {part for network in networks for part in network.modules() if part is not network}
    hooks = [network.register_forward_hook(add) for network in networks if network not in inner]
    yield count
    for hook in hooks:
        hook.remove()
