"""Students as programs: what other runtimes draw is what torch draws."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wavedistill
from tests.conftest import HEARD, speech_like
from tests.test_cli import fails
from tests.test_cli import wavedistill as command
from wavedistill.exporting import products, programs
from wavedistill.models.checkpoint import save_model
from wavedistill.models.kinds import build
from wavedistill.recipe.loading import validate_recipe
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech.audio import LogMel

LENGTHS = (2, 23, 61)


@pytest.fixture
def voice_of(tmp_path: Path, tiny_data: dict[str, Any]) -> Callable[..., wavedistill.Vocoder]:
    """A student whose networks say something, of the tiny recipe with some values of its tables changed."""

    def voice(passes: int = 1, linear_prediction: int = 4, pitch: bool = True, **student: Any) -> wavedistill.Vocoder:
        tiny_data["linear_prediction"]["order"] = linear_prediction
        tiny_data["conditioning"]["pitch"] = pitch
        tiny_data["consistency"] = {"passes": passes}
        tiny_data["corpus"]["licence"] = "nobody's"
        tiny_data["models"]["student"] |= student
        tiny_data["training"]["student"]["loss"] = {"kl_estimator": "mc-k"}  # of any base
        recipe = validate_recipe(tiny_data, "tiny.toml")
        model = build(recipe, "student", 0)
        generator = torch.Generator().manual_seed(1)
        for net in model.networks:
            net.head.weight.data.normal_(0, 0.05, generator=generator)
        save_model(tmp_path / "student.safetensors", "student", recipe, 1, HEARD, model.state_dict())
        return wavedistill.load(tmp_path / "student.safetensors")

    return voice


def log_mel(recipe: Recipe, frames: int) -> Tensor:
    return LogMel(recipe.audio).of_file(speech_like(frames * recipe.audio.hop_length, frames)[None])


def same(voice: wavedistill.Vocoder, drawn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """What `vocode` draws, by another way from the same noise."""
    for frames in LENGTHS:
        mel = log_mel(voice.recipe, frames)
        mel[:, :3] = -15.0  # below the floor of `LogMel`, as other programs' may be
        noise = voice._noise(5, 1.0)(frames * voice.recipe.audio.hop_length)
        expected, found = voice.vocode(mel[0], seed=5), drawn(mel, noise)
        assert found.shape == (1, len(expected))
        assert (found[0] - expected).abs().max() < 1e-4 * max(1, expected.abs().max())
        assert expected.abs().max() > 0.01


def by_onnx(path: Path) -> Any:
    runtime = pytest.importorskip("onnxruntime", reason="programs for ONNX need the extra onnx")
    return runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.slow
def test_an_onnx_program_of_a_squeezed_student_draws_what_torch_draws(
    voice_of: Callable[..., wavedistill.Vocoder], tmp_path: Path
) -> None:
    """With F0, a periodic source, borders inside groups, linear prediction and mel consistency, for any length."""
    pytest.importorskip("onnxscript", reason="programs for ONNX need the extra onnx")
    voice, path = voice_of(flow_layers=[2, 1], squeeze=[5]), tmp_path / "new" / "student.onnx"
    done = command("export", tmp_path / "student.safetensors", "--out", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path}: ")
    session = by_onnx(path)
    same(voice, lambda mel, z: torch.from_numpy(session.run(None, {"log_mel": mel.numpy(), "noise": z.numpy()})[0]))
    assert str(Path(wavedistill.__file__).parent).encode() not in path.read_bytes(), "nobody's folders are in it"
    said = session.get_modelmeta().custom_metadata_map
    expected = {"sample_rate": "16000", "hop_length": "200", "n_mels": "40", "licence": "nobody's", "passes": "1"}
    assert {key: said[key] for key in expected} == expected
    assert said["noise"] == "standard normal"
    assert [each.name for each in session.get_outputs()] == ["waveform"]
    assert os.listdir(path.parent) == ["student.onnx"]


@pytest.mark.slow
def test_an_onnx_program_of_a_bare_student_draws_what_torch_draws(
    voice_of: Callable[..., wavedistill.Vocoder], tmp_path: Path
) -> None:
    """Neither squeezed nor with F0, linear prediction or mel consistency, from logistic noise."""
    pytest.importorskip("onnxscript", reason="programs for ONNX need the extra onnx")
    voice = voice_of(passes=0, linear_prediction=0, pitch=False, periodic_source=False, base="logistic")
    programs.export(voice, tmp_path / "student.onnx")
    session = by_onnx(tmp_path / "student.onnx")
    same(voice, lambda mel, z: torch.from_numpy(session.run(None, {"log_mel": mel.numpy(), "noise": z.numpy()})[0]))
    assert session.get_modelmeta().custom_metadata_map["noise"] == "standard logistic"


@pytest.mark.slow
def test_a_torch_program_draws_what_torch_draws(voice_of: Callable[..., wavedistill.Vocoder], tmp_path: Path) -> None:
    voice = voice_of(flow_layers=[2, 1], squeeze=[5])
    programs.export(voice, tmp_path / "student.pt2")
    said = {"wavedistill.json": ""}
    program = torch.export.load(tmp_path / "student.pt2", extra_files=said).module()
    same(voice, lambda mel, noise: program(mel, noise))
    assert json.loads(said["wavedistill.json"])["hop_length"] == "200"


def test_in_products_a_student_draws_the_same(voice_of: Callable[..., wavedistill.Vocoder]) -> None:
    voice = voice_of(passes=2, linear_prediction=24)
    with torch.inference_mode():

        def drawn(mel: Tensor, noise: Tensor) -> Tensor:
            with products.InProducts():
                return programs.Spoken(voice)(mel, noise)

        same(voice, drawn)


@pytest.mark.parametrize("size", [8, 14, 800, 1024])
@pytest.mark.parametrize("complex_part", [0.0, 1.0])
def test_fourier_transforms_in_two_stages_are_fourier_transforms(size: int, complex_part: float) -> None:
    x = torch.randn(2, 3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spectrum = torch.fft.rfft(x)
    torch.testing.assert_close(products.rfft(x), spectrum, rtol=0, atol=1e-12)
    given = spectrum if complex_part else spectrum.real
    torch.testing.assert_close(products.irfft(given, size), torch.fft.irfft(given, size), rtol=0, atol=1e-12)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_stretches_are_those_of_torch(step: int) -> None:
    x = torch.arange(44.0).view(2, 22)
    for size in (4, 5, 11):
        assert torch.equal(products.unfold(x, 1, size, step), x.unfold(1, size, step))


def test_what_is_no_student_or_no_program_is_refused(
    voice_of: Callable[..., wavedistill.Vocoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    voice = voice_of()
    path, recipe = tmp_path / "teacher.safetensors", voice.recipe
    save_model(path, "teacher", recipe, 1, HEARD, build(recipe, "teacher", 0).state_dict())
    fails(1, "the teacher of tiny draws sample by sample", "export", path, "--out", tmp_path / "teacher.onnx")
    student = tmp_path / "student.safetensors"
    fails(1, "give a name that ends in .onnx or .pt2", "export", student, "--out", tmp_path / "student.tflite")
    monkeypatch.setattr(programs, "find_spec", lambda name: None)
    fails(1, "install wavedistill[onnx]", "export", student, "--out", tmp_path / "student.onnx")
    assert not list(tmp_path.glob("*.onnx"))
