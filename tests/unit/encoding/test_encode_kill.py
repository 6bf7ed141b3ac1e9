"""Encoding a file, stopped at any file operation and run again: the same bytes, nothing else."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from faults import Fault, in_child
from hash_encoder import HashEncoder
from nvembed.core.files import write_jsonl
from nvembed.core.ownership import MARK
from nvembed.encoding import files
from nvembed.encoding.files import encode_file
from nvembed.encoding.outputs import OutputFormat
from nvembed.model import bulk as embed
from nvembed.model import workers


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(embed, "WINDOW_TEXTS", 3)
    monkeypatch.setattr(files, "computed_fingerprint", lambda model, dtype: "m")
    monkeypatch.setattr(workers, "load_encoder", lambda model, dtype: HashEncoder(32))
    rows = [{"id": i, "text": f"text number {i} of {i * i}"} for i in range(10)]
    write_jsonl(tmp_path / "in.jsonl", rows)
    return tmp_path / "in.jsonl"


def encode(source: Path, folder: Path) -> None:
    form = OutputFormat(20, "int8")
    encode_file("o/m", source, folder / "out.npy", task=None, form=form)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MARK}


def test_killed_at_any_file_operation_and_run_again(source: Path) -> None:
    encode(source, source.parent / "here")
    expected = contents(source.parent / "here")
    names = {"out.npy", "out.npy.ids.json", "out.npy.ranges.npy", "out.npy.run.json"}
    assert set(expected) == names
    whole = in_child(partial(encode, source, source.parent / "whole"), source.parent)
    assert whole.error is None, whole.error
    assert len(whole.operations) > 15
    for number in range(0, len(whole.operations), 2):
        folder = source.parent / str(number)
        job = partial(encode, source, folder)
        assert in_child(job, source.parent, fault=Fault(number)).died
        again = in_child(job, source.parent)
        assert again.error is None, again.error
        assert contents(folder) == expected, whole.operations[number]


@pytest.mark.parametrize("place", [r"\.npz", r"\.out\.npy\."])
def test_a_full_disk_is_told_and_what_is_done_is_kept(source: Path, place: str) -> None:
    folder = source.parent / "out"
    job = partial(encode, source, folder)
    full = in_child(job, source.parent, fault=Fault(place, full=True))
    assert full.error is not None
    assert "UserError" in full.error
    assert "cannot write: No space left" in full.error
    assert not (folder / "out.npy").exists()
    assert in_child(job, source.parent).error is None
    encode(source, source.parent / "here")
    assert contents(folder) == contents(source.parent / "here")
