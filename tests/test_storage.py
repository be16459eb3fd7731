"""Prepared audio in its three kinds of storage, and what is written whole or not at all."""

import io
import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import webdataset

from tests.conftest import HEARD, write_voice
from wavedistill.corpus.segments import Batch, Segments
from wavedistill.corpus.utterances import Manifest, read_f0, read_samples
from wavedistill.experiment.folder import Experiment
from wavedistill.experiment.stage import run_stage
from wavedistill.models.checkpoint import load, save_model
from wavedistill.models.kinds import build
from wavedistill.recipe.loading import validate_recipe
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech import audio
from wavedistill.stages import prepare
from wavedistill.tools.errors import CorpusError
from wavedistill.tools.files import Stretch, replacing
from wavedistill.tools.random import random_stream

STORAGES = ("wav", "flac", "shards")


@pytest.fixture
def prepared(tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> dict[str, Experiment]:
    """The same voice prepared in every kind of storage, with several shards of training clips."""
    monkeypatch.setattr("wavedistill.corpus.storage.SHARD_BYTES", 50_000)
    voice = write_voice(tmp_path / "voice", 8)
    found = {}
    for storage in STORAGES:
        data = tiny.model_dump(mode="json")
        data["corpus"] = {"kind": "folder", "path": str(voice)}
        data["prepare"]["storage"] = storage
        experiment = Experiment(validate_recipe(data, storage), tmp_path / storage, torch.device("cpu"))
        run_stage(prepare.stage(), experiment)
        found[storage] = experiment
    return found


def parts(batch: Batch) -> list[torch.Tensor]:
    told = batch.conditioning
    assert told.f0 is not None
    return [batch.audio, batch.with_margins, told.mel, told.f0]


def test_every_storage_gives_the_same_batches(prepared: dict[str, Experiment], tiny: Recipe) -> None:
    batches = []
    for experiment in prepared.values():
        manifest = Manifest.read(experiment.manifest)
        segments = Segments(manifest, experiment.audio, "train", frames=10, margin=2)
        batches.append(segments.draw([random_stream(0, item) for item in range(20)]))
    for batch in batches[1:]:
        for one, other in zip(parts(batch), parts(batches[0]), strict=True):
            assert torch.equal(one, other)
    sizes = [sum(path.stat().st_size for path in e.audio.iterdir()) for e in prepared.values()]
    assert sizes[1] < sizes[0]
    assert {path.suffix for path in prepared["shards"].audio.iterdir()} == {".tar"}


def test_shards_are_those_of_webdataset(prepared: dict[str, Experiment]) -> None:
    """Its own reader finds every clip of a split, with its F0, in the order of the manifest."""
    experiment = prepared["shards"]
    manifest = Manifest.read(experiment.manifest)
    shards = sorted(map(str, experiment.audio.glob("train-*.tar")))
    assert len(shards) > 1
    found = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [u.name for u in manifest.of("train")]
    for sample, utterance in zip(found, manifest.of("train"), strict=True):
        wave, rate = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
        assert rate == manifest.audio.sample_rate
        assert np.array_equal(wave, read_samples(experiment.audio, utterance).numpy())
        assert np.array_equal(np.load(io.BytesIO(sample["f0.npy"])), read_f0(experiment.audio, utterance).numpy())
    with tarfile.open(shards[0]) as tar:
        assert {(member.mtime, member.uid) for member in tar} == {(0, 0)}, "the same bytes each time"


def test_a_packing_that_was_interrupted_goes_on(
    tmp_path: Path, prepared: dict[str, Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is prepared anew, and the archives are those of one that was not."""
    whole = prepared["shards"]
    experiment = Experiment(whole.recipe, tmp_path / "again", whole.device)
    written = itertools.count()

    def interrupted(*args: Any, **options: Any) -> tarfile.TarFile:
        if next(written) == 3:
            raise KeyboardInterrupt
        return tarfile.TarFile.open(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("wavedistill.corpus.storage.tarfile.open", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_stage(prepare.stage(), experiment)
    assert not experiment.audio.exists()
    with monkeypatch.context() as patch:
        patch.setattr("wavedistill.corpus.clips._clips", None)
        run_stage(prepare.stage(), experiment)
    first, second = ({path.name: path.read_bytes() for path in e.audio.iterdir()} for e in (whole, experiment))
    assert first == second
    assert {path.name for path in experiment.root.iterdir()} >= {"audio", "manifest.json", "prepare.json"}
    assert not (experiment.root / "audio.partial").exists()


@pytest.mark.parametrize("storage", STORAGES)
def test_lost_audio_is_named_and_prepared_anew(prepared: dict[str, Experiment], storage: str) -> None:
    experiment = prepared[storage]
    before = {path.name: path.read_bytes() for path in experiment.audio.iterdir()}
    utterance = Manifest.read(experiment.manifest).of("train")[0]
    lost = experiment.audio / utterance.audio.file
    lost.write_bytes(lost.read_bytes()[:60])
    with pytest.raises(CorpusError, match=rf"{lost.name}: cannot be read: delete it and run the prepare stage again"):
        read_samples(experiment.audio, utterance)
    lost.unlink()
    with pytest.raises(CorpusError, match="cannot be read"):
        read_samples(experiment.audio, utterance)
    assert "utterances" in run_stage(prepare.stage(), experiment)
    assert {path.name: path.read_bytes() for path in experiment.audio.iterdir()} == before


def test_a_licence_goes_with_every_checkpoint_and_prepares_nothing_anew(
    tmp_path: Path, prepared: dict[str, Experiment]
) -> None:
    experiment = prepared["wav"]
    corpus = experiment.recipe.corpus.model_copy(update={"licence": "Jane Doe, CC BY 4.0"})
    recipe = experiment.recipe.model_copy(update={"corpus": corpus})
    named = Experiment(recipe, experiment.root, experiment.device)
    assert run_stage(prepare.stage(), named) == "prepare: up to date"
    save_model(tmp_path / "a.safetensors", "teacher", recipe, 1, HEARD, build(recipe, "teacher", 0).state_dict())
    assert load(tmp_path / "a.safetensors")[1]["recipe"]["corpus"]["licence"] == "Jane Doe, CC BY 4.0"


def test_a_stretch_of_a_file_reads_as_a_file(tmp_path: Path) -> None:
    content = bytes(range(100))
    (tmp_path / "a").write_bytes(content)
    with Stretch((tmp_path / "a").open("rb"), 20, 30) as stretch:
        assert stretch.read() == content[20:50]
        assert stretch.read(1) == b""
        assert stretch.seek(-5, io.SEEK_END) == 25
        assert stretch.read(100) == content[45:50]
        stretch.seek(3)
        stretch.seek(4, io.SEEK_CUR)
        assert (stretch.tell(), stretch.read(2)) == (7, content[27:29])
        stretch.seek(99)
        assert stretch.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_is_named_with_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.wav"
    (tmp_path / "a.wav.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*a\.wav'"):
        audio.write(path, torch.zeros(100_000), 16000)
    assert not path.exists()
    assert not capfd.readouterr().err


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with replacing(path) as file:
        file.write(json.dumps("old").encode())

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert json.loads(path.read_text()) == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]
