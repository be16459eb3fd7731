"""Which clips a model is trained on, and which it is validated and tested on."""

import hashlib
import re

from wavedistill.corpus.clips import Clip
from wavedistill.corpus.utterances import Split
from wavedistill.recipe.recipe import Recipe
from wavedistill.tools.errors import CorpusError


def splits(clips: list[Clip], recipe: Recipe) -> dict[str, Split]:
    """The split of each clip, as shares of the duration: no group of recordings is in two.

    A group is one recording, or all that `prepare.together` says; with fewer than three recordings, one clip. Test
    takes, and then valid, the groups that fit into its share, or the shortest if none does, and leaves some.

    Raises:
        CorpusError: if `prepare.together` makes fewer than three groups.
    """
    settings = recipe.prepare
    group = {clip.name: _group(clip.source, settings.together) for clip in clips}
    if (count := len(set(group.values()))) < 3:
        if settings.together:
            raise CorpusError(
                f"prepare.together = {settings.together!r} leaves {count} groups of recordings, and 3 are needed, one "
                "each to train, validate and test: change it, or remove it"
            )
        group = {clip.name: clip.name for clip in clips}
    frames: dict[str, int] = dict.fromkeys(group.values(), 0)
    for clip in clips:
        frames[group[clip.name]] += clip.frames
    # Ranked by a hash, so that the order of files says nothing about their split.
    rest = sorted(frames, key=lambda g: hashlib.sha256(f"{recipe.seed} {g}".encode()).digest())
    part: dict[str, Split] = dict.fromkeys(rest, "train")
    shares: list[tuple[Split, float, int]] = [
        ("test", settings.test_fraction, 2),
        ("valid", settings.valid_fraction, 1),
    ]
    for split, fraction, left in shares:
        budget = fraction * sum(frames.values()) + 1e-6
        taken: list[str] = []
        for g in rest:
            if frames[g] <= budget and len(rest) - len(taken) > left:
                taken.append(g)
                budget -= frames[g]
        taken = taken or [min(rest, key=frames.__getitem__)]
        rest = [g for g in rest if g not in taken]
        part.update(dict.fromkeys(taken, split))
    return {name: part[g] for name, g in group.items()}


def _group(source: str, together: str | None) -> str:
    """What a recording belongs to: what a pattern finds in its name, or its first group; else the name itself."""
    found = re.search(together, source) if together else None
    return source if found is None else (found[1] if found.re.groups else found[0]) or source
