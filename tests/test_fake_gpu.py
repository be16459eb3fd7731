"""The GPU's path on a machine without one: tensors that claim to be there, and refuse what a GPU would.

torch's `FakeTensorMode` follows devices and shapes without computing. It refuses operations between devices, and those
that would have to look at a value, for which a GPU has to be waited for.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily

from tests.conftest import RECIPES, told
from wavedistill.corpus.segments import Batch, dequantise
from wavedistill.flows.bases import StandardNormal
from wavedistill.flows.elementwise import MixtureCdf
from wavedistill.flows.roots import LOOK_EVERY
from wavedistill.models.kinds import build
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.loading import load_recipe, validate_recipe
from wavedistill.recipe.recipe import Recipe
from wavedistill.sampling import sequential
from wavedistill.sampling.streaming import slices, stream
from wavedistill.speech.audio import LogMel
from wavedistill.speech.conditioning import Conditioning
from wavedistill.tools.random import random_stream
from wavedistill.training.distillation import Distillation, FromDensity, Objective, log_mel_filters
from wavedistill.training.likelihood import likelihood_task

FRAMES = 8
RECIPE = load_recipe(RECIPES / "tiny.toml")


def on_gpu(module: nn.Module) -> nn.Module:
    """The same module with all its tensors on a GPU that is not there; within `FakeTensorMode`."""
    for part in module.modules():
        for name, value in list(part._parameters.items()):
            if value is not None:
                there = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                part._parameters[name] = nn.Parameter(there, requires_grad=value.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    return module


def there(*shape: int) -> Tensor:
    return torch.empty(shape, device="cuda")


@pytest.fixture
def gpu(tiny: Recipe) -> Iterator[Callable[[str], WaveformModel]]:
    """Gives the teacher or student of the tiny recipe on the GPU, and the mode in which it exists."""
    models = {kind: build(tiny, kind, 0).requires_grad_(kind == "student") for kind in ("teacher", "student")}
    with FakeTensorMode():
        yield lambda kind: on_gpu(models[kind])


def batch_of(recipe: Recipe, margin: int) -> Batch:
    hop, frames = recipe.audio.hop_length, FRAMES + 2 * margin
    known = Conditioning(there(2, recipe.audio.n_mels, frames), margin, there(2, frames))
    return Batch(there(2, FRAMES * hop), there(2, frames * hop), known)


@pytest.fixture
def streams() -> list[torch.Generator]:
    return [random_stream(0, item) for item in range(2)]


def test_the_trap_works(gpu: Callable[[str], WaveformModel]) -> None:
    teacher = gpu("teacher")
    with pytest.raises(RuntimeError, match=r"device|cuda"):
        teacher(told(RECIPE, torch.empty(2, 40, FRAMES + 2 * teacher.margin))).log_prob(there(2, FRAMES * 200))
    with pytest.raises(DataDependentOutputException):
        float(there(1))


def test_the_teacher_s_terms_stay_on_the_gpu(
    tiny: Recipe, gpu: Callable[[str], WaveformModel], streams: list[torch.Generator]
) -> None:
    teacher = gpu("teacher")
    terms = likelihood_task(tiny, "teacher").terms(teacher, batch_of(tiny, teacher.margin), streams)
    assert {name: term.device.type for name, term in terms.items()} == {"nll": "cuda", "pitch": "cuda"}


EVERY = {"spectral": 1.0, "log_mel": 1.0, "drawn_log_mel": 1.0, "contrastive": 0.1}
RECONSTRUCTIONS = {"log_scale": 1.0, "x_reconstruction": 1.0, "z_reconstruction": 1.0}


Made = TypeVar("Made", bound=Objective)


def made(make: Callable[[], Made]) -> Made:
    """An objective with its filterbanks and windows, which are made of values, on the GPU."""
    with unset_fake_temporarily():
        banks = log_mel_filters(RECIPE, (512, 1024), torch.device("cpu"))
        shapes = {n_fft: bank.shape for n_fft, bank in banks.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("wavedistill.training.distillation.log_mel_filters", lambda *_: {})
            objective = make()
    objective.filters = {n_fft: there(*shape) for n_fft, shape in shapes.items()}
    for name, buffer in objective.consistency.named_buffers():
        objective.consistency.register_buffer(name, there(*buffer.shape))
    return objective


@pytest.mark.parametrize("estimator", ["closed", "mc", "mc-k"])
def test_the_student_s_terms_stay_on_the_gpu(
    tiny_data: dict[str, Any], gpu: Callable[[str], WaveformModel], streams: list[torch.Generator], estimator: str
) -> None:
    tiny_data["training"]["student"]["loss"].update(kl_estimator=estimator, **EVERY, **RECONSTRUCTIONS)
    recipe = validate_recipe(tiny_data, "tiny.toml")
    student, teacher = gpu("student"), gpu("teacher")
    objective = made(lambda: Distillation(teacher, recipe, "student", torch.device("cpu")))
    terms = objective.terms(student, batch_of(recipe, student.margin), streams)
    assert set(terms) == {"kl", *EVERY, *RECONSTRUCTIONS}
    assert {term.device.type for term in terms.values()} == {"cuda"}


def test_so_do_those_from_a_density_of_a_user_s_own(
    tiny_data: dict[str, Any], gpu: Callable[[str], WaveformModel], streams: list[torch.Generator]
) -> None:
    tiny_data["training"]["student"]["loss"].update(kl_estimator="mc", **EVERY)
    recipe = validate_recipe(tiny_data, "tiny.toml")
    student, teacher = gpu("student"), gpu("teacher")
    objective = made(lambda: FromDensity(lambda told: teacher(told), recipe, "student", torch.device("cpu")))
    terms = objective.terms(student, batch_of(recipe, student.margin), streams)
    assert {term.device.type for term in terms.values()} == {"cuda"}


@pytest.mark.parametrize("solver", [sequential.naive, sequential.cached])
def test_the_teacher_s_steps_look_at_no_value(
    tiny: Recipe, gpu: Callable[[str], WaveformModel], solver: sequential.Solver
) -> None:
    """So that a block of them can be recorded."""
    teacher = gpu("teacher")
    mel = there(2, tiny.audio.n_mels, 1 + 2 * teacher.margin)
    assert sequential.sample(teacher(told(tiny, mel)), there(2, 10), solver).device.type == "cuda"


def test_a_student_is_drawn_in_one_pass_and_as_a_stream(tiny: Recipe, gpu: Callable[[str], WaveformModel]) -> None:
    student = gpu("student")
    mel, z = there(2, tiny.audio.n_mels, FRAMES + 2 * student.margin), there(2, FRAMES * tiny.audio.hop_length)
    assert sequential.sample(student(told(tiny, mel)), z).device.type == "cuda"
    blocks = list(stream(student, [Conditioning(piece, 0) for piece in mel.split(3, -1)], slices(z)))
    assert {block.device.type for block in blocks} == {"cuda"}
    assert sum(block.shape[1] for block in blocks) == z.shape[1]


def test_log_mel_and_dequantisation_stay_on_the_gpu(tiny: Recipe, streams: list[torch.Generator]) -> None:
    log_mel = LogMel(tiny.audio)
    with FakeTensorMode():
        audio = there(2, 10 * tiny.audio.hop_length)
        on_gpu(log_mel)
        # A spectrogram's window is no buffer of torchaudio's before 2.6.
        mel = log_mel.of_segment(torch.nn.functional.pad(audio, (log_mel.overlap,) * 2), there(2, 10) > 0)
        assert mel.device.type == "cuda"
        assert dequantise(audio, streams).device.type == "cuda"


def test_a_mixture_is_searched_with_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its search ends where its values say so: a GPU is waited for once in some steps, not in each."""
    looks: list[int] = []
    mixture = MixtureCdf(StandardNormal(), 3, -5.0)
    steps = mixture.to_z
    monkeypatch.setattr(mixture, "to_z", lambda *args: (looks.append(1), steps(*args))[1])
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        mixture.to_x(there(5), there(5, 3), there(5, 3), there(5, 3))
    assert len(looks) == LOOK_EVERY
