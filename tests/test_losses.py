"""Objectives: agreement with closed forms, exact zeros, and where gradients go."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn import Parameter

from tests.conftest import changed, margin, noise, one_draw, randomise, small_mel, small_model, told
from tests.test_flows import constant_flow
from wavedistill.corpus.segments import Batch, dequantise
from wavedistill.flows.bases import StandardLogistic, StandardNormal
from wavedistill.flows.distributions import Conditionals, FlowDistribution
from wavedistill.flows.elementwise import Affine, MixtureCdf
from wavedistill.flows.transforms import Autoregressive, Bound
from wavedistill.models.kinds import build
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech.audio import LogMel
from wavedistill.speech.conditioning import Conditioning
from wavedistill.tools.random import random_stream
from wavedistill.training.distillation import Distillation
from wavedistill.training.losses import (
    closed_kl,
    cross_entropy_kl,
    log_mel_distance,
    log_scale_distance,
    negative_log_likelihood,
    spectral_distance,
)


def distribution_of(*flows: Autoregressive) -> FlowDistribution:
    return FlowDistribution(StandardNormal(), [Bound(flow) for flow in flows])


def density_parameters(model: WaveformModel) -> list[tuple[str, Parameter]]:
    """All but those of the predictor of F0, which has an objective of its own."""
    return [(name, parameter) for name, parameter in model.named_parameters() if not name.startswith("pitch.")]


def test_kl_of_a_density_from_itself_is_zero_for_every_draw() -> None:
    """Two flows that compose to the teacher's single one: no noise in the estimate, only rounding."""
    q = distribution_of(constant_flow("z", 0.5, 0.2), constant_flow("z", -1.0, -0.7))
    p = distribution_of(constant_flow("x", -1.0 + 0.5 * math.exp(-0.7), -0.5))
    kl, _ = one_draw(q, p, noise(100, 7))
    assert kl.abs().max() < 1e-12


def test_monte_carlo_kl_of_two_gaussians_agrees_with_the_closed_form() -> None:
    q = distribution_of(constant_flow("z", 0.3, -0.4))
    p = distribution_of(constant_flow("x", -0.2, 0.1))
    kl, _ = one_draw(q, p, noise(4000, 5))
    expected = kl_divergence(Normal(0.3, math.exp(-0.4)), Normal(-0.2, math.exp(0.1)))
    standard_error = kl.std() / math.sqrt(len(kl))
    assert abs(kl.mean() - expected) < 4 * standard_error
    assert standard_error < 0.05 * expected
    assert kl.min() < 0, "single draws may be negative, and nothing may forbid it"


def test_distillation_gradients_reach_every_student_parameter_and_no_teacher_parameter() -> None:
    student, teacher, mel = small_model("student"), small_model("teacher"), small_mel(2, 5)
    teacher.requires_grad_(False)
    kl, x = one_draw(student(mel), teacher(mel), noise(2, 40))
    (kl.mean() + spectral_distance(x, noise(2, 40, seed=1), [16, 32]).mean()).backward()
    for name, parameter in density_parameters(student):
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_teacher_s_term_alone_moves_the_student() -> None:
    """The gradient reaches x through the frozen teacher; no_grad around it would cut this path."""
    student, teacher, mel = small_model("student"), small_model("teacher"), small_mel(1, 5)
    teacher.requires_grad_(False)
    x, _ = student(mel).rsample_and_log_prob(noise(1, 40))
    teacher(mel).log_prob(x).sum().backward()
    assert all(parameter.grad is not None for _, parameter in density_parameters(student))


def test_likelihood_gradients_reach_every_teacher_parameter() -> None:
    teacher = small_model("teacher")
    negative_log_likelihood(teacher(small_mel(2, 5)), noise(2, 40)).mean().backward()
    for name, parameter in density_parameters(teacher):
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_likelihood_is_in_nats_per_sample_whatever_the_length() -> None:
    p = distribution_of(constant_flow("x", 0.0, 0.0))
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


def pair() -> tuple[Conditionals, Conditionals]:
    """Two Gaussians a few tenths of a nat apart, at each of 2 x 50 steps."""
    parameters = noise(4, 2, 50, seed=5) * 0.3
    return tuple(Conditionals(StandardNormal(), Affine(-5.0), (p[0], p[1])) for p in parameters.split(2))


def test_closed_kl_is_that_of_torch() -> None:
    q, p = pair()
    expected = kl_divergence(*(Normal(c.parameters[0], c.parameters[1].exp()) for c in (q, p)))
    torch.testing.assert_close(closed_kl(q, p), expected)
    assert not closed_kl(q, q).any()


@pytest.mark.parametrize("k", [1, 10, 100])
def test_estimators_agree_with_the_closed_form(k: int) -> None:
    q, p = pair()
    expected = closed_kl(q, p).sum()
    draws = torch.stack([cross_entropy_kl(q, p, noise(k, 2, 50, seed=s)).sum() for s in range(200)])
    assert abs(draws.mean() - expected) < 4 * draws.std() / math.sqrt(len(draws))
    assert draws.std() / math.sqrt(len(draws)) < 0.1 * expected


def test_estimators_of_one_student_agree_with_each_other() -> None:
    """`mc`, `mc-k` and `closed` through whole networks: the same number within 4 standard errors."""
    student, teacher, mel = small_model("student"), small_model("teacher"), small_mel(1, 5)
    mel = replace(mel, mel=mel.mel.expand(64, -1, -1))
    q, p = student.residual(mel), teacher.residual(mel)
    found: dict[str, list[float]] = {"mc": [], "mc-k": [], "closed": []}
    with torch.no_grad():
        for seed in range(8):
            z = noise(64, 40, seed=seed)
            x, q_steps = q.rsample_and_conditionals(z)
            p_steps = p.conditionals(x)
            found["mc"] += one_draw(q, p, z)[0].tolist()
            found["mc-k"] += cross_entropy_kl(q_steps, p_steps, noise(10, 64, 40, seed=100 + seed)).mean(-1).tolist()
            found["closed"] += closed_kl(q_steps, p_steps).mean(-1).tolist()
    values = {name: torch.tensor(each) for name, each in found.items()}
    for name in ("mc-k", "closed"):
        difference = values[name] - values["mc"]  # of the same draws of x
        assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(len(difference)), name
    assert values["closed"].std() <= values["mc"].std() * 1.1


def test_closed_form_refuses_other_densities() -> None:
    q, p = pair()
    with pytest.raises(ValueError, match="Gaussians"):
        closed_kl(q, p._replace(base=StandardLogistic()))
    mixture = Conditionals(StandardLogistic(), MixtureCdf(StandardNormal(), 3, -5.0), (p.parameters[0],) * 3)
    with pytest.raises(ValueError, match="more than a shift"):
        log_scale_distance(q, mixture)


def test_log_mel_distance_measures_a_gain_in_nats_in_loud_and_soft_parts_alike(tiny: Recipe) -> None:
    filters = {64: torch.eye(33).double()[:, 1:32]}
    y = noise(2, 400) * torch.tensor([[1.0], [0.01]])
    torch.testing.assert_close(log_mel_distance(y * 1.5, y, filters), torch.full((2,), math.log(1.5)).double())
    assert not log_mel_distance(1e-6 * y, 0 * y, filters).any(), "both silent"
    x = torch.zeros(1, 400, dtype=torch.float64, requires_grad=True)
    log_mel_distance(x, y[:1], filters).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


LOSSES = ("kl", "log_scale", "spectral", "log_mel", "contrastive", "x_reconstruction", "z_reconstruction")


class Setting(NamedTuple):
    """A tiny untrained pair, a batch, and what distils the one from the other."""

    student: WaveformModel
    teacher: WaveformModel
    batch: Batch
    objective: Distillation

    def terms(self) -> dict[str, Tensor]:
        return self.objective.terms(self.student, self.batch, [random_stream(0, item) for item in range(2)])


def setting(recipe: Recipe, **loss: Any) -> Setting:
    """With some weights of the recipe's changed."""
    recipe = changed(recipe, "training.student.loss", **loss)
    student, teacher = (randomise(build(recipe, kind, 0)) for kind in ("student", "teacher"))
    teacher.requires_grad_(False)
    hop, frames, context = recipe.audio.hop_length, 12, margin(recipe)
    audio = 0.1 * noise(2, (frames + 2 * context) * hop)
    mel = LogMel(recipe.audio).double().of_file(audio)
    f0 = torch.full((2, mel.shape[2]), 100.0).double()
    batch = Batch(audio[:, context * hop : -context * hop], audio, told(recipe, mel, f0))
    objective = Distillation(teacher, recipe, "student", audio.device)
    objective.filters = {n_fft: filters.double() for n_fft, filters in objective.filters.items()}
    return Setting(student, teacher, batch, objective)


def distillation(recipe: Recipe, **loss: Any) -> tuple[dict[str, Tensor], WaveformModel]:
    """The terms of a tiny untrained pair, and the student."""
    made = setting(recipe, **loss)
    return made.terms(), made.student


@pytest.mark.parametrize("estimator", ["mc", "closed"])
def test_a_term_and_its_gradient_are_those_of_its_formula(tiny: Recipe, estimator: str) -> None:
    """From the log-mel alone, through the teacher to the student's sample; the contrastive one is what is to grow."""
    made = setting(tiny, kl_estimator=estimator, kl=1.0, contrastive=1.0, spectral=0.0)
    student, teacher, mel = made.student, made.teacher, made.batch.conditioning.mel_alone()
    base, length = student.base, made.batch.audio.shape[1]
    z = torch.stack([base.noise((length,), random_stream(0, item)) for item in range(2)]).double()

    def kl(other: Conditioning) -> Tensor:
        q, p = student.residual(mel), teacher.residual(other)
        if estimator == "mc":
            return one_draw(q, p, z)[0].mean()
        x, q_steps = q.rsample_and_conditionals(z)
        return closed_kl(q_steps, p.conditionals(x)).mean()

    expected = {"kl": kl(mel), "contrastive": -kl(replace(mel, mel=mel.mel.roll(mel.mel.shape[-1] // 2, -1)))}
    found = made.terms()
    weights = [parameter for _, parameter in density_parameters(student)]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
        gradients = (torch.autograd.grad(term, weights, retain_graph=True) for term in (found[name], value))
        for given, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize(
    ("name", "estimator"),
    [(name, "closed") for name in LOSSES]
    + [(name, estimator) for name in ("kl", "contrastive") for estimator in ("mc", "mc-k")],
)
def test_every_term_moves_the_student(tiny: Recipe, name: str, estimator: str) -> None:
    weights = {other: float(other == name) for other in LOSSES}
    terms, student = distillation(tiny, kl_estimator=estimator, kl_draws=3, **weights)
    assert set(terms) == {"kl", name}, "terms without a weight cost nothing"
    terms[name].backward()
    for parameter_name, parameter in density_parameters(student):
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


def test_spectral_terms_hear_the_draw_at_the_level_of_its_log_mel(tiny: Recipe) -> None:
    """Behind the passes, a recording that is drawn too soft is the recording; the edges of a crop see what is there."""
    weights = {"passes": 1, "spectral": 1.0, "log_mel": 1.0, "drawn_log_mel": 1.0}
    made = setting(tiny, **weights)
    made.objective.consistency.double()
    recorded = made.batch.audio
    assert (made.objective.consistent(recorded, made.batch) - recorded).abs().max() < 1e-6
    soft = made.objective.spectra(0.5 * recorded, made.batch)
    torch.testing.assert_close(soft["drawn_log_mel"], torch.full((2,), math.log(2)).double(), rtol=0, atol=0.01)
    for name in ("spectral", "log_mel"):
        drawn = setting(tiny, **{**weights, "passes": 0}).objective.spectra(0.5 * recorded, made.batch)[name]
        assert (soft[name] < 0.2 * drawn).all()


def test_reconstruction_is_exact_for_a_student_that_is_its_teacher(tiny: Recipe) -> None:
    """Untrained, both are the same white residual: noise comes back, and so does the recording."""
    terms, _ = distillation(tiny, x_reconstruction=1.0, z_reconstruction=1.0, kl_estimator="mc")
    assert terms["x_reconstruction"] > 1e-3, "these two differ"
    student, teacher = build(tiny, "student", 0), build(tiny, "teacher", 0)
    audio = 0.1 * noise(1, 16 * tiny.audio.hop_length).float()
    mel = LogMel(tiny.audio).of_file(audio)
    context = margin(tiny)
    inner = audio[:, context * tiny.audio.hop_length : -context * tiny.audio.hop_length]
    recipe = changed(tiny, "training.student.loss", x_reconstruction=1.0, z_reconstruction=1.0)
    batch = Batch(inner, audio, told(recipe, mel, torch.zeros(1, mel.shape[2])))
    terms = Distillation(teacher, recipe, "student", audio.device).terms(student, batch, [random_stream(0)])
    for name in ("kl", "x_reconstruction", "z_reconstruction"):
        assert terms[name].abs() < 1e-3, name  # the soft bound of each flow adds a hundredth to its log-scale


def test_every_resolution_counts_alike() -> None:
    """As torch's transform has them, whatever the order in which they are named."""
    x, y = noise(2, 400), noise(2, 400, seed=1)
    each = []
    for n_fft in (32, 64, 128):
        window = torch.hann_window(n_fft).double()
        spectra = (
            torch.stft(a, n_fft, n_fft // 4, window=window, center=False, return_complex=True).abs() for a in (x, y)
        )
        first, second = spectra
        each.append((first - second).abs().sum((1, 2)) / second.sum((1, 2)))
    torch.testing.assert_close(spectral_distance(x, y, [32, 64, 128]), torch.stack(each).mean(0))
    torch.testing.assert_close(spectral_distance(x, y, [128, 32, 64]), torch.stack(each).mean(0))


def test_draws_of_every_step_are_their_own_and_each_item_s(tiny: Recipe) -> None:
    """`mc-k`: k draws beside that of the sample, from the item's own stream, after it."""
    made = setting(tiny, kl_estimator="mc-k", kl_draws=3, kl=1.0, spectral=0.0)
    length = made.batch.audio.shape[1]
    streams = [random_stream(0, item) for item in range(2)]
    base = made.student.base
    sample, draws = (
        torch.stack([base.noise(shape, stream) for stream in streams]).double() for shape in ((length,), (3, length))
    )
    assert all(not torch.equal(draws[:, i], draws[:, j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    mel = made.batch.conditioning.mel_alone()
    x, q = made.student.residual(mel).rsample_and_conditionals(sample)
    p = made.teacher.residual(mel).conditionals(x)
    each = [q.rsample(draw) for draw in draws.unbind(1)]
    expected = torch.stack([q.log_prob_steps(at) - p.log_prob_steps(at) for at in each])
    torch.testing.assert_close(made.terms()["kl"], expected.mean())


def test_a_recording_comes_back_as_it_is_analysed_with_what_lies_before_it(tiny: Recipe) -> None:
    """The terms of reconstruction, from the noise that the teacher sees in the recording, and from the student's."""
    made = setting(tiny, kl_estimator="closed", x_reconstruction=1.0, z_reconstruction=1.0, spectral=0.0)
    batch, streams = made.batch, [random_stream(0, item) for item in range(2)]
    length, around = batch.audio.shape[1], (batch.with_margins.shape[1] - batch.audio.shape[1]) // 2
    z = torch.stack([made.student.base.noise((length,), stream) for stream in streams]).double()
    mel = batch.conditioning.mel_alone()
    q, p = (model.residual(mel) for model in (made.student, made.teacher))
    found = made.terms()
    x, _ = q.rsample_and_log_prob(z)
    torch.testing.assert_close(found["z_reconstruction"], (p.conditionals(x).noise(x) - z).square().mean())
    heard = dequantise(batch.with_margins, streams)
    coefficients, log_gain = made.teacher.shared_context(mel)
    frames = torch.arange(length) // tiny.audio.hop_length
    predicted = sum(
        coefficients[:, frames, k] * heard[:, around - 1 - k : around - 1 - k + length]
        for k in range(coefficients.shape[-1])
    )
    recorded = (heard[:, around : around + length] - predicted) * (-log_gain[:, frames]).exp()
    rebuilt, _ = q.to_x(p.conditionals(recorded).noise(recorded))
    torch.testing.assert_close(found["x_reconstruction"], (rebuilt - recorded).square().mean())
