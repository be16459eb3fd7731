"""Splines as elementwise bijections, and what they share with shifts and polynomials: compiled steps, samplers."""

from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import noise, small_flow
from wavedistill.flows.bases import StandardNormal
from wavedistill.flows.distributions import Conditionals
from wavedistill.flows.elementwise import Affine, Elementwise, Shift, solve_step
from wavedistill.flows.polynomials import SumOfSquares
from wavedistill.flows.splines import BOUND, LEAST_SHARE, LEAST_SLOPE, RationalQuadraticSpline
from wavedistill.flows.transforms import Autoregressive
from wavedistill.models.kinds import build
from wavedistill.recipe.loading import validate_recipe
from wavedistill.sampling.sequential import cached, naive
from wavedistill.tools.errors import RecipeError
from wavedistill.training.losses import cross_entropy_kl

BINS = [2, 3, 8]


def parameters(spline: RationalQuadraticSpline, *shape: int, spread: float = 3.0) -> tuple[Tensor, ...]:
    return spline.parameters(spread * noise(*shape, spline.outputs, seed=4))


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("bins", BINS)
def test_a_spline_rises_and_round_trips_to_rounding(bins: int, spread: float) -> None:
    """Through all pieces, at their borders, and beyond the bound."""
    spline, count = RationalQuadraticSpline(bins, -5.0), 50
    shift, log_scale, u, y, d = parameters(spline, count, 1, spread=spread)
    values = torch.linspace(-2 * BOUND, 2 * BOUND, 401, dtype=torch.float64).expand(count, -1)
    for direction, back, knots in ((spline.to_x, spline.to_z, y), (spline.to_z, spline.to_x, u)):
        edges = knots[:, 0] if direction == spline.to_x else shift + log_scale.exp() * knots[:, 0]
        given = torch.cat([values, edges], 1)
        found, ladj = direction(given, shift, log_scale, u, y, d)
        again, ladj_back = back(found, shift, log_scale, u, y, d)
        # As exact as what lies between can be: where the slope is small, a rounding of it moves the other side.
        tolerance = 1e-11 * (1 + (-ladj).exp() + given.abs())
        assert ((again - given).abs() <= tolerance).all()
        assert ((ladj + ladj_back).abs()[:, :401] <= 1e-7).all()
        assert (found[:, :401].diff(dim=1) > 0).all()


@pytest.mark.parametrize("bins", BINS)
def test_a_spline_s_ladj_is_the_logarithm_of_its_slope_everywhere(bins: int) -> None:
    spline = RationalQuadraticSpline(bins, -5.0)
    given = parameters(spline, 1000)
    x = (4 * noise(1000, seed=1)).requires_grad_()
    for direction in (spline.to_x, spline.to_z):
        z, ladj = direction(x, *given)
        (slope,) = torch.autograd.grad(z.sum(), x)
        torch.testing.assert_close(slope.log(), ladj, rtol=0, atol=1e-7)


def test_pieces_and_slopes_keep_above_their_least_and_fill_the_range() -> None:
    spline = RationalQuadraticSpline(5, -5.0)
    _, log_scale, *knots, slopes = parameters(spline, 200, spread=30.0)
    for each in knots:
        assert torch.equal(each[:, 0], torch.full((200,), -BOUND).double())
        assert torch.equal(each[:, 5], torch.full((200,), BOUND).double())
        assert (each.diff(dim=-1) >= 2 * BOUND * LEAST_SHARE * (1 - 1e-9)).all()
    assert (slopes >= LEAST_SLOPE).all()
    assert torch.equal(slopes[:, [0, 5]], torch.ones(200, 2).double())
    assert (log_scale >= -5).all()


@pytest.mark.parametrize("std", [1.0, 1.8])
def test_a_spline_starts_as_the_affine_function(std: float) -> None:
    spline, affine, z = RationalQuadraticSpline(8, -4.5), Affine(-4.5), 3 * noise(50)
    raw = spline.start(std).double().expand(50, -1)
    expected = affine.to_x(z, *affine.parameters(affine.start(std).double().expand(50, -1)))
    for found, wanted in zip(spline.to_x(z, *spline.parameters(raw)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_gradients_reach_every_output_in_float32_and_stay_finite() -> None:
    spline = RationalQuadraticSpline(8, -4.5)
    raw = (3 * noise(500, spline.outputs)).float().requires_grad_()
    x = (10 * noise(500, seed=1)).float()
    conditionals = Conditionals(StandardNormal(), spline, spline.parameters(raw))
    conditionals.log_prob_steps(x).sum().backward()
    assert raw.grad is not None
    assert raw.grad.isfinite().all()
    assert (raw.grad.abs().sum(0) > 0).all()


ELEMENTWISE: list[Elementwise] = [RationalQuadraticSpline(3, -5.0), SumOfSquares(2, 3, -5.0), Shift()]


@numba.njit
def one_step(raw: np.ndarray, given: float, constants: Any) -> float:
    """As the compiled loop takes it, whose compilation takes longer."""
    return solve_step(raw, given, constants)


@pytest.mark.parametrize("elementwise", ELEMENTWISE)
@pytest.mark.parametrize("to_x", [True, False])
def test_a_compiled_step_equals_the_bijection(elementwise: Elementwise, to_x: bool) -> None:
    raw, given = 3 * noise(300, elementwise.outputs), 6 * noise(300, seed=1)
    raw[:100, 1:2], given[:3] = 0, torch.tensor([BOUND, -BOUND, 0.0])
    function = elementwise.to_x if to_x else elementwise.to_z
    expected, _ = function(given, *elementwise.parameters(raw))
    steps = [one_step(r.numpy(), float(g), elementwise.step(to_x)) for r, g in zip(raw, given, strict=True)]
    torch.testing.assert_close(torch.tensor(steps, dtype=torch.float64), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("elementwise", ELEMENTWISE)
@pytest.mark.parametrize("reads", ["x", "z"])
def test_the_cached_sampler_equals_naive(reads: str, elementwise: Elementwise) -> None:
    flow = small_flow(reads, out_channels=elementwise.outputs)
    flow = Autoregressive(flow.conditioner, reads, elementwise)
    # Large outputs bend a spline: each of its pieces is met, and values beyond its bound.
    flow.conditioner.head.weight.data *= 5
    context, given = (noise(3, 10, 3),), 3 * noise(3, 37)
    with torch.no_grad():
        slow = naive(flow, given, context)
        assert (cached(flow, given, context) - slow).abs().max() < 1e-9 * slow.abs().max()
        back = flow.inverse(slow, context)[0] if reads == "x" else flow(slow, context)[0]
    assert (back - given).abs().max() < 1e-9 * slow.abs().max()


@pytest.mark.parametrize("elementwise", ELEMENTWISE)
def test_jacobian_is_triangular_and_agrees_with_ladj(elementwise: Elementwise) -> None:
    flow, at = small_flow("x", out_channels=elementwise.outputs), noise(22)
    flow = Autoregressive(flow.conditioner, "x", elementwise)
    context = (noise(1, 6, 3),)
    matrix = torch.autograd.functional.jacobian(lambda v: flow.inverse(v[None], context)[0][0], at)
    ladj = flow.inverse(at[None], context)[1][0]
    assert torch.equal(matrix.triu(1), torch.zeros_like(matrix))
    assert (matrix.diagonal().log() - ladj).abs().max() < 1e-9


def test_draws_of_every_step_have_pieces_of_their_own_step() -> None:
    """Several draws (k, B, T) from parameters (B, T), as the estimator of a KL asks for."""
    spline = RationalQuadraticSpline(4, -5.0)
    p = Conditionals(StandardNormal(), spline, parameters(spline, 2, 9))
    draws = noise(5, 2, 9)
    assert torch.equal(p.rsample(draws)[3], p.rsample(draws[3]))
    torch.testing.assert_close(p.noise(p.rsample(draws)), draws, rtol=0, atol=1e-8)
    torch.testing.assert_close(cross_entropy_kl(p, p, draws), torch.zeros(2, 9).double(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="RationalQuadraticSpline is more than"):
        _ = p.affine


def test_a_recipe_asks_for_a_spline(tiny_data: dict[str, Any]) -> None:
    tiny_data["models"]["teacher"].update(elementwise="spline", bins=6)
    with pytest.raises(RecipeError, match=r'elementwise = "mixture".*use "mc-k"'):
        validate_recipe(tiny_data, "tiny.toml")
    tiny_data["training"]["student"]["loss"].update(kl_estimator="mc-k", log_scale=1)
    with pytest.raises(RecipeError, match=r"log_scale compares.*elementwise to \"mixture\""):
        validate_recipe(tiny_data, "tiny.toml")
    tiny_data["training"]["student"]["loss"]["log_scale"] = 0
    (flow,) = build(validate_recipe(tiny_data, "tiny.toml"), "teacher", 0).flows
    assert isinstance(flow.elementwise, RationalQuadraticSpline)
    assert flow.elementwise.bins == 6
    tiny_data["models"]["teacher"]["components"] = 2
    with pytest.raises(RecipeError, match=r"models\.teacher: elementwise = \"spline\" has one component"):
        validate_recipe(tiny_data, "tiny.toml")
