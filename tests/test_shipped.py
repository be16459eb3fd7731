"""The voice that comes with the package."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

import wavedistill
from tests.conftest import REPOSITORY
from wavedistill.cli.commands import app
from wavedistill.corpus import recordings
from wavedistill.evaluation.systems import griffin_lim
from wavedistill.vocoder.vocoder import SHIPPED

CARD = SHIPPED.with_name("CARD.md").read_text(encoding="utf-8")


def test_it_is_small_and_says_whom_to_name_and_what_it_is_worth_on_strangers() -> None:
    assert SHIPPED.stat().st_size < 1_500_000
    licence = wavedistill.load().recipe.corpus.licence
    assert licence
    for name in ("Shmyrev", "LJSpeech", "SVOX Pico"):
        assert name in licence
        assert name in CARD
    assert CARD.count("A voice that it never heard: ") == 2


def test_clips_to_hear_are_few_short_and_alike() -> None:
    clips = sorted((REPOSITORY / "docs" / "clips").iterdir())
    assert [clip.name for clip in clips] == ["griffin_lim.flac", "recorded.flac", "student.flac"]
    assert sum(clip.stat().st_size for clip in clips) < 300_000
    sounds = [soundfile.read(clip) for clip in clips]
    assert len({(len(samples), rate) for samples, rate in sounds}) == 1
    powers = [float(np.square(samples).mean()) for samples, _ in sounds]
    assert max(powers) < 2 * min(powers)


def test_it_speaks_where_no_other_is_named(tmp_path: Path) -> None:
    clip = REPOSITORY / "docs" / "clips" / "recorded.flac"
    done = CliRunner().invoke(app, ["generate", str(clip), "-o", str(tmp_path), "--threads", "1"])
    assert done.exit_code == 0, done.output
    voice = wavedistill.load()
    wave, rate = soundfile.read(tmp_path / "recorded.wav", dtype="float32")
    assert rate == voice.sample_rate
    mel, again = (voice.log_mel(torch.from_numpy(x)) for x in (soundfile.read(clip, dtype="float32")[0], wave))
    assert (mel - again).abs().mean() < 0.2, "nats"
    # Speech, not a whisper: as periodic as the recording is, where that is voiced.
    from wavedistill.evaluation.metrics import periodicity

    recorded = recordings.read(clip, rate)
    length = min(len(recorded), len(wave))
    pair = recorded[:length], torch.from_numpy(wave)[:length]
    ours, theirs = periodicity(*pair, voice.recipe.audio), periodicity(pair[0], pair[0], voice.recipe.audio)
    assert ours is not None
    assert theirs is not None
    assert ours > 0.8 * theirs


def test_it_is_better_than_griffin_lim() -> None:
    """On a stranger, at the very least: a damaged voice is not."""
    pystoi = pytest.importorskip("pystoi")
    voice = wavedistill.load()
    clip = recordings.read(REPOSITORY / "docs" / "clips" / "recorded.flac", voice.sample_rate)
    mel = voice.log_mel(clip)
    scores = [
        pystoi.stoi(clip.numpy(), wave[: len(clip)].numpy(), voice.sample_rate)
        for wave in (voice.vocode(mel), griffin_lim(mel, voice.recipe.audio))
    ]
    assert scores[0] > scores[1]
