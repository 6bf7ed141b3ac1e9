"""Which pairs a folder of documents gives, and what is told where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvembed.building.own_documents import FEWEST, read_own
from nvembed.building.own_pairs import INSTRUCTIONS, OwnPairs
from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import write_jsonl
from nvembed.data.records import PairRecord

pytest.importorskip("lancedb", reason="needs the extra nvembed[index]")

LONG = "\n\n".join(f"Paragraph {n} of this long section tells of number {n}." for n in range(40))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Enough small files to make a training of."""
    place = tmp_path / "docs"
    place.mkdir()
    for n in range(FEWEST):
        (place / f"filler-{n}.markdown").write_text(
            f"# Filler {n}\n\nThis is what filler {n} holds.\n"
        )
    return place


def pairs(folder: Path) -> dict[str, tuple[str, ...]]:
    found = read_own(folder, {})
    assert len(found.records) == len(found.sources)
    texts = {}
    for record in found.records:
        assert isinstance(record, PairRecord)
        texts[record.query] = record.positives
    return {query: text for query, text in texts.items() if not query.startswith("Filler")}


def test_headings_ask_for_what_is_below_them(folder: Path) -> None:
    (folder / "a.md").write_text(
        f"# The *guide*\n\nIt begins with an introduction.\n\n## Moon\n\nThe moon turns around the "
        f"earth.\n\n### Light\n\nIt shines at night.\n\n## Sea\n\n{LONG}\n\n## Too short\n\nNo.\n"
    )
    found = pairs(folder)
    assert found["The guide"] == ("It begins with an introduction.",)
    assert found["The guide > Moon"] == (
        "The moon turns around the earth.\n\n### Light\n\nIt shines at night.",
    )
    sea = found.pop("The guide > Sea")
    assert len(sea) > 1  # a long section has several passages
    assert "\n\n".join(sea) == LONG
    assert found.keys() == {"The guide", "The guide > Moon"}
    assert read_own(folder, {}).notes == ()


def test_files_without_one_title_are_called_by_their_name(folder: Path) -> None:
    (folder / "first_steps.markdown").write_text(
        f"# Install\n\nCall pip to install everything.\n\n# Start\n\n{LONG}\n"
    )
    (folder / "boil.py").write_text(
        'def boil(water):\n    """Boil water until it is hot."""\n    return water\n\n\n'
        f"class Pot:\n    '''A pot of {LONG}'''\n"
    )
    found = pairs(folder)
    assert found["first steps > Install"] == ("Call pip to install everything.",)
    assert found["boil > boil"] == ('"""Boil water until it is hot."""\n    return water',)
    assert {*found} == {*(f"first steps > {n}" for n in ("Install", "Start")), "boil > boil"} | {
        "boil > Pot"
    }


def test_equal_headings_of_files_are_one_query(folder: Path) -> None:
    text = "# Tool\n\n## Usage\n\nCall it with the argument {} first.\n"
    for name in ("a", "b"):
        (folder / f"{name}.md").write_text(text.format(name))
    found = read_own(folder, {})
    both = [n for n, one in enumerate(found.records) if one.query == "Tool > Usage"]
    assert found.records[both[0]].positives == (
        "Call it with the argument a first.",
        "Call it with the argument b first.",
    )
    assert found.sources[both[0]] == {str(folder / "a.md"), str(folder / "b.md")}
    assert len(both) == 1


def test_a_text_below_several_headings_answers_none(folder: Path) -> None:
    for name in ("a", "b"):
        licence = "Everybody may do everything with it."
        (folder / f"{name}.md").write_text(f"# {name}\n\n## Licence\n\n{licence}\n")
    assert pairs(folder) == {}
    told = "1 passages left out that stand below several headings"
    assert read_own(folder, {}).notes == (told,)


def test_what_gives_no_pairs_is_told(folder: Path) -> None:
    (folder / "plain.txt").write_text("A text without any heading in it.\n")
    (folder / "notes.js").write_text("// code that has no outline at all\n")
    (folder / "notes.md").write_text("\n")
    write_jsonl(folder / "rows.jsonl", [{"text": "a row of a table"}])
    found = read_own(folder, {}, instruction="Find it")
    assert found.config.instruction == "Find it"
    first = folder / "notes.js"
    assert found.notes == (
        f"2 of {FEWEST + 2} files gave no pairs: no headings (the first is {first})",
        "2 files left out: 1 empty, 1 of other kinds (.jsonl 1)",
    )
    assert read_own(folder, {}).config.instruction == INSTRUCTIONS["retrieval"]


def refused(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_own(folder, {})
    return str(caught.value)


def test_too_few_pairs_are_refused(tmp_path: Path, folder: Path) -> None:
    (folder / "filler-0.markdown").write_text("A text without any heading in it.\n")
    told = refused(folder)
    assert told.startswith(
        f"{folder}: only {FEWEST - 1} headings have passages of their own below them (1 of {FEWEST}"
    )
    assert f"expected a folder with at least {FEWEST}, or a file of pairs" in told
    assert "nvembed data synthesize" in told
    (tmp_path / "empty").mkdir()
    assert "no documents in it" in refused(tmp_path / "empty")
    write_jsonl(tmp_path / "empty" / "corpus.jsonl", [{"_id": "d", "text": "a text"}])
    assert "only 0 headings" in refused(tmp_path / "empty")  # half a BEIR folder
    with pytest.raises(ConfigError, match="--column: a folder of documents has no columns"):
        read_own(folder, {"query": "title"})
    with pytest.raises(DataError, match="none: no such file or folder"):
        read_own(tmp_path / "none", {})


def test_files_go_the_ordinary_way(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("question,answer\nq,a\n")
    assert read_own(tmp_path / "own.csv", {}) == OwnPairs(
        read_own(tmp_path / "own.csv", {}).config, (PairRecord("q", ("a",)),)
    )
