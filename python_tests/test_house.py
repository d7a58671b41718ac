"""The house keeps its order: imports go downwards only, without circles, and no file is too long."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "loftq_kernels"
# From the top: each imports only what stands below it. CONTRIBUTING.md says what each is.
FLOORS = (
    "__main__",
    "cli",
    "recipes",
    "__init__",
    "public",
    "integrations",
    "checkpoints",
    "calibration",
    "tuning",
    "models",
    "nn",
    "initializers",
    "formats",
    "ops",
    "triton_kernels",
    "storage",
    "optim",
    "progress",
    "threads",
    "arguments",
    "vocabulary",
    "hosts",
)
MOST_LINES = 350


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below ``loftq_kernels``; "__init__" is the package itself."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = path
    return found


def imports_of(path: Path, known: set[str]) -> set[str]:
    """The package's modules that a file imports, anywhere in it, also for type checkers alone."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{_absolute(node, path)}.{alias.name}" for alias in node.names}
    own = {name.partition(".")[2] for name in names if name.split(".")[0] == "loftq_kernels"}
    return {_module_of(name, known) for name in own}


def _absolute(node: ast.ImportFrom, path: Path) -> str:
    """The dotted name of the module that a file imports from."""
    if not node.level:
        return node.module
    folder = path.relative_to(PACKAGE.parent).parts[: -node.level]
    return ".".join((*folder, *([node.module] if node.module else [])))


def _module_of(name: str, known: set[str]) -> str:
    """The module that an imported name is, or is defined in: a folder's __init__ goes by the folder's name."""
    while name not in known and name:
        name = name.rpartition(".")[0]
    return name or "__init__"


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports_of(path, known.keys()) - {name} for name, path in known.items()}


def floor(name: str) -> int:
    return FLOORS.index(name.split(".")[0])


def test_imports_go_downwards(graph):
    """`import loftq_kernels` itself stands above what it gathers, and below those that use it as a user would."""
    upwards = sorted(
        f"{name} -> {other}" for name, others in graph.items() for other in others if floor(other) < floor(name)
    )
    assert not upwards
    users = {name for name, others in graph.items() if "__init__" in others}
    assert {name.split(".")[0] for name in users} <= {"__main__", "cli", "recipes"}


def test_imports_make_no_circle(graph):
    """Folders' __init__ files count where a module asks the folder for a name."""
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        state[name] = 1
        for other in sorted(graph[name]):
            assert state.get(other) != 1, f"a circle: {' -> '.join((*path, name, other))}"
            if other not in state:
                visit(other, (*path, name))
        state[name] = 2

    for name in sorted(graph):
        if name not in state:
            visit(name, ())


def test_folders_make_no_circle(graph):
    arrows = {(name.split(".")[0], other.split(".")[0]) for name, others in graph.items() for other in others}
    assert not [(a, b) for a, b in arrows if a != b and (b, a) in arrows]


def test_relative_imports():
    """Within triton_kernels/ all are relative and none leaves the folder, for copies of it work in other packages;
    elsewhere none is relative, for a full name says which floor it is of."""
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        alone = path.parent == PACKAGE / "triton_kernels"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            level, names = (node.level, [node.module]) if isinstance(node, ast.ImportFrom) else (0, names)
            absolute = any((name or "").split(".")[0] == "loftq_kernels" for name in names if not level)
            if level > 1 or (level and not alone) or (absolute and alone):
                wrong.append(f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}")
    assert not wrong


def test_every_folder_has_its_floor():
    rooms = {name.split(".")[0] for name in modules()}
    assert rooms <= set(FLOORS)


def test_contributing_names_every_file():
    """In the row of its folder."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = {folder: set(re.findall(r"\w+", row)) for folder, row in re.findall(r"^\| `(\w+)/` \|(.*)$", text, re.M)}
    files = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE and path.stem != "__init__"]
    folders = {path: path.relative_to(PACKAGE).parts[0] for path in files}
    assert not sorted(str(path) for path, folder in folders.items() if path.stem not in rows[folder])


def test_no_file_is_too_long():
    """350 lines: what is longer holds a second idea. Kernels and their options are one idea, and stay below it, too."""
    long = {
        name: lines for name, path in modules().items() if (lines := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert not long
