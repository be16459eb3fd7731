"""What a model's scores are worth: beside those of systems without training, and against the gates of a recipe."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from wavedistill.recipe.sections import Gates

Scores = dict[str, float | None]
"""Of one clip, or of a system: by name, None where there is nothing to measure."""
UNTRAINED = ("griffin_lim", "source_filter", "whisper")
"""Systems that need no training: what a user has for nothing."""


class Score(NamedTuple):
    """How a score reads, and whether more of it is better (1) or less (-1)."""

    label: str
    digits: int
    unit: str
    sign: int


COMPARED = {
    "pesq_wb": Score("PESQ-wb", 2, "", 1),
    "stoi": Score("STOI", 3, "", 1),
    "mcd_db": Score("MCD", 2, " dB", -1),
}
"""Scores in which a model is to be better than systems without training."""


def mean(scores: list[Scores]) -> Scores:
    """Mean of each score over the clips that have it; None where none has."""
    means: Scores = {}
    for name in scores[0]:
        values = [value for score in scores if (value := score[name]) is not None]
        means[name] = sum(values) / len(values) if values else None
    return means


def against_untrained(synthesis: Mapping[str, Scores], system: str) -> dict[str, dict[str, Any]]:
    """A system's scores beside those of the best that needs no training, for each score that both have.

    `gain` is how much better the system is: positive where it is better, in the score's own unit.
    """
    found = {}
    for name, (_, _, _, sign) in COMPARED.items():
        own = synthesis[system][name]
        others = {o: value for o in UNTRAINED if o in synthesis and (value := synthesis[o][name]) is not None}
        if own is None or not others:
            continue
        best = max(others, key=lambda other: sign * others[other])
        found[name] = {"own": own, "best": others[best], "system": best, "gain": sign * (own - others[best])}
    return found


def in_words(compared: Mapping[str, Mapping[str, Any]]) -> str:
    """The comparison of `against_untrained` in words."""
    parts = []
    for name, found in compared.items():
        label, digits, unit, _ = COMPARED[name]
        verdict = "better than" if found["gain"] > 0 else "worse than"
        by = f"{abs(found['gain']):.{digits}f}{unit}"
        parts.append(f"{label} {found['own']:.{digits}f}{unit} ({by} {verdict} {found['system']})")
    return ", ".join(parts) or "no score to compare with a system without training"


def gates(
    drawn: list[Scores], recorded: list[Scores], compared: Mapping[str, Mapping[str, Any]], thresholds: Gates
) -> dict[str, dict[str, Any]]:
    """What a model's speech must not fall short of: the value, its threshold, and whether it passed.

    `level_db`, `tilt_db`, `aperiodicity_db` and `aperiodicity_bias_db` are means over clips of a difference's
    magnitude, with a largest value; `vuv_f1`, `periodicity` as a share of the recordings' own, and `better_scores`,
    the number of scores in which the model is better than every system without training, have a least one. What could
    not be measured, for instance in silence, has not passed.
    """

    def magnitude(name: str) -> float | None:
        return mean([{name: None if (value := clip[name]) is None else abs(value)} for clip in drawn])[name]

    means, given = mean(drawn), mean(recorded)["periodicity"]
    share = means["periodicity"] / given if means["periodicity"] is not None and given else None
    better = sum(score["gain"] > 0 for score in compared.values())
    least = {"vuv_f1": means["vuv_f1"], "periodicity": share, "better_scores": better}
    most = {
        "level_db": magnitude("level_difference_db"),
        "tilt_db": magnitude("tilt_difference_db"),
        "aperiodicity_db": means["aperiodicity_db"],
        "aperiodicity_bias_db": magnitude("aperiodicity_bias_db"),
    }
    found = {}
    for name, value in {**most, **least}.items():
        threshold = getattr(thresholds, name)
        passed = value is not None and (value <= threshold if name in most else value >= threshold)
        found[name] = {"value": value, "threshold": threshold, "passed": passed}
    return found
