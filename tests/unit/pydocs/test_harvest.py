"""The harvest: what of a source tree becomes an entry, without running any of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nvembed.core.errors import DataError
from pydocs import harvest as harvest_module
from pydocs.harvest import (
    DocEntry,
    fingerprint,
    harvest,
    harvest_roots,
    harvest_source,
    read_entries,
)

REST = "It takes some more words to say what this does, how it does it, and when it fails to do so."


def docstring(summary: str) -> str:
    return f'"""{summary}\n\n{REST}\n"""'


SOURCE = f'''
raise SystemExit("nobody may run this")

def area(width, height=1.5, *, unit: str = "square metres of floor space", scale: int = 2) -> float:
    {docstring("Compute the area of a room.")}

def bare(x):
    """Short."""

def _private(x):
    {docstring("Compute what nobody should see.")}

try:
    async def load(path, /, *paths, **options):
        {docstring("Load a plan of the house.")}
except ImportError:
    pass

class Room(Base):
    {docstring("Represent one room of a house.")}
    def __init__(self, name="hall"):
        {docstring("Make a room of a house.")}
    def paint(self, colour):
        {docstring("Paint the walls of the room.")}
        def inner():
            {docstring("Compute a thing inside.")}
    @classmethod
    def parse(cls, text):
        {docstring("Parse the text of a plan.")}
    @property
    def size(self):
        {docstring("Give the size of the room.")}
'''


def test_entries_of_a_module() -> None:
    entries = {entry.name: entry for entry in harvest_source(SOURCE, "house._rooms")}
    assert {name: entry.signature for name, entry in entries.items()} == {
        "house.area": "area(width, height=1.5, *, unit=..., scale=2)",
        "house.load": "load(path, /, *paths, **options)",
        "house.Room": "Room(name='hall')",
        "house.Room.paint": "Room.paint(colour)",
        "house.Room.parse": "Room.parse(text)",
        "house.Room.size": "Room.size",
    }
    assert {entry.kind for entry in entries.values()} == {"function", "class", "method"}
    assert entries["house.Room"].kind == "class"
    assert entries["house.area"] == DocEntry(
        name="house.area",
        module="house._rooms",
        package="house",
        kind="function",
        signature="area(width, height=1.5, *, unit=..., scale=2)",
        summary="Compute the area of a room.",
        rest=REST,
    )


def test_private_module_with_hardly_any_documentation_is_skipped() -> None:
    undocumented = "".join(f"def f{number}(): pass\n" for number in range(8))
    source = SOURCE + undocumented
    assert harvest_source(source, "house._rooms") == []
    assert len(harvest_source(source, "house.rooms")) == 6


def write_package(root: Path) -> None:
    for name in ("house/__init__.py", "house/rooms.py", "house/tests/test_rooms.py", "garden.py"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SOURCE, encoding="utf-8")
    (root / "house" / "_vendor").mkdir()
    (root / "house" / "_vendor" / "copied.py").write_text(SOURCE, encoding="utf-8")
    (root / "nvembed").mkdir()
    (root / "nvembed" / "own.py").write_text(SOURCE, encoding="utf-8")
    (root / "broken.py").write_text('"""x"""\ndef f(:', encoding="utf-8")
    (root / "latin.py").write_bytes(b'"""caf\xe9"""\n')
    (root / "dangling.py").symlink_to(root / "nowhere.py")


def test_folders(tmp_path: Path) -> None:
    write_package(tmp_path)
    entries = harvest_roots([tmp_path])
    assert {entry.module for entry in entries} == {"house", "house.rooms", "garden"}
    assert [entry.name for entry in entries] == sorted(entry.name for entry in entries)
    assert len(entries) == 18


def test_two_processes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path)
    alone = harvest_roots([tmp_path])
    monkeypatch.setattr(harvest_module, "POOL_FROM_FILES", 1)
    monkeypatch.setattr(harvest_module, "CHUNK_FILES", 2)
    assert harvest_roots([tmp_path], processes=2) == alone


def test_cache_is_used_until_a_version_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages, cache = tmp_path / "packages", tmp_path / "cache"
    packages.mkdir()
    write_package(packages)
    (packages / "house-1.0.dist-info").mkdir()
    monkeypatch.setattr(harvest_module, "installed_roots", lambda: [packages])
    first = harvest(cache=cache)
    assert len(first) == 18
    (packages / "house" / "more.py").write_text(SOURCE, encoding="utf-8")
    assert harvest(cache=cache) == first  # nothing was read again
    (packages / "house-1.0.dist-info").rename(packages / "house-1.1.dist-info")
    assert len(harvest(cache=cache)) == 24
    assert len(list(cache.iterdir())) == 2


def test_damaged_cache_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages, cache = tmp_path / "packages", tmp_path / "cache"
    packages.mkdir()
    write_package(packages)
    monkeypatch.setattr(harvest_module, "installed_roots", lambda: [packages])
    first = harvest(cache=cache)
    path = cache / f"docs-{fingerprint([packages])}.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-40], encoding="utf-8")
    assert harvest(cache=cache) == first


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"name": "a"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.jsonl:1: not a documentation entry"):
        read_entries(path)


def test_long_signatures_are_cut_at_an_argument() -> None:
    arguments = ", ".join(f"argument_number_{number}=None" for number in range(30))
    source = f"def f({arguments}):\n    {docstring('Take very many arguments.')}\n"
    (entry,) = harvest_source(source, "m")
    assert entry.signature.endswith("=None, ...)")
    assert len(entry.signature) < 220
    assert entry == replace(entry, name="m.f", module="m")
