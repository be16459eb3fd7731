"""A student made ready for others."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import wavedistill
from tests.conftest import HEARD, changed, randomise, write_voice
from wavedistill.cli.commands import app
from wavedistill.models.checkpoint import load_model, save_model
from wavedistill.models.kinds import build
from wavedistill.recipe.recipe import Recipe


@pytest.fixture
def trained(tmp_path: Path, tiny: Recipe) -> dict[str, Path]:
    recipe = changed(tiny, "evaluate", clips=2, max_seconds=1.5)
    recipe = recipe.model_copy(update={"corpus": recipe.corpus.model_copy(update={"licence": "by Jane Doe"})})
    found = {}
    for name in recipe.models:
        found[name] = tmp_path / f"{name}.safetensors"
        save_model(found[name], name, recipe, 7, HEARD, randomise(build(recipe, name, 0)).state_dict())
    return found


@pytest.mark.slow
def test_a_released_student_is_half_as_large_scored_on_strangers_and_says_whom_to_name(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    ann = write_voice(tmp_path / "ann", 3)
    out = tmp_path / "out" / "voice.safetensors"
    done = CliRunner().invoke(app, ["release", str(trained["student"]), "--on", f"ann={ann}", "--out", str(out)])
    assert done.exit_code == 0, done.output
    whole, small = load_model(trained["student"]), load_model(out)
    assert out.stat().st_size < 0.6 * trained["student"].stat().st_size
    assert small.recipe == whole.recipe
    for (name, ours), theirs in zip(small.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert ours.dtype == theirs.dtype, "half precision is that of the file alone"
        torch.testing.assert_close(ours, theirs.half().to(theirs.dtype), rtol=0, atol=0, msg=name)
    card = (out.parent / "CARD.md").read_text()
    assert "by Jane Doe" in card
    assert "after 7 steps" in card
    assert "A voice that it never heard: ann" in card
    assert "2 clips" in card
    rows = {line.split("|")[1].strip(): line.split("|")[2:10] for line in card.splitlines() if line.startswith("| ")}
    assert {"recorded", "**student**", "**student, full precision**", "Griffin-Lim, no model"} < rows.keys()
    assert float(rows["recorded"][2]) == 1, "the STOI of a recording beside itself"
    assert float(rows["**student**"][2]) < 0.99
    voice = wavedistill.load(out)
    assert voice.vocode(voice.log_mel(torch.zeros(4000))).shape == (4000,)


def test_what_cannot_be_released_is_refused_and_leaves_nothing(trained: dict[str, Path], tmp_path: Path) -> None:
    ann, out = write_voice(tmp_path / "ann", 2), tmp_path / "out.safetensors"

    def refused(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["release", *arguments, "--out", str(out)])
        assert done.exit_code != 0
        assert not out.exists()
        return " ".join((done.output.replace("│", "") + str(done.exception)).split())

    assert "draws sample by sample" in refused(str(trained["teacher"]), "--on", f"ann={ann}")
    assert "NAME=FOLDER, with" in refused(str(trained["student"]), "--on", str(ann))
    assert "ann already" in refused(str(trained["student"]), "--on", f"ann={ann}", "--on", f"ann={ann}")
    (tmp_path / "empty").mkdir()
    assert "holds no audio file" in refused(str(trained["student"]), "--on", f"bob={tmp_path / 'empty'}")
