"""Bijections and densities: invertibility, Jacobians, agreement with torch.distributions."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import AffineTransform, Normal, SigmoidTransform, TransformedDistribution, Uniform

from tests.conftest import noise, small_flow, small_mel, small_model
from wavedistill.flows import (
    BASES,
    AutoregressiveAffine,
    Composition,
    FlowDistribution,
    Scale,
    SequentialDirectionError,
    StandardLogistic,
    StandardNormal,
)
from wavedistill.losses import monte_carlo_kl
from wavedistill.sampling import cached, invert, sample

LENGTH = 22  # no multiple of the features' repetition


def constant_flow(reads: str, shift: float, log_scale: float) -> AutoregressiveAffine:
    """A flow whose parameters depend on nothing."""

    def conditioner(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.full_like(x, shift), torch.full_like(x, log_scale)

    return AutoregressiveAffine(conditioner, reads)


def jacobian(function: Callable[[Tensor], tuple[Tensor, Tensor]], at: Tensor) -> tuple[Tensor, Tensor]:
    """Autograd Jacobian (T, T) of a transform at (T,), and its per-step ladj (T,)."""
    matrix = torch.autograd.functional.jacobian(lambda v: function(v[None])[0][0], at)
    return matrix, function(at[None])[1][0]


@pytest.mark.parametrize("reads", ["x", "z"])
def test_both_readings_round_trip(reads: str) -> None:
    flow, context, given = small_flow(reads), noise(3, 6, 3), noise(3, LENGTH)
    with torch.no_grad():
        other = cached(flow, given, context)
        back, _ = flow.inverse(other, context) if reads == "x" else flow(other, context)
    assert (back - given).abs().max() < 1e-9


@pytest.mark.parametrize("case", ["teacher", "one flow", "student"])
def test_jacobian_is_triangular_and_agrees_with_ladj(case: str) -> None:
    mel, at = small_mel(1, 3), noise(LENGTH)
    if case == "one flow":
        flow, context = small_flow("z"), noise(1, 6, 3)
        matrix, ladj = jacobian(lambda v: flow(v, context), at)
    else:
        distribution = small_model(case)(mel)
        transform = distribution.transform.inverse if case == "teacher" else distribution.transform
        matrix, ladj = jacobian(lambda v: transform(v, distribution.context), at)
    assert torch.equal(matrix.triu(1), torch.zeros_like(matrix)), "step t must not see later inputs"
    assert (matrix.diagonal() - ladj.exp()).abs().max() < 1e-9, "step t must not see its own input through the network"
    assert abs(torch.linalg.slogdet(matrix).logabsdet - ladj.sum()) < 1e-9
    assert matrix.tril(-1).abs().max() > 1e-3, "the test says nothing if the flow ignores the past"


def test_composition_of_affine_flows_is_affine_in_the_noise() -> None:
    # mu_tot = sum_i mu_i prod_{j>i} s_j and s_tot = prod_i s_i (van den Oord et al. 2018).
    parameters = [(0.3, -0.2), (-1.0, 0.5), (0.7, 0.1)]
    z = noise(2, 5)
    x, ladj = Composition([constant_flow("z", *p) for p in parameters])(z)
    scales = [math.exp(log_scale) for _, log_scale in parameters]
    shift = sum(mu * math.prod(scales[i + 1 :]) for i, (mu, _) in enumerate(parameters))
    torch.testing.assert_close(x, shift + math.prod(scales) * z)
    torch.testing.assert_close(ladj, torch.full_like(z, math.log(math.prod(scales))))


def test_scale_inverts_and_counts_its_log_determinant() -> None:
    scale, z = Scale(0.07).double(), noise(2, 5)
    x, ladj = scale(z)
    back, inverse_ladj = scale.inverse(x)
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(x, z * 0.07, rtol=1e-6, atol=0)
    torch.testing.assert_close(ladj, -inverse_ladj)


@pytest.mark.parametrize("base", BASES)
def test_density_agrees_with_torch_distributions(base: str) -> None:
    shift, log_scale = 0.4, -1.3
    standard = {
        "normal": Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)),
        "logistic": TransformedDistribution(Uniform(torch.tensor(0.0).double(), 1), SigmoidTransform().inv),
    }[base]
    expected = TransformedDistribution(standard, AffineTransform(shift, math.exp(log_scale)))
    x = noise(4, 9)
    distribution = FlowDistribution(constant_flow("x", shift, log_scale), BASES[base])
    torch.testing.assert_close(distribution.log_prob_steps(x), expected.log_prob(x))
    torch.testing.assert_close(distribution.log_prob(x), expected.log_prob(x).sum(-1))


@pytest.mark.parametrize("base", [StandardNormal(), StandardLogistic()])
def test_base_noise_has_the_density_it_claims(base: StandardNormal | StandardLogistic) -> None:
    generator = torch.Generator().manual_seed(0)
    z = base.noise((200_000,), generator).double()
    edges = torch.linspace(-4, 4, 33, dtype=torch.float64)
    counted = torch.histogram(z, edges).hist / len(z)
    fine = torch.linspace(-4, 4, 32 * 64 + 1, dtype=torch.float64)
    expected = torch.stack([torch.trapezoid(base.log_prob(p).exp(), p) for p in fine.unfold(0, 65, 64)])
    assert ((counted - expected).abs() < 5 * (expected / len(z)).sqrt()).all()


def test_base_density_stays_finite_far_out() -> None:
    z = torch.tensor([-1e4, 1e4, 0.0], requires_grad=True)
    for base in BASES.values():
        base.log_prob(z).sum().backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


def test_student_density_from_cached_noise_equals_density_by_inverting_its_sample() -> None:
    student, z = small_model("student"), noise(2, LENGTH)
    q = student(small_mel(2, 3))
    with torch.no_grad():
        x, log_q = q.rsample_and_log_prob_steps(z)
    found, log_prob = invert(q, x)
    torch.testing.assert_close(found, z, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_prob, log_q, rtol=0, atol=1e-9)


def test_teacher_density_of_its_own_sample_equals_density_from_the_noise() -> None:
    teacher, z = small_model("teacher"), noise(2, LENGTH)
    p = teacher(small_mel(2, 3))
    x = sample(p, z)
    found, log_prob = invert(p, x)
    torch.testing.assert_close(found, z, rtol=0, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(p.log_prob(x), log_prob.sum(-1), rtol=0, atol=1e-9)


def test_the_sequential_direction_is_refused_rather_than_run_in_t_passes() -> None:
    mel = small_mel(1, 3)
    with pytest.raises(SequentialDirectionError):
        small_model("student")(mel).log_prob(noise(1, LENGTH))
    with pytest.raises(SequentialDirectionError):
        small_model("teacher")(mel).rsample_and_log_prob(noise(1, LENGTH))


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_density_of_the_waveform_is_that_of_the_residual_and_the_filter(kind: str) -> None:
    """log p(x) = log p(e) - sum log g, with margins that give a crop its true past."""
    model, mel = small_model(kind), small_mel(2, 6)
    with torch.no_grad():
        audio = sample(model(mel), noise(2, 48))
        _, log_prob = invert(model(mel), audio)
        residual, ladj = model.analyse(torch.nn.functional.pad(audio, (8, 8)), mel)
        _, log_prob_residual = invert(model.residual(mel), residual)
    torch.testing.assert_close(log_prob_residual + ladj, log_prob, rtol=0, atol=1e-9)


def test_analysis_of_a_crop_with_margins_is_the_crop_of_the_analysis() -> None:
    model, mel = small_model("teacher"), small_mel(1, 12)
    audio = noise(1, 14 * 8)
    with torch.no_grad():
        whole, _ = model.analyse(audio, mel)
        crop, _ = model.analyse(audio[:, 4 * 8 : 10 * 8], mel[..., 4:10])
    torch.testing.assert_close(crop, whole[:, 4 * 8 : 8 * 8], rtol=0, atol=1e-9)


def test_kl_of_waveforms_is_the_kl_of_residuals() -> None:
    """Draw by draw: a transform that both models share cancels."""
    student, teacher, mel, z = small_model("student"), small_model("teacher"), small_mel(2, 6), noise(2, 48)
    with torch.no_grad():
        waveform, _ = monte_carlo_kl(student(mel), teacher(mel), z)
        residual, _ = monte_carlo_kl(student.residual(mel), teacher.residual(mel), z)
    torch.testing.assert_close(waveform, residual, rtol=0, atol=1e-9)
