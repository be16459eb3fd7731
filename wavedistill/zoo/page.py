"""The zoo's page: its pictures, its words, and the template filled in."""

import base64
import io
import statistics
from collections.abc import Sequence
from importlib import resources
from itertools import groupby
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.image import imsave

from wavedistill import __version__
from wavedistill.reporting.page import templates
from wavedistill.zoo.families import FAMILIES
from wavedistill.zoo.fit import MISSED
from wavedistill.zoo.targets import TARGETS

EXTENT = 3.2
"""Half the width of a picture."""
PIXELS, FEW_PIXELS, FEW = 72, 36, 6000
"""Of a picture's side, and what counts as few points."""
BRIGHTEST = 0.995
"""Share of the pixels that are not white."""
FEWEST = 100.0
"""Nats above which a student's negative log-likelihood says only that it has missed something."""


def picture(points: np.ndarray) -> bytes:
    """The first two of the values of points (N, D), counted in squares, as a WebP image."""
    pixels = PIXELS if len(points) >= FEW else FEW_PIXELS
    counts, _, _ = np.histogram2d(points[:, 1], points[:, 0], bins=pixels, range=[[-EXTENT, EXTENT]] * 2)
    shown = matplotlib.colormaps["magma"](np.clip(counts / max(1.0, np.quantile(counts, BRIGHTEST)), 0, 1))
    large = np.kron((255 * shown[..., :3]).astype(np.uint8), np.ones((2 * PIXELS // pixels,) * 2 + (1,), np.uint8))
    content = io.BytesIO()
    imsave(content, np.ascontiguousarray(large), origin="lower", format="webp", pil_kwargs={"quality": 60})
    return content.getvalue()


def render(about: dict[str, Any], found: Sequence[tuple[dict[str, Any], Sequence[bytes]]]) -> str:
    """The page of pairs that are done.

    Args:
        about: the run: machine, seconds, processes, seed, and how many pairs were asked for.
        found: of each pair its figures, and the pictures of the density, the teacher and the student.
    """
    own = resources.files("wavedistill.zoo") / "templates" / "zoo.html.j2"
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({**templates(), "zoo.html.j2": own.read_text(encoding="utf-8")}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    pairs = [
        {**figures, "pictures": dict(zip(("density", "teacher", "student"), pictures, strict=True))}
        for figures, pictures in found
    ]
    groups = [
        (group, [(name, list(of)) for name, of in groupby(members, lambda pair: pair["family"])])
        for group, members in groupby(pairs, lambda pair: FAMILIES[pair["family"]].group)
    ]
    kls = [pair["kl"] for pair in pairs]
    return environment.get_template("zoo.html.j2").render(
        about=about,
        version=__version__,
        families=FAMILIES,
        targets=TARGETS,
        groups=groups,
        pairs=pairs,
        columns=[name for name in TARGETS if any(pair["target"] == name for pair in pairs)],
        median=statistics.median(kls),
        worst=sorted(pairs, key=lambda pair: -pair["kl"])[:2],
        fewest=FEWEST,
        missed=MISSED,
    )
