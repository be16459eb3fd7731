"""Densities against those of zuko, another library of flows, from the very parameters that our networks give.

It is in the extra `zoo`: `pip install -e '.[zoo]'`.
"""

import math

import pytest
import torch
from torch import Tensor

from tests.conftest import noise, small_flow
from tests.test_coupling import small_network
from tests.test_splines import BINS, parameters
from wavedistill.flows.bases import StandardNormal
from wavedistill.flows.coupling import CouplingLayer
from wavedistill.flows.distributions import FlowDistribution
from wavedistill.flows.elementwise import Affine
from wavedistill.flows.polynomials import BOUND as POLYNOMIAL_BOUND
from wavedistill.flows.polynomials import LEAST_SLOPE, SumOfSquares
from wavedistill.flows.splines import BOUND, RationalQuadraticSpline
from wavedistill.flows.transforms import Autoregressive, Bound

distributions = pytest.importorskip("zuko.distributions", reason="zuko is not installed: pip install -e '.[zoo]'")
transforms = pytest.importorskip("zuko.transforms")

LENGTH = 12
SLOPE = 1e-12
"""Zuko clips logarithms softly at that of this."""


def unclipped(log: Tensor, factor: float = 1.0) -> Tensor:
    """What zuko clips to a logarithm."""
    return log / (1 - (factor * log / math.log(SLOPE)).abs())


def affine(shift: Tensor, log_scale: Tensor) -> "transforms.Transform":
    """From x to z = (x - shift) / scale."""
    inner = transforms.MonotonicAffineTransform(-shift * (-log_scale).exp(), unclipped(-log_scale), slope=SLOPE)
    return transforms.DependentTransform(inner, 1)


def normal(length: int = LENGTH) -> "distributions.Distribution":
    return distributions.DiagNormal(torch.zeros(length).double(), torch.ones(length).double())


def test_a_masked_autoregressive_flow_has_zuko_s_density_and_samples() -> None:
    flow, context, x = small_flow("x"), (noise(1, 3, 3),), noise(1, LENGTH)
    theirs = transforms.AutoregressiveTransform(lambda x: affine(*flow.step_parameters(x, context)), passes=LENGTH)
    with torch.no_grad():
        ours = FlowDistribution(StandardNormal(), [Bound(flow, context)])
        expected = distributions.NormalizingFlow(theirs, normal()).log_prob(x)
        torch.testing.assert_close(ours.log_prob(x), expected, rtol=0, atol=1e-10)
        z, _ = flow.inverse(x, context)
        torch.testing.assert_close(theirs.inv(z), x, rtol=0, atol=1e-8)


def test_an_inverse_autoregressive_flow_has_zuko_s_density_of_its_own_sample() -> None:
    """Zuko inverts in as many passes as steps; ours has the noise in hand."""
    flow, context, z = small_flow("z"), (noise(1, 3, 3),), noise(1, LENGTH)

    def step(z: Tensor) -> "transforms.Transform":
        shift, log_scale = flow.step_parameters(z, context)
        inner = transforms.MonotonicAffineTransform(shift, unclipped(log_scale), slope=SLOPE)
        return transforms.DependentTransform(inner, 1)

    theirs = transforms.AutoregressiveTransform(step, passes=LENGTH)
    with torch.no_grad():
        x, log_q = FlowDistribution(StandardNormal(), [Bound(flow, context)]).rsample_and_log_prob(z)
        torch.testing.assert_close(theirs(z), x, rtol=0, atol=1e-10)
        expected = distributions.NormalizingFlow(theirs.inv, normal()).log_prob(x)
        torch.testing.assert_close(log_q, expected, rtol=0, atol=1e-8)


def rational_quadratic(*given: Tensor) -> "transforms.Transform":
    """Zuko's spline through the knots of ours."""
    _, _, u, y, slopes = given
    shares = [(knots.diff(dim=-1) / (2 * BOUND)).log() for knots in (u, y)]
    widths, heights = (unclipped(share, 2) for share in shares)
    return transforms.MonotonicRQSTransform(widths, heights, unclipped(slopes[..., 1:-1].log()), BOUND, SLOPE)


@pytest.mark.parametrize("bins", BINS)
def test_a_spline_is_zuko_s_through_the_same_knots(bins: int) -> None:
    """Where ours has no affine part; both ways, with ladj, beyond the bound too."""
    spline, values = RationalQuadraticSpline(bins, -40.0), 4 * noise(400, seed=2)
    _, _, *knots = parameters(spline, 400, spread=2.0)
    plain = torch.zeros(400).double(), torch.zeros(400).double(), *knots
    theirs = rational_quadratic(*plain)
    z, ladj = spline.to_z(values, *plain)
    expected, expected_ladj = theirs.call_and_ladj(values)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(ladj, expected_ladj, rtol=0, atol=1e-8)
    x, _ = spline.to_x(values, *plain)
    torch.testing.assert_close(x, theirs.inv(values), rtol=1e-8, atol=1e-8)


def test_an_autoregressive_spline_flow_has_zuko_s_density() -> None:
    spline = RationalQuadraticSpline(4, -5.0)
    flow = Autoregressive(small_flow("x", out_channels=spline.outputs).conditioner, "x", spline)
    context, x = (noise(1, 3, 3),), 3 * noise(1, LENGTH)

    def step(x: Tensor) -> "transforms.Transform":
        given = flow.step_parameters(x, context)
        bend = transforms.DependentTransform(rational_quadratic(*given), 1)
        return transforms.ComposedTransform(affine(*given[:2]), bend)

    theirs = transforms.AutoregressiveTransform(step, passes=LENGTH)
    with torch.no_grad():
        ours = FlowDistribution(StandardNormal(), [Bound(flow, context)])
        expected = distributions.NormalizingFlow(theirs, normal()).log_prob(x)
        torch.testing.assert_close(ours.log_prob(x), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("polynomials", "degree"), [(1, 1), (2, 3), (3, 4)])
def test_a_sum_of_squares_is_zuko_s_of_the_same_coefficients(polynomials: int, degree: int) -> None:
    """Up to the bound, where ours has no affine part; zuko's weighs the least slope otherwise, hence the factor."""
    sums, share = SumOfSquares(polynomials, degree, -40.0), 1 - LEAST_SLOPE
    _, _, a = sums.parameters(noise(400, sums.outputs, seed=4))
    plain = torch.zeros(400).double(), torch.zeros(400).double(), a
    u = POLYNOMIAL_BOUND * (2 * torch.rand(400, generator=torch.Generator().manual_seed(2)).double() - 1)
    theirs = transforms.SOSPolynomialTransform(a, slope=LEAST_SLOPE / share, bound=POLYNOMIAL_BOUND, eps=1e-9)
    expected, expected_ladj = theirs.call_and_ladj(u)
    z, ladj = sums.to_z(u, *plain)
    torch.testing.assert_close(z, share * expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ladj, expected_ladj + math.log(share), rtol=0, atol=1e-8)
    # Theirs is found by bisection, to the eps it is given.
    torch.testing.assert_close(sums.to_x(z, *plain)[0], theirs.inv(z / share), rtol=0, atol=1e-8)


def test_a_coupling_layer_has_zuko_s_density() -> None:
    net, context, x = small_network(in_channels=3, out_channels=6), (noise(1, 6, 3),), noise(1, 24)
    layer = CouplingLayer(net, 6, 3, Affine(-5.0))

    def given(kept: Tensor) -> "transforms.Transform":
        raw = net(kept.unflatten(-1, (4, 3)), *context).unflatten(-1, (3, 2))
        return affine(*(each.flatten(1) for each in layer.elementwise.parameters(raw)))

    kept = (torch.arange(24) % 6 < 3).bool()
    theirs = transforms.CouplingTransform(given, kept)
    with torch.no_grad():
        ours = FlowDistribution(StandardNormal(), [Bound(layer, context)])
        expected = distributions.NormalizingFlow(theirs, normal(24)).log_prob(x)
        torch.testing.assert_close(ours.log_prob(x), expected, rtol=0, atol=1e-10)
