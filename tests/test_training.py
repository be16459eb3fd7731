"""The training loop: resuming, averaging, what is kept, and how it stops."""

import itertools
import math
import os
import re
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from tests.conftest import HEARD, margin, speech_like, told
from tests.test_audio import corpus
from wavedistill.corpus.segments import Batch, Segments, dequantise
from wavedistill.corpus.utterances import Manifest
from wavedistill.experiment.folder import Experiment
from wavedistill.experiment.stage import Stage, run_stage
from wavedistill.models import checkpoint
from wavedistill.models.kinds import build
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.loading import validate_recipe
from wavedistill.recipe.recipe import Recipe
from wavedistill.recipe.trainings import DistillationLoss
from wavedistill.sampling.sequential import sample
from wavedistill.speech.audio import LogMel, rms_db
from wavedistill.speech.conditioning import Conditioning
from wavedistill.speech.pitch import PitchPredictor
from wavedistill.tools.engine import launch
from wavedistill.tools.errors import CheckpointError, CorpusError, TrainingError
from wavedistill.tools.random import Streams, random_stream
from wavedistill.training.batches import Batches, read_ahead
from wavedistill.training.distillation import distillation_task
from wavedistill.training.learner import Learner, update_average
from wavedistill.training.likelihood import likelihood_task
from wavedistill.training.loop import Outcome, fit
from wavedistill.training.losses import negative_log_likelihood
from wavedistill.training.pace import TIMED, UNTIMED
from wavedistill.training.preview import Preview
from wavedistill.training.state import State, saved_states
from wavedistill.training.task import Player, Task, learning_rate, players

STEPS = 24


@pytest.fixture
def recipe(tiny_data: dict[str, Any]) -> Recipe:
    tiny_data["models"]["teacher"]["layers"] = 3
    tiny_data["linear_prediction"]["order"] = 0  # which leaves the network more to learn
    tiny_data["training"]["teacher"].update(
        steps=STEPS, batch_size=2, segment_frames=4, validate_every=8, validate_batches=1
    )
    return validate_recipe(tiny_data, "tiny.toml")


Train = Callable[..., Outcome]


@pytest.fixture
def train(tmp_path: Path, recipe: Recipe, blank_pictures: None) -> Train:
    """Train the small teacher in a folder; `hook` is called with the number of each evaluation of the loss."""
    manifest = corpus(tmp_path / "audio", recipe, [20, 20])
    first, second = manifest.utterances
    both = Manifest(audio=recipe.audio, utterances=[first, second.model_copy(update={"split": "valid"})])

    def run(
        folder: str,
        hook: Callable[[int], None] = lambda _: None,
        steps: int = STEPS,
        fingerprint: str = "a",
        given: Mapping[str, Tensor] | None = None,
    ) -> Outcome:
        count = itertools.count(1)

        def terms(model: WaveformModel, batch: Batch, streams: Streams) -> Mapping[str, Tensor]:
            hook(next(count))
            density = model(batch.conditioning)
            assert model.pitch is not None
            return {
                "nll": negative_log_likelihood(density, dequantise(batch.audio, streams)).mean(),
                "pitch": model.pitch.loss(batch.conditioning),
            }

        settings = recipe.training["teacher"].model_copy(update={"steps": steps})
        task = Task(
            "teacher",
            settings,
            terms,
            {"nll": 1.0},
            lambda model, batch: sample(model(batch.conditioning), torch.zeros(1, 800)),
            given or {},
        )
        return fit(
            task,
            both,
            tmp_path / "audio",
            recipe=recipe,
            folder=tmp_path / folder,
            fingerprint=fingerprint,
            device=torch.device("cpu"),
        )

    return run


def weights(path: Path) -> dict[str, Tensor]:
    return checkpoint.load_model(path / "checkpoint.safetensors").model.state_dict()


def state(path: Path) -> dict[str, Any]:
    """What the last state of a training says of itself."""
    return checkpoint.load(saved_states(path)[0])[1]


def test_an_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path, train: Train) -> None:
    """Bit for bit, with the average, the optimizer and the best value so far."""
    train("whole")

    def interrupt(count: int) -> None:
        if count == 13:  # not at a validation
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingError, match=r"interrupted at step .* run the same command again"):
        train("parts", interrupt)
    assert 0 < state(tmp_path / "parts")["step"] < STEPS
    train("parts")
    (whole, whole_header), (parts, parts_header) = (
        checkpoint.load(saved_states(tmp_path / name)[0]) for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert {name.split(".")[0] for name in whole} == {"model", "average", "optimizer"}
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert whole_header == parts_header
    assert all(
        torch.equal(a, b) for a, b in zip(*(weights(tmp_path / n).values() for n in ("whole", "parts")), strict=True)
    )


def test_termination_saves_as_an_interrupt_does(tmp_path: Path, train: Train) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingError, match="interrupted"):
        train("a", lambda count: os.kill(os.getpid(), signal.SIGTERM) if count == 3 else None)
    assert saved_states(tmp_path / "a")
    assert signal.getsignal(signal.SIGTERM) is before


def test_training_lowers_the_validation_loss_and_keeps_the_best(tmp_path: Path, train: Train) -> None:
    outcome = train("a")
    log = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    log.Reload()
    valid = {event.step: event.value for event in log.Scalars("valid/nll")}
    assert list(valid) == [0, 8, 16, 24]
    assert valid[24] < valid[0] - 0.05
    assert outcome.step == min(valid, key=lambda step: valid[step])
    assert abs(outcome.valid["nll"] - min(valid.values())) < 1e-6
    tags = ["utterance_1/generated", "utterance_1/recorded"]
    assert sorted(log.Tags()["audio"]) == sorted(log.Tags()["images"]) == tags
    for tag, steps in zip(tags, ([0, 8, 16, 24], [0]), strict=True):
        assert [event.step for event in log.Audio(tag)] == [event.step for event in log.Images(tag)] == steps


def test_what_is_heard_of_a_training_leaves_it_alone(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("heard")
    monkeypatch.setattr(Preview, "generated", lambda *args: None)
    train("unheard")
    heard, unheard = (checkpoint.load(saved_states(tmp_path / name)[0]) for name in ("heard", "unheard"))
    assert heard[1] == unheard[1]
    assert all(torch.equal(value, unheard[0][name]) for name, value in heard[0].items())


def test_a_long_training_says_once_how_long_it_will_take(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock on which every reading is 36 s after the one before, and so every step 36 s long."""
    clock = itertools.count(0, 36)
    monkeypatch.setattr("wavedistill.training.loop.time.monotonic", lambda: float(next(clock)))
    with pytest.raises(TrainingError, match="interrupted"):
        train(
            "a",
            lambda count: os.kill(os.getpid(), signal.SIGINT) if count == UNTIMED + TIMED + 10 else None,
            steps=UNTIMED + TIMED + 500,
        )
    assert capsys.readouterr().err.count("teacher: about 5 h on this machine") == 1


def test_a_lengthened_training_goes_on_and_a_finished_one_does_nothing(train: Train) -> None:
    calls: list[int] = []
    assert re.fullmatch(r"at step \d+, \d+ s", str(train("a", steps=16)))
    outcome = train("a", calls.append, steps=24)
    assert len(calls) == 8 + 1  # steps 16 to 24, and one validation
    assert str(outcome).endswith(" s from step 16 on"), "the seconds are those of this call"
    calls.clear()
    train("a", calls.append, steps=24)
    assert not calls


@pytest.mark.parametrize("change", [{"fingerprint": "b"}, {"steps": 8}])
def test_a_training_of_other_settings_is_set_aside_not_overwritten(
    tmp_path: Path, train: Train, change: dict[str, Any]
) -> None:
    train("a")
    kept = weights(tmp_path / "a")
    train("a", **change)
    assert all(torch.equal(value, kept[name]) for name, value in weights(tmp_path / "a.1").items())
    train("a", fingerprint="c")
    assert (tmp_path / "a.2" / "checkpoint.safetensors").exists()


def test_a_training_whose_checkpoint_was_deleted_starts_anew(tmp_path: Path, train: Train) -> None:
    train("a")
    kept = weights(tmp_path / "a")
    (tmp_path / "a" / "checkpoint.safetensors").unlink()
    train("a")
    assert all(torch.equal(value, kept[name]) for name, value in weights(tmp_path / "a").items())
    assert saved_states(tmp_path / "a.1")
    for path in saved_states(tmp_path / "a"):
        path.unlink()
    train("a")
    assert all(torch.equal(value, kept[name]) for name, value in weights(tmp_path / "a.2").items())


def test_resuming_loses_no_point_of_the_log(tmp_path: Path, train: Train) -> None:
    train("a", steps=16)
    train("a", steps=24)
    log = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    log.Reload()
    assert [event.step for event in log.Scalars("valid/nll")] == [0, 8, 16, 24]


def test_an_interrupted_stage_is_not_up_to_date_for_the_settings_before(tmp_path: Path, recipe: Recipe) -> None:
    """Settings A, then B interrupted, then A again: the files are B's."""
    runs = []

    def run(experiment: Experiment) -> str:
        (experiment.root / "out").write_text(str(experiment.recipe.seed))
        runs.append(experiment.recipe.seed)
        if experiment.recipe.seed == 7:
            raise TrainingError("interrupted")
        return "done"

    stage = Stage("a", (), lambda e: e.recipe.seed, lambda e: [], lambda e: [e.root / "out"], run)
    first, second = (
        Experiment(recipe.model_copy(update={"seed": seed}), tmp_path, torch.device("cpu")) for seed in (1, 7)
    )
    run_stage(stage, first)
    with pytest.raises(TrainingError):
        run_stage(stage, second)
    assert run_stage(stage, first) == "a: done"
    assert run_stage(stage, first) == "a: up to date"
    assert runs == [1, 7, 1]


def test_a_damaged_state_is_named_and_left_alone(tmp_path: Path, train: Train) -> None:
    train("a")
    for path in saved_states(tmp_path / "a"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"state-00000016\.safetensors: .*damaged"):
        train("a")
    assert [path.stat().st_size for path in saved_states(tmp_path / "a")] == [1000, 1000]


def spoil(batch: Batch) -> Batch:
    """The same without a finite log-mel."""
    told = batch.conditioning
    return batch._replace(conditioning=replace(told, mel=told.mel * math.nan))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def of_wrong_types(path: Path) -> None:
    tensors, header = checkpoint.load(path)
    checkpoint.save(path, tensors, {**header, "step": "many"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_short, "not a wavedistill checkpoint, or a damaged one"),
        (of_wrong_types, "not the state of a training, or a damaged one"),
    ],
)
def test_a_damaged_last_state_falls_back_to_the_one_before(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], said: str
) -> None:
    train("whole")
    train("a")
    kept = weights(tmp_path / "a")
    last, before = saved_states(tmp_path / "a")
    damage(last)
    calls: list[int] = []
    train("a", calls.append)
    assert f"{last}: {said}; going on from {before.name}" in (" ".join(capsys.readouterr().err.split()))
    assert len(calls) == 8 + 1  # from step 16 to 24, and one validation
    assert checkpoint.load(last)[1]["step"] == STEPS, "mended on the way"
    assert all(torch.equal(value, kept[name]) for name, value in weights(tmp_path / "a").items())


def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(tmp_path: Path, train: Train) -> None:
    train("good", steps=3)
    step = Learner.step

    def spoilt(learner: Learner, parts: Any, number: int) -> tuple[dict[str, Tensor], float]:
        if number != 1:
            return step(learner, parts, number)
        before = [value.clone() for part in (learner.model, learner.average) for value in part.parameters()]
        found = step(learner, [(spoil(batch), streams) for batch, streams in parts], number)
        after = [value for part in (learner.model, learner.average) for value in part.parameters()]
        assert all(map(torch.equal, before, after))
        assert all(state["step"] == 1 for state in learner.optimizer.state.values())
        assert math.isnan(found[1])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", spoilt)
        train("a", steps=3)
    assert state(tmp_path / "a")["skipped"] == 1
    assert state(tmp_path / "a")["skipped_in_a_row"] == 0
    assert all(value.isfinite().all() for value in weights(tmp_path / "a").values())


def test_a_loss_that_is_not_finite_stops_the_training_and_keeps_the_checkpoint(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wavedistill.training.task.learning_rate", lambda settings, step: 1e30)
    with pytest.raises(TrainingError, match=r"not finite .*step .*lower training\.teacher\.learning_rate"):
        train("a")
    assert all(value.isfinite().all() for value in weights(tmp_path / "a").values())


def test_reading_ahead_gives_each_step_its_own_batch_and_its_own_error() -> None:
    """Whatever steps are asked for; the one after is read before it is asked for, and an error waits for its step."""
    read: list[int] = []
    after = threading.Event()

    def of_step(step: int) -> int:
        read.append(step)
        if step == 3:
            after.set()
        if step == 5:
            raise CorpusError("gone")
        return 10 * step

    ahead = read_ahead(of_step)
    assert ahead(2) == 20
    assert after.wait(10)
    assert [ahead(step) for step in (3, 7, 4)] == [30, 70, 40]
    with pytest.raises(CorpusError, match="gone"):
        ahead(5)
    assert ahead(6) == 60
    assert read.count(4) == 2, "read ahead, dropped, and read again"


def test_the_averaged_weights_are_what_is_validated_and_kept(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    validated = []
    validate = Batches.validate

    def noted(batches: Batches, model: WaveformModel) -> dict[str, float]:
        validated.append({name: value.clone() for name, value in model.state_dict().items()})
        return validate(batches, model)

    monkeypatch.setattr(Batches, "validate", noted)
    assert train("a").step == STEPS, "the last is the best"
    tensors, _ = checkpoint.load(saved_states(tmp_path / "a")[0])
    average, raw = ({n.partition(".")[2]: v for n, v in tensors.items() if n.startswith(kind)} for kind in ("av", "mo"))
    for found in (validated[-1], weights(tmp_path / "a")):
        assert all(torch.equal(value, average[name]) for name, value in found.items())
    assert not all(torch.equal(value, raw[name]) for name, value in average.items()), "they differ"


def test_what_validates_best_is_kept_and_not_what_comes_last(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after an interruption, since which nothing was better."""
    objectives = iter([3.0, 1.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(Batches, "validate", lambda batches, model: {"nll": next(objectives), "pitch": 0.0})
    assert train("a", steps=16).step == 8
    kept = weights(tmp_path / "a")
    outcome = train("a", steps=24)
    assert (outcome.step, outcome.valid["nll"]) == (8, 1.0)
    assert checkpoint.load_model(tmp_path / "a" / "checkpoint.safetensors").step == 8
    assert all(torch.equal(value, kept[name]) for name, value in weights(tmp_path / "a").items())


def test_no_step_follows_a_gradient_longer_than_the_recipe_allows(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, norms = Learner.step, []

    def noted(learner: Learner, parts: Any, number: int) -> tuple[dict[str, Tensor], float]:
        learner.players = [player._replace(grad_clip=0.05) for player in learner.players]
        terms, norm = step(learner, parts, number)
        clipped = nn.utils.get_total_norm([p.grad for n, p in learner.model.named_parameters() if "pitch." not in n])
        norms.append((norm, float(clipped)))
        return terms, norm

    monkeypatch.setattr(Learner, "step", noted)
    train("a", steps=3)
    assert all(norm > 0.05 for norm, _ in norms), "they are longer"
    assert all(clipped <= 0.0501 for _, clipped in norms)


def test_the_batches_of_a_training_differ_by_step_and_item(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = Learner.step

    def noted(learner: Learner, parts: Any, number: int) -> tuple[dict[str, Tensor], float]:
        parts = list(parts)
        seen.extend(item for batch, streams in parts for item in dequantise(batch.audio, streams))
        return step(learner, [(batch, streams) for batch, streams in parts], number)

    monkeypatch.setattr(Learner, "step", noted)
    train("a", steps=4)
    assert len(seen) == 8
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


def test_a_likelihood_is_learnt_from_dequantised_audio(
    tiny: Recipe, tiny_model: Callable[[str], WaveformModel]
) -> None:
    """Each item by its own stream; without, the density of 16-bit audio has no bound."""
    model = tiny_model("teacher")
    frames = 4 + 2 * model.margin
    quiet = 1e-3 * torch.stack([speech_like(frames * 200, seed) for seed in range(2)])
    wide = (quiet * 2**15).round() / 2**15
    cut = model.margin * 200
    mel = LogMel(tiny.audio).of_file(wide)
    known = Conditioning(mel, model.margin, torch.zeros(2, frames))
    batch = Batch(wide[:, cut:-cut], wide, known)
    streams = [[random_stream(0, item) for item in range(2)] for _ in range(2)]
    found = likelihood_task(tiny, "teacher").terms(model, batch, streams[0])["nll"]
    audio = dequantise(wide, streams[1])
    residual, ladj = model.analyse(audio, known)
    expected = -(model.residual(known).log_prob_steps(residual) + ladj).mean()
    torch.testing.assert_close(found, expected)
    residual, ladj = model.analyse(wide, known)
    bare = -(model.residual(known).log_prob_steps(residual) + ladj).mean()
    assert abs(bare - expected) > 1e-5


def test_average_weighs_the_old_value_with_the_decay() -> None:
    average, model = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.ones_(average.weight)
    nn.init.zeros_(model.weight)
    update_average(average, model, decay=0.9, step=10_000)
    assert abs(average.weight.item() - 0.9) < 1e-6
    update_average(average, model, decay=0.9, step=0)
    assert average.weight.item() == 0, "before there is a history, the average is the model"


def test_learning_rate_rises_then_falls(recipe: Recipe) -> None:
    settings = recipe.training["teacher"].model_copy(update={"steps": 100, "warmup_steps": 9, "learning_rate": 1.0})
    rates = [learning_rate(settings, step) for step in range(100)]
    assert abs(rates[0] - 0.1) < 1e-2
    assert rates.index(max(rates)) == 9
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0.05 <= rates[99] < 0.06
    assert rates[50] == pytest.approx(0.05 + 0.95 / 2), "half way at half time"


@pytest.mark.parametrize("base", ["normal", "logistic"])
@pytest.mark.parametrize("order", [0, 24])
@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_before_the_first_step_a_sample_has_the_level_of_the_data(
    tiny_data: dict[str, Any], kind: str, order: int, base: str
) -> None:
    """Of all data without linear prediction; with it, of the very recording whose log-mel is given."""
    tiny_data["linear_prediction"]["order"] = order
    tiny_data["models"][kind]["base"] = base
    tiny_data["training"]["student"]["loss"]["kl_estimator"] = "mc"  # for any base
    recipe = validate_recipe(tiny_data, "tiny.toml")
    model = build(recipe, kind, seed=0)
    recording = speech_like(8000) * 10 ** (recipe.audio.level_db / 20) / speech_like(8000).std()
    mel = LogMel(recipe.audio).of_file(recording[None], margin(recipe))
    x = sample(model(told(recipe, mel)), model.base.noise((1, 8000), random_stream(0)))
    assert abs(rms_db(x[0]) - recipe.audio.level_db) < 2
    assert abs(x.mean()) < 0.01


def test_the_bound_of_log_scale_never_stops_the_gradient(tiny: Recipe) -> None:
    model = build(tiny, "teacher", seed=0)
    (flow,) = model.flows
    with torch.no_grad():
        flow.conditioner.head.bias[1] = -20.0
    silence = told(tiny, torch.zeros(1, tiny.audio.n_mels, 1 + 2 * model.margin))
    context, _ = model.context(silence)
    _, log_scale = flow.step_parameters(torch.zeros(1, 8), context)
    assert (log_scale >= tiny.models["teacher"].min_log_scale).all()
    log_scale.sum().backward()
    assert flow.conditioner.head.bias.grad[1] > 0


def test_the_predictor_of_f0_leaves_the_density_s_steps_alone(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its loss: the gradients are clipped apart, and it has no say in which weights are kept."""
    train("a", steps=3)
    loss = PitchPredictor.loss
    monkeypatch.setattr(PitchPredictor, "loss", lambda *args: 1000 * loss(*args))
    outcome = train("b", steps=3)
    (a, first), (b, second) = (checkpoint.load(saved_states(tmp_path / name)[0]) for name in ("a", "b"))
    assert first["best"][1] == second["best"][1] == outcome.valid["nll"]
    for name, value in a.items():
        assert torch.equal(value, b[name]) or ".pitch." in name or name.startswith("optimizer."), name


def test_weights_that_are_given_stay_as_they_are(tmp_path: Path, train: Train) -> None:
    """As a student's predictor of F0, which is the teacher's."""
    train("teacher", steps=3)
    given = {name: value for name, value in weights(tmp_path / "teacher").items() if name.startswith("pitch.")}
    assert given
    train("student", steps=6, given=given)
    found = weights(tmp_path / "student")
    assert all(torch.equal(found[name], value) for name, value in given.items())


def test_spectral_terms_weigh_more_in_the_last_quarter_of_a_distillation(tiny: Recipe) -> None:
    loss = DistillationLoss(spectral=0.6, log_mel=0.2, drawn_log_mel=0.1, late=4, contrastive=0.05)
    changed = tiny.training["student"].model_copy(update={"loss": loss, "steps": 80})
    recipe = tiny.model_copy(update={"training": {**tiny.training, "student": changed}})
    task = distillation_task(recipe, "student", build(recipe, "teacher", 0), torch.device("cpu"))
    density, *_ = players(task, build(recipe, "student", 0))
    early = {"kl": 1, "log_scale": 0, "x_reconstruction": 0, "z_reconstruction": 0, "contrastive": 0.05}
    late = {**early, "spectral": 2.4, "log_mel": 0.8, "drawn_log_mel": 0.4}
    early |= {"spectral": 0.6, "log_mel": 0.2, "drawn_log_mel": 0.1}
    assert [density.weights(step) for step in (0, 59, 60, 79)] == [pytest.approx(early)] * 2 + [pytest.approx(late)] * 2


def test_late_factors_hold_in_the_steps_and_choose_the_model_to_keep(tmp_path: Path, tiny: Recipe) -> None:
    manifest = corpus(tmp_path / "audio", tiny, [40])
    plain = likelihood_task(tiny, "teacher")
    task = plain._replace(
        factors={"nll": 3.0}, settings=plain.settings.model_copy(update={"steps": 100, "grad_clip": 1e9})
    )
    segments = Segments(manifest, tmp_path / "audio", "train", frames=20, margin=margin(tiny))
    norms = []
    for step in (74, 75):
        streams = [random_stream(0)]
        learner = Learner(task, tiny, launch(torch.device("cpu")))
        norms.append(learner.step([(segments.draw(streams), streams)], step)[1])
    assert norms[1] == pytest.approx(3 * norms[0], rel=1e-3)
    state = State(learner, "")
    state.keep_best({"nll": 2.0}, task, tiny, HEARD, tmp_path)
    assert state.best_objective == 6


def test_each_player_follows_its_own_schedule_and_clipping(tmp_path: Path, tiny: Recipe) -> None:
    """A task's own players: one whose gradient is clipped to next to nothing, and one that stands still."""
    manifest = corpus(tmp_path / "audio", tiny, [40])

    def own(task: Task, model: WaveformModel) -> list[Player]:
        assert model.pitch is not None
        density = [*model.encoder.parameters(), *model.flows.parameters()]
        return [
            Player("density", density, lambda step: task.weights, lambda step: 1e-3, 1e-6),
            Player("predictor", list(model.pitch.parameters()), lambda step: {"pitch": 1.0}, lambda step: 0.0, 1.0),
        ]

    task = likelihood_task(tiny, "teacher")._replace(players=own)
    segments = Segments(manifest, tmp_path / "audio", "train", frames=20, margin=margin(tiny))
    streams = [random_stream(0)]
    learner = Learner(task, tiny, launch(torch.device("cpu")))
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    learner.step([(segments.draw(streams), streams)], 0)
    moved = {name.split(".")[0] for name, value in learner.model.state_dict().items() if not value.equal(before[name])}
    assert moved == {"flows"}, "the head starts at zero, so that nothing before it has a gradient yet"
    norms = [float(nn.utils.get_total_norm([p.grad for p in player.parameters])) for player in learner.players]
    assert norms[0] <= 1.01e-6 < 1e-3 < norms[1]
