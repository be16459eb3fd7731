"""Checkpoints: what they hold, and what happens when a file is none, or cannot be written."""

import json
import math
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.conftest import HEARD
from wavedistill.models import checkpoint
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.recipe import Recipe
from wavedistill.tools.errors import CheckpointError


def test_a_model_comes_back_with_its_recipe(
    tmp_path: Path, tiny: Recipe, tiny_model: Callable[[str], WaveformModel]
) -> None:
    model = tiny_model("student")
    checkpoint.save_model(tmp_path / "a.safetensors", "student", tiny, 17, HEARD, model.state_dict())
    loaded = checkpoint.load_model(tmp_path / "a.safetensors")
    assert (loaded.name, loaded.recipe, loaded.step, loaded.heard) == ("student", tiny, 17, HEARD)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not loaded.model.training


class Explosive:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return (Path.touch, (self.file,))


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    """Pickled bare or by torch, or in place of a good file: refused before anything is read from it."""
    mark = tmp_path / "the code ran"
    (tmp_path / "bare.safetensors").write_bytes(pickle.dumps(Explosive(mark)))
    torch.save({"model": Explosive(mark)}, tmp_path / "torch.safetensors")
    torch.save({"model": Explosive(mark)}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    for name in ("bare", "torch", "old"):
        with pytest.raises(CheckpointError, match=rf"{name}\.safetensors: a pickled file, which could run code"):
            checkpoint.load_model(tmp_path / f"{name}.safetensors")
    assert not mark.exists()
    pickle.loads((tmp_path / "bare.safetensors").read_bytes())
    assert mark.exists(), "the trap works"


def test_what_is_no_checkpoint_is_named(tmp_path: Path, tiny: Recipe) -> None:
    def path(name: str) -> Path:
        return tmp_path / f"{name}.safetensors"

    path("text").write_text("hello")
    path("empty").write_bytes(b"")
    safetensors.torch.save_file({"a": torch.zeros(1)}, path("foreign"))
    safetensors.torch.save_file({"a": torch.zeros(1)}, path("newer"), {checkpoint.HEADER: json.dumps({"version": 99})})
    safetensors.torch.save_file({"a": torch.zeros(1)}, path("list"), {checkpoint.HEADER: "[1]"})
    for first in range(256):
        path(f"byte{first}").write_bytes(bytes([first]) + b"IFF....WAVEfmt ")
    checkpoint.save_model(path("lacking"), "student", tiny, 0, HEARD, {})
    checkpoint.save_model(path("name"), "pupil", tiny, 0, HEARD, {})
    checkpoint.save(path("state"), {"a": torch.zeros(9)}, {"step": 3})
    whole = path("state").read_bytes()
    for length in (4, 30, len(whole) - 1):
        path(f"truncated{length}").write_bytes(whole[:length])
    expected = {
        "text": "not a wavedistill checkpoint",
        "empty": "not a wavedistill checkpoint",
        "foreign": "another program's tensors",
        "list": "another program's tensors",
        "newer": "of version 99 of the format.*install a newer wavedistill",
        "lacking": "does not fit",
        "name": "no models.pupil",
        "state": "the state of a training, not a model; give the checkpoint.safetensors",
        "missing": "no such checkpoint",
        **{f"truncated{length}": "or a damaged one" for length in (4, 30, len(whole) - 1)},
        **{f"byte{first}": "not a wavedistill checkpoint" for first in range(256)},
    }
    for name, reason in expected.items():
        with pytest.raises(CheckpointError, match=rf"{name}\.safetensors: .*{reason}") as caught:
            checkpoint.load_model(path(name))
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="it is a folder"):
        checkpoint.load_model(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", [4]),
        ("version", None),
        ("name", ["student"]),
        ("name", 3),
        ("step", "many"),
        ("step", -1),
        ("recipe", None),
        ("recipe", []),
        ("recipe", {"name": "x"}),
        ("heard", None),
        ("heard", {"mel_mean": 3}),
    ],
)
def test_a_header_of_wrong_types_is_named(tmp_path: Path, tiny: Recipe, key: str, value: object) -> None:
    path = tmp_path / "a.safetensors"
    header = {"name": "student", "recipe": tiny.model_dump(mode="json"), "step": 1, "heard": HEARD.model_dump()}
    whole = {"version": checkpoint.VERSION, **header, key: value}
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}, {checkpoint.HEADER: json.dumps(whole)}))
    with pytest.raises(CheckpointError, match=rf"a\.safetensors: .*({key}|not a wavedistill checkpoint)") as caught:
        checkpoint.load_model(path)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, tiny: Recipe, tiny_model: Callable[[str], WaveformModel]
) -> None:
    weights = tiny_model("student").state_dict()
    name = next(reversed(weights))
    weights[name].flatten()[-1] = math.nan
    checkpoint.save_model(tmp_path / "a.safetensors", "student", tiny, 17, HEARD, weights)
    with pytest.raises(CheckpointError, match=rf"a\.safetensors: holds weights that are not finite \({name}\)"):
        checkpoint.load_model(tmp_path / "a.safetensors")


def test_the_same_content_is_the_same_file(tmp_path: Path) -> None:
    content = {name: torch.arange(9.0) for name in "cab"}
    for name in ("a", "b"):
        checkpoint.save(tmp_path / name, content, {"z": 1, "a": {"b": 2, "c": 3}})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_is_read_whatever_the_length_of_its_header(tmp_path: Path) -> None:
    """Its first bytes are that length: some look like the beginning of a pickle, or of a zip archive."""
    begins = set()
    for length in range(0, 2**15, 8):
        path = tmp_path / "a.safetensors"
        path.write_bytes(
            safetensors.torch.save(
                {}, {checkpoint.HEADER: json.dumps({"version": checkpoint.VERSION, "x": "x" * length})}
            )
        )
        begins.add(path.read_bytes()[:2])
        assert len(checkpoint.load(path)[1]["x"]) == length
    assert b"PK" in begins
    assert any(begin[0] == 0x80 for begin in begins)


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from wavedistill.models import checkpoint
from wavedistill.tools.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(Path(sys.argv[1]), {"a": torch.zeros(10**6)}, {})
except CheckpointError as error:
    print(error)
"""


def test_a_disk_without_room_leaves_the_old_file_and_no_remains(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"a": torch.ones(3)}, {"step": 1})
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000, "the limit is of the other process"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=True)
    assert f"{path}: cannot be written: File too large; make room" in done.stdout
    assert checkpoint.load(path)[1]["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CheckpointError, match=r"file/a\.safetensors: cannot be written: "):
        checkpoint.save(tmp_path / "file" / "a.safetensors", {}, {})
