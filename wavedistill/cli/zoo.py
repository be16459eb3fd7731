"""The command that shows what can be distilled: families of densities, each on a page with its student."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from wavedistill.tools.errors import UserError

PACKAGES = ("zuko", "sklearn")
"""Of the extra."""


def zoo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where `index.html` and `zoo.json` go.")] = (
        Path("zoo")
    ),
    family: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A family, `glow` for instance; repeatable; all by default."),
    ] = None,
    density: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A density, `spirals` for instance; repeatable; three a family by default."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every family on every density: about a quarter of an hour.")] = (
        False
    ),
    steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="Steps of each fit and each distillation of a cheap family.")
    ] = 500,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same figures.")] = 0,
) -> None:
    """Fit every family of normalizing flows, distil each into an inverse autoregressive flow, and show both.

    The densities are eight of the plane and a small table of measurements; the distillation is that of speech. It is
    work of some minutes for two processors, and needs `pip install 'wavedistill[zoo]'`.

    Examples:

    - `wavedistill zoo`, then open `zoo/index.html`
    - `wavedistill zoo --family glow --density spirals --steps 3000`
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(f"zoo: {' and '.join(missing)} not installed; pip install 'wavedistill[zoo]'")
    from wavedistill.zoo.families import FAMILIES
    from wavedistill.zoo.run import chosen, run
    from wavedistill.zoo.targets import TARGETS

    for option, named, known in (("--family", family, FAMILIES), ("--density", density, TARGETS)):
        for name in named or []:
            if name not in known:
                raise typer.BadParameter(f"{option} {name}: there are {', '.join(known)}")
    if every and density:
        raise typer.BadParameter("--all: is every density; leave out --density")
    typer.echo(run(chosen(family or [], density or [], seed, steps, every=every), out))
