"""Integrals of sums of squared polynomials as an elementwise bijection, and of a teacher.

Compiled steps, samplers and Jacobians are held equal beside those of splines, in `test_splines.py`.
"""

from typing import Any

import pytest
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from tests.conftest import noise
from wavedistill.benchmarking.draws import jobs
from wavedistill.flows.bases import StandardNormal
from wavedistill.flows.distributions import Conditionals
from wavedistill.flows.elementwise import Affine
from wavedistill.flows.polynomials import BOUND, LEAST_SLOPE, SumOfSquares
from wavedistill.models.kinds import build
from wavedistill.recipe.loading import validate_recipe
from wavedistill.tools.errors import RecipeError

SIZES = [(1, 1), (2, 3), (3, 6)]


def parameters(sums: SumOfSquares, *shape: int, spread: float = 2.0) -> tuple[Tensor, ...]:
    return sums.parameters(spread * noise(*shape, sums.outputs, seed=4))


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("size", SIZES)
def test_it_rises_and_round_trips_to_rounding(size: tuple[int, int], spread: float) -> None:
    """Within the bound, at it, and far beyond."""
    sums, count = SumOfSquares(*size, -5.0), 50
    given = parameters(sums, count, 1, spread=spread)
    for direction, back, furthest in ((sums.to_x, sums.to_z, 100 * BOUND), (sums.to_z, sums.to_x, 4 * BOUND)):
        values = torch.linspace(-furthest, furthest, 401, dtype=torch.float64).expand(count, -1)
        found, ladj = direction(values, *given)
        again, ladj_back = back(found, *given)
        # As exact as what lies between can be: where the slope is small, a rounding of it moves the other side.
        tolerance = 1e-12 * (1 + (1 + found.abs()) * (-ladj).exp() + values.abs())
        assert ((again - values).abs() <= tolerance).all()
        assert ((ladj + ladj_back).abs() <= 1e-9).all()
        assert (found.diff(dim=1) > 0).all()


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_integral_of_its_slope(size: tuple[int, int]) -> None:
    """By the coefficients of the squares, which nothing in the program multiplies out."""
    sums = SumOfSquares(*size, -5.0)
    shift, log_scale, a = parameters(sums, 20)
    values = BOUND * torch.linspace(-1, 1, 21, dtype=torch.float64)
    x = shift + log_scale.exp() * values[:, None]
    z, ladj = sums.to_z(x, shift, log_scale, a)
    for i, each in enumerate(a):
        squares = [(1 + Polynomial(row.numpy(), domain=[-BOUND, BOUND], window=[-1, 1])) ** 2 for row in each]
        slope = LEAST_SLOPE + (1 - LEAST_SLOPE) * sum(squares[1:], squares[0]) / len(squares)
        expected = torch.from_numpy(slope.integ(lbnd=0)(values.numpy()))
        torch.testing.assert_close(z[:, i], expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ladj[:, i].exp(), torch.from_numpy(slope(values.numpy())) / log_scale[i].exp())


def test_beyond_the_bound_it_goes_on_straight() -> None:
    sums = SumOfSquares(2, 3, -5.0)
    shift, log_scale, a = parameters(sums, 30)
    for side in (-BOUND, BOUND):
        x = shift + log_scale.exp() * side * torch.tensor([[1.0], [2.0], [50.0]]).double()
        z, ladj = sums.to_z(x, shift, log_scale, a)
        torch.testing.assert_close(ladj[1:], ladj[:1].expand(2, -1), rtol=0, atol=1e-9)
        torch.testing.assert_close((z[2] - z[0]) / (x[2] - x[0]), ladj[0].exp(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", SIZES)
def test_ladj_is_the_logarithm_of_the_slope_both_ways(size: tuple[int, int]) -> None:
    sums = SumOfSquares(*size, -5.0)
    given = parameters(sums, 1000)
    values = (4 * noise(1000, seed=1)).requires_grad_()
    for direction in (sums.to_x, sums.to_z):
        found, ladj = direction(values, *given)
        (slope,) = torch.autograd.grad(found.sum(), values)
        torch.testing.assert_close(slope.log(), ladj, rtol=0, atol=1e-9)


def test_the_search_has_a_gradient_in_every_output() -> None:
    """That of the inverse function, by finite differences."""
    sums, z = SumOfSquares(2, 2, -5.0), 3 * noise(4, seed=2)
    raw = noise(4, sums.outputs, seed=3).requires_grad_()
    torch.autograd.gradcheck(lambda raw: sums.to_x(z, *sums.parameters(raw)), raw, atol=1e-6)


@pytest.mark.parametrize("std", [1.0, 1.8])
def test_it_starts_as_the_affine_function(std: float) -> None:
    sums, affine, z = SumOfSquares(3, 4, -4.5), Affine(-4.5), 3 * noise(50)
    expected = affine.to_x(z, *affine.parameters(affine.start(std).double().expand(50, -1)))
    for start in (sums.start(std), torch.cat([affine.start(std), torch.zeros(sums.outputs - 2)])):
        for found, wanted in zip(sums.to_x(z, *sums.parameters(start.double().expand(50, -1))), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_its_polynomials_go_their_own_ways() -> None:
    """From their start, one square fits no density better than two: of two modes with something in between."""
    data = torch.cat([noise(1000, seed=1) * 0.5 - 1.5, noise(1000, seed=2) * 0.5 + 1.5])
    fits = []
    for polynomials in (1, 2):
        sums = SumOfSquares(polynomials, 3, -4.5)
        raw = sums.start(1.0).double().requires_grad_()
        optimizer = torch.optim.Adam([raw], lr=0.05)
        for _ in range(150):
            optimizer.zero_grad()
            given = sums.parameters(raw.expand(len(data), -1))
            loss = -Conditionals(StandardNormal(), sums, given).log_prob_steps(data).mean()
            loss.backward()
            optimizer.step()
        fits.append(loss.item())
    assert fits[1] < fits[0] - 0.01


def test_gradients_reach_every_output_in_float32_and_stay_finite() -> None:
    sums = SumOfSquares(2, 3, -4.5)
    raw = (3 * noise(500, sums.outputs)).float().requires_grad_()
    x = (10 * noise(500, seed=1)).float()
    Conditionals(StandardNormal(), sums, sums.parameters(raw)).log_prob_steps(x).sum().backward()
    assert raw.grad is not None
    assert raw.grad.isfinite().all()
    assert (raw.grad.abs().sum(0) > 0).all()


def test_draws_of_every_step_have_polynomials_of_their_own_step() -> None:
    """Several draws (k, B, T) from parameters (B, T), as the estimator of a KL asks for."""
    sums = SumOfSquares(2, 3, -5.0)
    p, draws = Conditionals(StandardNormal(), sums, parameters(sums, 2, 9)), noise(5, 2, 9)
    torch.testing.assert_close(p.rsample(draws)[3], p.rsample(draws[3]), rtol=0, atol=1e-12)
    torch.testing.assert_close(p.noise(p.rsample(draws)), draws, rtol=0, atol=1e-10)


def test_a_recipe_asks_for_it(tiny_data: dict[str, Any]) -> None:
    tiny_data["models"]["teacher"].update(elementwise="sos", polynomials=3, degree=2)
    with pytest.raises(RecipeError, match=r'elementwise = "mixture".*use "mc-k"'):
        validate_recipe(tiny_data, "tiny.toml")
    tiny_data["training"]["student"]["loss"].update(kl_estimator="mc-k", log_scale=0)
    recipe = validate_recipe(tiny_data, "tiny.toml")
    (flow,) = build(recipe, "teacher", 0).flows
    assert isinstance(flow.elementwise, SumOfSquares)
    assert (flow.elementwise.polynomials, flow.elementwise.degree) == (3, 2)
    gpu = {job.sampler for job in jobs(recipe, torch.device("cuda"), [(1, 0.1)]) if job.model == "teacher"}
    assert gpu == {"naive", "cached"}, "no graph of what looks at values"
    tiny_data["models"]["teacher"]["components"] = 2
    with pytest.raises(RecipeError, match=r"models\.teacher: elementwise = \"sos\" has one component"):
        validate_recipe(tiny_data, "tiny.toml")
