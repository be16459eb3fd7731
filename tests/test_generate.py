"""Waveforms from a checkpoint: which files are drawn, at which level, into what; and through a pipe."""

import json
import os
import select
import subprocess
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tests.conftest import HEARD, REPOSITORY, speech_like
from wavedistill.cli import main
from wavedistill.cli.generate import _level_told
from wavedistill.corpus import pipes, recordings
from wavedistill.flows.bases import StandardNormal
from wavedistill.models.checkpoint import save_model
from wavedistill.models.kinds import build
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech.audio import LogMel, comment_of, rms_db, to_pcm16
from wavedistill.vocoder import jobs, vocoder
from wavedistill.vocoder.contract import contract, in_words
from wavedistill.vocoder.vocoder import load

RATE = 16000
HANGS_SECONDS = 100
Run = subprocess.CompletedProcess[str]


@pytest.fixture
def student(tmp_path: Path, tiny: Recipe) -> Path:
    """The file of an untrained student: noise of the level and the envelope of what it is given."""
    path = tmp_path / "checkpoint.safetensors"
    save_model(path, "student", tiny, 1, HEARD, build(tiny, "student", 0).state_dict())
    return path


@pytest.fixture
def voice(tmp_path: Path) -> Path:
    """A folder with recordings, and a log-mel further down."""
    folder = tmp_path / "voice"
    (folder / "deeper").mkdir(parents=True)
    for name in ("a.wav", "b.flac", "deeper/a.ogg"):
        soundfile.write(folder / name, speech_like(4000).numpy(), RATE)
    np.save(folder / "deeper" / "m.npy", np.full((40, 12), -5.0, np.float32))
    (folder / "words.txt").write_text("no sound")
    return folder


def generate(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Run:
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["wavedistill", "generate", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
    said, code = capsys.readouterr(), ended.value.code
    return Run(sys.argv, code if isinstance(code, int) else 0, said.out, said.err)


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def rms(wave: np.ndarray) -> float:
    return float(np.sqrt(np.square(wave).mean()))


def test_a_waveform_is_as_loud_as_the_recording_it_is_made_from(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model works at the level of the training; its gain is undone."""
    inputs = {"loud": 4.0, "soft": 0.1}
    for name, gain in inputs.items():
        soundfile.write(tmp_path / f"{name}.wav", gain * speech_like(16000).numpy(), RATE, subtype="FLOAT")
    generate(capsys, student, *(tmp_path / f"{name}.wav" for name in inputs), "--out", tmp_path / "out")
    for name, gain in inputs.items():
        found = rms(soundfile.read(tmp_path / "out" / f"{name}.wav")[0])
        assert found == pytest.approx(gain * rms(speech_like(16000).numpy()), rel=0.3)


def test_a_log_mel_is_drawn_at_its_own_level(
    student: Path, tmp_path: Path, tiny: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = 0.5 * speech_like(16000)
    np.save(tmp_path / "mel.npy", LogMel(tiny.audio).of_file(sound[None])[0].numpy())
    generate(capsys, student, tmp_path / "mel.npy", "-o", tmp_path)
    assert rms(soundfile.read(tmp_path / "mel.wav")[0]) == pytest.approx(rms(sound.numpy()), rel=0.3)


def test_folders_patterns_and_lists_stand_for_the_files_in_them(
    student: Path, voice: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What lies below a folder goes below the output folder alike, and the output is no input."""
    out, every = voice / "out", ["a.wav", "b.wav", "deeper/a.wav", "deeper/m.wav"]
    done = generate(capsys, student, voice, "-o", out)
    assert done.returncode == 0, done.stderr
    assert written(out) == every
    assert [job.target.name for job in jobs.found([str(voice)], out)] == ["a.wav", "b.wav", "a.wav", "m.wav"]
    listing = tmp_path / "list.txt"
    listing.write_text(f"{voice}/a.wav\n\n{voice}/deeper/m.npy\n")
    assert generate(capsys, student, "--list", listing, "-o", tmp_path / "listed").returncode == 0
    assert written(tmp_path / "listed") == ["a.wav", "m.wav"]
    found = jobs.found([f"{voice}/*.[wf]*", f"{voice}/a.wav"], tmp_path)
    assert [job.source.name for job in found] == ["a.wav", "b.flac"], "each once"
    (voice / "a[1].wav").write_bytes((voice / "a.wav").read_bytes())
    assert [job.source.name for job in jobs.found([f"{voice}/a[1].wav"], out)] == ["a[1].wav"], "a name, no pattern"


def test_what_was_made_of_the_same_is_not_made_again(
    student: Path, voice: Path, tmp_path: Path, tiny: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same input, settings and checkpoint; another's file is not replaced, unless that is asked for."""
    out, given = tmp_path / "out", (student, voice / "a.wav", "-o", tmp_path / "out")
    target = out / "a.wav"
    assert generate(capsys, *given).stdout == f"{target}: 0.25 s\n"
    before = target.read_bytes()
    assert (comment_of(target) or "").startswith(jobs.OURS)
    assert soundfile.info(target).frames == 4000
    assert before[36:44] == b"data" + (2 * 4000).to_bytes(4, "little"), "players find sound where they expect it"
    assert generate(capsys, *given).stdout == f"{target}: unchanged\n"
    for changed in (["--seed", "1"], ["--temperature", "0.5"], ["--passes", "0"]):
        assert generate(capsys, *given, *changed).stdout == f"{target}: 0.25 s\n", changed
    assert generate(capsys, *given).stdout == f"{target}: 0.25 s\n"
    assert target.read_bytes() == before
    soundfile.write(voice / "a.wav", speech_like(4000, 1).numpy(), RATE)
    assert generate(capsys, *given).stdout == f"{target}: 0.25 s\n"
    save_model(student, "student", tiny, 2, HEARD, build(tiny, "student", 0).state_dict())
    assert generate(capsys, *given).stdout == f"{target}: 0.25 s\n"
    soundfile.write(target, speech_like(400).numpy(), RATE)
    refused = generate(capsys, *given)
    assert refused.returncode == 1
    assert "is there already, and not by `generate`" in refused.stderr
    assert soundfile.info(target).frames == 400
    assert generate(capsys, *given, "--overwrite").stdout == f"{target}: 0.25 s\n"


def test_a_full_disk_leaves_what_was_finished(
    student: Path, voice: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "b.wav.partial").symlink_to("/dev/full")
    done = generate(capsys, student, voice / "a.wav", voice / "b.flac", "-o", out)
    assert done.returncode == 1
    assert f"{out}/b.wav: cannot be written: no space left on device; make room" in done.stderr
    assert written(out)[0] == "a.wav"
    (out / "b.wav.partial").unlink()
    again = generate(capsys, student, voice / "a.wav", voice / "b.flac", "-o", out)
    assert again.stdout.splitlines() == [f"{out}/a.wav: unchanged", f"{out}/b.wav: 0.25 s"]


USAGE = {
    "no input": ([], "give an INPUT, or --list"),
    "no such format": (["m.npy", "--mel-format", "nepers"], "'nepers' is not one of"),
    "a reference of none": (["m.npy", "--mel-format", "log10", "--mel-ref-db", "20"], "--mel-ref-db: goes with"),
    "a reference alone": (["m.npy", "--mel-ref-db", "20"], "--mel-ref-db: goes with --mel-format"),
    "two into a pipe": (["a.wav", "-"], "is for one INPUT alone"),
    "a pipe into a folder": (["-"], "INPUT -: goes to standard output"),
    "raw files": (["a.wav", "--raw"], "--raw: is for -"),
    "gain of a file": (["a.wav", "--gain-db", "3"], "--gain-db: is for -"),
}


@pytest.mark.parametrize("name", USAGE)
def test_what_does_not_go_together_is_a_mistake_of_usage(
    student: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = USAGE[name]
    done = generate(capsys, student, *words, "-o", tmp_path / "out")
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", "").split()), done.stderr


def test_a_pipe_wants_a_model_that_draws_in_parallel(
    tmp_path: Path, tiny: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_model(path, "teacher", tiny, 1, HEARD, build(tiny, "teacher", 0).state_dict())
    done = generate(capsys, path, "-", "-o", "-")
    assert done.returncode == 2
    assert "INPUT -: is for parallel models" in " ".join(done.stderr.replace("│", "").split())


def test_formats_are_given_on_the_command_line(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Decibels over a reference, normalised, are drawn as the natural logarithms that they stand for."""
    mel = np.linspace(-8, -2, 480).reshape(40, 12)
    np.save(tmp_path / "a.npy", mel)
    np.save(tmp_path / "b.npy", (mel * 20 / np.log(10) - 20 - 3) / 2)
    np.savez(tmp_path / "stats.npz", mean=np.full(40, 3), scale=np.full(40, 2))
    out, stats = tmp_path / "out", ("--mel-stats", tmp_path / "stats.npz")
    generate(capsys, student, tmp_path / "a.npy", "-o", out)
    done = generate(capsys, student, tmp_path / "b.npy", "-o", out, "--mel-format", "db", "--mel-ref-db", "20", *stats)
    assert done.returncode == 0, done.stderr
    a, b = (soundfile.read(out / name, dtype="int16")[0].astype(int) for name in ("a.wav", "b.wav"))
    assert a.any()
    assert np.abs(a - b).max() <= 1


def test_a_checkpoint_is_shown(
    student: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["wavedistill", "info", str(student), *words])
        with pytest.raises(SystemExit):
            main()
        said = capsys.readouterr().out
        if words:
            assert json.loads(said) == json.loads(json.dumps(contract(student)))
        else:
            assert said == in_words(contract(student)) + "\n"


def test_a_long_input_shows_what_is_left_of_it(
    student: Path, voice: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocoder, "PATIENCE_SECONDS", 0)
    vocoder.load(student).of_file(voice / "a.wav")
    assert "a.wav:   0%" in capsys.readouterr().err


# Through a pipe.


@pytest.mark.parametrize("block", [37, 1600, 100_000])
def test_a_stream_is_one_pass_over_the_same_sound(student: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of any length; the end is filled up to a whole hop."""
    voice = load(student)
    for module in (voice.model, voice.consistency, voice._log_mel):
        module.double()
    draw = StandardNormal.noise
    monkeypatch.setattr(StandardNormal, "noise", lambda *given: draw(*given).double())
    sound = speech_like(9_950).double()
    mel = voice.log_mel(0.5 * sound)
    with torch.inference_mode():
        drawn, _ = voice.given(mel).rsample_and_log_prob(voice._noise(3, 0.7)(10_000))
        expected = 2 * voice.consistency(drawn, mel[None])[0]
    found = torch.cat(list(voice.stream(sound.split(block), 3, 0.7, gain=0.5)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def command(student: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "wavedistill", "generate", str(student), *words, "--device", "cpu", "--threads", "1"]


def test_first_samples_come_before_half_a_second_more_is_known(student: Path) -> None:
    """Than the look-ahead that is said; the rest when the input ends. All is as it would be at once."""
    sound = to_pcm16(speech_like(2 * RATE)).tobytes()
    voice = load(student)
    known = 2 * (voice.latency + RATE // 2)
    assert known < len(sound)
    words = command(student, "-", "-o", "-", "--raw", "--seed", "5")
    with subprocess.Popen(
        words, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write(sound[:known])
        process.stdin.flush()
        if not select.select([process.stdout], [], [], HANGS_SECONDS)[0]:
            process.kill()
        first = process.stdout.read(2)
        assert first, "nothing comes before the input ends"
        process.stdin.write(sound[known:])
        process.stdin.close()
        whole = first + process.stdout.read()
        assert process.wait() == 0, process.stderr.read()
    pieces = pipes.read_raw(_Bytes(sound), RATE)
    expected = torch.cat(list(voice.stream(pieces, 5)))
    assert np.abs(np.frombuffer(whole, "<i2").astype(int) - to_pcm16(expected)).max() <= 1


class _Bytes:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def read(self, count: int) -> bytes:
        found, self.content = self.content[:count], self.content[count:]
        return found


def piped(given: bytes, folder: Path, *words: str | Path, out: Path | None = None) -> tuple[int, bytes, str]:
    """Exit code, output and messages of a command that is given bytes; in this process, because a new one is slow."""
    out = out or folder / "stdout"
    (folder / "stdin").write_bytes(given)
    with pytest.MonkeyPatch.context() as patch, (folder / "stdin").open() as source, out.open("w") as sink:
        patch.setattr(sys, "argv", ["wavedistill", "generate", *map(str, words)])
        patch.setattr(sys, "stdin", source)
        patch.setattr(sys, "stdout", sink)
        with redirect_stderr(StringIO()) as said, pytest.raises(SystemExit) as ended:
            main()
    code = ended.value.code
    return code if isinstance(code, int) else 0, b"" if out.is_char_device() else out.read_bytes(), said.getvalue()


def test_a_wav_stream_of_any_rate_comes_out_as_one(student: Path, tmp_path: Path) -> None:
    """What comes out says that its length is unknown, and is read; sound is all that standard output holds."""
    soundfile.write(tmp_path / "a.wav", np.stack([speech_like(22050).numpy()] * 2, 1), 22050)
    code, sound, said = piped((tmp_path / "a.wav").read_bytes(), tmp_path, student, "-", "-o", "-")
    assert code == 0, said
    assert "s behind it" in said
    (tmp_path / "b.wav").write_bytes(sound)
    assert len(recordings.read(tmp_path / "b.wav", RATE)) == RATE
    code, again, said = piped(sound, tmp_path, student, "-", "-o", "-")
    assert (code, len(again)) == (0, len(sound)), said
    code, _, said = piped(b"words", tmp_path, student, "-", "-o", "-")
    assert code == 1
    assert "standard input: not readable as a wav stream" in said


def test_a_pipe_that_is_full_or_that_nobody_reads_ends_in_one_line(student: Path, tmp_path: Path) -> None:
    sound = to_pcm16(speech_like(4 * RATE)).tobytes()
    code, _, said = piped(sound, tmp_path, student, "-", "-o", "-", "--raw", out=Path("/dev/full"))
    assert code == 1
    assert said.splitlines()[-1] == "wavedistill: standard output: cannot be written: no space left on device"
    with subprocess.Popen(
        command(student, "-", "-o", "-", "--raw"),
        **{"cwd": REPOSITORY, **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)},
    ) as process:
        process.stdout.close()
        _, errors = process.communicate(sound)
    assert process.returncode == 1
    assert len(errors.decode().splitlines()) == 1, errors


def test_one_file_goes_to_standard_output_as_it_would_to_a_folder(
    student: Path, voice: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(capsys, student, voice / "a.wav", "-o", tmp_path / "out")
    expected = soundfile.read(tmp_path / "out" / "a.wav", dtype="int16")[0]
    code, sound, _ = piped(b"", tmp_path, student, voice / "a.wav", "-o", "-", "--raw")
    assert code == 0
    np.testing.assert_array_equal(np.frombuffer(sound, "<i2"), expected)
    code, sound, _ = piped(b"", tmp_path, student, voice / "a.wav", "-o", "-")
    np.testing.assert_array_equal(np.frombuffer(sound[44:], "<i2"), expected)


def test_the_level_of_what_comes_is_told_once_where_it_is_far_from_the_training(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(sound: torch.Tensor, gain_db: float) -> str:
        capsys.readouterr()
        pieces = [torch.zeros(0), *sound.split(1600)]  # a resampler's first block may be empty
        given = _level_told(pieces, RATE, -23, 10 ** (gain_db / 20))
        assert torch.equal(torch.cat(list(given)), sound)
        return capsys.readouterr().err

    soft = torch.cat([torch.zeros(RATE), 0.02 * speech_like(8 * RATE)])
    level = rms_db(soft[RATE:])
    assert (
        said(soft, 0)
        == f"its level differs by {level + 23:+.0f} dB from the training's: try --gain-db {-23 - level:.0f}\n"
    )
    assert said(soft, -20 - level) == ""
    assert said(soft[: 3 * RATE], 0) == "", "three seconds above silence are needed"


MEASURE = """
import resource, sys, torch
from wavedistill.vocoder.vocoder import load
voice = load(sys.argv[1], passes=1)
block = 0.1 * torch.randn(1600)
def peak(seconds):
    for _ in voice.stream(block for _ in range(10 * seconds)):
        pass
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak(5)
print(peak(60) - before)
"""


@pytest.mark.slow
def test_memory_of_a_stream_does_not_grow(student: Path) -> None:
    """A minute of float32 samples is 4 MB, and its log-mel, noise and features are many times that."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(student)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4 * 60 * RATE


def test_words_of_a_shell_are_completed() -> None:
    """The shell asks the program, which answers without torch."""
    script = (
        "import sys; from wavedistill.cli import main; sys.argv = ['wavedistill']\n"
        "try: main()\nfinally: print('torch' in sys.modules)"
    )
    asked = {"_WAVEDISTILL_COMPLETE": "complete_bash", "COMP_WORDS": "wavedistill gen", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["generate", "False"], done.stderr
