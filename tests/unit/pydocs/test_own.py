"""One's own code: a file that `nvembed search` reads, with the summary in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hash_encoder import HashEncoder
from nvembed.encoding.file_search import search_file
from pydocs.own import main

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
    assert hits[1].text.startswith("dew_point(temperature, humidity)\nCompute the dew point")
    assert hits[0].text == "Station()\nRepresent a weather station. It holds sensors."


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere"), "x.jsonl"]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main([str(tmp_path), str(tmp_path / "x.jsonl")]) == 2
    assert "no documented function or class" in capsys.readouterr().err
    assert main([]) == 2
    assert not (tmp_path / "x.jsonl").exists()
