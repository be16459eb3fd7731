"""What the report shows: only what belongs to the models and settings of its recipe."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from wavedistill.experiment.folder import Experiment, measured_on
from wavedistill.recipe.recipe import Recipe
from wavedistill.stages.report import _current


@pytest.fixture
def experiment(tmp_path: Path, tiny: Recipe) -> Experiment:
    found = Experiment(tiny, tmp_path, torch.device("cpu"))
    for path in (found.manifest, *found.checkpoints):
        path.parent.mkdir(exist_ok=True)
        path.write_text(path.name)
    return found


def changed(experiment: Experiment, **settings: Any) -> Experiment:
    return Experiment(experiment.recipe.model_copy(update=settings), experiment.root, experiment.device)


def test_a_table_is_of_the_very_models_settings_and_version(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = experiment.benchmark_of("full")
    assert _current(experiment, path) is None
    of = measured_on(experiment)
    path.write_text(json.dumps({"rows": [{"of": of}, {"of": of}]}))
    assert _current(experiment, path) is not None
    assert _current(changed(experiment, name="other"), path) is not None
    assert _current(changed(experiment, seed=7), path) is None
    experiment.checkpoint("student").write_text("trained again")
    assert _current(experiment, path) is None
    of = measured_on(experiment)
    path.write_text(json.dumps({"rows": [{"of": of}, {"of": "another student's"}]}))
    assert _current(experiment, path) is None, "every row"
    path.write_text(json.dumps({"rows": [{"of": of}]}))
    monkeypatch.setattr("wavedistill.experiment.folder.__version__", "99")
    assert _current(experiment, path) is None
