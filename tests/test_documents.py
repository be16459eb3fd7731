"""What README and docs say: commands are understood, snippets run, links lead somewhere, keys are the code's."""

import ast
import importlib
import importlib.metadata
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tests.conftest import HEARD, REPOSITORY, speech_like
from wavedistill.cli.commands import app
from wavedistill.corpus.utterances import Manifest, Utterance
from wavedistill.models.checkpoint import VERSION, ModelHeader, save_model
from wavedistill.models.kinds import build
from wavedistill.recipe import models, sections, trainings
from wavedistill.recipe.loading import load_recipe
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech import audio
from wavedistill.training.state import StateHeader

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "data/README.md", *DOCS.rglob("*.md")]
NOTEBOOK = DOCS / "first_flow.ipynb"
CODE = re.compile(r"\[`([\w.]+):([\w.]+)`\]\(([^)]+)\)")
LINK = re.compile(r"\[[^\]]*\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]*))?\)")
BLOCK = re.compile(r"^```([^\n`]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SYSTEM = {
    "cat",
    "cd",
    "mkdir",
    ".",
    "git",
    "docker",
    "make",
    "pip",
    "curl",
    "export",
    "apt-get",
    "python",
    "python3",
    "open",
}
"""Commands that a shell or the system brings."""
GROUP = typer.main.get_command(app)
INSTALLED = {entry.name for entry in importlib.metadata.entry_points(group="console_scripts")}


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def named(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in BLOCK.findall(text(page)) if language in languages]


def spans(page: Path) -> list[str]:
    """What words have in backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", BLOCK.sub("", text(page)))


def every_page(*languages: str) -> Any:
    """The pages that have blocks of a language, or all."""
    found = [page for page in PAGES if not languages or blocks(page, *languages)]
    return pytest.mark.parametrize("page", found, ids=named)


# Docstrings


def described() -> list[str]:
    """The modules that the reference pages describe."""
    return [name for page in DOCS.glob("api/*.md") for name in re.findall(r"automodule:: (\S+)", text(page))]


def public(module: str) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef, str, str]]:
    """Of what a module has for others: name, definition, docstring, which may be a base's, and that of its class."""
    tree = ast.parse(text(REPOSITORY / f"{module.replace('.', '/')}.py"))
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"]
    for node in defined:
        about = ast.get_docstring(node) or ""
        yield node.name, node, about, about
        if not isinstance(node, ast.ClassDef):
            continue
        classes = getattr(importlib.import_module(module), node.name).__mro__
        ours = [each for each in classes if each.__module__.startswith("wavedistill")]
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name[0] != "_":
                words = (each.__dict__[method.name].__doc__ for each in ours if method.name in each.__dict__)
                yield f"{node.name}.{method.name}", method, next((found for found in words if found), ""), about


def test_every_module_of_a_room_for_users_is_described() -> None:
    rooms = ("flows", "models", "networks", "speech", "recipe", "experiment", "training", "vocoder")
    paths = [path for room in rooms for path in (REPOSITORY / "wavedistill" / room).glob("[!_]*.py")]
    assert {f"wavedistill.{path.parent.name}.{path.stem}" for path in paths} <= set(described())


@pytest.mark.parametrize("module", described())
def test_what_is_public_has_words_with_shapes_and_errors(module: str) -> None:
    for name, node, words, about in public(module):
        assert words, f"{module}:{name} has no docstring"
        if isinstance(node, ast.ClassDef):
            continue
        calls = [each.exc for each in ast.walk(node) if isinstance(each, ast.Raise) and isinstance(each.exc, ast.Call)]
        raised = {found for call in calls if (found := ast.unparse(call.func)).endswith("Error")}
        missing = [each for each in raised - {"NotImplementedError", "AttributeError"} if each not in words + about]
        assert not missing, f"{module}:{name} does not say that it raises {missing}"
        arguments = [*node.args.args, *node.args.kwonlyargs]
        types = [ast.unparse(each.annotation) for each in arguments if each.annotation]
        result = ast.unparse(node.returns) if node.returns else ""
        if "Tensor" in types or result == "Tensor":
            shape = r"\((?:[^()]+,[^()]*|any|B)\)|a scalar|[Aa]s (?:in )?`\w+`|in the shape of|any shape"
            assert re.search(shape, words), f"{module}:{name} says no shape"


# Links


@every_page()
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target, anchor in LINK.findall(BLOCK.sub("", text(page))):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{target}: no such file"
        if anchor and path.suffix == ".md":
            assert anchor in headings(path), f"{target}#{anchor}: no such heading"


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site have them."""
    found = re.findall(r"^#+ (.+)$", BLOCK.sub("", text(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@every_page()
def test_links_to_code_lead_to_what_they_name(page: Path) -> None:
    for module, name, target in CODE.findall(text(page)):
        path = (page.parent / target).resolve()
        assert path == REPOSITORY / f"{module.replace('.', '/')}.py", f"{module}: is not in {target}"
        found: Any = ast.parse(text(path))
        for part in name.split("."):
            inside = {node.name: node for node in found.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            assert part in inside, f"{module}:{name}: not defined there"
            found = inside[part]


def test_each_equation_of_the_mathematics_has_its_code() -> None:
    for section in text(DOCS / "mathematics.md").split("\n## ")[1:]:
        title = section.splitlines()[0]
        assert ("$" not in section) or CODE.search(section), f"{title}: equations without a link to code"


# Commands


@every_page("", "bash", "sh", "console")
def test_commands_are_understood(page: Path) -> None:
    for body in blocks(page, "", "bash", "sh", "console"):
        lines = body.replace("\\\n", " ").replace("&&", "\n").replace("$ ", "").splitlines()
        first = next(word for word in lines[0].split() if "=" not in word)
        if first not in SYSTEM | INSTALLED | {"#"}:
            continue  # a drawing
        for line in lines:
            if words := shlex.split(line, comments=True):
                understood(words)


def understood(words: list[str]) -> None:
    """Fails where a command does not exist, or does not know its arguments."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "wavedistill":
        parsed(rest)
    elif program == "python" and rest[:2] == ["-m", "wavedistill"]:
        parsed(rest[2:])
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(rest)
        assert (given.module, given.training_script) == (True, "wavedistill"), " ".join(words)
        parsed(given.training_script_args)
    elif program == "docker" and rest[0] == "run":
        parsed(rest[rest.index("wavedistill") + 1 :])
    elif program == "make":
        for target in rest:
            assert re.search(rf"^{target}:", text(REPOSITORY / "Makefile"), re.MULTILINE), f"make {target}: no target"
    else:
        assert program in SYSTEM | INSTALLED, f"{program}: a command that nobody has"


def parsed(words: list[str]) -> None:
    """Fails where a `wavedistill` command line would be refused."""
    # Of a recipe that is shipped, whose trainings' names are known.
    words = ["demo" if word.endswith(".toml") and words[0] != "new" else word for word in words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["wavedistill", *words])
        outer = GROUP.make_context("wavedistill", list(words))
        name, command, rest = GROUP.resolve_command(outer, list(words))
        inner = command.make_context(name, rest, parent=outer)
    load_recipe("demo", inner.params.get("overrides") or [])


def options(*commands: str) -> set[str]:
    """Those of some commands, or of all."""
    known = [GROUP.commands[name] for name in commands or GROUP.commands]
    return {"--help", *(each for command in [GROUP, *known] for given in command.params for each in given.opts)}


@every_page()
def test_commands_that_words_mention_are_known(page: Path) -> None:
    for span in spans(page):
        if span.startswith(("wavedistill ", *(f"{name} --" for name in GROUP.commands))):
            name, *rest = shlex.split(span.removeprefix("wavedistill "))
            if name.startswith("--"):
                assert name in options(), f"{span}: no such option"
            elif name != "NAME":
                assert name in GROUP.commands, f"{span}: no such command"
                found = {word.split("=")[0] for word in rest if word.startswith("--")}
                assert found <= options(name), f"{span}: no such option"


@every_page()
def test_options_that_words_mention_are_known(page: Path) -> None:
    for span in spans(page):
        if span.startswith("--"):
            assert re.split("[ =]", span)[0] in options(), f"{span}: no such option"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("run demo --fast", "No such option: --fast"),
        ("dance demo.html", "No such command 'dance'"),
        ("generate checkpoint.safetensors", "Missing parameter: out"),
        ("run demo --set audio.hop=1", "audio.hop: unknown key"),
    ],
)
def test_a_wrong_command_is_noticed(command: str, said: str) -> None:
    with pytest.raises(Exception, match=said):
        parsed(command.split())


# Recipes


@every_page("toml")
def test_recipes_are_valid(page: Path, tmp_path: Path) -> None:
    for body in blocks(page, "toml"):
        if page.name == "recipes.md" or "extends" in tomllib.loads(body):
            path = tmp_path / "shown.toml"
            path.write_text(body)
        else:
            path = tmp_path / "part.toml"
            path.write_text('extends = "demo"\n' + body)
        load_recipe(path)


TABLES: dict[str, list[type[BaseModel]]] = {
    "[corpus]": list(get_args(get_args(sections.Corpus)[0])),
    "[[corpus.parts]]": [sections.Part],
    "[models.NAME]": [models.Maf, models.Iaf, models.Coupling],
    "[models.NAME.network]": [models.Network, models.NetworkAround],
    "[training.NAME]": [trainings.Likelihood, trainings.Distillation],
    "[training.NAME.loss]": [trainings.DistillationLoss],
    **{
        f"[{name}]": [field.annotation]
        for name, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    },
}


@pytest.mark.parametrize("table", TABLES)
def test_the_guide_has_every_key_of_a_table_and_its_default(table: str) -> None:
    (section,) = re.findall(rf"^### `{re.escape(table)}`\n(.*?)(?=^##|\Z)", text(DOCS / "recipes.md"), re.M | re.S)
    shown = set(re.findall(r"^\| `(\w+)` \| (\S.*?) \| \S", section, re.MULTILINE))
    has = {(name, default(field)) for each in TABLES[table] for name, field in each.model_fields.items()}
    assert shown == has


def default(field: Any) -> str:
    """As a recipe would have it."""
    value = field.default
    if value is PydanticUndefined:
        return "required"
    value = list(value) if isinstance(value, tuple) else {} if isinstance(value, BaseModel) else value
    return "`none`" if value is None else f"`{json.dumps(value)}`"


def test_the_guide_has_every_table() -> None:
    named_tables = set(re.findall(r"^### `\[+(\w+)", text(DOCS / "recipes.md"), re.MULTILINE))
    assert named_tables == set(Recipe.model_fields) - {"name", "seed"}


@every_page()
def test_keys_that_words_mention_are_keys(page: Path) -> None:
    for span in spans(page):
        if re.fullmatch(rf"({'|'.join(Recipe.model_fields)})\.(?!json|toml|txt)[a-z][\w.]*", span):
            assert span.split(".")[1] in {*("NAME", "teacher", "student"), *keys(span)}, f"{span}: no such key"
            if span.startswith(("models.", "training.")):
                *_, last = parts = span.split(".")
                assert len(parts) == 2 or last in keys(span), f"{span}: no such key"


def keys(span: str) -> set[str]:
    """Those of a table, and of the tables in it."""
    tables = [name for name in TABLES if name.startswith(f"[{span.split('.')[0]}")]
    return {key for name in tables for each in TABLES[name] for key in each.model_fields}


# Files


def test_the_formats_of_files_are_described_as_they_are() -> None:
    described = text(DOCS / "files.md")
    for model in (Manifest, Utterance, ModelHeader, StateHeader, ModelHeader.model_fields["heard"].annotation):
        assert model is not None
        assert not [name for name in model.model_fields if f"`{name}`" not in described]
    assert f"of the format, {VERSION} now" in described


# Snippets


@every_page("python")
def test_snippets_compile_and_import_what_is_there(page: Path) -> None:
    for body in filter(installed, blocks(page, "python")):
        for node in ast.walk(compile(body, named(page), "exec", ast.PyCF_ONLY_AST)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)


EXTRA = ("zuko", "torchflows")
"""Libraries that pages show beside ours, of the extra `zoo`."""


def installed(body: str) -> bool:
    """Whether the libraries that a snippet shows are here."""
    shown = [name for name in EXTRA if re.search(rf"^(?:import|from) {name}\b", body, re.MULTILINE)]
    return all(importlib.util.find_spec(name) for name in shown)


def runnable() -> list[Any]:
    """Those that begin with an import: they need nothing that stands before them."""
    every = [(f"{named(page)}-{i}", body) for page in PAGES for i, body in enumerate(blocks(page, "python"))]
    return [pytest.param(body, id=name) for name, body in every if re.match("import |from ", body)]


@pytest.mark.parametrize("body", runnable())
def test_snippets_run(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not installed(body):
        pytest.skip("zuko and torchflows are not installed: pip install -e '.[zoo]'")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("tiny")
    for node in ast.walk(ast.parse(body)):  # the files that they read
        name = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if name.endswith("checkpoint.safetensors"):
            model = "teacher" if "teacher" in name else "student"
            weights = build(recipe, model, 0).state_dict()
            save_model(Path(name), model, recipe, 0, HEARD, weights)
        elif name.endswith(".wav"):
            audio.write(Path(name), speech_like(8000), recipe.audio.sample_rate)
    exec(compile(body, "snippet", "exec"), {})


# The site, and the notebook


def cells() -> list[str]:
    every = json.loads(text(NOTEBOOK))["cells"]
    return ["".join(cell["source"]) for cell in every if cell["cell_type"] == "code"]


def test_the_notebook_holds_no_sound_and_little_else() -> None:
    assert "audio" not in {kind.split("/")[0] for kind in re.findall(r'"(\w+/[\w+-]+)":', text(NOTEBOOK))}
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    shared: dict[str, Any] = {}
    for cell in cells():
        exec(compile(cell, NOTEBOOK.name, "exec"), shared)
    said = capsys.readouterr().out
    assert "above the diagonal, at most 0.0\ndiagonal is sigma: True" in said
    assert "noise is found again: True" in said
    likelihood = {name: float(value) for value, name in re.findall(r"([\d.]+) nats a sample: (.+)", said)}
    assert likelihood["trained"] > likelihood["untrained"]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_asks_nobody(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(tmp_path / "cache"), "docs"]
    done = subprocess.run(
        [*command, str(tmp_path / "site")], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "<math" in text(tmp_path / "site/mathematics.html")
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link|iframe)[^>]*?(?:src|href)="((?:https?:)?//[^"]*)"', text(page))
        assert not loaded, f"{page.name} asks for {loaded}"
