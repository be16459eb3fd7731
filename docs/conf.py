"""How the documents become a site: `make docs`. Nothing in it asks another server for anything."""

import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from docutils import nodes
from pydantic import BaseModel
from sphinx.application import Sphinx

from wavedistill import __version__

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "wavedistill"
copyright = "the authors of wavedistill; Apache-2.0"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown", ".ipynb": "markdown"}
exclude_patterns = ["_build", "exp"]
html_theme = "furo"
html_title = "wavedistill"
html_copy_source = False
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]
pygments_style, pygments_dark_style = "friendly", "monokai"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# A name in backticks links to what it names, where that is described here, and is code elsewhere.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!wavedistill\.).*"), ("py:class", ".*")]
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "model_config"}
autodoc_typehints_format = "short"
napoleon_use_ivar = True
python_maximum_signature_line_length = 100
suppress_warnings = ["myst.xref_missing.download"]

OUTSIDE = {
    "contributing": ROOT / "CONTRIBUTING.md",
    "changelog": ROOT / "CHANGELOG.md",
    "notebook": ROOT / "recipes" / "NOTES.md",
}
"""Pages whose text stands elsewhere; the file here is what GitHub shows."""
CODE = re.compile(r"\[`(wavedistill[\w.]*):([\w.]+)`\]\([\w./]+\.py\)")
"""A link to what is defined in a module."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
WORD = re.compile(r"(?<!\\operatorname\{)(?<![\\A-Za-z])([A-Za-z]{3,}|KL)(?![A-Za-z])")
"""Several letters of a formula that are one name, and no command of TeX."""
FUNCTION = re.compile(r"<mi>(log|exp|tanh)</mi>(<mo stretchy=\"false\">&#x00028;)?")
BAR = '<mo stretchy="false">&#x0007C;</mo>'


def mathml(tex: str, display: str) -> str:
    """A formula that browsers show without a script; names of functions stand apart from what follows them."""
    found = latex2mathml.converter.convert(WORD.sub(r"\\mathrm{\1}", tex), display=display)

    def apart(match: re.Match[str]) -> str:
        after, bracket = "0" if match[2] else "0.17em", match[2] or ""
        return f'<mo form="prefix" stretchy="false" lspace="0.17em" rspace="{after}">{match[1]}</mo>{bracket}'

    return FUNCTION.sub(apart, found).replace(BAR, BAR.replace(">", ' lspace="0" rspace="0">', 1))


def markdown_of(notebook: str) -> str:
    """A notebook's cells, and what they printed and drew."""
    parts = []
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
        drawn = [output["data"]["image/png"].strip() for output in cell["outputs"] if "data" in output]
        parts += [f"![What the cell draws](data:image/png;base64,{picture})" for picture in drawn]
    return "\n\n".join(parts)


def relocate(text: str, folder: Path, page: Path) -> str:
    """Links of a file in a folder, as they are from a page's folder: to pages, to code, and to other files."""
    pages = {path: HERE / f"{name}.md" for name, path in OUTSIDE.items()}

    def link(match: re.Match[str]) -> str:
        image, label, target, anchor = match.groups()
        path = (folder / target).resolve()
        return f"{image}[{label}]({os.path.relpath(pages.get(path, path), page)}{anchor or ''})"

    return LINK.sub(link, CODE.sub(r"{py:obj}`\1:\2 <\1.\2>`", text))


def read(app: Sphinx, name: str, source: list[str]) -> None:
    """What a page is made of."""
    page = Path(app.env.doc2path(name))
    path = OUTSIDE.get(name, page)
    text = path.read_text(encoding="utf-8")
    source[0] = relocate(markdown_of(text) if path.suffix == ".ipynb" else text, path.parent, page.parent)


def left_out(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Whether a member is not described: constants, and fields, on which the words on their class or the guides are."""
    code = inspect.isclass(obj) or inspect.isroutine(obj) or isinstance(obj, property)
    return None if code else True


def signature(app: Sphinx, what: str, name: str, obj: Any, *rest: Any) -> tuple[str, None] | None:
    """None of its own for a table of a recipe, whose keys follow one by one, and for a protocol."""
    table = inspect.isclass(obj) and (issubclass(obj, BaseModel) or getattr(obj, "_is_protocol", False))
    return ("", None) if table else None


def setup(app: Sphinx) -> None:
    """Called by sphinx."""

    def leave(translator: Any, node: nodes.Element) -> None:
        raise AssertionError("a formula has no parts")

    def inline(translator: Any, node: nodes.math) -> None:
        translator.body.append(mathml(node.astext(), "inline"))
        raise nodes.SkipNode

    def block(translator: Any, node: nodes.math_block) -> None:
        translator.body.append(f'<div class="formula">{mathml(node.astext(), "block")}</div>')
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (inline, leave), (block, leave))
    app.connect("source-read", read)
    app.connect("autodoc-skip-member", left_out)
    app.connect("autodoc-process-signature", signature)


html_math_renderer = "mathml"
