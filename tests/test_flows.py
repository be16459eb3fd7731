"""Bijections and densities: invertibility, Jacobians, agreement with torch.distributions."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import AffineTransform, Normal, SigmoidTransform, TransformedDistribution, Uniform

from tests.conftest import margin, noise, one_draw, randomise, small_flow, small_mel, small_model, told
from wavedistill.flows.bases import BASES, StandardLogistic, StandardNormal
from wavedistill.flows.distributions import Conditionals, FlowDistribution
from wavedistill.flows.elementwise import Affine, Elementwise, MixtureCdf, bounded
from wavedistill.flows.transforms import Autoregressive, Bound, Scale, SequentialDirectionError
from wavedistill.models.kinds import build
from wavedistill.recipe.loading import validate_recipe
from wavedistill.sampling.sequential import cached, invert, sample
from wavedistill.speech.pitch import PITCH_CONTEXT

LENGTH = 22  # no multiple of the features' repetition


def constant_flow(reads: str, shift: float, log_scale: float) -> Autoregressive:
    """A flow whose parameters depend on nothing, and lie far above any bound."""

    def conditioner(x: Tensor) -> Tensor:
        return torch.stack([torch.full_like(x, shift), torch.full_like(x, log_scale)], -1)

    return Autoregressive(conditioner, reads, Affine(-40.0))


def jacobian(function: Callable[[Tensor], tuple[Tensor, Tensor]], at: Tensor) -> tuple[Tensor, Tensor]:
    """Autograd Jacobian (T, T) of a transform at (T,), and its per-step ladj (T,)."""
    matrix = torch.autograd.functional.jacobian(lambda v: function(v[None])[0][0], at)
    return matrix, function(at[None])[1][0]


@pytest.mark.parametrize("reads", ["x", "z"])
def test_both_readings_round_trip(reads: str) -> None:
    flow, context, given = small_flow(reads), (noise(3, 6, 3),), noise(3, LENGTH)
    with torch.no_grad():
        other = cached(flow, given, context)
        back, _ = flow.inverse(other, context) if reads == "x" else flow(other, context)
    assert (back - given).abs().max() < 1e-9


@pytest.mark.parametrize("case", ["teacher", "one flow", "student", "squeezed"])
def test_jacobian_is_triangular_and_agrees_with_ladj(case: str) -> None:
    mel, at = small_mel(1, 3), noise(LENGTH)
    if case == "one flow":
        flow, context = small_flow("z"), (noise(1, 6, 3),)
        matrix, ladj = jacobian(lambda v: flow(v, context), at)
    else:
        distribution = small_model(case)(mel)
        matrix, ladj = jacobian(distribution.to_z if case == "teacher" else distribution.to_x, at)
    assert torch.equal(matrix.triu(1), torch.zeros_like(matrix)), "step t must not see later inputs"
    assert (matrix.diagonal() - ladj.exp()).abs().max() < 1e-9, "step t must not see its own input through the network"
    assert abs(torch.linalg.slogdet(matrix).logabsdet - ladj.sum()) < 1e-9
    assert matrix.tril(-1).abs().max() > 1e-3, "the test says nothing if the flow ignores the past"


def test_composition_of_affine_flows_is_affine_in_the_noise() -> None:
    # mu_tot = sum_i mu_i prod_{j>i} s_j and s_tot = prod_i s_i (van den Oord et al. 2018).
    parameters = [(0.3, -0.2), (-1.0, 0.5), (0.7, 0.1)]
    z = noise(2, 5)
    x, ladj = FlowDistribution(StandardNormal(), [Bound(constant_flow("z", *p)) for p in parameters]).to_x(z)
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
    distribution = FlowDistribution(BASES[base], [Bound(constant_flow("x", shift, log_scale))])
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
        residual, ladj = model.analyse(torch.nn.functional.pad(audio, (model.margin * 8,) * 2), mel)
        _, log_prob_residual = invert(model.residual(mel), residual)
    torch.testing.assert_close(log_prob_residual + ladj, log_prob, rtol=0, atol=1e-9)


def test_analysis_of_a_crop_with_margins_is_the_crop_of_the_analysis() -> None:
    model, mel = small_model("teacher"), small_mel(1, 12)
    audio = noise(1, (12 + 2 * model.margin) * 8)
    with torch.no_grad():
        whole, _ = model.analyse(audio, mel)
        crop, _ = model.analyse(audio[:, 4 * 8 : (8 + 2 * model.margin) * 8], mel.block(4, 4))
    torch.testing.assert_close(crop, whole[:, 4 * 8 : 8 * 8], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_crop_is_conditioned_as_the_whole_file(tiny_data: dict[str, Any], kind: str) -> None:
    """At every place: F0, features and source see all that they look at, and none is made up at the edges."""
    recipe = validate_recipe(tiny_data, "tiny.toml")
    hop, model = recipe.audio.hop_length, randomise(build(recipe, kind, 0))
    assert model.margin == margin(recipe)
    mel = noise(1, recipe.audio.n_mels, 20 + 2 * model.margin) * 3 - 5
    whole, crops = model.context(told(recipe, mel))[0], []
    for first in range(20 - 4 + 1):
        crops.append(model.context(told(recipe, mel).block(first, 4))[0])
        features, steps = crops[-1][0], whole[0].shape[1] // 20
        expected = whole[0][:, first * steps : (first + 4) * steps]
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-12)
        if kind == "student":  # whose phase starts with the crop; the last channel is voicing
            voiced = crops[-1][1][..., -1]
            assert torch.equal(voiced, whole[1][:, first * hop : (first + 4) * hop, -1])
    f0 = model.pitch(mel)
    assert (f0 > 0).any()
    assert f0.shape[1] == 20 + 2 * recipe.conditioning.context
    alone = model.pitch(mel[..., 7 : 8 + 2 * PITCH_CONTEXT])
    torch.testing.assert_close(alone, f0[:, 7:8], rtol=1e-12, atol=0)


def test_kl_of_waveforms_is_the_kl_of_residuals() -> None:
    """Draw by draw: a transform that both models share cancels."""
    student, teacher, mel, z = small_model("student"), small_model("teacher"), small_mel(2, 6), noise(2, 48)
    with torch.no_grad():
        waveform, _ = one_draw(student(mel), teacher(mel), z)
        residual, _ = one_draw(student.residual(mel), teacher.residual(mel), z)
    torch.testing.assert_close(waveform, residual, rtol=0, atol=1e-9)


MIXTURES = [(base, components) for base in BASES for components in (1, 2, 5)]


def mixture_parameters(components: int, *shape: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    weights, shift, log_scale = noise(3, *shape, components, seed=3).unbind(0)
    return weights, spread * shift, log_scale - 1


@pytest.mark.parametrize(("base", "components"), MIXTURES)
def test_mixture_has_the_density_of_torch_distributions_and_integrates_to_one(base: str, components: int) -> None:
    weights, shift, log_scale = mixture_parameters(components)
    x = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    every = tuple(p.expand(len(x), -1) for p in (weights, shift, log_scale))
    log_prob = Conditionals(BASES["logistic"], MixtureCdf(BASES[base], components, -5.0), every).log_prob_steps(x)
    parts = BASES[base].log_prob((x[:, None] - shift) * (-log_scale).exp()) - log_scale
    torch.testing.assert_close(log_prob, (weights.log_softmax(-1) + parts).logsumexp(-1), rtol=1e-9, atol=1e-9)
    assert torch.trapezoid(log_prob.exp(), x).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("base", "components"), MIXTURES)
def test_mixture_round_trips_also_far_out_and_with_small_scales(base: str, components: int) -> None:
    mixture, z = MixtureCdf(BASES[base], components, -5.0), torch.linspace(-40, 40, 801, dtype=torch.float64)
    weights, shift, log_scale = (
        p.expand(len(z), -1) for p in mixture_parameters(components, spread=10)
    )  # far apart: the density has deep valleys
    for smaller in (0, 5):
        parameters = weights, shift, log_scale - smaller
        x, ladj = mixture.to_x(z, *parameters)
        back, inverse_ladj = mixture.to_z(x, *parameters)
        # As exact as x can be: between far apart components, a rounding of x moves z.
        tolerance = 1e-9 + 8 * torch.finfo(x.dtype).eps * x.abs() * inverse_ladj.exp()
        assert ((back - z).abs() <= tolerance).all()
        torch.testing.assert_close(ladj, -inverse_ladj)
        assert (x.diff() > 0).all()


@pytest.mark.parametrize("base", BASES)
def test_mixture_s_ladj_is_the_logarithm_of_its_slope(base: str) -> None:
    mixture, parameters, x = MixtureCdf(BASES[base], 4, -5.0), mixture_parameters(4, 50), noise(50).requires_grad_()
    z, ladj = mixture.to_z(x, *parameters)
    (slope,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(slope.log(), ladj, rtol=0, atol=1e-9)


@pytest.mark.parametrize("base", BASES)
def test_mixture_of_one_logistic_is_affine_and_tails_keep_a_gradient_in_float32(base: str) -> None:
    shift, log_scale = torch.tensor([[0.5]]), torch.tensor([[-4.5]]).requires_grad_()
    x = torch.tensor([-30.0, 0.0, 30.0])  # thousands of scales away
    parameters = torch.zeros(3, 1), shift.expand(3, 1), log_scale.expand(3, 1)
    conditionals = Conditionals(BASES["logistic"], MixtureCdf(BASES[base], 1, -5.0), parameters)
    if base == "logistic":
        torch.testing.assert_close(conditionals.noise(x), Affine(-5.0).to_z(x, shift[0], log_scale[0])[0])
    conditionals.log_prob_steps(x).sum().backward()
    assert log_scale.grad is not None
    assert log_scale.grad.isfinite().all()
    assert log_scale.grad.item() > 1, "a larger scale would explain these values"


@pytest.mark.parametrize("base", BASES)
def test_both_ways_to_sample_a_mixture_agree_with_its_distribution_function(base: str) -> None:
    """Kolmogorov-Smirnov distance of either from the distribution function, at the level of 1 in 10,000."""
    count, generator = 20_000, torch.Generator().manual_seed(0)
    mixture = MixtureCdf(BASES[base], 3, -5.0)
    parameters = tuple(p.expand(count, -1) for p in mixture_parameters(3, spread=2))
    through_cdf, _ = mixture.to_x(BASES["logistic"].noise((count,), generator).double(), *parameters)
    # Without the inverse: first the component, then its value.
    weights, shift, log_scale = parameters
    choice = torch.rand(count, generator=generator, dtype=torch.float64)
    k = (choice[:, None] > weights.softmax(-1).cumsum(-1)).sum(-1, keepdim=True).clamp_max(2)
    of_component = BASES[base].noise((count,), generator).double()[:, None]
    by_component = (shift.gather(-1, k) + log_scale.gather(-1, k).exp() * of_component)[:, 0]
    for draws in (through_cdf, by_component):
        uniform = mixture.to_z(draws, *parameters)[0].sigmoid().sort().values
        distance = (uniform - (torch.arange(count) + 0.5) / count).abs().max()
        assert distance < 2.23 / math.sqrt(count)


BIJECTIONS = [Affine(-9.0), *(MixtureCdf(BASES[base], components, -9.0) for base, components in MIXTURES)]


@pytest.mark.parametrize("elementwise", BIJECTIONS)
def test_outputs_of_a_network_become_the_parameters_of_a_bijection(elementwise: Elementwise) -> None:
    """Of as many outputs as it asks for, in any leading shape, with a log-scale that keeps above its bound."""
    raw = 9 * noise(3, 4, elementwise.outputs)
    parameters = elementwise.parameters(raw)
    z, ladj = elementwise.to_z(noise(3, 4), *parameters)
    assert z.shape == ladj.shape == (3, 4)
    *unbounded, log_scale = (p.reshape(3, 4, -1) for p in parameters)
    assert torch.equal(torch.cat(unbounded, -1), raw[..., : -log_scale.shape[-1]])
    expected = torch.log1p((raw[..., -log_scale.shape[-1] :] + 9).exp()) - 9
    torch.testing.assert_close(log_scale, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("noise_base", BASES)
@pytest.mark.parametrize("elementwise", BIJECTIONS)
def test_a_start_has_zero_mean_and_unit_variance(elementwise: Elementwise, noise_base: str) -> None:
    """By integration of its density; a mixture's noise is logistic."""
    base = BASES[noise_base if isinstance(elementwise, Affine) else "logistic"]
    start = elementwise.start(base.std)
    assert start.shape == (elementwise.outputs,)
    x = torch.linspace(-40, 40, 40_001, dtype=torch.float64)
    parameters = elementwise.parameters(start.double().expand(len(x), -1))
    density = Conditionals(base, elementwise, parameters).log_prob_steps(x).exp()
    moments = [torch.trapezoid(density * x**power, x).item() for power in (0, 1, 2)]
    assert moments == pytest.approx([1, 0, 1], abs=2e-3), "but for the softplus, far above its bound"


def test_a_distribution_says_what_it_is() -> None:
    mel = small_mel(1, 3)
    assert repr(small_model("teacher")(mel)) == (
        "FlowDistribution(z of StandardNormal -> Affine given past x -> LinearPrediction -> x)"
    )
    assert repr(small_model("student").residual(mel)) == (
        f"FlowDistribution(z of StandardNormal{' -> Affine given past z' * 3} -> x)"
    )


def test_each_transform_is_bound_to_its_own_context_in_both_directions() -> None:
    """From z to x in the order given, and back; the terms of ladj add up."""
    flows = [small_flow("z", seed) for seed in range(2)]
    bound = [Bound(flow, (noise(2, 6, 3, seed=9 + i),)) for i, flow in enumerate(flows)]
    distribution, z = FlowDistribution(StandardNormal(), [*bound, Bound(Scale(0.5).double())]), noise(2, LENGTH)
    with torch.no_grad():
        x, ladj = distribution.to_x(z)
        first, ladj_of_first = flows[0](z, bound[0].context)
        second, ladj_of_second = flows[1](first, bound[1].context)
        torch.testing.assert_close(x, 0.5 * second, rtol=1e-6, atol=0)
        torch.testing.assert_close(ladj, ladj_of_first + ladj_of_second + math.log(0.5), rtol=1e-6, atol=1e-6)
    scales = FlowDistribution(StandardNormal(), [Bound(constant_flow("x", 0.3, 0.2)), Bound(Scale(0.5).double())])
    back, inverse_ladj = scales.to_z(z)
    torch.testing.assert_close(back, (2 * z - 0.3) * math.exp(-0.2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inverse_ladj, torch.full_like(z, math.log(2) - 0.2), rtol=1e-6, atol=0)


def test_conditionals_of_a_student_are_its_composed_affine_function() -> None:
    student, z = small_model("student").residual(small_mel(2, 3)), noise(2, LENGTH)
    with torch.no_grad():
        x, conditionals = student.rsample_and_conditionals(z)
        torch.testing.assert_close(conditionals.rsample(z), x)
        torch.testing.assert_close(conditionals.log_prob_steps(x), student.rsample_and_log_prob_steps(z)[1])


def test_conditionals_of_a_teacher_are_the_terms_of_its_density() -> None:
    teacher, x = small_model("teacher").residual(small_mel(2, 3)), noise(2, LENGTH)
    with torch.no_grad():
        torch.testing.assert_close(teacher.conditionals(x).log_prob_steps(x), teacher.log_prob_steps(x))
    with pytest.raises(SequentialDirectionError, match="masked"):
        small_model("student").residual(small_mel(2, 3)).conditionals(x)


def test_a_mixture_s_inverse_takes_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs at every step of a sequential sampler: Newton's method, not the bisection that keeps it safe."""
    monkeypatch.setattr("wavedistill.flows.roots.ITERATIONS", 20)
    for base in BASES.values():
        mixture, z = (
            MixtureCdf(base, 3, -5.0),
            BASES["logistic"].noise((500,), torch.Generator().manual_seed(0)).double(),
        )
        parameters = mixture_parameters(3, 500, spread=2)
        x, _ = mixture.to_x(z, *parameters)
        torch.testing.assert_close(mixture.to_z(x, *parameters)[0], z, rtol=1e-9, atol=1e-9)


def test_only_affine_flows_are_taken_for_an_affine_function_of_the_noise() -> None:
    flow = Autoregressive(lambda x: x.new_zeros(*x.shape, 6), "z", MixtureCdf(StandardNormal(), 2, -5.0))
    for steps in ([flow], [constant_flow("z", 0.0, 0.0), Scale(2.0)], [flow, constant_flow("z", 0.0, 0.0)]):
        with pytest.raises(ValueError, match="affine"):
            FlowDistribution(StandardLogistic(), [Bound(s) for s in steps]).rsample_and_conditionals(noise(1, 5))


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_model_uses_the_f0_it_is_given_at_its_own_place(tiny_data: dict[str, Any], kind: str) -> None:
    """With margins of more than the frame that the source looks at."""
    tiny_data["conditioning"]["context"] = 3
    recipe = validate_recipe(tiny_data, "tiny.toml")
    hop, model = recipe.audio.hop_length, randomise(build(recipe, kind, 0))
    mel = noise(1, recipe.audio.n_mels, 8 + 2 * model.margin) - 5
    f0 = torch.full((1, 8 + 2 * model.margin), 120.0).double()

    def context_of(f0: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(part for part in model.residual(told(recipe, mel, f0)).steps[0].context if part is not None)

    given, predicted = context_of(f0), context_of(None)
    assert all((a != b).any() for a, b in zip(given, context_of(2 * f0), strict=True))
    own = torch.nn.functional.pad(model.pitch(mel), (PITCH_CONTEXT, PITCH_CONTEXT))
    assert all(torch.equal(a, b) for a, b in zip(predicted, context_of(own), strict=True))
    if kind == "student":
        source = given[1]
        assert source.shape[1] == 8 * hop
        far, first = f0.clone(), f0.clone()
        far[:, PITCH_CONTEXT], first[:, model.margin] = 200, 200
        assert torch.equal(context_of(far)[1], source), "a margin frame that touches no sample"
        assert (context_of(first)[1] != source).any(-1)[0, 0], "the first frame acts from the first sample on"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bounded_log_scale_is_a_softplus_of_any_size(dtype: torch.dtype) -> None:
    """With its gradient, which a naive form loses where the exponential overflows."""
    raw = torch.tensor([-100.0, -20, -5, -4.5, -4, 0, 30, 90, 1e4], dtype=dtype, requires_grad=True)
    expected = -4.5 + torch.nn.functional.softplus(raw + 4.5)
    found = bounded(raw, -4.5)
    atol = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=atol)
    gradients = [torch.autograd.grad(value.sum(), raw)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=2 * atol)
