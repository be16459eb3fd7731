"""The zoo: its densities are densities, its bijections bijections, and its page is whole."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian
from typer.testing import CliRunner

from tests.conftest import REPOSITORY, noise
from wavedistill.cli import zoo as command
from wavedistill.cli.commands import app
from wavedistill.flows.bases import StandardNormal
from wavedistill.flows.elementwise import Affine
from wavedistill.flows.transforms import Autoregressive
from wavedistill.sampling.sequential import repeated
from wavedistill.zoo.layers import Contraction, Layer, MaskedConvolution, Planar, Radial, Residual, Sylvester
from wavedistill.zoo.made import Made
from wavedistill.zoo.targets import TARGETS, KnownDensity

pytest.importorskip("zuko", reason="zuko is not installed: pip install -e '.[zoo]'")

from wavedistill.zoo import fit
from wavedistill.zoo.families import FAMILIES
from wavedistill.zoo.teachers import Teacher, Vae, Zuko

FLOWS = [name for name in FAMILIES if name != "vae"]
SOLVED = {"ffjord": 5e-2, "umnn": 1e-5, "naf": 1e-5, "sos": 1e-5}
"""What is solved by steps or a search, to its tolerance; the others are exact to rounding."""
LAYERS: dict[str, Any] = {
    "planar": Planar,
    "radial": Radial,
    "sylvester": Sylvester,
    "residual": lambda features: Residual(features, 8),
    "convolution": lambda features: MaskedConvolution(features, 8),
    "convolution back": lambda features: MaskedConvolution(features, 8, reverse=True),
}


def shaken(module: torch.nn.Module, seed: int = 0) -> Any:
    """In float64, with parameters away from where they start."""
    torch.manual_seed(seed)
    for parameter in module.double().parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module.eval()


def normal(z: Tensor) -> Tensor:
    """Log density (B,) of noise z (B, D)."""
    return StandardNormal().log_prob(z).sum(1)


def log_det(function: Any, x: Tensor) -> Tensor:
    """log|det| (B,) of the Jacobian of a function of points (B, D), by autograd."""
    each = [jacobian(lambda point: function(point[None])[0], point) for point in x]
    return torch.linalg.slogdet(torch.stack(each)).logabsdet


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "table"])
def test_a_density_of_the_plane_integrates_to_one_and_is_that_of_its_samples(name: str) -> None:
    """Its entropy, from samples, is that from the integral."""
    target = TARGETS[name].make()
    assert isinstance(target, KnownDensity)
    cell = 0.06  # of which every side of a square is a multiple
    side = cell * (torch.arange(-75, 75, dtype=torch.float64) + 0.5)
    grid = torch.cartesian_prod(side, side)
    density = torch.cat([target.log_prob(part) for part in grid.split(2000)])
    assert float(density.exp().sum()) * cell**2 == pytest.approx(1, abs=0.002)
    entropy = float(-(density.exp() * density.clamp_min(-1e3)).sum()) * cell**2
    x = target.sample(8000, torch.Generator().manual_seed(0)).split(2000)
    assert float(-torch.cat([target.log_prob(part) for part in x]).mean()) == pytest.approx(entropy, abs=0.05)


def test_the_table_keeps_rows_from_the_fits() -> None:
    table = TARGETS["table"].make()
    x, held_out = (draw(20000, torch.Generator().manual_seed(0)) for draw in (table.sample, table.held_out))
    assert x.shape == (20000, 5)
    assert held_out.shape == (114, 5)
    assert float(x.std(0).mean()) == pytest.approx(math.hypot(1, 0.25), abs=0.05)


@pytest.mark.parametrize("context", [0, 3])
def test_a_masked_perceptron_sees_what_is_before_and_all_of_its_context(context: int) -> None:
    made = shaken(Made(4, 2, hidden=16, context=context))
    told = [noise(1, context)] if context else []
    by_x = jacobian(lambda x: made(x, *told), noise(1, 4)).abs().sum((0, 2, 3))  # (t, input)
    assert not by_x.triu().any()
    assert (by_x + torch.ones(4, 4).triu() > 0).all(), "it does see the past"
    if context:
        assert (jacobian(lambda told: made(noise(1, 4), told), *told) != 0).all()


@pytest.mark.parametrize("reads", ["x", "z"])
def test_the_sequential_direction_by_repeated_passes_is_the_inverse(reads: Any) -> None:
    flow = Autoregressive(shaken(Made(4, 2, hidden=16)), reads, Affine(-5.0))
    given = noise(3, 4)
    found, parameters = repeated(flow, given)
    back, ladj = (flow.inverse if reads == "x" else flow)(found)
    torch.testing.assert_close(back, given, rtol=0, atol=1e-10)
    direction = flow.elementwise.to_z if reads == "x" else flow.elementwise.to_x
    torch.testing.assert_close(direction(found, *parameters)[1], ladj, rtol=0, atol=1e-10)


@pytest.mark.parametrize("features", [2, 5])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_has_an_inverse_and_its_determinant(name: str, features: int) -> None:
    torch.manual_seed(1)
    layer: Layer = shaken(LAYERS[name](features))
    x = 2 * noise(4, features)
    z, ladj = layer(x)
    torch.testing.assert_close(ladj, log_det(lambda x: layer(x)[0], x), rtol=0, atol=1e-8)
    with torch.no_grad():
        torch.testing.assert_close(layer.invert(z), x, rtol=0, atol=1e-5)


def test_folds_that_would_overlap_are_kept_from_it() -> None:
    """Whatever a fit does to the parameters: a planar layer's w.u, a radial one's beta, a Sylvester one's product."""
    planar, radial, sylvester = (make(2).double() for make in (Planar, Radial, Sylvester))
    planar.raw_u.data = -4 * planar.w.data
    radial.raw_beta.data -= 10
    sylvester.product.data -= 10
    x = 3 * noise(200, 2)
    for layer in (planar, radial, sylvester):
        ladj = layer(x)[1]
        assert ladj.isfinite().all()
        torch.testing.assert_close(ladj, log_det(lambda x, layer=layer: layer(x)[0], x), rtol=0, atol=1e-6)
    assert float(planar.w @ planar.u) > -1


def test_a_contraction_contracts_whatever_its_weights() -> None:
    network = Contraction(3, 16).double()
    for layer in (network.first, network.last):
        layer.weight.data *= 50
    x, y = 5 * noise(500, 3), 5 * noise(500, 3)[torch.randperm(500)]
    (at_x, jacobian_there), (at_y, _) = network(x), network(y)
    assert ((at_x - at_y).norm(dim=1) <= 0.95 * (x - y).norm(dim=1) + 1e-12).all()
    for factors in ((50, 0.1), (0.1, 50)):  # where no unit is in its bend, it is as steep as it can be
        steep = Contraction(3, 16).double()
        for layer, factor in zip((steep.first, steep.last), factors, strict=True):
            layer.weight.data *= factor
        steep.first.bias.data.zero_()
        assert torch.linalg.matrix_norm(steep(torch.zeros(1, 3).double())[1], 2) <= 0.95 + 1e-12
    torch.testing.assert_close(
        jacobian_there[0], jacobian(lambda point: network(point[None])[0][0], x[0]), rtol=0, atol=1e-8
    )


def test_a_masked_convolution_is_triangular_with_a_positive_diagonal() -> None:
    for reverse in (False, True):
        layer = shaken(MaskedConvolution(4, 8, reverse=reverse))
        layer.taps.data[:, -1], layer.taps_out.data[:, -1] = -5, 50  # whatever a training makes of them
        layer.bias.data.zero_()
        there = jacobian(lambda x, layer=layer: layer(x[None])[0][0], 0.1 * noise(4))
        assert (there.diagonal() > 0).all()
        assert not (there.tril(-1) if reverse else there.triu(1)).any()
        assert (there.triu(1) if reverse else there.tril(-1)).any()


@pytest.mark.parametrize("name", [name for name in FLOWS if FAMILIES[name].source == "ours"])
def test_a_family_of_ours_has_the_density_of_its_draws(name: str) -> None:
    """Of a draw x(z): log p(x) = log N(z) - log|det dx/dz|, and the determinant is found by differences."""
    torch.manual_seed(0)
    teacher: Teacher = FAMILIES[name].make(2).double().eval()
    z, step = noise(3, 2), 1e-3
    with torch.no_grad():
        x = teacher.to_x(z)
        columns = [(teacher.to_x(z + step * e) - teacher.to_x(z - step * e)) / (2 * step) for e in torch.eye(2)]
        expected = normal(z) - torch.linalg.slogdet(torch.stack(columns, -1)).logabsdet
        torch.testing.assert_close(teacher.log_prob(x), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", [name for name in FLOWS if FAMILIES[name].source == "zuko"])
def test_a_family_of_zuko_s_has_the_density_and_the_inverse_it_says(name: str) -> None:
    torch.manual_seed(0)
    teacher = FAMILIES[name].make(2).double().eval()
    assert isinstance(teacher, Zuko)
    x, tolerance = noise(3, 2), SOLVED.get(name, 1e-8)
    to_z = teacher.flow().transform
    expected = normal(to_z(x)) + log_det(to_z, x)
    torch.testing.assert_close(teacher.log_prob(x), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(teacher.to_x(to_z(x)), x, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.differentiable])
def test_what_may_be_fitted_by_its_own_draws_has_their_gradient(name: str) -> None:
    torch.manual_seed(0)
    teacher = FAMILIES[name].make(2).double()
    x, log_q = teacher.rsample_and_log_prob(noise(3, 2))
    torch.testing.assert_close(log_q, teacher.log_prob(x), rtol=0, atol=1e-6)
    x.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in teacher.parameters())


def test_a_vae_bounds_its_likelihood_and_more_draws_make_it_tight() -> None:
    """Against the sum over a grid of latents."""
    torch.manual_seed(0)
    vae = Vae(2, hidden=8, context=3).double()
    for parameter in vae.posterior.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = 0.3 * noise(6, 2)
    side = torch.linspace(-6, 6, 151, dtype=torch.float64)
    latents = torch.cartesian_prod(side, side)
    with torch.no_grad():
        joint = torch.stack([vae.log_joint(point.expand(len(latents), 2), latents) for point in x])
        exact = torch.logsumexp(joint, 1) + 2 * math.log(side[1] - side[0])
        one, many = (torch.stack([vae.bound(x, draws) for _ in range(200)]) for draws in (1, 1000))
    assert (one.mean(0) < exact + 0.05).all()
    assert float((exact - one.mean(0)).mean()) > 0.01, "a bound, and no more"
    torch.testing.assert_close(many.exp().mean(0).log(), exact, rtol=0, atol=0.05)


def test_evaluations_are_counted_point_by_point() -> None:
    counts = {}
    for name in ("maf", "iaf", "realnvp", "planar"):
        found = fit.cost(FAMILIES[name].make(2), torch.Generator().manual_seed(0))
        counts[name] = found["evaluations_to_draw"], found["evaluations_to_evaluate"]
    assert counts["maf"] == (16, 8), "eight steps, of two values each"
    assert counts["iaf"] == (8, 16)
    assert counts["realnvp"] == (8, 8)
    assert counts["planar"][1] == 24
    assert counts["planar"][0] > 24 * 30, "a search for a root in every layer"


@pytest.mark.slow
def test_distillation_brings_a_student_near(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {steps: fit.examine(fit.Pair("realnvp", "waves", 0, steps))[0] for steps in (2, 150)}
    assert figures[150]["fitted_by"] == "reverse KL"
    assert figures[150]["kl"] + 10 * figures[150]["kl_error"] < figures[2]["kl"] + 10 * figures[2]["kl_error"]
    assert figures[150]["kl"] < 0.5
    assert figures[150]["teacher_nll"] < figures[2]["teacher_nll"]


# The command line


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["zoo", *words])


def test_unknown_names_are_answered_with_those_there_are() -> None:
    assert "there are planar, radial" in flat(invoke("--family", "dodo").output)
    assert "there are moons, rings" in flat(invoke("--density", "suns").output)
    assert "leave out --density" in flat(invoke("--density", "moons", "--all").output)


def flat(text: str) -> str:
    """Without the frame and line breaks of an error."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PACKAGES", ("zuko", "no_such_package"))
    assert str(invoke().exception) == "zoo: no_such_package not installed; pip install 'wavedistill[zoo]'"


def test_each_family_meets_its_own_density_and_the_common_ones() -> None:
    from wavedistill.zoo.run import chosen

    assert [pair.target for pair in chosen(["glow"], [], 0, 9, every=False)] == ["moons", "waves", "table"]
    assert len(chosen([], [], 0, 9, every=True)) == len(FAMILIES) * len(TARGETS)
    shown = {pair.target for pair in chosen([], [], 0, 9, every=False)}
    assert shown == set(TARGETS), "each density is seen by default"


@pytest.mark.slow
def test_a_run_leaves_a_page_and_figures_that_depend_on_its_seed_alone(tmp_path: Path) -> None:
    words = ["--family", "radial", "--family", "glow", "--density", "moons", "--steps", "3", "--out", str(tmp_path)]
    done = invoke(*words)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "zoo.json").read_text())["pairs"]
    assert [pair["family"] for pair in found] == ["radial", "glow"], "in the table's order"
    again, _ = fit.examine(fit.Pair("glow", "moons", 0, 3))  # in this process, after other random numbers
    for key in ("teacher_nll", "student_nll", "kl", "kl_error", "missed"):
        assert again[key] == pytest.approx(found[1][key], rel=1e-4)
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/webp") == 6
    assert not re.search(r'(src|href)="https?:', page), "it asks nobody"
    for pair in found:
        assert f"{pair['kl']:.3f} ± {pair['kl_error']:.3f}".replace("-", "\N{MINUS SIGN}") in page


KILLED = """
import os, time
from wavedistill.zoo.run import _pool

if __name__ == "__main__":
    with _pool(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 60)
        time.sleep(1)
        os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="whether a process lives is read from Linux's /proc")
def test_a_worker_ends_with_the_process_that_it_works_for(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment, told = {**os.environ, "PYTHONPATH": str(REPOSITORY)}, tmp_path / "told"
    with told.open("w") as file:  # no pipe, which a worker that goes on would hold open
        assert subprocess.run([sys.executable, script], stdout=file, env=environment).returncode == -9
    for _ in range(100):
        if not alive(int(told.read_text())):
            return
        time.sleep(0.1)
    raise AssertionError("the worker goes on")


def alive(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()
