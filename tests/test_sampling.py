"""Every sampler equals the naive one, which equals the definition."""

from functools import partial

import pytest
import torch

from tests.conftest import noise, small_flow, small_mel, small_model
from wavedistill.flows import Affine, Autoregressive
from wavedistill.sampling import cached, invert, naive, sample


@pytest.mark.parametrize("length", [1, 2, 29, 40])
@pytest.mark.parametrize("kernel_size", [2, 3])
def test_cached_equals_naive_equals_definition(length: int, kernel_size: int) -> None:
    """x_t = mu(x_<t) + sigma(x_<t) z_t, where the parallel pass over the finished x gives mu and sigma."""
    flow, context, z = small_flow("x", kernel_size=kernel_size), (noise(2, 10, 3),), noise(2, length)
    with torch.no_grad():
        slow, fast = naive(flow, z, context), cached(flow, z, context)
        shift, log_scale = flow.conditioner(slow, context)
    torch.testing.assert_close(slow, shift + log_scale.exp() * z, rtol=0, atol=1e-9)
    assert (slow - fast).abs().max() < 1e-9


def test_unconditional_sampling() -> None:
    flow, z = small_flow("x", feature_channels=None, repeat=1), noise(2, 25)
    with torch.no_grad():
        assert (naive(flow, z, ()) - cached(flow, z, ())).abs().max() < 1e-9


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_model_sampling_and_inversion_with_either_solver(kind: str) -> None:
    distribution, z = small_model(kind)(small_mel(2, 5)), noise(2, 37)
    x = sample(distribution, z, naive)
    assert (sample(distribution, z, cached) - x).abs().max() < 1e-9
    for solver in (naive, cached):
        found, _ = invert(distribution, x, solver)
        assert (found - z).abs().max() < 1e-9


def test_student_sampling_is_its_one_pass() -> None:
    q, z = small_model("student")(small_mel(2, 5)), noise(2, 37)
    with torch.no_grad():
        assert torch.equal(sample(q, z), q.rsample_and_log_prob(z)[0])


def test_naive_from_a_later_start_costs_only_what_it_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the benchmark relies on to time the steady state."""
    flow, context, z = small_flow("x"), (noise(1, 10, 3),), noise(1, 40)
    calls = []
    forward = flow.conditioner.forward
    monkeypatch.setattr(flow.conditioner, "forward", lambda x, c: calls.append(x.shape[1]) or forward(x, c))
    partial(naive, start=36)(flow, z, context)
    field = flow.conditioner.wavenet.receptive_field
    assert len(calls) == 4
    assert all(field < length <= field + 4 for length in calls)


def test_a_flow_that_cannot_step_is_refused_by_name() -> None:
    flow = Autoregressive(lambda x, c: (x, x), "x", Affine())
    with pytest.raises(TypeError, match="function"):
        cached(flow, noise(1, 4), ())
