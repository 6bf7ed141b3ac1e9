"""The store of artifacts: made once, by one process at a time, and read or refused."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from forked import in_processes
from nvembed.core.errors import DataError
from nvembed.core.store import (
    STORED,
    claims,
    key_of,
    make_missing,
    read_array,
    read_arrays,
    write_array,
    write_arrays,
)


def test_only_what_is_missing_is_made_and_half_files_go(tmp_path: Path) -> None:
    paths = [tmp_path / "store" / f"x-{key_of(number)}.npy" for number in range(3)]
    write_array(paths[1], np.arange(3))
    half = paths[2].with_name(f".{paths[2].name}.a1b2c3d4.nvembed-new")
    half.write_text("what kill -9 leaves")
    made: list[int] = []

    def make(number: int) -> None:
        made.append(number)
        write_array(paths[number], np.full(2, number))

    make_missing(paths, make)
    make_missing(paths, make)
    assert made == [0, 2]
    assert not half.exists()
    assert all(STORED.fullmatch(path.name) for path in paths[0].parent.iterdir())
    assert read_array(paths[0]).tolist() == [0, 0]
    assert np.array_equal(read_array(paths[1], mapped=True), np.arange(3))


def _make_all(paths: list[Path], log: Path) -> None:
    with claims(paths) as numbers:
        for number in numbers:
            with open(log, "a", encoding="utf-8") as file:
                file.write(f"{number}\n")
            write_array(paths[number], np.arange(number))


def test_two_processes_make_each_artifact_once(tmp_path: Path) -> None:
    paths = [tmp_path / f"x-{key_of(number)}.npy" for number in range(40)]
    in_processes(functools.partial(_make_all, paths, tmp_path / "log"))
    assert all(path.is_file() for path in paths)
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(40))


def test_what_is_damaged_is_told(tmp_path: Path) -> None:
    write_arrays(tmp_path / "x.npz", {"a": np.arange(3)})
    assert read_arrays(tmp_path / "x.npz", "a")[0].tolist() == [0, 1, 2]
    for name, content in (("y.npy", b"\x93NUMPY"), ("z.npy", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: cannot be read .*made again"):
            read_array(tmp_path / name)
    with pytest.raises(DataError, match=r"x\.npz: cannot be read .*made again"):
        read_arrays(tmp_path / "x.npz", "b")
