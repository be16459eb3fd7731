"""Checkpoints: what they hold, and what happens when a file is none."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from wavedistill import checkpoint
from wavedistill.config import Recipe
from wavedistill.errors import CheckpointError
from wavedistill.models import WaveformModel


def test_a_model_comes_back_with_its_recipe(
    tmp_path: Path, tiny: Recipe, tiny_model: Callable[[str], WaveformModel]
) -> None:
    model = tiny_model("student")
    checkpoint.save_model(tmp_path / "a.pt", "student", tiny, 17, model.state_dict())
    loaded = checkpoint.load_model(tmp_path / "a.pt")
    assert (loaded.kind, loaded.recipe, loaded.step) == ("student", tiny, 17)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not loaded.model.training


class Explosive:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (print, ("code ran",))


def test_what_is_no_checkpoint_is_named(tmp_path: Path, tiny: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(Explosive()))
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for first in range(256):
        (tmp_path / f"byte{first}.pt").write_bytes(bytes([first]) + b"IFF....WAVEfmt ")
    checkpoint.save_model(tmp_path / "lacking.pt", "student", tiny, 0, {})
    expected = {
        "text": "not a wavedistill checkpoint",
        "empty": "not a wavedistill checkpoint",
        "code": "not a wavedistill checkpoint",
        "foreign": "give the checkpoint.pt",
        "list": "it holds a list",
        "lacking": "does not fit",
        "missing": "no such checkpoint",
        **{f"byte{first}": "not a wavedistill checkpoint" for first in range(256)},
    }
    for name, reason in expected.items():
        with pytest.raises(CheckpointError, match=rf"{name}\.pt: .*{reason}"):
            checkpoint.load_model(tmp_path / f"{name}.pt")
    with pytest.raises(CheckpointError, match="it is a folder"):
        checkpoint.load_model(tmp_path)
    assert "code ran" not in capsys.readouterr().out


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"value": 1})
    with pytest.raises(AttributeError):
        checkpoint.save(path, {"value": lambda: None})  # cannot be pickled
    assert checkpoint.load(path) == {"value": 1}
