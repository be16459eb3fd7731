"""Objectives: agreement with closed forms, exact zeros, and where gradients go."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tests.conftest import noise, small_mel, small_model
from tests.test_flows import constant_flow
from wavedistill.flows import Composition, FlowDistribution, StandardNormal
from wavedistill.losses import monte_carlo_kl, negative_log_likelihood, spectral_distance


def test_kl_of_a_density_from_itself_is_zero_for_every_draw() -> None:
    """Two flows that compose to the teacher's single one: no noise in the estimate, only rounding."""
    q = FlowDistribution(Composition([constant_flow("z", 0.5, 0.2), constant_flow("z", -1.0, -0.7)]), StandardNormal())
    p = FlowDistribution(constant_flow("x", -1.0 + 0.5 * math.exp(-0.7), -0.5), StandardNormal())
    kl, _ = monte_carlo_kl(q, p, noise(100, 7))
    assert kl.abs().max() < 1e-12


def test_monte_carlo_kl_of_two_gaussians_agrees_with_the_closed_form() -> None:
    q = FlowDistribution(constant_flow("z", 0.3, -0.4), StandardNormal())
    p = FlowDistribution(constant_flow("x", -0.2, 0.1), StandardNormal())
    kl, _ = monte_carlo_kl(q, p, noise(4000, 5))
    expected = kl_divergence(Normal(0.3, math.exp(-0.4)), Normal(-0.2, math.exp(0.1)))
    standard_error = kl.std() / math.sqrt(len(kl))
    assert abs(kl.mean() - expected) < 4 * standard_error
    assert standard_error < 0.05 * expected
    assert kl.min() < 0, "single draws may be negative, and nothing may forbid it"


def test_distillation_gradients_reach_every_student_parameter_and_no_teacher_parameter() -> None:
    student, teacher, mel = small_model("student"), small_model("teacher"), small_mel(2, 5)
    teacher.requires_grad_(False)
    kl, x = monte_carlo_kl(student(mel), teacher(mel), noise(2, 40))
    (kl.mean() + spectral_distance(x, noise(2, 40, seed=1), [16, 32]).mean()).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_teacher_s_term_alone_moves_the_student() -> None:
    """The gradient reaches x through the frozen teacher; no_grad around it would cut this path."""
    student, teacher, mel = small_model("student"), small_model("teacher"), small_mel(1, 5)
    teacher.requires_grad_(False)
    x, _ = student(mel).rsample_and_log_prob(noise(1, 40))
    teacher(mel).log_prob(x).sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_likelihood_gradients_reach_every_teacher_parameter() -> None:
    teacher = small_model("teacher")
    negative_log_likelihood(teacher(small_mel(2, 5)), noise(2, 40)).mean().backward()
    for name, parameter in teacher.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_likelihood_is_in_nats_per_sample_whatever_the_length() -> None:
    p = FlowDistribution(constant_flow("x", 0.0, 0.0), StandardNormal())
    for length in (3, 50):
        expected = torch.tensor([0.5 * math.log(2 * math.pi)], dtype=torch.float64)
        torch.testing.assert_close(negative_log_likelihood(p, torch.zeros(1, length).double()), expected)


def test_spectral_distance_is_zero_for_equal_sound_and_ignores_sign_and_units() -> None:
    x, y = noise(2, 400), noise(2, 400, seed=1)
    assert not spectral_distance(x, x, [64, 128]).any()
    torch.testing.assert_close(spectral_distance(-x, y, [64]), spectral_distance(x, y, [64]))
    torch.testing.assert_close(spectral_distance(10 * x, 10 * y, [64]), spectral_distance(x, y, [64]))
    torch.testing.assert_close(spectral_distance(0 * x, y, [64]), torch.ones(2).double())


def test_spectral_distance_has_finite_gradients_on_silence() -> None:
    x = torch.zeros(1, 400, requires_grad=True)
    for y in (torch.zeros(1, 400), torch.randn(1, 400, generator=torch.Generator().manual_seed(0))):
        spectral_distance(x, y, [64, 128]).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_hann_windows_keep_a_tone_out_of_distant_bands() -> None:
    """A rectangular window leaks a tone into every band, and would hide quiet noise there."""
    n = torch.arange(4096, dtype=torch.float64)
    tone = torch.sin(2 * math.pi * 0.1003 * n)[None]
    distant = 0.001 * torch.sin(2 * math.pi * 0.4 * n)[None]
    # Four bins of a Hann window hold a tone: a thousandth of it elsewhere is heard as a thousandth, not masked.
    assert spectral_distance(tone + distant, tone, [512])[0] == pytest.approx(0.001, rel=0.2)
