"""The example that searches Python's own documentation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import which_module


def test_documents_are_what_modules_say_of_themselves() -> None:
    found = which_module.descriptions()
    assert len(found) > 100
    assert found["gzip"] == "gzip: Functions that read and write gzipped files."
    assert all(text.startswith(f"{name}: ") for name, text in found.items())
    assert "antigravity" not in found


def test_it_prints_modules_and_says_what_is_missing(
    tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = dict(list(which_module.descriptions().items())[:5])
    monkeypatch.setattr(which_module, "descriptions", lambda: known)
    monkeypatch.setattr(sys, "argv", ["which", str(tiny_decoder_dir), "send an e-mail"])
    assert which_module.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "send an e-mail"
    assert all(line[8:].split(": ")[0] in known for line in lines[2:5])
    monkeypatch.setattr(sys, "argv", ["which", "no/such/folder"])
    assert which_module.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no/such/folder: ")
    assert error.count("\n") == 1
