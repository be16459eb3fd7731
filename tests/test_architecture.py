"""The rooms of the package: imports run one way, and what may live in one place only does."""

import ast
import re

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "wavedistill"
ROOMS = [
    *("tools", "recipe", "flows", "networks", "speech", "corpus", "models", "sampling", "training", "evaluation"),
    *("experiment", "benchmarking", "reporting", "zoo", "vocoder", "exporting", "checking", "stages", "cli"),
    "__main__",
]
"""Each knows those before it only."""
LONGEST, LONGEST_STAGE = 350, 160
"""Lines of a file."""
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


def test_every_module_has_a_room() -> None:
    assert {parts[0] for parts in MODULES} - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    below = {*ROOMS[: ROOMS.index(room)], room}
    for parts in MODULES:
        if parts[0] == room:
            others = {other[0] for other in imported(parts)} - {"__init__"}
            assert others <= below, f"{'.'.join(parts)} imports {others - below}"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_within_a_room_run_in_no_circle(room: str) -> None:
    known = {parts: {other for other in imported(parts) if other[0] == room} for parts in MODULES if parts[0] == room}
    while free := {parts for parts, others in known.items() if not others & known.keys()}:
        known = {parts: others for parts, others in known.items() if parts not in free}
    assert not known


def test_no_file_is_long() -> None:
    lengths = {".".join(parts): len(path.read_text().splitlines()) for parts, path in MODULES.items()}
    most = {name: LONGEST_STAGE if name.startswith("stages.") else LONGEST for name in lengths}
    assert not {name: length for name, length in lengths.items() if length > most[name]}


def test_no_stage_imports_another() -> None:
    for parts in MODULES:
        if parts[0] == "stages" and parts[1] != "__init__":
            assert not [other for other in imported(parts) if other[0] == "stages"], parts


def test_flows_know_neither_audio_nor_networks() -> None:
    for parts, path in MODULES.items():
        if parts[0] == "flows":
            assert {other[0] for other in imported(parts)} <= {"flows"}
            assert "Hz" not in path.read_text()


@pytest.mark.parametrize(
    ("pattern", "owner"),
    [
        (r"\[[^\]\n]*:-1[\],]", "networks"),  # the causal shift
        (r"\.step\(previous|out\[:, t\]", "sampling models"),  # the loops over time; models hand a step on
        (r"\bnjit\b", "flows speech sampling"),  # steps and recurrences in compiled code
        (r"soundfile\.(?!SoundFileError)", "speech corpus stages"),  # file formats
        (r"\btomllib\b", "recipe"),
    ],
)
def test_what_lives_in_one_room_lives_nowhere_else(pattern: str, owner: str) -> None:
    found = {parts[0] for parts, path in MODULES.items() if re.search(pattern, path.read_text())}
    assert found <= set(owner.split())
