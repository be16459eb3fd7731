"""The command line as a user types it: the whole pipeline in miniature, waveforms from checkpoints, and mistakes."""

import json
import logging
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tests.conftest import RECIPES, REPOSITORY, speech_like
from wavedistill.benchmarking import draws
from wavedistill.cli import main
from wavedistill.evaluation.verdict import Scores, against_untrained, gates, in_words
from wavedistill.experiment.folder import Experiment
from wavedistill.experiment.stage import run_stage
from wavedistill.models.checkpoint import load_model
from wavedistill.models.compiling import compile_networks
from wavedistill.recipe.loading import load_recipe
from wavedistill.recipe.sections import Gates
from wavedistill.speech.audio import LogMel
from wavedistill.stages import benchmark, stages_of
from wavedistill.training.state import saved_states

TINY = str(RECIPES / "tiny.toml")
STAGES = stages_of(load_recipe(TINY))
PAIR = ["teacher", "student"]


def wavedistill(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """What a command says and ends with; in this process, because a new one takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        patch.setattr(sys, "argv", ["wavedistill", *map(str, arguments)])
        patch.chdir(REPOSITORY)
        with pytest.raises(SystemExit) as ended:
            main()
    code = ended.value.code
    return subprocess.CompletedProcess(sys.argv, code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def fails(code: int, message: str, *arguments: str | Path) -> None:
    """The command ends with a code and a message of one's own, not a traceback."""
    result = wavedistill(*arguments)
    assert result.returncode == code, result.stderr
    assert message in " ".join(result.stderr.split()), result.stderr
    assert "Traceback" not in result.stderr


def test_a_bar_in_a_log_file_is_drawn_only_where_something_is_new() -> None:
    """tqdm's monitor draws bars again whose last step was long ago."""
    script = (
        "import time; from tqdm import tqdm; tqdm.monitor_interval = min(tqdm.monitor_interval, 0.1)\n"
        "from wavedistill.tools.progress import progress; bar = progress(total=2, mininterval=0.1)\n"
        "bar.update(); time.sleep(2); bar.update(); bar.close()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    drawn = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert len(drawn) <= 3, drawn


def test_a_cuda_without_a_gpu_is_nobodys_worry(caplog: pytest.LogCaptureFixture) -> None:
    """torch warns of it where it compiles for a CPU; of other things it goes on to warn."""
    compile_networks(torch.nn.Linear(1, 1))
    log = logging.getLogger("torch.utils.cpp_extension")
    log.addHandler(caplog.handler)
    log.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "x")
    log.warning("something else")
    log.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.name == log.name][-1] == "something else"
    assert "No CUDA" not in caplog.text


SYSTEMS = {"recorded", "teacher", "student", "griffin_lim", "source_filter", "whisper"}


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny experiment after a whole run."""
    root = tmp_path_factory.mktemp("exp")
    pytest.importorskip("py_nanotts", reason="the tiny recipe's speech is made by the package py-nanotts")
    command = [Path(sys.executable).with_name("wavedistill"), "run", TINY, "--exp", root, "--device", "cpu"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == list(STAGES), "one line of result a stage"
    return root / "tiny"


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(tiny_run: Path) -> None:
    for name in (
        "report.html",
        "metrics.json",
        "benchmark.json",
        "teacher/checkpoint.safetensors",
        "student/checkpoint.safetensors",
    ):
        assert (tiny_run / name).stat().st_size > 0
    assert {path.parent.name for path in tiny_run.glob("samples/*/*.wav")} == SYSTEMS
    assert not list(tiny_run.rglob("*.partial"))


@pytest.mark.slow
def test_metrics_hold_the_promised_figures(tiny_run: Path) -> None:
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    assert metrics["recipe"] == load_recipe(TINY).model_dump(mode="json")
    density = metrics["density"]
    teacher, student = (density["models"][name] for name in ("teacher", "student"))
    assert set(density["models"]) == {"teacher", "student"}
    assert set(student) == {"kl", "kl_before_training", "kl_standard_error", "kl_from"}
    assert {"nll", "bits_per_sample_given_log_mel"} <= set(teacher)
    assert teacher["nll"] < teacher["nll_before_training"] - 0.05
    # In so few steps the spectral term outweighs the KL; that the sum fell shows in the step whose weights were kept.
    assert 0 < student["kl"] < 0.5
    assert all(load_model(tiny_run / kind / "checkpoint.safetensors").step > 0 for kind in ("teacher", "student"))
    assert teacher["nll_before_training"] < density["level_gaussian_nll"] - 2
    assert teacher["nll_shuffled_conditioning"] > teacher["nll"]
    assert set(metrics["synthesis"]) == set(metrics["as_drawn"]) == SYSTEMS
    for scores in (*metrics["synthesis"].values(), *metrics["as_drawn"].values()):
        assert set(scores) == {
            "pesq_wb",
            "stoi",
            "mcd_db",
            "lsd_db",
            "f0_rmse_cents",
            "vuv_f1",
            "periodicity_rmse",
            "periodicity",
            "level_difference_db",
            "tilt_difference_db",
            "aperiodicity_db",
            "aperiodicity_bias_db",
            "teacher_log_likelihood",
        }
    recorded, griffin_lim, whisper = (metrics["as_drawn"][name] for name in ("recorded", "griffin_lim", "whisper"))
    assert recorded["stoi"] == pytest.approx(1, abs=1e-4)
    assert recorded["lsd_db"] == recorded["mcd_db"] == recorded["f0_rmse_cents"] == 0
    assert recorded["vuv_f1"] == 1
    assert griffin_lim["stoi"] > 0.7
    assert whisper["periodicity"] < 0.5 * recorded["periodicity"]
    assert whisper["vuv_f1"] < 0.5
    for name in SYSTEMS - {"recorded"}:
        assert metrics["synthesis"][name]["mcd_db"] < metrics["as_drawn"][name]["mcd_db"], "nearer to the log-mel"
    pulses = metrics["synthesis"]["source_filter"]["aperiodicity_bias_db"]
    assert pulses < metrics["synthesis"]["whisper"]["aperiodicity_bias_db"]
    assert set(metrics["pitch_from_mel"]["student"]) == {"f0_rmse_cents", "vuv_f1"}
    about = metrics["about"]
    assert {"cpu", "torch", "date"} <= set(about["machine"])
    assert (about["seed"], about["temperature"], about["clips"]) == (1, 1, 2)
    assert set(about["inputs"]) == {
        "tiny/manifest.json",
        "teacher/checkpoint.safetensors",
        "student/checkpoint.safetensors",
    }
    assert metrics["against_untrained"]["student"]["mcd_db"]["own"] == metrics["synthesis"]["student"]["mcd_db"]


@pytest.mark.slow
def test_gates_are_applied_to_the_student_and_named_where_they_fail(tiny_run: Path) -> None:
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    assert set(metrics["gates"]) == {"student"}, "the model that draws in parallel"
    gates, student = metrics["gates"]["student"], metrics["synthesis"]["student"]
    assert set(gates) == set(Gates.model_fields)
    assert gates["level_db"]["value"] >= abs(student["level_difference_db"])
    assert gates["vuv_f1"]["value"] == student["vuv_f1"]
    page = (tiny_run / "report.html").read_text()
    assert page.count('class="failed"') == sum(not gate["passed"] for gate in gates.values())
    failed = sum(not gate["passed"] for gate in gates.values())
    assert (f"fails {failed} of {len(gates)} quality checks" in page) == bool(failed)
    assert ("passes all" in page) != bool(failed)


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ([{}], set()),
        ([{"level_difference_db": -3.5}], {"level_db"}),
        ([{"tilt_difference_db": 3.5}], {"tilt_db"}),
        ([{"level_difference_db": 10.0}, {"level_difference_db": -10.0}], {"level_db"}),  # which a mean would hide
        ([{"vuv_f1": 0.5}], {"vuv_f1"}),
        ([{"periodicity": 0.3}], {"periodicity"}),
        ([{"vuv_f1": None, "periodicity": None}], {"vuv_f1", "periodicity"}),
        ([{"aperiodicity_db": 4.0}], {"aperiodicity_db"}),
        ([{"aperiodicity_bias_db": 3.0}, {"aperiodicity_bias_db": -3.0}], {"aperiodicity_bias_db"}),
        ([{"aperiodicity_db": None, "aperiodicity_bias_db": None}], {"aperiodicity_db", "aperiodicity_bias_db"}),
        ([{"pesq_wb": 2.0}], {"better_scores"}),
        ([{"pesq_wb": None}], {"better_scores"}),
        ([{"pesq_wb": 2.0, "stoi": 0.98}], set()),
        ([{"pesq_wb": 2.0, "mcd_db": 0.9}], set()),
    ],
)
def test_each_gate_catches_its_own_fault(changes: list[dict[str, float | None]], failed: set[str]) -> None:
    good = {
        "level_difference_db": -1.0,
        "tilt_difference_db": 0.5,
        "vuv_f1": 0.95,
        "periodicity": 0.8,
        "aperiodicity_db": 2.5,
        "aperiodicity_bias_db": -0.5,
        "pesq_wb": 2.3,
        "stoi": 0.93,
        "mcd_db": 3.0,
    }
    thresholds = Gates(level_db=3.0, tilt_db=3.0, vuv_f1=0.9, periodicity=0.8, better_scores=1)
    student = [{**good, **change} for change in changes]
    compared = against_untrained({"student": student[0], **BASELINES}, "student")
    found = gates(student, [{"periodicity": 0.9}], compared, thresholds)
    assert {name for name, gate in found.items() if not gate["passed"]} == failed


BASELINES: dict[str, Scores] = {
    "griffin_lim": {"pesq_wb": 2.2, "stoi": 0.97, "mcd_db": 1.0},
    "whisper": {"pesq_wb": 1.1, "stoi": 0.8, "mcd_db": 4.0},
}


def test_a_student_is_compared_with_the_best_that_needs_no_training() -> None:
    """In each score, by how much, and in words; one that is below it everywhere passes no gate for it."""
    compared = against_untrained({"student": {"pesq_wb": 2.3, "stoi": 0.93, "mcd_db": 3.0}, **BASELINES}, "student")
    assert {name: found["gain"] for name, found in compared.items()} == pytest.approx(
        {"pesq_wb": 0.1, "stoi": -0.04, "mcd_db": -2.0}
    )
    assert in_words(compared) == (
        "PESQ-wb 2.30 (0.10 better than griffin_lim), STOI 0.930 (0.040 worse than griffin_lim), "
        "MCD 3.00 dB (2.00 dB worse than griffin_lim)"
    )
    whisper = against_untrained({"student": BASELINES["whisper"], **BASELINES}, "student")
    assert all(found["gain"] < 0 for found in whisper.values())
    assert not against_untrained({"student": dict.fromkeys(BASELINES["whisper"]), **BASELINES}, "student")


@pytest.mark.slow
def test_benchmark_compares_the_samplers_of_one_pair(tiny_run: Path) -> None:
    benchmark = json.loads((tiny_run / "benchmark.json").read_text())
    rows = {row["sampler"]: row for row in benchmark["rows"]}
    assert {name: row["model"] for name, row in rows.items()} == {
        "naive": "teacher",
        "cached": "teacher",
        "compiled": "teacher",
        "parallel": "student",
        "streamed": "student",
    }
    assert {row["num_samples"] for name, row in rows.items() if name != "naive"} == {1600}
    assert rows["naive"]["num_samples"] == 5
    assert "5 samples only" in rows["naive"]["note"]
    for row in rows.values():
        assert row["first_samples_seconds"] > 0
        assert row["setup_seconds"] >= 0
        assert row["peak_memory_bytes"] > 1e7
        assert len(row["seconds_all"]) >= 2
        assert len(row["seconds_all"]) == 2 or sum(row["seconds_all"]) < 1 + max(row["seconds_all"])
        assert row["samples_per_second"] == pytest.approx(row["num_samples"] / row["seconds_median"])
        lower, median, upper = row["seconds_quartiles"]
        assert lower <= median <= upper
        assert median == row["seconds_median"]
        assert (row["disturbed"] is None) or isinstance(row["disturbed"], str)
        assert row["times_real_time"] == pytest.approx(row["samples_per_second"] / 16000)
    assert all(0 < row["share_of_ceiling"] < 1 for row in rows.values())
    assert rows["parallel"]["samples_per_second"] > rows["cached"]["samples_per_second"]
    assert rows["compiled"]["samples_per_second"] > rows["cached"]["samples_per_second"]
    assert rows["cached"]["samples_per_second"] > rows["naive"]["samples_per_second"]
    assert {"cpu", "torch", "date"} <= set(benchmark["machine"])
    assert [line for line in benchmark["summary"] if "times as fast as the teacher's compiled sampler" in line]


@pytest.mark.slow
def test_tables_on_demand_measure_batches_sizes_and_trainings(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "FULL_SECONDS", (0.1,))
    monkeypatch.setattr(draws, "CROSSOVER", (0.5, 1))
    monkeypatch.setattr(draws, "CROSSOVER_SECONDS", 0.1)
    root = tmp_path / "tiny"
    shutil.copytree(tiny_run, root)
    experiment = Experiment(load_recipe(Path(TINY)), root, torch.device("cpu"))
    assert run_stage(benchmark.full(PAIR), experiment).endswith("benchmark_full.json")
    assert run_stage(benchmark.full(PAIR), experiment) == "benchmark_full: up to date"
    rows = json.loads((root / "benchmark_full.json").read_text())["rows"]
    assert {row["batch_size"] for row in rows} == {1, 16}
    batch = next(row for row in rows if row["batch_size"] == 16 and row["sampler"] == "compiled")
    assert batch["samples_per_second"] == pytest.approx(16 * 1600 / batch["seconds_median"])
    small, large = (row["flops_per_sample"] for row in rows if not row["trained"])
    assert small < large
    assert "training of the student" in run_stage(benchmark.train(PAIR), experiment)
    table = json.loads((root / "benchmark_train.json").read_text())
    assert [row["model"] for row in table["rows"]] == ["teacher", "student"]
    for row in table["rows"]:
        assert 0 < row["share_of_loading"] < 1
        assert 0 < row["share_of_ceiling"] < 1
    assert run_stage(STAGES["report"], experiment).endswith("report.html")
    page = (root / "report.html").read_text()
    assert "training of the student" in page
    assert "is left out" not in page
    # A table of another student's, and none at all.
    stale = {**table, "rows": [{**row, "of": "another student's"} for row in table["rows"]]}
    (root / "benchmark_train.json").write_text(json.dumps(stale))
    (root / "benchmark.json").unlink()
    assert run_stage(STAGES["report"], experiment).endswith("report.html")
    page = (root / "report.html").read_text()
    assert "training of the student" not in page
    assert "benchmark_train.json is of other models, settings or another version, and is left out" in page
    assert "Not measured yet" in page


@pytest.mark.slow
def test_the_report_is_self_contained(tiny_run: Path) -> None:
    page = (tiny_run / "report.html").read_text()
    sounds = 2 * (2 * len(SYSTEMS) - 1)  # as heard, and all but the recordings as drawn
    assert page.count("<audio ") == page.count("data:audio/flac;base64,") == sounds
    assert page.count("data:image/webp;base64,") == sounds
    assert page.count("<svg ") == 4, "two terms of the teacher, two of the student"
    assert "http://" not in page
    assert "https://" not in page


@pytest.mark.slow
def test_a_second_run_does_nothing_and_a_changed_setting_only_what_it_must(tiny_run: Path) -> None:
    result = wavedistill("run", TINY, "--exp", tiny_run.parent, "--device", "cpu")
    assert result.stdout.splitlines() == [f"{name}: up to date" for name in STAGES]
    changed = wavedistill(
        "run", TINY, "--exp", tiny_run.parent, "--device", "cpu", "--set", "benchmark.repeats=1", "--until", "benchmark"
    )
    lines = changed.stdout.splitlines()
    assert lines[:4] == [f"{name}: up to date" for name in list(STAGES)[:4]]
    assert re.match(r"benchmark: 1,600 samples, cpu, 1 thread: the streamed student draws ", lines[4])
    again = wavedistill("run", TINY, "--exp", tiny_run.parent, "--device", "cpu", "--from", "benchmark")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[1].endswith("report.html")


@pytest.mark.slow
def test_a_model_of_other_settings_is_refused(tiny_run: Path) -> None:
    options = ("evaluate", TINY, "--exp", tiny_run.parent, "--set", "linear_prediction.order=12")
    fails(1, "its [linear_prediction] is not the recipe's: run the teacher stage again", *options)
    options = ("teacher", TINY, "--exp", tiny_run.parent, "--set", "audio.f_max=7000")
    fails(1, "its [audio] is not the recipe's: run the prepare stage again", *options)
    assert (tiny_run / "teacher" / "checkpoint.safetensors").exists(), "nothing was set aside for it"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_generate_gives_frames_times_hop_samples(tiny_run: Path, tmp_path: Path, kind: str) -> None:
    settings = load_recipe(Path(TINY)).audio
    soundfile.write(tmp_path / "sound.wav", speech_like(2345).numpy(), 16000)
    stereo = torch.stack([speech_like(3000), speech_like(3000)], 1)
    soundfile.write(tmp_path / "stereo.flac", stereo.numpy(), 44100)
    np.save(tmp_path / "mel.npy", LogMel(settings).of_file(speech_like(1400)[None])[0].numpy())
    inputs = [tmp_path / name for name in ("sound.wav", "stereo.flac", "mel.npy")]
    checkpoint = tiny_run / kind / "checkpoint.safetensors"

    def generate(folder: str, *options: str) -> dict[str, np.ndarray]:
        result = wavedistill("generate", checkpoint, *inputs, "--out", tmp_path / folder, *options)
        assert result.returncode == 0, result.stderr
        files = sorted((tmp_path / folder).iterdir())
        assert all(soundfile.info(path).subtype == "PCM_16" for path in files)
        return {path.name: soundfile.read(path)[0] for path in files}

    first = generate("first", "--seed", "3")
    assert {name: len(wave) for name, wave in first.items()} == {"sound.wav": 2400, "stereo.wav": 1200, "mel.wav": 1400}
    again, other = generate("again", "--seed", "3"), generate("other", "--seed", "4")
    if kind == "student":
        lowered = generate("lowered", "--seed", "3", "--bf16")
        for name, wave in first.items():
            assert 0 < np.square(lowered[name] - wave).mean() < 1e-3 * np.square(wave).mean(), name
    else:
        refused = wavedistill("generate", checkpoint, inputs[0], "--out", tmp_path / "no", "--bf16")
        assert refused.returncode == 2
        assert "--bf16: is for parallel models" in " ".join(refused.stderr.split())
    drawn, cold = generate("drawn", "--passes", "0"), generate("cold", "--temperature", "0", "--passes", "0")
    for name, wave in first.items():
        assert np.array_equal(wave, again[name])
        assert not np.array_equal(wave, other[name])
        assert np.square(cold[name]).mean() < np.square(drawn[name]).mean()


@pytest.mark.slow
def test_generate_names_what_it_cannot_use(tiny_run: Path, tmp_path: Path) -> None:
    checkpoint = tiny_run / "student" / "checkpoint.safetensors"
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "good.wav", speech_like(2000).numpy(), 16000)
    out = tmp_path / "out"
    fails(1, "text.wav: not readable as audio", "generate", checkpoint, tmp_path / "text.wav", "--out", out)
    fails(1, "would overwrite this input", "generate", checkpoint, tmp_path / "good.wav", "--out", tmp_path)
    twice = (tmp_path / "good.wav", tmp_path / "good.npy")
    fails(1, "another input of the same name", "generate", checkpoint, *twice, "--out", out)
    (state, *_) = saved_states(tiny_run / "student")
    fails(1, "give the checkpoint.safetensors", "generate", state, tmp_path / "good.wav", "--out", out)
    good = ("generate", checkpoint, tmp_path / "good.wav", "--out", out, "--device")
    fails(2, "--device tpu: not a device", *good, "tpu")
    fails(2, "--device meta: not supported", *good, "meta")
    np.save(tmp_path / "db.npy", np.linspace(-80, 0, 800).reshape(40, 20))
    fails(1, "is it in decibels", "generate", checkpoint, tmp_path / "db.npy", "--out", out)
    fails(
        1,
        "text.wav: cannot be written to: is a file",
        "generate",
        checkpoint,
        tmp_path / "good.wav",
        "--out",
        tmp_path / "text.wav",
    )


def test_mistakes_end_in_one_message(tmp_path: Path) -> None:
    misspelt = tmp_path / "misspelt.toml"
    misspelt.write_text((RECIPES / "tiny.toml").read_text().replace("n_mels", "n_mel"))
    fails(2, "audio.n_mel: unknown key; did you mean n_mels?", "run", misspelt, "--exp", tmp_path)
    fails(2, "stepz: unknown key", "run", TINY, "--set", "training.teacher.stepz=1", "--exp", tmp_path)
    fails(2, "name: unknown key", "run", TINY, "--set", "name=x", "--exp", tmp_path)
    fails(2, "cannot read the recipe", "prepare", tmp_path / "none.toml")
    fails(2, "comes after --until", "run", TINY, "--from", "report", "--until", "teacher", "--exp", tmp_path)
    fails(2, "prepaer: no stage of this recipe", "prepaer", TINY)
    fails(2, "No such command", "prepaer")
    fails(1, "the prepare stage has not finished", "teacher", TINY, "--exp", tmp_path)
    fails(1, "none.safetensors: no such checkpoint", "generate", tmp_path / "none.safetensors", TINY, "--out", tmp_path)
    fails(1, "tiny.toml: not readable as audio", "generate", TINY, "--out", tmp_path)
    folder = ("--set", 'corpus={kind="folder",path="nowhere"}')
    fails(1, "corpus.path = 'nowhere': does not exist", "prepare", TINY, "--exp", tmp_path, *folder)


def test_help_shows_every_command_with_examples() -> None:
    result = wavedistill("--help")
    assert result.returncode == 0
    for word in (*STAGES, "run", "new", "generate", "info", "wavedistill run demo"):
        assert word in result.stdout
    for command in (*STAGES, "run", "new", "generate", "info"):
        assert wavedistill(command, "--help").returncode == 0
    assert wavedistill("--version").stdout.startswith("wavedistill ")


def test_a_recipe_for_a_voice_of_one_s_own_is_written_once(tmp_path: Path) -> None:
    """It is that of own_voice.toml, is valid, and a file that is there already is left alone."""
    path = tmp_path / "mine.toml"
    assert f"wavedistill run {path}" in wavedistill("new", path).stdout
    assert path.read_text() == (RECIPES / "own_voice.toml").read_text()
    assert load_recipe(path).corpus.path == str(tmp_path / "recordings")
    path.write_text("mine")
    fails(1, "is there already", "new", path)
    assert path.read_text() == "mine"
    fails(2, "ends in .toml", "new", tmp_path / "mine")


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["runn"], ["run", "nothing"], ["run", "tiny", "--set", "x=1"]]
)
def test_a_command_answers_for_itself_before_it_imports_torch(words: list[str]) -> None:
    script = (
        "import sys; from wavedistill.cli import main; sys.argv = ['wavedistill', *sys.argv[1:]]\n"
        "try: main()\nexcept SystemExit: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1] == "False", done.stderr
