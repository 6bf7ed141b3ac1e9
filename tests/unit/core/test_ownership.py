"""Marks: what they know, and what is deleted by them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nvembed.core import ownership
from nvembed.core.errors import ConfigError, UserError
from nvembed.core.files import atomic_folder, write_text
from nvembed.core.ownership import MARK, problem_of, refuse_foreign, remove


def test_a_file_is_ours_until_it_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    assert problem_of(path, "encode") is None
    write_text(path, "1", "encode")
    line = json.loads((tmp_path / MARK).read_text())
    assert (line["name"], line["by"], line["bytes"]) == ("v.npy", "encode", 1)
    assert problem_of(path, "encode") is None
    assert problem_of(path) is None
    assert "another command (encode)" in str(problem_of(path, "mine"))
    path.write_text("2")
    assert problem_of(path, "encode") == "was changed since nvembed made it"
    with pytest.raises(ConfigError, match="was changed"):
        write_text(path, "3", "encode")
    assert path.read_text() == "2"
    path.write_text("")  # nothing that could be lost
    write_text(path, "3", "encode")
    assert path.read_text() == "3"


def test_what_was_put_there_meanwhile_is_kept(tmp_path: Path) -> None:
    """The work may have taken hours."""
    target = tmp_path / "model"

    def meanwhile() -> None:
        with atomic_folder(target, "train") as folder:
            (folder / "weights").write_text("new")
            target.mkdir()
            (target / "notes.txt").write_text("mine")

    with pytest.raises(ConfigError, match=r"did not make it: notes\.txt"):
        meanwhile()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "notes.txt").read_text() == "mine"


def test_a_mark_that_was_torn_goes_on(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "1", "encode")
    with open(tmp_path / MARK, "a") as out:
        out.write('{"name": "b", "by"')
    write_text(tmp_path / "b", "2", "encode")
    assert problem_of(tmp_path / "a", "encode") is None
    assert problem_of(tmp_path / "b", "encode") is None


def test_a_users_file_of_that_name_is_no_mark(tmp_path: Path) -> None:
    (tmp_path / MARK).write_text("mine")
    with pytest.raises(UserError, match="not what nvembed writes there"):
        write_text(tmp_path / "a", "1", "encode")
    assert (tmp_path / MARK).read_text() == "mine"
    assert not (tmp_path / "a").exists()


def test_large_files_are_known_by_size_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "_LARGE_BYTES", 100)
    monkeypatch.setattr(ownership, "_END_BYTES", 10)
    path = tmp_path / "v.npy"
    write_text(path, "x" * 1000, "encode")
    assert problem_of(path, "encode") is None
    for place in (0, 9, 990, 999):
        content = bytearray(b"x" * 1000)
        content[place] = ord("y")
        path.write_bytes(content)
        assert problem_of(path, "encode") == "was changed since nvembed made it"
    path.write_text("x" * 1001)
    assert problem_of(path, "encode") == "was changed since nvembed made it"


def test_removing_leaves_the_users_files_and_can_be_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    with atomic_folder(target, "train") as folder:
        (folder / "1_Pooling").mkdir()
        for name in ("a", "b", "1_Pooling/c"):
            (folder / name).write_text(name)
    removed: list[Path] = []
    unlink = Path.unlink

    def killed(path: Path, **options: bool) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            remove(target)
    refuse_foreign(target, "train")  # what is left is known still
    (target / "b").write_text("edited")
    (target / "1_Pooling" / "notes.txt").write_text("mine")
    remove(target)
    left = {path.name: path.read_text() for path in target.rglob("*") if path.is_file()}
    del left[MARK]
    assert left == {"b": "edited", "notes.txt": "mine"}


def test_links_lead_nowhere(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model", "train") as folder:
        (folder / "a").write_text("a")
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "a").write_text("a")
    os.symlink(tmp_path / "users", tmp_path / "model" / "sub")
    remove(tmp_path / "model")
    assert (tmp_path / "users" / "a").read_text() == "a"
