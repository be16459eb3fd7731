"""How many threads of a CPU compute, and how they wait for each other.

A library's threads wait by spinning, unless told otherwise: beside any other work, each then spends its time on a core
where another of them could get on. Measured on two cores with one other busy process, a stream took 41 times as long
with two threads as with one, and 0.9 times as long if they wait passively (`wavedistill/__init__.py`).
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from wavedistill.networks.network import Network
from wavedistill.tools.progress import note

CORES = torch.get_num_threads()
"""What a process may use: torch's own choice, before a stage settles on fewer for what it computes."""

ROUNDS = 4
STEPS = 4000
"""Samples for the network that is timed, about: as many as are computed at once."""


def settle(wanted: int | None, net: Network, *, backward: bool = False, before: int | None = None) -> int:
    """Set the number of threads that compute on the CPU, and return it.

    Args:
        wanted: the number; None for the fastest, which is measured with the network, here and now.
        net: the network that is to be computed.
        backward: whether its gradients are, too.
        before: the number that what goes on was begun with, which is kept if there are as many cores: results are equal
            to the last bit for one number of threads only.
    """
    free = CORES > 1 and "OMP_NUM_THREADS" not in os.environ
    if wanted is None and free and next(net.parameters()).device.type == "cpu":
        wanted = before if before and before <= CORES else fastest(lambda: _compute(net, backward), [1, CORES])
        note(
            f"computing with {wanted} of {CORES} threads: {'as before' if wanted == before else 'the faster just now'}"
        )
    if wanted is not None:
        torch.set_num_threads(wanted)
    return torch.get_num_threads()


_OPEN: list[int] = []
"""Of `one_thread`s that are open: the number of threads before the first, as often as there are."""
_CHANGE = threading.Lock()


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, torch computes with one thread in each that asks it; the last to leave sets the number from before."""
    with _CHANGE:
        _OPEN.append(_OPEN[0] if _OPEN else torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _CHANGE:
            usual = _OPEN.pop()
            if not _OPEN:
                torch.set_num_threads(usual)


def fastest(work: Callable[[], object], numbers: list[int]) -> int:
    """The number of threads with which work takes least time; each is tried in turn, several times."""
    seconds: dict[int, list[float]] = {number: [] for number in numbers}
    work()  # the first call sets itself up
    for _ in range(ROUNDS):
        for number, taken in seconds.items():
            torch.set_num_threads(number)
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return min(numbers, key=lambda number: sorted(seconds[number])[ROUNDS // 2])


def _compute(net: Network, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        out = net(*net.trial(STEPS)).sum()
        if out.requires_grad:
            torch.autograd.grad(out, [p for p in net.parameters() if p.requires_grad], allow_unused=True)
