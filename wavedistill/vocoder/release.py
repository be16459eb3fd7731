"""A trained model made ready for others: small, and with a card that says what it is worth on voices it never heard."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from wavedistill import __version__
from wavedistill.corpus import recordings
from wavedistill.corpus.sources import sources
from wavedistill.evaluation.excerpts import Excerpt
from wavedistill.evaluation.scoring import Scoring
from wavedistill.evaluation.systems import SourceFilter, consistent, synthesise
from wavedistill.evaluation.verdict import Scores, mean
from wavedistill.models.checkpoint import Checkpoint, load_model, save_model
from wavedistill.recipe.recipe import Recipe
from wavedistill.recipe.sections import FolderCorpus
from wavedistill.speech import audio
from wavedistill.tools.errors import AudioError, UserError
from wavedistill.tools.files import replacing, shown
from wavedistill.tools.machine import machine

COLUMNS = {
    "pesq_wb": ("PESQ-wb", "{:.2f}"),
    "stoi": ("STOI", "{:.3f}"),
    "mcd_db": ("MCD, dB", "{:.2f}"),
    "f0_rmse_cents": ("F0 error, cents", "{:.0f}"),
    "periodicity": ("periodicity", "{:.3f}"),
    "aperiodicity_db": ("aperiodicity error, dB", "{:.1f}"),
    "aperiodicity_bias_db": ("its bias, dB", "{:+.1f}"),
}
"""Scores of the card: their headings, and how they are written."""
SYSTEMS = {
    "recorded": "recorded",
    "griffin_lim": "Griffin-Lim, no model",
    "source_filter": "pulses and noise, no model",
    "whisper": "noise through linear prediction",
}


def release(path: Path, out: Path, speakers: Mapping[str, Path]) -> str:
    """Write a checkpoint's weights at half precision and a card, `CARD.md`, beside them; returns a line of result.

    Args:
        path: of the checkpoint.
        out: of the checkpoint to write; the card goes beside it.
        speakers: folders of recordings that the model never heard, by the names of who speaks; at most
            `evaluate.clips` of each are scored, cut to `evaluate.max_seconds`.

    Raises:
        CheckpointError: if there is none at the path.
        UserError: if a folder holds too little speech, or the checkpoint is no parallel model.
    """
    whole = load_model(path)
    if not whole.model.draws_in_parallel:
        raise UserError(f"{path}: draws sample by sample; release the student that is distilled from it")
    clips = {name: _clips(folder, whole.recipe) for name, folder in speakers.items()}
    weights = whole.model.state_dict()
    halved = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_model(out, whole.name, whole.recipe, whole.step, whole.heard, halved)
    small = load_model(out)
    tables = {name: _scores(whole, small, heard) for name, heard in clips.items()}
    with replacing(out.with_name("CARD.md")) as file:
        file.write(_card(small, out, clips, tables).encode())
    return f"{out}: {out.stat().st_size / 1e6:.2f} MB, and its card"


def _clips(folder: Path, recipe: Recipe) -> list[Excerpt]:
    """Clips of a folder's recordings, as training has them: trimmed, levelled, whole hops."""
    limit = int(recipe.evaluate.max_seconds * recipe.audio.sample_rate)
    clips = []
    for source in sources(FolderCorpus(kind="folder", path=str(folder), limit=recipe.evaluate.clips)):
        samples = source.read(recipe.audio.sample_rate)
        pieces, gain = recordings.speech(samples, recipe)
        clip = torch.cat([samples[piece] for piece in pieces]) * gain
        clip = clip[: limit // recipe.audio.hop_length * recipe.audio.hop_length]
        if len(clip) < recipe.audio.sample_rate:
            raise AudioError(f"{shown(folder)}: {source.origin}: holds less than a second of speech: remove it")
        clips.append(Excerpt.of(audio.pad_to_hops(clip, recipe.audio.hop_length), recipe.audio))
    return clips


def _scores(whole: Checkpoint, small: Checkpoint, clips: Sequence[Excerpt]) -> dict[str, tuple[Scores, Scores]]:
    """Mean scores of each system, as drawn and after the recipe's passes."""
    recipe, name = whole.recipe, whole.name
    # The baseline's one setting is chosen on the very clips, to its advantage.
    baseline = SourceFilter(recipe, {name: whole.model}, clips)
    models = {name: small.model, f"{name}, full precision": whole.model}
    systems = synthesise(recipe, models, baseline, clips, torch.device("cpu"))
    drawn = {**{each: systems[each] for each in models}, **systems}
    after = {key: waves if key == "recorded" else consistent(recipe, waves, clips) for key, waves in drawn.items()}
    scored = Scoring(recipe, clips, None)
    first, last = scored(drawn, "scores as drawn"), scored(after, "scores")
    return {key: (mean(first[key]), mean(last[key])) for key in drawn}


def _card(
    model: Checkpoint,
    path: Path,
    clips: Mapping[str, Sequence[Excerpt]],
    tables: Mapping[str, Mapping[str, tuple[Scores, Scores]]],
) -> str:
    recipe, units, heard = model.recipe, model.recipe.audio, model.heard
    count = sum(weight.numel() for weight in model.model.parameters())
    where = machine(torch.device("cpu"))
    computer = f"{where['cpu_count']} cores of {where['cpu']}, torch {where['torch']}, {where['date']}"
    lines = [
        f"# {path.name}",
        "",
        f"The {model.name} of the recipe `{recipe.name}`, after {model.step:,} steps: {count / 1e6:.2f} million "
        f"weights at half precision, {path.stat().st_size / 1e6:.2f} MB, {model.model.flops_per_sample / 1e6:.3f} "
        f"MFLOP a sample. It draws speech at {units.sample_rate} Hz in one pass, from {units.n_mels} mel bands of "
        f"{units.f_min:g} to {units.f_max:g} Hz every {units.hop_length} samples (windows of {units.n_fft}), and takes "
        f"{recipe.consistency.passes} passes of mel consistency after it.",
        "",
        f"**Licence and attribution.** {recipe.corpus.licence or 'None was given.'}",
        "",
        *([f"Nine of ten voiced frames of its training lie between {heard.f0_low:.0f} and {heard.f0_high:.0f} Hz.", ""]
          if heard.f0_low and heard.f0_high else []),
    ]  # fmt: skip
    for speaker, table in tables.items():
        seconds = sum(len(clip.audio) for clip in clips[speaker]) / units.sample_rate
        lines += [
            f"## A voice that it never heard: {speaker}",
            "",
            f"{len(clips[speaker])} clips, {seconds:.0f} s, from the log-mel alone; scores after "
            f"{recipe.consistency.passes} passes for every system, and PESQ-wb as drawn before them. Periodicity is a "
            "share of the recordings'. That of pulses and noise had its one setting chosen on these very clips.",
            "",
            "| | PESQ-wb as drawn | " + " | ".join(heading for heading, _ in COLUMNS.values()) + " |",
            "|---|" + "---|" * (1 + len(COLUMNS)),
        ]
        own = table["recorded"][1]["periodicity"] or 1
        lines += [_row(system, *both, own) for system, both in table.items()]
        lines.append("")
    lines += [
        f"Measured by `wavedistill release` {__version__}: {computer}.",
        "",
    ]
    return "\n".join(lines)


def _row(system: str, drawn: Scores, after: Scores, periodicity: float) -> str:
    def text(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    shown_after: dict[str, Any] = {**after, "periodicity": (after["periodicity"] or 0) / periodicity}
    values = [text(drawn["pesq_wb"], "{:.2f}"), *(text(shown_after[k], form) for k, (_, form) in COLUMNS.items())]
    return f"| {SYSTEMS.get(system, f'**{system}**')} | " + " | ".join(values) + " |"
