"""Threads: the faster number is measured, a training keeps its own, and a busy neighbour halts nobody."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.conftest import RECIPES, REPOSITORY, small_wavenet
from wavedistill.networks.threads import fastest, settle


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def test_the_number_with_which_work_takes_least_time_is_found() -> None:
    for best in (1, 2, 3):
        assert (
            fastest(lambda best=best: time.sleep(0.002 if torch.get_num_threads() == best else 0.01), [1, 2, 3]) == best
        )


def test_what_was_begun_goes_on_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless there are fewer cores now, or another number is asked for."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("wavedistill.networks.threads.fastest", lambda work, numbers: (work(), numbers[-1])[1])
    monkeypatch.setattr("wavedistill.networks.threads.CORES", 4)
    net = small_wavenet(source_channels=2)
    assert settle(None, net, before=3) == torch.get_num_threads() == 3
    assert settle(None, net, backward=True, before=16) == 4
    assert settle(2, net, before=3) == torch.get_num_threads() == 2
    for squeezed in (small_wavenet(source_channels=2, squeeze=2), small_wavenet(squeeze=4, feature_channels=None)):
        assert settle(None, squeezed, backward=True) == 4
    assert settle(None, net) == 4, "fewer threads of an earlier stage are no fewer cores"
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert settle(None, net, before=1) == 2, "who sets the variable has decided"


RATIO = """
import statistics, sys, time
from pathlib import Path
from wavedistill.recipe.loading import load_recipe
from wavedistill.tools.random import random_stream
from wavedistill.models.kinds import build
from wavedistill.sampling.sequential import sample
from wavedistill.speech.conditioning import Conditioning
import torch

model = build(load_recipe(Path(sys.argv[1])), "student", 0)
mel, noise = torch.full((1, 80, 40 + 2 * model.margin), -5.0), model.base.noise((1, 8000), random_stream(0))

def seconds(threads):
    torch.set_num_threads(threads)
    start = time.perf_counter()
    sample(model(Conditioning(mel, model.margin)), noise)
    return time.perf_counter() - start

seconds(1), seconds(int(sys.argv[2]))
print(statistics.median(seconds(int(sys.argv[2])) / seconds(1) for _ in range(5)))
"""


@contextmanager
def busy_neighbours() -> Iterator[None]:
    """A busy process on every core."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has one thread")
def test_a_busy_neighbour_does_not_halt_threads_that_wait_for_each_other() -> None:
    """Beside busy processes, all cores take longer over one's time by spinning than they do by our default."""
    cores = os.cpu_count() or 1
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", RATIO, str(RECIPES / "demo.toml"), str(cores)]

    def ratio(**policy: str) -> float:
        env = {**kept, **policy}
        done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True)
        return float(done.stdout)

    with busy_neighbours():
        found = []
        while len(found) < 3 and not (found and found[-1][0] < 0.8 * found[-1][1]):  # a moment may be unlike others
            found.append((ratio(), ratio(OMP_WAIT_POLICY="ACTIVE")))
    assert found[-1][0] < 0.8 * found[-1][1], found
