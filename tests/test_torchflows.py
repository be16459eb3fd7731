"""Densities against those of torchflows, a third library of flows, from the very parameters that our networks give.

It is in the extra `zoo`: `pip install -e '.[zoo]'`. What is compared is first held against autograd, on their side too.
"""

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import noise, small_flow
from wavedistill.flows.bases import StandardLogistic, StandardNormal
from wavedistill.flows.coupling import CouplingLayer
from wavedistill.flows.distributions import FlowDistribution
from wavedistill.flows.elementwise import Affine, MixtureCdf
from wavedistill.flows.transforms import Autoregressive, Bound

layers = pytest.importorskip(
    "torchflows.bijections.finite.autoregressive.layers",
    reason="torchflows is not installed: pip install -e '.[zoo]'",
)
flows = pytest.importorskip("torchflows.flows")
sigmoid = pytest.importorskip("torchflows.bijections.finite.autoregressive.transformers.combination.sigmoid")

LENGTH = 12
SHAPE = (LENGTH,)


class Given(nn.Module):
    """A conditioner for torchflows: what our network says of a sequence, in its order and units."""

    def __init__(self, flow: Autoregressive, context: tuple[Tensor, ...], affine: nn.Module) -> None:
        super().__init__()
        self.flow, self.context, self.affine = flow, context, affine

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        shift, log_scale = self.flow.step_parameters(x, self.context)
        return torch.stack([self.affine.unconstrain_scale((-log_scale).exp()), -shift * (-log_scale).exp()], -1)


def theirs(kind: type, flow: Autoregressive, context: tuple[Tensor, ...]) -> nn.Module:
    """Torchflows' flow whose steps have the parameters of ours; from signal to noise, as its affine functions are."""
    bijection = kind(SHAPE)
    bijection.conditioner_transform = Given(flow, context, bijection.transformer)
    return flows.Flow(bijection).double().eval()


def jacobian_agrees(bijection: nn.Module, x: Tensor) -> None:
    """Whether torchflows' own log-determinant is that of its Jacobian."""
    matrix = torch.autograd.functional.jacobian(lambda v: bijection.forward(v[None])[0][0], x[0])
    torch.testing.assert_close(bijection.forward(x)[1][0], torch.linalg.slogdet(matrix)[1], rtol=0, atol=1e-9)


def test_a_masked_autoregressive_flow_has_torchflows_density_and_samples() -> None:
    flow, context, x = small_flow("x"), (noise(1, 3, 3),), noise(1, LENGTH)
    other = theirs(layers.AffineForwardMaskedAutoregressive, flow, context)
    jacobian_agrees(other.bijection, x)
    with torch.no_grad():
        ours = FlowDistribution(StandardNormal(), [Bound(flow, context)])
        torch.testing.assert_close(ours.log_prob(x), other.log_prob(x), rtol=0, atol=1e-8)
        z, _ = flow.inverse(x, context)
        torch.testing.assert_close(other.bijection.inverse(z)[0], x, rtol=0, atol=1e-8)


def test_an_inverse_autoregressive_flow_has_torchflows_density_of_its_own_sample() -> None:
    """Torchflows finds the noise in as many passes as samples; ours has it in hand."""
    flow, context, z = small_flow("z"), (noise(1, 3, 3),), noise(1, LENGTH)
    other = theirs(layers.AffineInverseMaskedAutoregressive, flow, context)
    with torch.no_grad():
        x, log_q = FlowDistribution(StandardNormal(), [Bound(flow, context)]).rsample_and_log_prob(z)
        torch.testing.assert_close(other.bijection.inverse(z)[0], x, rtol=0, atol=1e-8)
        torch.testing.assert_close(other.log_prob(x), log_q, rtol=0, atol=1e-8)


def test_torchflows_network_in_our_flow_has_its_density() -> None:
    """The other way round: their masked network as our conditioner."""
    bijection, x = layers.AffineForwardMaskedAutoregressive(SHAPE).double(), noise(4, LENGTH)

    def conditioner(x: Tensor) -> Tensor:
        unconstrained, shift = bijection.conditioner_transform(x).unbind(-1)
        log_scale = -bijection.transformer.constrain_scale(unconstrained).log()
        return torch.stack([-shift * log_scale.exp(), log_scale], -1)

    flow = Autoregressive(conditioner, "x", Affine(-40.0))
    with torch.no_grad():
        ours = FlowDistribution(StandardNormal(), [Bound(flow)])
        expected = flows.Flow(bijection).double().log_prob(x)
        torch.testing.assert_close(ours.log_prob(x), expected, rtol=0, atol=1e-9)


def test_a_coupling_layer_has_torchflows_density() -> None:
    bijection, x = layers.AffineCoupling(SHAPE).double(), noise(4, LENGTH)
    kept = LENGTH // 2

    def conditioner(given: Tensor) -> Tensor:
        raw = bijection.conditioner_transform(given[:, 0], context=None)
        unconstrained, shift = raw.view(len(given), LENGTH - kept, 2).unbind(-1)
        log_scale = -bijection.transformer.constrain_scale(unconstrained).log()
        return torch.stack([-shift * log_scale.exp(), log_scale], -1).view(len(given), 1, -1)

    layer = CouplingLayer(conditioner, LENGTH, kept, Affine(-40.0))
    jacobian_agrees(bijection, x[:1])
    with torch.no_grad():
        ours = FlowDistribution(StandardNormal(), [Bound(layer)])
        torch.testing.assert_close(ours.log_prob(x), flows.Flow(bijection).double().log_prob(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("components", [1, 3])
def test_a_mixture_is_one_layer_of_a_deep_sigmoidal_flow(components: int) -> None:
    """Of logistics. Torchflows' log-determinant is none of its map (1.2.1), so that ours is held against autograd."""
    mixture, x = MixtureCdf(StandardLogistic(), components, -5.0), noise(200, seed=1).requires_grad_()
    weights, shift, log_scale = mixture.parameters(noise(200, mixture.outputs, seed=2))
    layer = sigmoid.Sigmoid((1,), hidden_dim=components)
    scale = (-log_scale).exp() - layer.min_scale
    raw = [scale.expm1().log() - layer.default_u_a, -shift * (-log_scale).exp(), weights]
    expected, _ = layer.forward(x[:, None], layer.const * torch.cat(raw, -1)[:, None])
    z, ladj = mixture.to_z(x, weights, shift, log_scale)
    # It clips probabilities to within a millionth of 0 and 1.
    inside = z.detach().abs() < 13
    assert inside.sum() > 150
    torch.testing.assert_close(z[inside], expected[inside, 0], rtol=0, atol=1e-9)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(ladj[inside], slope[inside].log(), rtol=0, atol=1e-8)
