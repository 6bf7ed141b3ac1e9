"""One's own code: a file that `nvembed search` reads, with the summary in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hash_encoder import HashEncoder
from nvembed.encoding.file_search import search_file
from pydocs.own import main
from pydocs.report import next_commands

ROOT = Path(__file__).parents[3]

SOURCE = '''
def dew_point(temperature, humidity):
    """Compute the dew point of moist air."""

class Station:
    """Represent a weather station.

    It holds sensors.
    """

def undocumented():
    pass
'''


def test_own_code_is_searchable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "src" / "weather").mkdir(parents=True)
    (tmp_path / "src" / "weather" / "air.py").write_text(SOURCE, encoding="utf-8")
    output = tmp_path / "docs.jsonl"
    assert main([str(tmp_path / "src"), str(output)]) == 0
    assert capsys.readouterr().out == f"2 documents written to {output}\n"
    hits = search_file(HashEncoder(), output, "weather station sensors", task=None, top_k=2)
    assert [hit.id for hit in hits] == ["weather.air.Station", "weather.air.dew_point"]
    assert hits[1].text.startswith(
        "Compute the dew point of moist air.\ndew_point(temperature, humidity)"
    )
    assert hits[0].text == "Represent a weather station.\nStation()\nIt holds sensors."


def test_the_command_that_the_demo_names_runs(tmp_path: Path) -> None:
    (tmp_path / "air.py").write_text(SOURCE, encoding="utf-8")
    named = dict(next_commands(Path("runs/demo")))["search your own Python"].splitlines()[0]
    command = named.replace("path/to/your/code", str(tmp_path)).replace(
        "my-docs", str(tmp_path / "d")
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    subprocess.run(command, shell=True, check=True, cwd=ROOT, env=environment)
    assert len((tmp_path / "d.jsonl").read_text("utf-8").splitlines()) == 2


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere"), "x.jsonl"]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main([str(tmp_path), str(tmp_path / "x.jsonl")]) == 2
    assert "no documented function or class" in capsys.readouterr().err
    assert main([]) == 2
    assert not (tmp_path / "x.jsonl").exists()
