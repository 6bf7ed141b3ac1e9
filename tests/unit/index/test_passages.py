"""Folders in passages: what is read, what is kept of each, and what a second run changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from hash_encoder import HashEncoder
from nvembed import NVEmbed
from nvembed.core.errors import ConfigError, DataError, UserError
from nvembed.core.files import write_jsonl
from nvembed.index import build, documents
from nvembed.index.build import IndexOptions, index_documents
from nvembed.index.database import Database
from nvembed.index.passages import place_of
from nvembed.index.search import SearchOptions, search_database
from nvembed.model.encoder import load_encoder, reading_limit


class Counting(HashEncoder):
    """Keeps what it embeds."""

    def __init__(self) -> None:
        super().__init__(64)
        self.read: list[str] = []

    def encode_document(self, texts, *, task=None):
        if "bread 42" not in texts:  # the probe
            self.read += texts
        return super().encode_document(texts, task=task)

    def since(self) -> list[str]:
        found, self.read = self.read, []
        return found


def pdf(*pages: str) -> bytes:
    """A PDF file of pages with one line of text each, without a table of places."""
    kids = " ".join(f"{3 + 2 * n} 0 R" for n in range(len(pages)))
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>",
    ]
    font = "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"
    for number, text in enumerate(pages):
        content = f"BT /F 12 Tf 72 720 Td ({text}) Tj ET"
        objects.append(
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents {4 + 2 * number} 0 R"
            f"/Resources<</Font<</F {font}>>>>>>"
        )
        objects.append(f"<</Length {len(content)}>>stream\n{content}\nendstream")
    body, places = "%PDF-1.4\n", []
    for number, one in enumerate(objects, start=1):
        places.append(len(body))
        body += f"{number} 0 obj{one}endobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    size = len(objects) + 1
    return (
        f"{body}xref\n0 {size}\n0000000000 65535 f \n{table}trailer<</Size {size}/Root 1 0 R>>\n"
        f"startxref\n{len(body)}\n%%EOF"
    ).encode()


PAGE = """<html><head><title>Page</title><style>b {}</style></head><body><nav>menu</nav>
<div role="main"><h2>Soup<a class="headerlink" href="#soup">¶</a></h2>
<p>Salt and <a href="x">hot_water</a> boil.</p><pre>x = 1</pre></div><script>no()</script></body>"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "docs"
    (place / "sub").mkdir(parents=True)
    paragraphs = "\n\n".join(f"paragraph {n} tells of number {n}." for n in range(12))
    guide = f"# Guide\n\n{paragraphs}\n\n## Moon\n\nThe moon turns.\n\n## Sea\n\n{paragraphs}\n"
    (place / "a.md").write_text(guide)
    (place / "sub" / "code.py").write_text("import os\n\n\ndef boil(water):\n    return water\n")
    (place / "page.html").write_text(PAGE)
    (place / "paper.pdf").write_bytes(pdf("The first page is about bread.", "Then comes wine."))
    (place / "win.txt").write_bytes(b"one line\r\n\r\nanother line\r\n")
    write_jsonl(place / "rows.jsonl", [{"id": "r", "text": "a row stays whole " * 40, "year": 1}])
    (place / "package.json").write_text('{"name": "no text"}')
    (place / "broken.json").write_text("{")
    (place / "sub" / "data.csv").write_text("x,y\n# a remark\n1,2\n")
    (place / "bad.pdf").write_bytes(b"%PDF-1.4 cut off")
    (place / "table.md").write_bytes(b"head\0\1\2")
    (place / "latin.rst").write_bytes(b"caf\xe9 au lait")
    (place / "notes.md").write_text(" \n")
    for name in ("a.png", "b.png", "LICENSE"):
        (place / name).write_bytes(b"\x89")
    return place


def kept(path: Path) -> dict[str, dict]:
    table = Database.open(path)._table.to_arrow()
    return {row["id"]: row for row in table.to_pylist()}


def index(path: Path, *documents: Path, encoder=None, **options):
    chosen = IndexOptions(**{"passages": "auto", **options})
    return index_documents(path, documents, model=encoder or HashEncoder(64), options=chosen)


def test_a_folder_in_passages(folder: Path, tmp_path: Path) -> None:
    # 40 tokens: rows are cut too where a number is given, so the default is made smaller.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "PASSAGE_TOKENS", 40)
        report = index(tmp_path / "db", folder)
    rows = kept(tmp_path / "db")
    assert report.total == len(rows) == report.added
    assert report.documents == 5
    assert report.passages == 40
    assert str(report.left_out).startswith("10 files left out: 3 unreadable, 2 without texts, ")
    for part in (
        "1 binary",
        "1 empty",
        "3 of other kinds (.png 2, no ending 1)",
    ):
        assert part in str(report.left_out)
    assert "bad.pdf: not readable as PDF" in str(report.left_out)

    assert rows["r"]["text"] == "a row stays whole " * 40
    assert rows["r"]["year"] == 1
    assert rows["r"]["start"] is None
    of = {name: [] for name in ("a.md", "sub/code.py", "page.html", "paper.pdf", "win.txt")}
    for id, row in rows.items():
        if id != "r":
            of[id.partition("#")[0]].append(row)
            assert row["file"] == str(folder / id.partition("#")[0])
    text = (folder / "a.md").read_text()
    assert len(of["a.md"]) > 3
    for row in of["a.md"]:
        assert row["text"] == text[row["start"] : row["end"]]
        assert text.split("\n")[row["line"] - 1] == row["text"].split("\n")[0]
    assert {row["heading"] for row in of["a.md"]} == {"Guide", "Guide > Moon", "Guide > Sea"}
    (code,) = of["sub/code.py"]
    assert code["text"].startswith("import os")
    (page,) = of["page.html"]
    assert page["heading"] == "Page > Soup"
    assert page["text"] == "# Page\n\n## Soup\n\nSalt and hot_water boil.\n\n```\nx = 1\n```"
    assert page["line"] is None
    (paper,) = of["paper.pdf"]
    assert (paper["page"], paper["line"]) == (1, None)
    assert [row["text"] for row in of["win.txt"]] == ["one line\n\nanother line"]


def test_hits_tell_the_place(folder: Path, tmp_path: Path) -> None:
    long = [f"Page {n} is about {word}. {word} " * 6 for n, word in enumerate(["bread", "wine"], 1)]
    (folder / "paper.pdf").write_bytes(pdf(*long))
    index(tmp_path / "db", folder, passages=30)
    database, encoder = Database.open(tmp_path / "db"), HashEncoder(64)
    for query, id, place in (
        ("the moon turns", "a.md", "line 27 · Guide > Moon"),
        ("wine page 2 about", "paper.pdf", "page 2"),
        ("salt water boil soup", "page.html", "characters 0–"),
    ):
        hit = search_database(database, encoder, query, SearchOptions(top_k=1))[0]
        assert hit.id.startswith(f"{id}#")
        assert (place_of(hit.id, hit.fields) or "").startswith(place)
    assert place_of("a#b", {"start": 1, "end": 2}) is None
    assert place_of("a#0123456789ab", {"year": 1}) is None


def test_again_what_is_new(folder: Path, tmp_path: Path) -> None:
    encoder, path = Counting(), tmp_path / "db"
    other = tmp_path / "other"
    other.mkdir()
    (other / "b.md").write_text("kept: of another folder")
    # A row with a field that looks like a place in the folder is no passage.
    foreign = {"id": "mine", "text": "x", "file": f"{folder}/report.md", "start": 1}
    write_jsonl(tmp_path / "mine.jsonl", [foreign])
    index(path, folder, other, tmp_path / "mine.jsonl", encoder=encoder, passages="auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "PASSAGE_TOKENS", 40)
        path = tmp_path / "small"
        index(path, folder, other, tmp_path / "mine.jsonl", encoder=encoder)
    encoder.since()
    before = kept(path)
    report = index(path, folder, encoder=encoder)
    assert (report.added, report.updated, report.deleted) == (0, 0, 0)
    assert encoder.since() == []
    assert kept(path) == before

    text = (folder / "a.md").read_text()
    (folder / "a.md").write_text(
        text.replace("# Guide\n", "# Guide\n\nNew words.\n", 1).replace("moon", "sun")
    )
    (folder / "sub" / "code.py").unlink()
    (folder / "win.txt").write_text("")
    (folder / "paper.pdf").write_bytes(b"%PDF-1.4 cut off")  # cannot be read: what was known stays
    report = index(path, folder, encoder=encoder)
    after = kept(path)
    changed = encoder.since()
    assert 2 <= len(changed) <= 4 < len([id for id in before if id.startswith("a.md")])
    assert "Guide > Moon\n## Moon\n\nThe sun turns." in changed
    assert report.embedded == len(changed)
    gone = before.keys() - after.keys()
    assert report.deleted == len(gone)
    assert {id.partition("#")[0] for id in gone} == {"a.md", "sub/code.py", "win.txt"}
    assert {
        "mine",
        *(id for id in before if id.startswith(("b.md", "paper.pdf"))),
    } <= after.keys()
    # Passages that only moved have their id, vector and new place.
    moved = [id for id in before.keys() & after.keys() if id.startswith("a.md")]
    assert moved
    new = (folder / "a.md").read_text()
    for id in moved:
        assert after[id]["vector"] == before[id]["vector"]
        assert new[after[id]["start"] : after[id]["end"]] == before[id]["text"]


@pytest.mark.parametrize("together", [True, False])
def test_equal_files_under_one_path(tmp_path: Path, together: bool) -> None:
    encoder, path = Counting(), tmp_path / "db"
    texts = {"LICENSE.txt": "You may copy this.", "own.txt": ""}
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
        for name, text in texts.items():
            (folder / name).write_text(text or f"of {folder.name}")

    def run() -> list[int]:
        parts = [folders] if together else [[folder] for folder in folders]
        done = [index(path, *part, encoder=encoder) for part in parts]
        counts = [sum(getattr(one, n) for one in done) for n in ("added", "updated", "deleted")]
        return [*counts, done[-1].total]

    def files() -> list[str]:
        return sorted(row["file"] for row in kept(path).values())

    def there() -> list[str]:
        return sorted(str(file) for file in tmp_path.glob("?/*.txt"))

    assert run() == [6, 0, 0, 6]
    assert files() == there()
    assert len(encoder.since()) == 4  # equal words are embedded once
    assert run() == [0, 0, 0, 6]
    for gone in ("a", "c"):
        (tmp_path / gone / "LICENSE.txt").unlink()
        run()
        assert files() == there()
    # What has moved keeps its ids, which no other file has.
    before = kept(path)
    (tmp_path / "b").rename(tmp_path / "d")
    folders[1] = tmp_path / "d"
    assert run()[0] == 0
    assert kept(path).keys() == before.keys()
    assert files() == there()
    assert encoder.since() == []


def test_a_document_is_deleted_with_its_passages(folder: Path, tmp_path: Path) -> None:
    # A row whose id looks like a passage of the file stays.
    write_jsonl(tmp_path / "rows.jsonl", [{"id": "a.md#own", "text": "a row", "start": 3}])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "PASSAGE_TOKENS", 40)
        index(tmp_path / "db", folder, tmp_path / "rows.jsonl")
    before = kept(tmp_path / "db")
    many = [f"it's not there {n}" for n in range(300)]
    report = index_documents(tmp_path / "db", [], model=None, delete=["r", *many, "a.md"])
    after = kept(tmp_path / "db")
    gone = {id for id in before if id == "r" or id.startswith("a.md#")} - {"a.md#own"}
    assert before.keys() - after.keys() == gone
    assert report.deleted == len(gone) > 4


def test_rows_are_cut_where_a_number_is_given(tmp_path: Path) -> None:
    long = "first sentence of it. second sentence of it. third sentence of it."
    path = tmp_path / "a.csv"
    path.write_text(f"id,text,year\na,{long},1999\nb,short,2000\n")
    report = index(tmp_path / "db", path, passages=6)
    assert report.documents == 2
    rows = kept(tmp_path / "db")
    parts = sorted((r for r in rows.values() if r["document"] == "a"), key=lambda r: r["start"])
    assert [r["text"] for r in parts] == [
        f"{n} sentence of it." for n in ("first", "second", "third")
    ]
    assert all(r["text"] == long[r["start"] : r["end"]] and r["year"] == 1999 for r in parts)
    database = Database.open(tmp_path / "db")
    assert database.fields["start"] == pa.int64()
    path.write_text(f"id,text,year\na,{long.replace('second', 'other')},1999\n")
    report = index(tmp_path / "db", path)  # as it was made
    assert (report.added, report.deleted, report.embedded) == (1, 1, 1)
    assert {r["document"] for r in kept(tmp_path / "db").values()} == {"a", "b"}
    write_jsonl(tmp_path / "c.jsonl", [{"id": "c", "text": "x", "page": "own"}])
    with pytest.raises(DataError, match=r'c.jsonl:1: the row has "page", which passages have'):
        index(tmp_path / "db", tmp_path / "c.jsonl")
    assert index(tmp_path / "db", tmp_path / "c.jsonl", fields=()).added == 1


def test_how_documents_are_cut_is_fixed(folder: Path, tmp_path: Path) -> None:
    for number, (made, wrong) in enumerate(((20, None), (None, 20), ("auto", 256), (20, 30))):
        path = tmp_path / str(number)
        index(path, folder / "a.md", passages=made)
        index(path, folder / "a.md", passages=made)
        with pytest.raises(ConfigError, match="fixed when a database is made"):
            index(path, folder / "a.md", passages=wrong)
        with pytest.raises(ConfigError, match="long is 'late', the database has 'cut'"):
            index(path, folder / "a.md", passages=made, long="late")
    assert kept(tmp_path / "1").keys() == {"a.md"}  # a whole file, as before there were passages
    assert set(kept(tmp_path / "1")["a.md"]) == {"id", "text", "text_hash", "vector"}
    with pytest.raises(ConfigError, match="at least 1"):
        index(tmp_path / "new", folder, passages=0)


def test_a_file_given_by_name_is_read_or_refused(folder: Path, tmp_path: Path) -> None:
    for name, message in (
        ("bad.pdf", "not readable as PDF"),
        ("notes.md", "the file is empty"),
        ("table.md", "a binary file"),
        ("latin.rst", "not UTF-8"),
        ("a.png", "unknown kind of file 'a.png'"),
    ):
        with pytest.raises(DataError, match=message) as error:
            index(tmp_path / "db", folder / name)
        assert str(error.value).startswith(str(folder / name))
    index(tmp_path / "db", folder / "paper.pdf", folder / "sub" / "code.py")
    assert {id.partition("#")[0] for id in kept(tmp_path / "db")} == {"paper.pdf", "code.py"}
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match="no documents in it; expected names that end in"):
        index(tmp_path / "db", tmp_path / "none")


def test_a_library_that_is_missing_is_named(folder: Path, tmp_path: Path, monkeypatch) -> None:
    def absent(name):
        raise ImportError

    monkeypatch.setattr(documents, "import_module", absent)
    with pytest.raises(UserError, match=r"reading HTML needs bs4. pip install 'nvembed\[index\]'"):
        index(tmp_path / "db", folder / "page.html")


def test_passages_fit_the_model(tiny_decoder_dir: Path, folder: Path, tmp_path: Path) -> None:
    encoder = load_encoder(str(tiny_decoder_dir), "float32")
    tokenizer, limit = reading_limit(encoder)
    assert tokenizer is not None
    assert limit == encoder.max_seq_length - 2
    path = tmp_path / "db"
    with pytest.raises(ConfigError, match=f"1 to {limit}, which the model reads"):
        index(path, folder / "a.md", encoder=encoder, passages=limit + 1)
    shutil.rmtree(path)
    index(path, folder / "a.md", encoder=encoder, passages=60)
    for row in kept(path).values():
        headed = f"{row['heading']}\n{row['text']}"
        assert len(tokenizer.encode(headed, add_special_tokens=False).ids) <= 60
        expected = encoder.encode_document([headed])[0]
        assert row["vector"] == pytest.approx(expected, abs=1e-5)


def test_late_passages_are_pooled_states_of_the_document(
    tiny_decoder_dir: Path, tmp_path: Path
) -> None:
    encoder, path = NVEmbed.from_pretrained(tiny_decoder_dir), tmp_path / "db"
    text = (
        "# One\n\nThe first part is so long that it stands alone.\n\n# Two\n\nThe second is too.\n"
    )
    (tmp_path / "a.md").write_text(text)
    (tmp_path / "b.txt").write_text(text.replace("#", "="))
    files = [tmp_path / "a.md", tmp_path / "b.txt"]
    index(path, *files, encoder=encoder, passages=60, long="late")
    rows = sorted((r for r in kept(path).values() if r["id"][0] == "a"), key=lambda r: r["start"])
    assert [row["heading"] for row in rows] == ["One", "Two"]
    border = text.index("# Two")
    assert rows[1]["start"] == border
    ids = (1, *encoder.tokenizer(text, add_special_tokens=False)["input_ids"], 2)
    assert len(ids) == len(text) + 2  # a token is a byte
    with torch.inference_mode():
        hidden_TD = encoder.backbone.states([ids])
        wanted_D = [hidden_TD[: 1 + border].mean(0), hidden_TD[1 + border :].mean(0)]
    for row, wanted in zip(rows, wanted_D, strict=True):
        assert row["vector"] == pytest.approx((wanted / wanted.norm()).numpy(), abs=1e-5)

    before = kept(path)
    files[0].write_text(text.replace("is too", "is so"))
    report = index(path, *files, encoder=encoder)
    after = kept(path)
    assert (report.embedded, report.added, report.updated, report.deleted) == (2, 1, 1, 1)
    first = rows[0]["id"]  # its words are the same, what stands around them is not
    assert after[first]["vector"] != before[first]["vector"]
    assert index(path, *files, encoder=encoder).unchanged == len(after)
    with pytest.raises(ConfigError, match="long is 'cut', the database has 'late'"):
        index(path, *files, encoder=encoder, long="cut")
    for options, model in (({"passages": None}, encoder), ({}, HashEncoder(8))):
        with pytest.raises(ConfigError, match="late chunking"):
            index(tmp_path / "new", *files, encoder=model, long="late", **options)


def test_a_run_that_was_stopped_goes_on(folder: Path, tmp_path: Path, monkeypatch) -> None:
    class Stopped(Counting):
        def encode_document(self, texts, *, task=None):
            if len(self.read) > 4:
                raise KeyboardInterrupt
            return super().encode_document(texts, task=task)

    monkeypatch.setattr(build, "PASSAGE_TOKENS", 40)
    index(tmp_path / "whole", folder)
    monkeypatch.setattr(build, "WINDOW_TEXTS", 3)
    stopped, encoder, path = Stopped(), Counting(), tmp_path / "db"
    with pytest.raises(KeyboardInterrupt):
        index(path, folder, encoder=stopped)
    expected, before = kept(tmp_path / "whole"), kept(path)
    assert 0 < len(before) < len(expected)
    documents = {id.partition("#")[0] for id in before}  # each is there with all its passages
    assert before.keys() == {id for id in expected if id.partition("#")[0] in documents}
    index(path, folder, encoder=encoder)
    assert kept(path) == expected
    assert not set(encoder.read) & {row["text"] for row in before.values()}
    assert len(encoder.read) == len(expected) - len(before)
