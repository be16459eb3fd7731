"""Several processes train as one does: true ones, started by `torchrun`, on one machine and as two nodes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric.strategies.ddp import DDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer import BadParameter

from tests.conftest import RECIPES, REPOSITORY, changed, write_voice
from wavedistill.cli import main
from wavedistill.cli.arguments import device_of
from wavedistill.corpus.utterances import Manifest
from wavedistill.models import checkpoint
from wavedistill.recipe.recipe import Recipe
from wavedistill.tools.engine import launch
from wavedistill.tools.errors import RecipeError, UserError
from wavedistill.training.batches import Batches
from wavedistill.training.likelihood import likelihood_task
from wavedistill.training.state import saved_states

STEPS = 20
KINDS = ("teacher", "student")
LOGS_EVERY_STEP = "import wavedistill.training.loop as t; t.LOG_EVERY = 1; from wavedistill.cli import main; main()"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
ONE_MACHINE = ("--nproc-per-node", 2)


class Runs:
    """Experiments of one recipe with a batch of four, in folders of their own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        write_voice(root / "voice", 5)
        self.script = root / "main.py"
        self.script.write_text(LOGS_EVERY_STEP)
        self.settings = {"corpus": f'{{kind="folder",path="{root / "voice"}"}}', "models.teacher.layers": 3}
        self.settings["models.student.flow_layers"] = [2, 2]
        for kind in KINDS:
            values = {"steps": STEPS, "validate_every": 10, "validate_batches": 1, "batch_size": 4}
            self.settings |= {f"training.{kind}.{key}": value for key, value in values.items()}

    def command(self, exp: str, *words: str, **changes: Any) -> list[str]:
        options = [f"--set={key}={value}" for key, value in {**self.settings, **changes}.items()]
        return [str(self.script), *words, str(RECIPES / "tiny.toml"), "--exp", str(self.root / exp), *options]

    def start(self, *command: object) -> "subprocess.Popen[str]":
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(list(map(str, command)), cwd=REPOSITORY, env=env, **pipes)

    def finish(self, *command: object) -> None:
        process = self.start(*command)
        _, errors = process.communicate()
        assert process.returncode == 0, errors

    def losses(self, exp: str, kind: str) -> dict[str, list[float]]:
        log = EventAccumulator(str(self.root / exp / "tiny" / kind / "tensorboard"))
        log.Reload()
        names = set(log.Tags()["scalars"]) - {"train/steps_per_second"}
        return {name: [event.value for event in log.Scalars(name)] for name in names}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One process has trained both models in the folder "one", and "prepared" is its corpus."""
    runs = Runs(tmp_path_factory.mktemp("distributed"))
    runs.finish(sys.executable, *runs.command("prepared", "prepare"))
    shutil.copytree(runs.root / "prepared", runs.root / "one")
    runs.finish(sys.executable, *runs.command("one", "run", "--until", "student"))
    return runs


def assert_equal_losses(runs: Runs, exp: str, kind: str) -> None:
    one, other = (runs.losses(name, kind) for name in ("one", exp))
    assert one.keys() == other.keys()
    assert {"valid/nll", "train/nll", "train/pitch"} <= one.keys() or {"valid/kl", "train/kl"} <= one.keys()
    for name, values in one.items():
        assert len(values) == (STEPS if name.startswith("train") else 3), name
        if "norm" not in name:
            torch.testing.assert_close(torch.tensor(other[name]), torch.tensor(values), rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
def test_two_processes_with_half_the_batch_each_have_the_losses_of_one(runs: Runs) -> None:
    shutil.copytree(runs.root / "prepared", runs.root / "two")
    runs.finish(*TORCHRUN, *ONE_MACHINE, *runs.command("two", "run", "--until", "student"))
    for kind in KINDS:
        assert_equal_losses(runs, "two", kind)


@pytest.mark.slow
def test_two_nodes_have_the_losses_of_one_process(runs: Runs) -> None:
    shutil.copytree(runs.root / "prepared", runs.root / "nodes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = [
        runs.start(
            *TORCHRUN,
            *("--nnodes", 2, "--node-rank", rank, "--nproc-per-node", 1),
            *("--master-addr", "127.0.0.1", "--master-port", port, "--local-addr", f"127.0.0.{rank + 1}"),
            *runs.command("nodes", "teacher"),
        )
        for rank in range(2)
    ]
    for node in nodes:
        _, errors = node.communicate()
        assert node.returncode == 0, errors
    assert_equal_losses(runs, "nodes", "teacher")


@pytest.mark.slow
def test_what_starts_from_data_starts_alike_in_every_process(runs: Runs) -> None:
    """A coupling flow, whose normalisation is that of the same segments however many processes share a batch."""
    changes = {"models.teacher": '{kind="coupling",steps=2,layers=2,network={channels=8,skip_channels=8}}'}
    changes |= {"training.student.loss.kl_estimator": "mc", "training.teacher.steps": 4}
    for exp, start in (("flow", (sys.executable,)), ("flow of two", (*TORCHRUN, *ONE_MACHINE))):
        shutil.copytree(runs.root / "prepared", runs.root / exp)
        runs.finish(*start, *runs.command(exp, "teacher", **changes))
    one, two = (runs.losses(exp, "teacher")["valid/nll"] for exp in ("flow", "flow of two"))
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_batch_in_parts_has_the_losses_of_a_whole_one(runs: Runs) -> None:
    shutil.copytree(runs.root / "prepared", runs.root / "parts")
    runs.finish(sys.executable, *runs.command("parts", "teacher", **{"training.teacher.accumulate": 2}))
    assert_equal_losses(runs, "parts", "teacher")


@pytest.mark.slow
def test_processes_parts_and_bfloat16_together_come_close(runs: Runs) -> None:
    shutil.copytree(runs.root / "prepared", runs.root / "all")
    changes = {f"training.{kind}.accumulate": 2 for kind in KINDS}
    changes |= {f"training.{kind}.precision": "bf16-mixed" for kind in KINDS}
    runs.finish(*TORCHRUN, *ONE_MACHINE, *runs.command("all", "run", "--until", "student", **changes))
    for kind, term in (("teacher", "train/nll"), ("student", "train/kl"), ("student", "train/spectral")):
        one, other = (torch.tensor(runs.losses(name, kind)[term]) for name in ("one", "all"))
        assert 0 < (one - other).abs().max() < 0.01, term


@pytest.mark.slow
def test_terminated_processes_save_and_a_single_one_goes_on(runs: Runs) -> None:
    shutil.copytree(runs.root / "prepared", runs.root / "stopped")
    folder = runs.root / "stopped" / "tiny" / "teacher"
    long = {"training.teacher.steps": 100_000}
    process = runs.start(*TORCHRUN, *ONE_MACHINE, *runs.command("stopped", "teacher", **long))
    while len(saved_states(folder)) < 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert "interrupted at step" in errors
    (last, *_) = saved_states(folder)
    step = checkpoint.load(last)[1]["step"]
    assert step >= 10
    runs.finish(sys.executable, *runs.command("stopped", "teacher", **{"training.teacher.steps": step + 10}))
    assert checkpoint.load(saved_states(folder)[0])[1]["step"] == step + 10
    assert not (folder.parent / "teacher.1").exists()


@pytest.mark.slow
def test_what_one_process_does_alone_is_refused_to_two(runs: Runs) -> None:
    process = runs.start(*TORCHRUN, *ONE_MACHINE, *runs.command("alone", "prepare"))
    _, errors = process.communicate()
    assert process.returncode != 0
    assert errors.count("run the prepare stage without torchrun: one process does it alone") == 2
    assert not (runs.root / "alone" / "tiny" / "manifest.json").exists()
    process = runs.start(*TORCHRUN, *ONE_MACHINE, *runs.command("alone", "teacher"))
    _, errors = process.communicate()
    assert errors.count("the prepare stage has not finished") == 2, "found by the first, told to all"
    assert "Error:" not in errors.replace("ChildFailedError:", "")


@pytest.mark.parametrize(
    ("world", "local", "device", "message"),
    [(2, 2, "cuda", "2 processes on a machine with"), (3, 2, "cpu", "the same --nproc-per-node")],
)
def test_processes_that_do_not_fit_the_machines_are_refused(
    world: int, local: int, device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "a"), ("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", local)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=message):
        launch(torch.device(device))


def test_each_process_of_a_machine_takes_a_gpu_and_finds_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage launches anew on the device, now with a number, that its process was given at first."""
    asked: list[dict[str, Any]] = []

    class Recorder:
        def __init__(self, **options: Any) -> None:
            asked.append(options)

        def launch(self) -> None:
            pass

    monkeypatch.setattr("lightning_fabric.Fabric", Recorder)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("TORCHELASTIC_RUN_ID", "a"), ("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    for device in ("cuda", "cuda:1"):
        launch(torch.device(device))
    strategies = [options.pop("strategy") for options in asked]
    assert asked == [{"accelerator": "cuda", "devices": 2, "num_nodes": 2}] * 2
    assert all(isinstance(strategy, DDPStrategy) for strategy in strategies)
    assert all(not strategy._ddp_kwargs["broadcast_buffers"] for strategy in strategies), "they are constants"
    with pytest.raises(BadParameter, match="try cuda"):
        device_of("cuda:1")


def test_a_waveform_is_one_process_s_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["wavedistill", "generate", "model", "a.wav", "--out", "out"])
    with pytest.raises(SystemExit):
        main()
    assert "generate: run it without torchrun" in capsys.readouterr().err


def test_a_batch_that_cannot_be_shared_out_is_refused(tiny: Recipe, tmp_path: Path) -> None:
    recipe = changed(tiny, "training.teacher", batch_size=3, accumulate=2)
    nothing = Manifest(audio=tiny.audio, utterances=[])
    with pytest.raises(RecipeError, match=r"training\.teacher\.batch_size = 3: cannot .* for instance batch_size = 4"):
        Batches(likelihood_task(recipe, "teacher"), nothing, tmp_path, recipe, launch(torch.device("cpu")), 5)


def test_all_in_float32_is_no_tensorfloat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's convolutions would round to ten bits by default, and its products where somebody has said so."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    launch(torch.device("cpu"))
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"
