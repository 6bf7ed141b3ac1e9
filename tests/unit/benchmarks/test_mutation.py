"""The mutation run: its list of modules, its sampling within the time, what it counts."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
_spec = importlib.util.spec_from_file_location("mutation", ROOT / "benchmarks" / "mutation.py")
assert _spec is not None
assert _spec.loader is not None
mutation = importlib.util.module_from_spec(_spec)
sys.modules["mutation"] = mutation
_spec.loader.exec_module(mutation)


def test_every_module_is_there_with_its_tests() -> None:
    for module, tests in (mutation.TESTS | mutation.FURTHER_TESTS).items():
        assert (ROOT / "src" / "nvembed" / module).is_file()
        assert tests
        for name in tests:
            file, _, test = name.partition("::")
            assert f"def {test}" in (ROOT / "tests" / "unit" / file).read_text(encoding="utf-8")


class FakeMutmut:
    """Takes a second a mutant, and ten for each start; writes what mutmut writes."""

    def __init__(self, folder: Path) -> None:
        self.meta = folder / "mutants" / "src" / "module.py.meta"
        self.meta.parent.mkdir(parents=True)
        self.now = 0.0
        self.batches: list[list[str]] = []
        self.codes: dict[str, int | None] = {}

    def run(self, names: Sequence[str]) -> None:
        self.batches.append(list(names))
        self.now += 10 + len(names)
        self.codes |= dict.fromkeys(names, 1)
        self.meta.write_text(json.dumps({"exit_code_by_key": {**self.codes, "other": None}}))


@pytest.mark.parametrize(
    ("minutes", "tried", "starts"), [(100, 300, 2), (2, range(70, 110), 3), (0, 12, 1)]
)
def test_as_many_mutants_are_tried_as_the_time_allows(
    minutes: float,
    tried: int | range,
    starts: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    fake = FakeMutmut(tmp_path)
    monkeypatch.setattr(mutation, "run_mutmut", fake.run)
    monkeypatch.setattr(mutation.time, "monotonic", lambda: fake.now)
    names = [f"mutant {number}" for number in range(300)]
    found = mutation.try_mutants(Path("src/module.py"), names, 60 * minutes)
    # The beginning of the drawn order, each once, and nothing that was not asked for.
    assert list(found) == names[: len(found)]
    assert [name for batch in fake.batches for name in batch] == list(found)
    assert len(found) in ([tried] if isinstance(tried, int) else tried)
    assert len(fake.batches) <= starts
    assert minutes != 2 or fake.now <= 120


def test_a_run_that_tries_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fake = FakeMutmut(tmp_path)
    monkeypatch.setattr(mutation, "run_mutmut", lambda names: fake.run([]))
    with pytest.raises(SystemExit, match="mutmut tried no mutant of"):
        mutation.try_mutants(Path("src/module.py"), ["a", "b"], 100.0)


def test_what_exit_codes_mean() -> None:
    assert mutation.status(0) == "survived"
    assert {mutation.status(code) for code in (1, 2, 3, -11, -6)} == {"killed"}
    assert {mutation.status(code) for code in (5, 33)} == {"no tests"}
    assert {mutation.status(code) for code in (-24, 152)} == {"timeout"}


def test_the_table_counts_what_was_tried() -> None:
    counts = Counter(killed=6, timeout=1, survived=2) + Counter({"no tests": 1})
    outcome = mutation.Outcome("a/b.py", 40, counts, ["a.b.x: survived\n-one\n+two"])
    assert outcome.tried == 10
    assert mutation.line(outcome) == "| a/b.py | 40 | 10 | 6 | 1 | 2 | 1 | 70.0% |"
    assert mutation.table([outcome], 3).endswith(mutation.line(outcome) + "\n")
    assert "```diff\na.b.x: survived\n-one\n+two\n```" in mutation.survivors(outcome)
    assert mutation.survivors(mutation.Outcome("c.py", 3)) == ""


@pytest.mark.slow
def test_the_template_is_tried_in_a_copy(tmp_path: Path) -> None:
    """From the command to the table; the tree is left as it was."""
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "src").rglob("*.py")}
    command = [sys.executable, ROOT / "benchmarks" / "mutation.py", "--minutes", "5"]
    command += ["--modules", "data/instructions.py", "--output", tmp_path / "report.md"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| data/instructions.py | ")
    assert "| data/instructions.py | " in (tmp_path / "report.md").read_text()
    assert before == {path: path.stat().st_mtime_ns for path in (ROOT / "src").rglob("*.py")}
