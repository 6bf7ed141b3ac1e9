"""The run that is left alone, which others are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_decoder_dir: Path) -> dict[str, Any]:
    """The run that is left alone; in this process, so that its children have all modules loaded."""
    from tiny_run import command, trace, write_inputs

    folder = tmp_path_factory.mktemp("whole")
    write_inputs(folder, tiny_decoder_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVEMBED_CACHE", "")  # put back after the run
        code, _, err = command(folder)
    assert code == 0, err
    found = trace(folder)
    rows = found["metrics"]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    assert rows[0]["recomputed"] > 0.2
    assert 0.1 != rows[0]["temperature"] != rows[1]["temperature"]
    assert "mined/two/pairs.jsonl" in found
    return found


@pytest.fixture
def folder(tmp_path: Path, tiny_decoder_dir: Path) -> Path:
    from tiny_run import write_inputs

    write_inputs(tmp_path, tiny_decoder_dir)
    return tmp_path
