"""The rooms of the package: imports run one way, and what may live in one place only does."""

import ast
import re

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "wavedistill"
LAYERS = [
    {"caching", "errors", "files", "machine", "memory", "progress"},
    {"config", "engine", "flows", "wavenet"},
    {"audio", "losses", "pitch", "threads"},
    {"recordings"},
    {"linear_prediction", "data", "corpora", "metrics", "verdict"},
    {"models"},
    {"checkpoint", "compiled", "distillation", "foreign"},
    {"sampling"},
    {"tasks"},
    {"experiment", "training"},
    {"stages"},
    {"cli"},
    {"__main__"},
]
MODULES = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}


def imported(path_parts: tuple[str, ...]) -> set[tuple[str, ...]]:
    """The modules of the package that one of its modules imports, as path parts."""
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(MODULES[path_parts].read_text())):
        names: list[str] = []
        assert not (isinstance(node, ast.ImportFrom) and node.level), "relative imports hide from this test"
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "wavedistill":
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "wavedistill"]
        found |= {tuple(name.split(".")[1:]) for name in names} & set(MODULES)
    return found


def test_every_module_has_a_layer() -> None:
    assert {parts[0] for parts in MODULES} - {"__init__"} == set().union(*LAYERS)


@pytest.mark.parametrize("module", sorted(set().union(*LAYERS)))
def test_imports_run_one_way(module: str) -> None:
    """A module imports from layers below its own only; within a layer, modules do not know each other."""
    level = next(i for i, layer in enumerate(LAYERS) if module in layer)
    below = set().union(*LAYERS[:level])
    for parts in MODULES:
        if parts[0] == module:
            others = {other[0] for other in imported(parts)} - {"__init__", module}
            assert others <= below, f"{'.'.join(parts)} imports {others - below}"


def test_no_stage_imports_another() -> None:
    for parts in MODULES:
        if parts[0] == "stages" and parts[1] != "__init__":
            assert not [other for other in imported(parts) if other[0] == "stages"], parts


def test_flows_know_neither_audio_nor_networks() -> None:
    assert not imported(("flows",))
    assert "Hz" not in MODULES["flows",].read_text()


@pytest.mark.parametrize(
    ("pattern", "owner"),
    [
        (r"\[[^\]\n]*:-1[\],]", "wavenet"),  # the causal shift
        (r"\.step\(previous|out\[:, t\]", "sampling models"),  # the loops over time; models.py hands a step on
        (r"\bnjit\b", "linear_prediction compiled"),  # recurrences in compiled code
        (r"soundfile\.(?!SoundFileError)", "audio data metrics recordings stages"),  # file formats
        (r"\btomllib\b", "config"),
    ],
)
def test_what_lives_in_one_place_lives_nowhere_else(pattern: str, owner: str) -> None:
    found = {parts[0] for parts, path in MODULES.items() if re.search(pattern, path.read_text())}
    assert found <= set(owner.split())
