"""Coupling flows: exact in both directions, started from data, trained by likelihood, and teachers of a student."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import wavedistill
from tests.conftest import margin, noise, randomise, told, write_voice
from tests.test_audio import corpus
from tests.test_cli import wavedistill as command
from wavedistill.corpus.utterances import Manifest
from wavedistill.flows.bases import StandardNormal
from wavedistill.flows.coupling import ActNorm, CouplingLayer, InvertibleConv, start_from_data
from wavedistill.flows.elementwise import Affine
from wavedistill.flows.transforms import SequentialDirectionError
from wavedistill.models.checkpoint import load, load_model
from wavedistill.models.kinds import build
from wavedistill.models.waveform import WaveformModel
from wavedistill.networks.around import WaveNetAround
from wavedistill.recipe.loading import validate_recipe
from wavedistill.recipe.recipe import Recipe
from wavedistill.sampling.sequential import invert, sample
from wavedistill.sampling.streaming import slices, stream
from wavedistill.speech.conditioning import Conditioning
from wavedistill.tools.errors import RecipeError
from wavedistill.training.distillation import distillation_task
from wavedistill.training.likelihood import likelihood_task
from wavedistill.training.loop import Outcome, fit
from wavedistill.training.state import load_state, saved_states

CPU = torch.device("cpu")
KINDS = [
    {},
    {"coupling": "additive", "mixing": "flip"},
    {"mixing": "flip", "early_channels": 0, "periodic_source": False},
    {"coupling": "spline", "bins": 4, "squeeze": 5, "early_channels": 1},
    {"actnorm": False, "squeeze": 2, "early_channels": 0, "network": {"channels": 4, "kernel_size": 5}},
]
"""Of each the table [models.teacher], over `TABLE`."""
TABLE: dict[str, Any] = {
    "kind": "coupling",
    "steps": 4,
    "squeeze": 8,
    "early_every": 2,
    "layers": 2,
    "network": {"channels": 6, "skip_channels": 5},
}
FRAMES = 2


def data(tiny_data: dict[str, Any], **table: Any) -> dict[str, Any]:
    """The tiny recipe with hops of 40, and a coupling flow for a teacher."""
    tiny_data["audio"]["hop_length"] = 40
    tiny_data["conditioning"].update(channels=4, upsample=[4, 10])
    tiny_data["linear_prediction"]["order"] = 4
    tiny_data["models"]["teacher"] = {**TABLE, **table}
    tiny_data["training"]["student"].update(spectral_n_ffts=[64], loss={"spectral": 0, "kl_estimator": "mc"})
    return tiny_data


Build = Callable[..., tuple[WaveformModel, Conditioning]]


@pytest.fixture
def model(tiny_data: dict[str, Any]) -> Build:
    """A model of a kind in float64 with random weights, started from random values, and what it is told."""

    def built(*, frames: int = FRAMES, batch: int = 1, **table: Any) -> tuple[WaveformModel, Conditioning]:
        recipe = validate_recipe(data(tiny_data, **table), "tiny.toml")
        found = randomise(build(recipe, "teacher", 0))
        given = told(recipe, noise(batch, recipe.audio.n_mels, frames + 2 * margin(recipe)) - 5)
        start_from_data(found.residual(given), 3 * noise(batch, frames * 40, seed=5) + 1)
        return found, given

    return built


@pytest.mark.parametrize("table", KINDS)
def test_both_directions_take_one_pass_and_are_each_other_s_inverse(model: Build, table: dict[str, Any]) -> None:
    flow, given = model(batch=2, **table)
    p, x = flow(given), noise(2, FRAMES * 40)
    with torch.no_grad():
        z, ladj = p.to_z(x)
        back, ladj_back = p.to_x(z)
        assert (back - x).abs().max() < 1e-9
        assert (ladj + ladj_back).abs().max() < 1e-9, "at every value, not only in their sum"
        drawn, log_q = p.rsample_and_log_prob(z)
        assert abs(log_q - p.log_prob(drawn)).max() < 1e-9
        assert torch.equal(sample(p, z), drawn)
        assert (invert(p, x)[0] - z).abs().max() < 1e-12
    assert flow.draws_in_parallel
    assert flow.density_in_parallel
    assert not flow.streams


@pytest.mark.parametrize("table", KINDS)
def test_ladj_is_the_log_determinant_of_the_jacobian(model: Build, table: dict[str, Any]) -> None:
    flow, given = model(**table)
    p = flow.residual(given)
    matrix = torch.autograd.functional.jacobian(lambda x: p.to_z(x[None])[0][0], noise(FRAMES * 40))
    _, ladj = p.to_z(noise(FRAMES * 40)[None])
    assert abs(torch.linalg.slogdet(matrix).logabsdet - ladj.sum()) < 1e-9
    assert matrix.triu(1).abs().max() > 1e-3, "a network that looks ahead"
    assert matrix.tril(-1).abs().max() > 1e-3


def test_each_transform_s_ladj_stands_at_what_it_changes() -> None:
    """Zero at what is kept; an affine coupling's own at each value; a matrix's in equal parts."""
    network = small_network(in_channels=3, out_channels=6)
    layer, x, context = CouplingLayer(network, 6, 3, Affine(-5.0)), noise(2, 24), (noise(2, 6, 3),)
    matrix = torch.autograd.functional.jacobian(lambda x: layer.inverse(x[None], (context[0][:1],))[0][0], x[0])
    _, ladj = layer.inverse(x, context)
    torch.testing.assert_close(ladj[0].exp(), matrix.diagonal(), rtol=0, atol=1e-12)
    assert torch.equal(ladj.unflatten(1, (4, 6))[..., :3], torch.zeros(2, 4, 3).double())
    assert (ladj.unflatten(1, (4, 6))[..., 3:] != 0).all()
    conv = InvertibleConv(6, 2).double()
    assert conv(x)[1].abs().max() < 1e-6, "a rotation at the start"
    conv.weight.data = noise(4, 4)
    _, ladj = conv.inverse(x)
    expected = 4 * torch.linalg.slogdet(noise(4, 4)).logabsdet
    torch.testing.assert_close(ladj.sum(1), expected.expand(2))
    assert ladj.unflatten(1, (4, 6))[..., :2].abs().max() == 0
    assert ladj.unflatten(1, (4, 6))[..., 2:].std() < 1e-12


def small_network(**changes: Any) -> WaveNetAround:
    settings = {"layers": 2, "dilation_cycle": 2, "kernel_size": 3, "channels": 4, "skip_channels": 4}
    inputs = {"in_channels": 3, "out_channels": 2, "feature_channels": 3, "repeat": 4, "squeeze": 6}
    return randomise(WaveNetAround(**{**settings, **inputs, **changes}))


@pytest.mark.parametrize("table", [{}, {"mixing": "flip"}])
def test_a_start_from_data_gives_every_channel_zero_mean_and_unit_deviation(
    model: Build, table: dict[str, Any]
) -> None:
    flow, given = model(frames=20, batch=3, **table)
    x = 0.3 * noise(3, 800, seed=8).cumsum(1) + 2
    p, norms = flow.residual(given), 0
    start_from_data(p, x)
    for step in reversed(p.steps):
        x, _ = step.inverse(x)
        if isinstance(step.transform, ActNorm):
            norms += 1
            changed = x.unflatten(1, (-1, 8))[..., step.transform.kept :]
            deviation, mean = torch.std_mean(changed, (0, 1), correction=0)
            assert mean.abs().max() < 1e-9
            assert (deviation - 1).abs().max() < 1e-9
    assert norms == 4


def test_without_scales_an_additive_flow_preserves_volume(model: Build) -> None:
    flow, given = model(coupling="additive", mixing="flip", actnorm=False)
    x = noise(1, FRAMES * 40)
    z, ladj = flow.residual(given).to_z(x)
    assert torch.equal(ladj, torch.zeros_like(x))
    assert (z - x).abs().max() > 0.1
    scaled, given = model(coupling="additive", mixing="flip")
    _, ladj = scaled.residual(given).to_z(x)
    scales = sum(norm.log_scale.sum() for norm in scaled.flows if isinstance(norm, ActNorm))
    assert abs(ladj.sum() + scales * FRAMES * 40 / 8) < 1e-9


def test_early_outputs_leave_as_noise_and_are_changed_no_more(model: Build) -> None:
    """After two steps of four, two channels of eight have left: the two that follow see them, and keep them."""
    flow, given = model()
    steps, x = list(reversed(flow.residual(given).steps)), noise(1, FRAMES * 40)
    for step in steps[:6]:
        x, _ = step.inverse(x)
    half = x
    for step in steps[6:]:
        x, _ = step.inverse(x)
    half, z = (values.unflatten(1, (-1, 8)) for values in (half, x))
    assert torch.equal(half[..., :2], z[..., :2])
    assert (half[..., 2:] != z[..., 2:]).all()


def test_items_of_a_batch_do_not_see_each_other(model: Build) -> None:
    flow, given = model(batch=3)
    x = noise(3, FRAMES * 40)
    alone = flow(Conditioning(given.mel[1:2], given.margin)).log_prob(x[1:2])
    assert abs(flow(given).log_prob(x)[1] - alone) < 1e-9


def test_the_untrained_model_is_the_noise_at_the_level_of_linear_prediction(tiny_data: dict[str, Any]) -> None:
    """Networks start at zero, matrices as rotations: before any start from data, the residual is white."""
    recipe = validate_recipe(data(tiny_data), "tiny.toml")
    flow = build(recipe, "teacher", 1)
    given, x = told(recipe, torch.full((1, 40, FRAMES + 2 * flow.margin), -5.0)), noise(1, FRAMES * 40).float()
    expected = StandardNormal().log_prob(x).sum()
    # But for the softplus, far above its bound.
    assert flow.residual(given).log_prob(x).item() == pytest.approx(expected.item(), abs=0.03 * x.numel())


def test_a_network_sees_as_far_ahead_as_back_and_features_at_their_place() -> None:
    net, x, features = small_network(source_channels=2), noise(1, 40, 3), noise(1, 60, 3)
    source = noise(1, 240, 2)
    at = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(net(at, features, source)[0, 21].sum(), at)
    seen = grad[0].abs().sum(-1).nonzero()[:, 0].tolist()
    assert seen == list(range(21 - 3, 21 + 3 + 1))
    assert (len(seen) - 1) * 6 == net.receptive_field
    # A group has the feature of its middle sample; the last layer, of dilation 2, reads the first one at three groups.
    at = features.clone().requires_grad_()
    (grad,) = torch.autograd.grad(net(x, at, source)[0, 21].sum(), at)
    assert set(grad[0].abs().sum(-1).nonzero()[:, 0].tolist()) == {(n * 6 + 3) // 4 for n in (19, 21, 23)}
    at = source.clone().requires_grad_()
    (grad,) = torch.autograd.grad(net(x, features, at)[0, 21].sum(), at)
    samples = grad[0].abs().sum(-1).nonzero()[:, 0].tolist()
    assert (samples[0], samples[-1]) == (18 * 6, 25 * 6 - 1)


def test_beyond_its_ends_a_network_sees_zeros_in_every_layer() -> None:
    """A crop equals the whole where its receptive field lies inside, and nowhere near its edges."""
    net, x, features = small_network(), noise(1, 40, 3), noise(1, 60, 3)
    whole, crop = net(x, features), net(x[:, 10:30], features[:, 15:])
    same = (whole[:, 10:30] - crop).abs().amax(-1)[0] < 1e-12
    assert same.tolist() == [False] * 3 + [True] * 14 + [False] * 3


def test_what_is_no_whole_number_of_groups_is_named(model: Build) -> None:
    flow, given = model()
    with pytest.raises(ValueError, match="75 samples are not whole groups of 8"):
        flow(given).log_prob(noise(1, 75))


def test_it_cannot_be_streamed_and_has_no_conditionals(model: Build) -> None:
    flow, given = model()
    with pytest.raises(ValueError, match="CouplingLayer among its flows"):
        next(stream(flow, [given], slices(noise(1, 80))))
    with pytest.raises(SequentialDirectionError):
        flow.residual(given).conditionals(noise(1, 80))
    with pytest.raises(ValueError, match="affine"):
        flow.residual(given).rsample_and_conditionals(noise(1, 80))


@pytest.mark.parametrize(
    ("where", "table", "said"),
    [
        ("models.teacher", {"squeeze": 16}, r"models\.teacher\.squeeze: 16 does not divide audio\.hop_length = 40"),
        ("models.teacher", {"steps": 8}, "leave 2 of squeeze = 8 channels|valid"),
        ("models.teacher", {"steps": 9}, "leave 0 of squeeze = 8 channels"),
        ("models.teacher", {"network": {"kernel_size": 4}}, r"kernel_size = 4: .* use 5"),
        ("models.teacher", {"coupling": "afine"}, r"models\.teacher\.coupling = 'afine'"),
        ("models.teacher", {"step": 3}, r"models\.teacher\.step: unknown key; did you mean steps"),
        ("models.teacher", {"layers": 9, "network": {"dilation_cycle": 9}}, r"sees 8184 samples, but.*squeeze or"),
        ("conditioning", {"pitch": False}, r"models\.(teacher|student)\.periodic_source = true needs F0"),
        (
            "training.student.loss",
            {"kl_estimator": "closed"},
            r"a coupling flow.*log_prob alone.*kl_estimator = \"mc\"",
        ),
        ("training.student.loss", {"kl_estimator": "mc-k"}, r"a coupling flow.*log_prob alone.*kl_estimator = \"mc\""),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(
    tiny_data: dict[str, Any], where: str, table: dict[str, Any], said: str
) -> None:
    found = data(tiny_data)
    section = found
    for key in where.split("."):
        section = section[key]
    section.update(table)
    if "valid" in said:
        validate_recipe(found, "tiny.toml")
        return
    with pytest.raises(RecipeError, match=said):
        validate_recipe(found, "tiny.toml")


Train = Callable[..., Outcome]


@pytest.fixture
def recipe(tiny_data: dict[str, Any]) -> Recipe:
    found = data(tiny_data)
    found["linear_prediction"]["order"] = 0  # which leaves the network more to learn
    found["training"]["teacher"].update(steps=8, batch_size=2, segment_frames=8, validate_every=4, validate_batches=1)
    found["training"]["student"].update(steps=8, batch_size=4, segment_frames=20, validate_every=8, validate_batches=1)
    return validate_recipe(found, "tiny.toml")


@pytest.fixture
def utterances(tmp_path: Path, recipe: Recipe) -> Manifest:
    """One for training, one for validation, in a folder `audio`."""
    first, second = corpus(tmp_path / "audio", recipe, [60, 60]).utterances
    return Manifest(audio=recipe.audio, utterances=[first, second.model_copy(update={"split": "valid"})])


@pytest.fixture
def train(tmp_path: Path, recipe: Recipe, utterances: Manifest) -> Train:
    """Train the coupling flow in a folder; `hook` is called before each evaluation of the loss."""

    def run(folder: str, hook: Callable[[], None] = lambda: None, start: Mapping[str, Tensor] | None = None) -> Outcome:
        task = likelihood_task(recipe, "teacher")._replace(start=start or {})

        def terms(*given: Any) -> Mapping[str, Tensor]:
            hook()
            return task.terms(*given)

        options: dict[str, Any] = {"recipe": recipe, "folder": tmp_path / folder, "fingerprint": "a", "device": CPU}
        return fit(task._replace(terms=terms), utterances, tmp_path / "audio", **options)

    return run


def test_a_training_starts_from_data_once_and_resumes_bit_for_bit(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before the first validation, where it starts anew from the same data, and after some steps."""
    starts: list[int] = []
    start = WaveformModel.start_from_data
    monkeypatch.setattr(WaveformModel, "start_from_data", lambda *given: (starts.append(1), start(*given))[1])

    def stop_at(call: int) -> Callable[[], None]:
        calls: list[int] = []

        def hook() -> None:
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt

        return hook

    whole = train("whole")
    assert starts == [1]
    with pytest.raises(KeyboardInterrupt):
        train("parts", stop_at(1))
    tensors, header = load_state(saved_states(tmp_path / "parts")[0])
    assert header.step == 0
    shifts = [value for name, value in tensors.items() if name.endswith(".shift")]
    assert len(shifts) == 8, "of the model and of its average"
    assert all((value != 0).any() for value in shifts), "the state is of the model after its start"
    with pytest.raises(KeyboardInterrupt):
        train("parts", stop_at(7))
    assert len(starts) == 3
    train("parts")
    assert len(starts) == 3, "a trained start is not overwritten"
    ends = [load(tmp_path / folder / "checkpoint.safetensors")[0] for folder in ("whole", "parts")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    with pytest.raises(KeyboardInterrupt):
        train("from another", stop_at(1), ends[0])
    assert len(starts) == 3, "nor is that of a checkpoint that a training begins with"
    tensors, _ = load_state(saved_states(tmp_path / "from another")[0])
    assert all(torch.equal(tensors[f"model.{name}"], value) for name, value in ends[0].items())
    assert whole.valid["nll"] < math.inf


def test_training_lowers_its_nll_and_then_the_kl_of_a_student_from_it(
    tmp_path: Path, train: Train, utterances: Manifest, recipe: Recipe
) -> None:
    """The KL from one draw is finite and falls, and the teacher's weights stay as they are."""
    outcome = train("teacher")
    log = EventAccumulator(str(tmp_path / "teacher" / "tensorboard")).Reload()
    assert outcome.valid["nll"] < log.Scalars("valid/nll")[0].value - 0.01
    teacher = load_model(tmp_path / "teacher" / "checkpoint.safetensors").model
    assert all((norm.shift != 0).any() for norm in teacher.flows if isinstance(norm, ActNorm))
    kept = {name: value.clone() for name, value in teacher.state_dict().items()}
    task, found = distillation_task(recipe, "student", teacher, CPU), []

    def terms(*given: Any) -> Mapping[str, Tensor]:
        values = task.terms(*given)
        found.append(values["kl"].item())
        return values

    options: dict[str, Any] = {"recipe": recipe, "folder": tmp_path / "student", "fingerprint": "a", "device": CPU}
    fit(task._replace(terms=terms), utterances, tmp_path / "audio", **options)
    assert all(map(math.isfinite, found))
    assert sum(found[-4:]) < 0.9 * sum(found[:4]), found
    assert all(torch.equal(kept[name], value) for name, value in teacher.state_dict().items())


RECIPE = """
extends = "tiny"

[corpus]
kind = "folder"
path = "voice"

[models.teacher]
kind = "coupling"
steps = 4
early_every = 2
layers = 3
network = { channels = 8, skip_channels = 8 }

[training]
teacher = { steps = 6, validate_every = 3 }
student = { steps = 3, validate_every = 3, loss = { kl_estimator = "mc" } }
"""


@pytest.mark.slow
def test_every_stage_takes_a_coupling_flow_and_a_student_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "none")  # without which no network is compiled, for a minute
    recording, out, root = write_voice(tmp_path / "voice", 5) / "0.wav", tmp_path / "out", tmp_path / "exp" / "flow"
    (tmp_path / "flow.toml").write_text(RECIPE)
    options = ["--exp", root.parent, "--device", "cpu", "--threads", "1"]
    done = command("run", tmp_path / "flow.toml", *options)
    assert done.returncode == 0, done.stderr
    metrics, rows = (json.loads((root / f"{name}.json").read_text()) for name in ("metrics", "benchmark"))
    models = metrics["density"]["models"]
    assert models["teacher"]["nll"] < models["teacher"]["nll_before_training"]
    assert models["student"]["kl_from"] == "teacher"
    assert set(metrics["gates"]) == {"teacher", "student"}, "both draw in one pass"
    samplers = {(row["model"], row["sampler"]) for row in rows["rows"]}
    assert {sampler for model, sampler in samplers if model == "teacher"} == {"parallel"}
    assert {sampler for model, sampler in samplers if model == "student"} == {"parallel", "streamed"}
    assert "<b>teacher, parallel</b>" in (root / "report.html").read_text()
    # A waveform from its checkpoint: drawn whole, of as many samples as the vocoder's own call gives.
    checkpoint = root / "teacher" / "checkpoint.safetensors"
    done = command("generate", checkpoint, recording, "--out", out)
    assert done.returncode == 0, done.stderr
    drawn, rate = soundfile.read(out / "0.wav", dtype="float32")
    assert (len(drawn), rate) == (16000, 16000)
    voice = wavedistill.load(checkpoint)
    mel = voice.log_mel(torch.from_numpy(drawn))
    again = voice.sample(mel, seed=3)
    assert again.shape == (16000,)
    assert voice.log_prob(again, mel).isfinite()
    done = command("generate", checkpoint, "-", "--out", "-")
    assert done.returncode == 2
    assert "draws at once" in " ".join(done.stderr.replace("│", " ").split())
