"""House rules: dependencies point one way, public names are exact, help is quick."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import nvembed
from nvembed.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "nvembed"

# From the top down; a package may import those below it, and those of its own level named here.
LEVELS = [
    {"cli"},
    {"training", "building", "serving"},
    {"mining", "evaluation", "encoding", "index"},
    {"model"},
    {"data", "kernels", "interop"},
    {"core"},
]


def level(package: str) -> int:
    return next(number for number, names in enumerate(LEVELS) if package in names)


def imported_packages(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [node.module or ""]
        found |= {
            name.split(".")[1] for name in names if name.startswith("nvembed.") and name.count(".")
        }
    return found


def test_dependencies_point_one_way() -> None:
    checked = 0
    for file in SOURCE.rglob("*.py"):
        parts = file.relative_to(SOURCE).parts
        if len(parts) == 1:
            continue
        own = parts[0]
        for other in imported_packages(file) - {own}:
            assert level(other) > level(own), f"{file} imports nvembed.{other}"
            checked += 1
    assert checked > 50
    assert {path.name for path in SOURCE.iterdir() if path.is_dir()} - {"__pycache__"} == set(
        chain.from_iterable(LEVELS)
    )


def test_public_names_are_exact_and_sorted() -> None:
    assert nvembed.__all__ == sorted(nvembed.__all__)
    assert set(nvembed.__all__) == {*nvembed._HOMES, "__version__"}
    assert nvembed.__all__ == [
        "ConfigError",
        "DataError",
        "DoctorOptions",
        "IndexOptions",
        "LongTexts",
        "MiningConfig",
        "ModelError",
        "NVEmbed",
        "NVEmbedError",
        "OutputFormat",
        "SearchOptions",
        "SourceError",
        "TrainConfig",
        "TrainingError",
        "UserError",
        "__version__",
        "build_data",
        "build_index",
        "compare",
        "compress",
        "doctor",
        "encode_file",
        "evaluate",
        "export",
        "load_config",
        "load_encoder",
        "load_tasks",
        "merge",
        "mine",
        "mine_negatives",
        "search_file",
        "search_index",
        "serve",
        "train",
    ]
    for name in nvembed.__all__:
        assert getattr(nvembed, name) is not None
        assert name == "__version__" or getattr(nvembed, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = nvembed.missing


def test_type_checkers_see_the_names_where_they_are_loaded_from() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nvembed.")
        for alias in node.names
    }
    del typed["__version__"]
    assert typed == {name: f"nvembed.{home}" for name, home in nvembed._HOMES.items()}


def commands(group: Any, *names: str) -> Iterator[list[str]]:
    """The words of a group and of every command in it."""
    yield [*names]
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, *names, name)


COMMANDS = list(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_examples_and_does_not_import_torch(command: list[str]) -> None:
    code = (
        "import sys; from nvembed.cli.main import run; "
        f"code = run({[*command, '--help']!r}); "
        "bad = {'torch', 'transformers', 'mteb', 'sklearn', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'imported {bad}' if bad else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"nvembed {command[0]}" in done.stdout if command else "train" in done.stdout


def test_help_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples can be pasted as they stand, and lists of commands have whole sentences."""
    monkeypatch.setenv("COLUMNS", "80")
    assert len(COMMANDS) > 15
    for command in COMMANDS:
        shown = CliRunner().invoke(app, [*command, "--help"]).output
        assert [line for line in shown.splitlines() if len(line) > 80] == []
        assert "..." not in shown.partition("Commands:")[2], command


def test_help_takes_less_than_half_a_second() -> None:
    def run() -> float:
        before = os.times()
        command = [sys.executable, "-m", "nvembed", "--help"]
        subprocess.run(command, capture_output=True, check=True)
        after = os.times()
        user = after.children_user - before.children_user
        return user + after.children_system - before.children_system

    # Of the CPU, and the best of several: what the command needs, not what the machine does
    # besides. It waits for nothing, so on an idle machine that is what its user waits.
    assert min(run() for _ in range(5)) < 0.5


def test_changelog_and_version_agree() -> None:
    headings = re.findall(r"^## \[?([0-9.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == nvembed.__version__


def test_files_stay_readable() -> None:
    long = {
        str(file.relative_to(ROOT)): count
        for file in SOURCE.rglob("*.py")
        if (count := len(file.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long


def functions_over_60_lines() -> dict[str, int]:
    found = {}
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 60:
                    found[f"{file.relative_to(SOURCE).as_posix()}:{node.name}"] = lines
    return found


def circles_of_files() -> list[list[str]]:
    """Files that import each other, in functions and for types alone too."""
    modules = {
        ".".join(("nvembed", *file.relative_to(SOURCE).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): file
        for file in sorted(SOURCE.rglob("*.py"))
    }
    graph = {name: imported_modules(file, set(modules)) - {name} for name, file in modules.items()}
    reach: dict[str, set[str]] = {}
    for name in graph:
        seen: set[str] = set()
        todo = list(graph[name])
        while todo:
            if (other := todo.pop()) not in seen:
                seen.add(other)
                todo += graph[other]
        reach[name] = seen
    circles = {
        tuple(sorted(other for other in reach[name] if name in reach[other]))
        for name in graph
        if name in reach[name]
    }
    return [list(circle) for circle in sorted(circles)]


def imported_modules(file: Path, modules: set[str]) -> set[str]:
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            found.update(inside or {node.module})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text(encoding="utf-8")))
    return found & modules


def docstrings_beginning_with_of() -> dict[str, int]:
    found: Counter[str] = Counter()
    for file in sorted(SOURCE.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        package = file.relative_to(SOURCE).parts[0]
        found[package] += len(re.findall(r"^ +\*{0,2}\w+: of ", text, re.MULTILINE))
    return {package: count for package, count in sorted(found.items()) if count}


def test_functions_are_short_and_files_have_no_circles() -> None:
    assert functions_over_60_lines() == {}
    assert circles_of_files() == []


def test_docstrings_are_sentences() -> None:
    assert docstrings_beginning_with_of() == {}


def test_documents_that_are_cited_exist() -> None:
    known = {path.name for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]}
    known |= {"README.md"}  # of many folders
    # Names of files that a command writes, or of examples.
    known |= {"report.md", "a.md", "b.md", "table.md", "notes.md"}
    known |= {"datasets.md"}  # of the shared folder beside the checkout
    files = [*SOURCE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").glob("*.md")]
    for file in [*files, ROOT / "README.md"]:
        if file.name in ("test_house.py", "log.md"):
            continue
        cited = re.findall(r"[\w-]+\.md\b", file.read_text(encoding="utf-8"))
        assert set(cited) <= known, file
