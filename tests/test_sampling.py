"""Every sampler equals the naive one, which equals the definition."""

import gc
import random
import subprocess
import sys
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch

from tests.conftest import RECIPES, noise, small_flow, small_mel, small_model
from wavedistill.flows.bases import StandardLogistic, StandardNormal
from wavedistill.flows.elementwise import Affine, Elementwise, MixtureCdf, StepConstants, solve_step
from wavedistill.flows.transforms import Autoregressive, Scale
from wavedistill.recipe.recipe import Recipe
from wavedistill.sampling import streaming
from wavedistill.sampling.blocks import CompiledBlocks
from wavedistill.sampling.compiled import AHEAD
from wavedistill.sampling.sequential import Solver, cached, compiled, conditioner_of, graphed, invert, naive, sample
from wavedistill.sampling.streaming import STREAM_VALUES, slices, stream
from wavedistill.sampling.tiles import exponential
from wavedistill.speech.conditioning import Conditioning

SOLVERS = [cached, compiled]
MIXTURES = [MixtureCdf(StandardNormal(), 3, -5.0), MixtureCdf(StandardLogistic(), 3, -5.0)]


def split(told: Conditioning, frames: int | list[int]) -> list[Conditioning]:
    """In pieces for a stream, those around it included."""
    return [Conditioning(piece, 0) for piece in told.mel.split(frames, -1)]


def narrow(told: Conditioning) -> Conditioning:
    return Conditioning(told.mel.float(), told.margin)


def flow_of(elementwise: Elementwise, reads: str, **changes: Any) -> Autoregressive:
    flow = small_flow(reads, out_channels=elementwise.outputs, **changes)
    return Autoregressive(flow.conditioner, reads, elementwise)


@pytest.mark.parametrize("length", [1, 2, 29, 40])
@pytest.mark.parametrize("kernel_size", [2, 3])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_equals_naive_equals_definition(solver: Solver, length: int, kernel_size: int) -> None:
    """x_t = mu(x_<t) + sigma(x_<t) z_t, where the parallel pass over the finished x gives mu and sigma."""
    flow = small_flow("x", kernel_size=kernel_size, source_channels=2)
    context, z = (noise(2, 10, 3), noise(2, 40, 2)), noise(2, length)
    with torch.no_grad():
        slow, fast = naive(flow, z, context), solver(flow, z, context)
        shift, log_scale = flow.step_parameters(slow, context)
    torch.testing.assert_close(slow, shift + log_scale.exp() * z, rtol=0, atol=1e-9)
    assert (slow - fast).abs().max() < 1e-9


@pytest.mark.parametrize("elementwise", [Affine(-5.0), *MIXTURES])
@pytest.mark.parametrize("reads", ["x", "z"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_equals_naive_for_every_density(solver: Solver, reads: str, elementwise: Elementwise) -> None:
    flow, context, given = flow_of(elementwise, reads), (noise(3, 10, 3),), 3 * noise(3, 37)
    with torch.no_grad():
        slow = naive(flow, given, context)
        assert (solver(flow, given, context) - slow).abs().max() < 1e-9 * slow.abs().max()


@pytest.mark.parametrize("elementwise", [Affine(-5.0), *MIXTURES])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_in_float32_equals_naive_in_float32(solver: Solver, elementwise: Elementwise) -> None:
    """Steps whose small differences do not grow: the weights of a network that contracts."""
    flow, context, given = flow_of(elementwise, "x"), (noise(2, 10, 3).float(),), noise(2, 37).float()
    for parameter in flow.parameters():
        parameter.data *= 0.5
    flow.float()
    with torch.no_grad():
        slow = naive(flow, given, context)
        assert (solver(flow, given, context) - slow).abs().max() < 1e-5 * slow.abs().max()


@pytest.mark.parametrize("solver", SOLVERS)
def test_unconditional_sampling(solver: Solver) -> None:
    flow, z = small_flow("x", feature_channels=None, repeat=1), noise(2, 25)
    with torch.no_grad():
        assert (naive(flow, z, ()) - solver(flow, z, ())).abs().max() < 1e-9


def test_compiled_loop_in_blocks_is_the_loop_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, context, z = small_flow("x"), (noise(2, 10, 3),), noise(2, 37)
    whole = compiled(flow, z, context)
    monkeypatch.setattr("wavedistill.sampling.sequential.BLOCK", 5)
    assert torch.equal(compiled(flow, z, context), whole)


@pytest.mark.parametrize("kernel_size", [2, 3])
def test_compiled_loop_past_the_steps_it_computes_ahead(kernel_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dilations on both sides of AHEAD, features that change within it, and calls that end anywhere."""
    flow = small_flow("x", layers=9, dilation_cycle=8, repeat=5, kernel_size=kernel_size)
    context, z = (noise(1, 80, 3),), noise(1, 400)
    with torch.no_grad():
        whole = compiled(flow, z, context)
        assert max(conditioner_of(flow).dilations) > AHEAD
        assert (cached(flow, z, context) - whole).abs().max() < 1e-9 * whole.abs().max()
        monkeypatch.setattr("wavedistill.sampling.sequential.BLOCK", 37)
        assert torch.equal(compiled(flow, z, context), whole)


@pytest.mark.parametrize("component", [StandardNormal(), StandardLogistic()])
def test_compiled_mixture_is_exact_far_out(component: StandardNormal | StandardLogistic) -> None:
    """Tails where the probability of either side underflows, valleys between far apart components, small scales."""
    z = torch.tensor([-300.0, -40, -8, 0, 1e-3, 8, 40, 300]).double()
    for spread, min_log_scale in ((0.5, -1.0), (10.0, -6.0)):
        raw = torch.cat([noise(3), spread * noise(3, seed=1), noise(3, seed=2) + min_log_scale])
        assert_steps_equal(MixtureCdf(component, 3, min_log_scale), raw, z)


@pytest.mark.parametrize("min_log_scale", [-5.0, -1.0])
def test_compiled_affine_step_is_exact(min_log_scale: float) -> None:
    """Scales near their bound and far above it."""
    for raw in ([0.3, -9.0], [-2.0, min_log_scale], [1.0, 22.0]):
        assert_steps_equal(Affine(min_log_scale), torch.tensor(raw).double(), noise(8))


def assert_steps_equal(elementwise: Elementwise, raw: torch.Tensor, z: torch.Tensor) -> None:
    """In both directions, compiled code gives what torch gives."""
    parameters = elementwise.parameters(raw.expand(len(z), -1))
    x, _ = elementwise.to_x(z, *parameters)
    for given, other, to_x in ((z, x, True), (x, elementwise.to_z(x, *parameters)[0], False)):
        found = [_step(raw.numpy(), value, elementwise.step(to_x)) for value in given.tolist()]
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), other, rtol=1e-9, atol=1e-9)


@numba.njit
def _step(raw: np.ndarray, given: float, constants: StepConstants) -> float:
    return solve_step(raw, given, constants)


def test_a_step_is_for_compiled_code() -> None:
    with pytest.raises(NotImplementedError, match="compiled"):
        solve_step(np.zeros(2), 0.0, Affine(-5.0).step(True))


@pytest.mark.parametrize("x", [0.0, 1e-8, -1e-8, 0.3, -0.7, 5.0, -20.0, 86.0, -86.0])
def test_compiled_exponential_is_exact_to_rounding(x: float) -> None:
    values = np.array([x, -x] * 9, np.float32)
    found = values.copy()
    _exponential_in_place(found)
    np.testing.assert_allclose(found, np.exp(values.astype(np.float64)), rtol=2.5e-7)


@numba.njit
def _exponential_in_place(values: np.ndarray) -> None:
    exponential(values)


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_model_sampling_and_inversion_with_either_solver(kind: str) -> None:
    distribution, z = small_model(kind)(small_mel(2, 5)), noise(2, 37)
    x = sample(distribution, z, naive)
    for solver in (naive, *SOLVERS):
        assert (sample(distribution, z, solver) - x).abs().max() < 1e-9
        found, _ = invert(distribution, x, solver)
        assert (found - z).abs().max() < 1e-9


def test_a_squeezed_model_is_inverted_by_the_naive_solver_alone() -> None:
    distribution, z = small_model("squeezed")(small_mel(2, 5)), noise(2, 37)
    found, log_prob = invert(distribution, sample(distribution, z))
    assert (found - z).abs().max() < 1e-9
    assert (log_prob - distribution.rsample_and_log_prob_steps(z)[1]).abs().max() < 1e-9
    for solver in SOLVERS:
        with pytest.raises(ValueError, match="use `naive`"):
            invert(distribution, z, solver)


def test_student_sampling_is_its_one_pass() -> None:
    q, z = small_model("student")(small_mel(2, 5)), noise(2, 37)
    with torch.no_grad():
        assert torch.equal(sample(q, z), q.rsample_and_log_prob(z)[0])


@pytest.mark.parametrize("pieces", [1, 2, 5, 40])
@pytest.mark.parametrize("pitch", [True, False])
@pytest.mark.parametrize("kind", ["student", "squeezed"])
def test_a_stream_equals_one_pass(pieces: int, pitch: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The past of every layer, of linear prediction and of the source's phase cross the borders of blocks."""
    monkeypatch.setitem(STREAM_VALUES, "cpu", 24 * 7 if kind == "student" else 24 * 4)
    model = small_model(kind, pitch=pitch)
    mel, z = small_mel(2, 38).within(model.margin), noise(2, 38 * 8)
    blocks = list(stream(model, split(mel, pieces), slices(z)))
    assert max(block.shape[1] for block in blocks) <= 24
    torch.testing.assert_close(torch.cat(blocks, 1), sample(model(mel), z), rtol=0, atol=1e-9)


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("kind", ["student", "squeezed"])
def test_blocks_drawn_abreast_are_those_drawn_one_by_one(
    threads: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although flows take unequal time; and torch has as many threads of its own after it as before."""
    monkeypatch.setitem(STREAM_VALUES, "cpu", 24 * 7 if kind == "student" else 24 * 4)
    model, before = small_model(kind), torch.get_num_threads()
    mel, z = small_mel(2, 98).within(model.margin), noise(2, 98 * 8)
    expected = list(stream(model, split(mel, 40), slices(z)))
    working, most, locks, original = 0, list[int](), defaultdict[object, Any](threading.Lock), CompiledBlocks.__call__

    def slowed(self: CompiledBlocks, *given: Any) -> torch.Tensor:
        nonlocal working
        assert locks[self].acquire(blocking=False), "two blocks in one flow at a time"
        working += 1
        most.append(working)
        time.sleep(random.random() / 500)
        found = original(self, *given)
        working -= 1
        locks[self].release()
        return found

    monkeypatch.setattr(CompiledBlocks, "__call__", slowed)
    found = list(stream(model, split(mel, 40), slices(z), threads=threads))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert 1 < max(most) <= threads
    assert torch.get_num_threads() == before


def test_a_model_in_half_precision_is_streamed_by_torch() -> None:
    """Compiled code is of float32 and float64."""
    model, mel, z = small_model("student"), small_mel(1, 38), noise(1, 38 * 8)
    expected = torch.cat(list(stream(model, [Conditioning(mel.mel, 0)], slices(z))), 1)
    told = Conditioning(mel.mel.bfloat16(), 0)
    found = torch.cat(list(stream(model.bfloat16(), [told], slices(z.bfloat16()), threads=2)), 1)
    assert found.dtype == torch.bfloat16
    assert 0 < (found - expected).square().mean() < 0.01 * expected.square().mean()


def test_blocks_are_equal_parts_of_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small rest would take nearly as long as a whole block."""
    monkeypatch.setitem(STREAM_VALUES, "cpu", 24 * 7)  # three frames
    model = small_model("student")
    mel = small_mel(1, 98).within(model.margin)
    drawn = stream(model, split(mel, [7 + 2 * model.margin, 91]), slices(noise(1, 98 * 8)))
    assert [block.shape[1] // 8 for block in drawn] == [3, 2, 2, *[3] * 29, 2, 2]


def test_many_blocks_abreast_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STREAM_VALUES, "cpu", 24 * 7)
    model, most = small_model("student"), 0
    mel = small_mel(1, 98).within(model.margin)
    for _ in stream(model, split(mel, 40), slices(noise(1, 98 * 8)), threads=2):
        gc.collect()
        most = max(most, sum(type(each) is streaming._Turn for each in gc.get_objects()))
    assert most <= 6


def test_streams_that_overlap_leave_torch_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first to end is not the last."""
    monkeypatch.setitem(STREAM_VALUES, "cpu", 24 * 7)
    model, before = small_model("student"), torch.get_num_threads()
    mel = small_mel(1, 98).within(model.margin)
    torch.set_num_threads(2)
    try:
        first, second = (stream(model, split(mel, 40), slices(noise(1, 784)), threads=2) for _ in range(2))
        next(first), next(second)
        assert torch.get_num_threads() == 1
        first.close()
        assert torch.get_num_threads() == 1
        assert len(list(second)) > 10
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_error_in_one_of_the_blocks_abreast_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STREAM_VALUES, "cpu", 24 * 7)
    model, before = small_model("student"), torch.get_num_threads()
    told = small_mel(1, 98).within(model.margin)
    drawn = stream(model, split(told, 40), slices(noise(1, 400)), threads=3)
    assert sum(next(drawn).shape[1] for _ in range(16)) == 384, "what was begun before it is drawn"
    with pytest.raises(ValueError, match="noise for 400 steps"):
        next(drawn)
    right, calls = CompiledBlocks.__call__, defaultdict[object, int](int)

    def failing(self: CompiledBlocks, *given: Any) -> torch.Tensor:
        calls[self] += 1
        if [self] == list(calls)[1:2] and calls[self] > 2:
            raise ZeroDivisionError
        return right(self, *given)

    monkeypatch.setattr(CompiledBlocks, "__call__", failing)
    drawn = stream(model, split(told, 40), slices(noise(1, 784)), threads=3)
    assert [next(drawn).shape[1] for _ in range(2)] == [24, 24]
    with pytest.raises(ZeroDivisionError):
        next(drawn)
    assert torch.get_num_threads() == before


def test_who_has_heard_enough_of_blocks_abreast_may_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STREAM_VALUES, "cpu", 24 * 7)
    model, before = small_model("student"), torch.get_num_threads()
    told = small_mel(1, 98).within(model.margin)
    drawn = stream(model, split(told, 40), slices(noise(1, 784)), threads=2)
    next(drawn)
    drawn.close()
    assert torch.get_num_threads() == before


MEMORY = """
import sys
import torch
from pathlib import Path
from wavedistill.recipe.loading import load_recipe
from wavedistill.tools.random import random_stream
from wavedistill.models.kinds import build
from wavedistill.sampling.streaming import stream
from wavedistill.speech.conditioning import Conditioning

torch.set_num_threads(1)
recipe = load_recipe(Path(sys.argv[1]))
model, generator = build(recipe, "student", 0), random_stream(0)
lengths = [8] * int(sys.argv[2]) + [2 * model.margin]
pieces = (Conditioning(torch.full((1, recipe.audio.n_mels, length), -5.0), 0) for length in lengths)
count = sum(block.shape[1] for block in stream(model, pieces, lambda n: model.base.noise((1, n), generator)))
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
print(count, peak.split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_of_a_stream_does_not_grow_with_its_length(tiny: Recipe) -> None:
    seconds_a_piece = 8 * tiny.audio.hop_length / tiny.audio.sample_rate
    found = []
    for seconds in (1, 40):
        command = [sys.executable, "-c", MEMORY, RECIPES / "tiny.toml", str(round(seconds / seconds_a_piece))]
        count, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert int(count) > 0.9 * seconds * tiny.audio.sample_rate
        found.append(int(peak))
    # The samples alone would take 2.5 MB, one layer's activations tens of MB.
    assert found[1] - found[0] < 2048


@pytest.mark.parametrize("pieces", [1, 40])
def test_a_stream_in_float32_equals_one_pass(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding differs with the length of a block; it must not decide on harmonics, nor ring on in a filter."""
    monkeypatch.setitem(STREAM_VALUES, "cpu", 24 * 7)
    model = small_model("student").float()
    mel, z = narrow(small_mel(2, 38)), noise(2, 38 * 8).float()
    streamed = torch.cat(list(stream(model, split(mel, pieces), slices(z))), 1)
    whole = sample(model(mel), z)
    assert (streamed - whole).abs().max() < 1e-6 * whole.abs().max()


def test_what_cannot_be_streamed_is_refused_and_no_part_of_it_left_out() -> None:
    with pytest.raises(ValueError, match="Autoregressive among its flows"):
        next(stream(small_model("teacher"), split(small_mel(1, 5), 15), lambda n: noise(1, n)))
    scaled = small_model("student")
    scaled.flows.append(Scale(2.0))
    with pytest.raises(ValueError, match="Scale among its flows"):
        next(stream(scaled, split(small_mel(1, 5), 15), lambda n: noise(1, n)))
    with pytest.raises(ValueError, match="noise for 39 steps"):
        list(stream(small_model("student"), split(small_mel(1, 5), 15), slices(noise(1, 39))))
    with pytest.raises(ValueError, match="no frames around it, and this one has 5"):
        list(stream(small_model("student"), [small_mel(1, 5)], slices(noise(1, 40))))


@pytest.mark.parametrize("solver", [naive, cached, compiled])
@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_every_sampler_runs_under_autocast(kind: str, solver: Solver) -> None:
    model, mel, z = small_model(kind).float(), narrow(small_mel(1, 5)), noise(1, 40).float()
    expected = sample(model(mel), z, solver)
    with torch.autocast("cpu", torch.bfloat16):
        found = sample(model(mel), z, solver)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_recorded_steps_equal_naive(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the recording itself, which needs a GPU: whole blocks on buffers that stay, after a trial run."""

    recordings = []

    def record(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        recordings.append(run)
        run()
        return run

    monkeypatch.setattr("wavedistill.sampling.sequential._record", record)
    monkeypatch.setattr("wavedistill.sampling.sequential.STEPS_BLOCK", 10)
    flow, z = small_flow("x", source_channels=2), noise(2, 37)
    context = (noise(2, 10, 3), noise(2, 40, 2))
    # The second on the first one's recording, in another mode.
    for noisy, mode in ((z, torch.inference_mode()), (-z, torch.no_grad())):
        with mode:
            assert (graphed(flow, noisy, context) - naive(flow, noisy, context)).abs().max() < 1e-9
    assert len(recordings) == 1
    gone = weakref.ref(flow)
    recordings.clear()
    del flow
    gc.collect()
    assert gone() is None, "a recording does not keep its model alive"


def test_what_cannot_be_recorded_is_refused() -> None:
    with pytest.raises(ValueError, match="GPU"):
        graphed(small_flow("x"), noise(1, 8), (noise(1, 2, 3),))
    with pytest.raises(ValueError, match="MixtureCdf"):
        graphed(flow_of(MIXTURES[0], "x"), noise(1, 8), (noise(1, 2, 3),))


@pytest.mark.parametrize("solver", SOLVERS)
def test_conditioning_that_is_too_short_is_refused(solver: Solver) -> None:
    with pytest.raises(ValueError, match=r"\(2, 9, 3\), each for 4 steps, does not cover \(2, 37\)"):
        solver(small_flow("x"), noise(2, 37), (noise(2, 9, 3),))
    with pytest.raises(ValueError, match="does not cover"):
        solver(small_flow("x"), noise(2, 36), (noise(1, 9, 3),))


def test_naive_from_a_later_start_costs_only_what_it_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the benchmark relies on to time the steady state."""
    flow, context, z = small_flow("x"), (noise(1, 10, 3),), noise(1, 40)
    calls = []
    forward = flow.conditioner.forward
    monkeypatch.setattr(flow.conditioner, "forward", lambda x, *c: calls.append(x.shape[1]) or forward(x, *c))
    partial(naive, start=36)(flow, z, context)
    field = flow.conditioner.receptive_field
    assert len(calls) == 4
    assert all(field < length <= field + 4 for length in calls)


def test_a_flow_that_cannot_step_is_refused_by_name() -> None:
    flow = Autoregressive(lambda x: torch.stack([x, x], -1), "x", Affine(-5.0))
    with pytest.raises(TypeError, match="function"):
        cached(flow, noise(1, 4), ())
