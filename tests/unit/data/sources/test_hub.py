"""Sets on the hub: local folders laid out like them, and what the libraries say when it fails."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

datasets = pytest.importorskip("datasets")
hub = pytest.importorskip("huggingface_hub")

from nvembed.core.errors import SourceError
from nvembed.data.config import DatasetConfig
from nvembed.data.loading import open_dataset
from nvembed.data.records import Converted, LabelRecord, PairRecord
from nvembed.data.sources.hub import through_buffer
from nvembed.data.sources.rows import Row

CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: qrels/train.jsonl}, {split: test, path: qrels/test.jsonl}]
- config_name: corpus
  data_files: [{split: corpus, path: corpus.jsonl}]
- config_name: queries
  data_files: [{split: queries, path: queries.jsonl}]
---
"""
COMMIT = "ec0fa4fe99da2ff19ca1214b7966684033a58814"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def entry(location: dict[str, Any], **keys: Any) -> DatasetConfig:
    values = {"name": "s", "hub": location, "kind": "retrieval", "instruction": None}
    return DatasetConfig.model_validate(values | keys)


def records(folder: Path, config: DatasetConfig) -> list[Any]:
    rows = list(open_dataset(config, base_dir=folder).rows)
    assert all(isinstance(row, Converted) for row in rows)
    return [row.record for row in rows if isinstance(row, Converted)]


@pytest.mark.parametrize("streaming", [False, True])
def test_mteb_layout_by_its_configurations(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "mteb" / "nfcorpus"
    write(
        folder / "corpus.jsonl",
        [{"_id": f"MED-{n}", "title": "", "text": f"doc {n}"} for n in range(9)],
    )
    write(folder / "queries.jsonl", [{"_id": f"PLAIN-{n}", "text": f"query {n}"} for n in range(9)])
    write(
        folder / "qrels/train.jsonl", [{"query-id": "PLAIN-7", "corpus-id": "MED-1", "score": 1.0}]
    )
    write(
        folder / "qrels/test.jsonl", [{"query-id": "PLAIN-8", "corpus-id": "MED-2", "score": 1.0}]
    )
    (folder / "README.md").write_text(CARD)
    config = entry({"id": "mteb/nfcorpus", "streaming": streaming}, layout="beir")
    opened = open_dataset(config, base_dir=tmp_path)
    assert list(opened.rows) == [
        Converted(PairRecord("query 7", ("doc 1",)), "mteb/nfcorpus train row 1")
    ]
    assert (opened.rows_read, opened.revision) == (1, None)


def test_renamed_columns_of_a_set_are_named(tmp_path: Path) -> None:
    write(tmp_path / "org/squad/train.jsonl", [{"question": "q", "context": "c"}])
    columns = {"query": "question", "positive": "answer"}
    with pytest.raises(SourceError) as caught:
        open_dataset(entry({"id": "org/squad"}, columns=columns), base_dir=tmp_path)
    assert 'org/squad train: no column "answer" for "positive"' in str(caught.value)
    assert "columns found: question, context" in str(caught.value)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ({"config": "pairs"}, r"org/set pairs train: .*'pairs' not found.*Correct `hub.config`"),
        ({"split": "dev"}, r'org/set dev: Unknown split "dev".*train.*Correct `hub.split`'),
        ({"files": ["no.jsonl"]}, r"no\.jsonl: no such file"),
    ],
)
def test_unknown_parts_of_a_set(tmp_path: Path, location: dict[str, Any], message: str) -> None:
    write(tmp_path / "org/set/train.jsonl", [{"query": "q", "positive": "p"}])
    with pytest.raises(SourceError, match=message):
        open_dataset(entry({"id": "org/set"} | location), base_dir=tmp_path)


def test_a_set_with_a_script_is_read_by_its_files(tmp_path: Path) -> None:
    write(tmp_path / "org/set/a/train.jsonl.gz", [["q", "p"]])
    write(tmp_path / "org/set/b/train.jsonl.gz", [["r", "s"]])
    (tmp_path / "org/set/set.py").write_text("raise SystemExit\n")
    with pytest.raises(SourceError, match=r"comes with a loading script.*`hub.files`"):
        open_dataset(entry({"id": "org/set"}), base_dir=tmp_path)
    files = ["a/train.jsonl.gz", "b/train.jsonl.gz"]
    columns = {"query": "0", "positive": "1"}
    assert records(tmp_path, entry({"id": "org/set", "files": files}, columns=columns)) == [
        PairRecord("q", ("p",)),
        PairRecord("r", ("s",)),
    ]


@pytest.mark.parametrize(
    "how",
    [{}, {"streaming": True}, {"files": ["train.jsonl"]}, {"streaming": True, "shuffle_buffer": 7}],
)
def test_take_draws_rows_at_random_and_the_same_ones_again(
    tmp_path: Path, how: dict[str, Any]
) -> None:
    rows = [{"title": f"t{n}", "subreddit": f"s{n % 5}"} for n in range(200)]
    write(tmp_path / "org/reddit/train.jsonl", rows)
    config = entry(
        {"id": "org/reddit", "take": 50} | how,
        kind="clustering",
        columns={"text": "title", "label": "subreddit"},
    )
    found = records(tmp_path, config)
    assert found == records(tmp_path, config)
    numbers = [int(record.text[1:]) for record in found]
    assert len(set(numbers)) == 50
    assert numbers != sorted(numbers)
    assert all(
        record == LabelRecord(f"t{n}", f"s{n % 5}")
        for record, n in zip(found, numbers, strict=True)
    )
    if "shuffle_buffer" not in how:  # drawn from everywhere, not from the beginning
        assert 70 < sum(numbers) / 50 < 130


def test_buffer_holds_no_more_than_its_size_and_loses_nothing() -> None:
    taken: list[int] = []

    def rows() -> Iterator[Row]:
        for number in range(100):
            taken.append(number)
            yield Row("", {"n": number})

    shuffled = through_buffer(rows(), 10, random.Random(0))
    first = next(shuffled)
    assert len(taken) == 11
    numbers = [row.values["n"] for row in (first, *shuffled) if isinstance(row, Row)]
    assert sorted(numbers) == list(range(100))
    assert numbers != list(range(100))


# --- What the libraries raise ---------------------------------------------------------------------


def raiser(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def http_error(kind: type[Exception], text: str) -> Exception:
    """An error of the hub's client; its response plays no part in the explanation."""
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


ERRORS = hub.errors
FAILURES: list[tuple[str, Exception, str]] = [
    ("gated", http_error(ERRORS.GatedRepoError, "403"), r"the set is gated.*hf auth login"),
    (
        "absent",
        http_error(ERRORS.RepositoryNotFoundError, "404"),
        "no such set on the hub, or a pri",
    ),
    ("revision", http_error(ERRORS.RevisionNotFoundError, "404"), "no revision 'v9'"),
    (
        "offline",
        ConnectionError("Couldn't reach 'org/set' on the Hub"),
        "the hub cannot be reached",
    ),
    ("other", ValueError("something\n new"), r"cannot be read \(ValueError: something new\)"),
]


@pytest.mark.parametrize(
    ("error", "message"), [entry[1:] for entry in FAILURES], ids=[entry[0] for entry in FAILURES]
)
def test_failures_are_explained(
    tmp_path: Path, error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the commit is asked for, and with a pinned one where the set is loaded."""
    monkeypatch.setattr(hub.HfApi, "dataset_info", raiser(error))
    with pytest.raises(SourceError, match=f"^org/set train: {message}"):
        open_dataset(entry({"id": "org/set", "revision": "v9"}), base_dir=tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", raiser(error))
    message = message.replace("v9", COMMIT)
    with pytest.raises(SourceError, match=f"^org/set train: {message}"):
        open_dataset(entry({"id": "org/set", "revision": COMMIT}), base_dir=tmp_path)


def test_the_commit_is_noted_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load(*place: Any, **keys: Any) -> Any:
        calls.append((place, keys["revision"]))
        return datasets.Dataset.from_list([{"query": "q", "positive": "p"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(
        hub.HfApi, "dataset_info", lambda *_, **__: hub.hf_api.DatasetInfo(id="org/set", sha=COMMIT)
    )
    opened = open_dataset(entry({"id": "org/set", "config": "c"}), base_dir=tmp_path)
    assert opened.revision == COMMIT
    assert calls == [(("org/set", "c"), COMMIT)]
    # without network what was downloaded before is used
    monkeypatch.setattr(
        hub.HfApi, "dataset_info", raiser(hub.errors.OfflineModeIsEnabled("offline"))
    )
    opened = open_dataset(entry({"id": "org/set", "config": "c"}), base_dir=tmp_path)
    assert (opened.revision, calls[1]) == (None, (("org/set", "c"), None))


def test_tables_of_one_set_are_read_at_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {
        None: [{"query-id": 1, "corpus-id": 2.0, "score": 1}],
        "queries": [{"_id": "1", "text": "q"}],
        "corpus": [{"_id": "2", "text": "d"}],
    }
    calls: list[Any] = []

    def load(name: str, config: str | None, *, split: str, revision: str, streaming: bool) -> Any:
        calls.append((name, config, split, revision, streaming))
        return datasets.Dataset.from_list(tables[config])

    commits = iter([COMMIT, "f" * 40])  # someone pushes in between
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(
        hub.HfApi,
        "dataset_info",
        lambda *_, **__: hub.hf_api.DatasetInfo(id="org/set", sha=next(commits)),
    )
    assert records(tmp_path, entry({"id": "org/set"}, layout="beir")) == [PairRecord("q", ("d",))]
    assert calls == [
        ("org/set", None, "train", COMMIT, False),
        ("org/set", "queries", "queries", COMMIT, False),
        ("org/set", "corpus", "corpus", COMMIT, False),
    ]


def test_scored_sets_have_a_split_in_three_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {
        "scores": [{"query_id": 0, "document_ids": [3, 9, 4], "scores": [0.91, 0.80, -1.0]}],
        "queries": [{"query_id": 0, "query": "q"}],
        "documents": [{"document_id": n, "document": f"d{n}"} for n in range(10)],
    }
    splits: list[str] = []

    def load(_: str, config: str, *, split: str, **__: Any) -> Any:
        splits.append(split)
        return datasets.Dataset.from_list(tables[config])

    monkeypatch.setattr(datasets, "load_dataset", load)
    place = {"id": "org/mined", "config": "scores", "split": "fiqa", "revision": COMMIT}
    assert records(tmp_path, entry(place, layout="scored")) == [
        PairRecord("q", ("d3",), ("d9",), (0.91,), (0.80,))
    ]
    assert splits == ["fiqa"] * 3


def test_a_stream_that_breaks_off_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield from [{"query": f"q{n}", "positive": "p"} for n in range(2500)]
        raise ConnectionError("reset by peer")

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    config = entry({"id": "org/set", "revision": COMMIT, "streaming": True})
    opened = open_dataset(config, base_dir=tmp_path)
    with pytest.raises(SourceError, match=r"org/set train: after row 2000: the hub cannot be reac"):
        list(opened.rows)


def test_files_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloaded, or read over the network; places name the set and the file."""
    write(tmp_path / "stored.jsonl.gz", [{"query": "q", "positive": "p"}])
    asked: list[str] = []

    def download(name: str, file: str, *, repo_type: str, revision: str) -> str:
        asked.append(f"{repo_type} {name} {file} {revision}")
        return str(tmp_path / "stored.jsonl.gz")

    def stream(_: Any, path: str, mode: str) -> Any:
        asked.append(path)
        return open(tmp_path / "stored.jsonl.gz", mode)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub.HfFileSystem, "open", stream)
    location = {"id": "org/set", "revision": COMMIT, "files": ["en/train.jsonl.gz"]}
    for streaming in (False, True):
        opened = open_dataset(entry(location | {"streaming": streaming}), base_dir=tmp_path)
        expected = Converted(PairRecord("q", ("p",)), "org/set/en/train.jsonl.gz:1")
        assert list(opened.rows) == [expected]
        assert opened.revision == COMMIT
    assert asked == [
        f"dataset org/set en/train.jsonl.gz {COMMIT}",
        f"datasets/org/set@{COMMIT}/en/train.jsonl.gz",
    ]
    gone = http_error(hub.errors.RemoteEntryNotFoundError, "404 Entry Not Found")
    monkeypatch.setattr(hub, "hf_hub_download", raiser(gone))
    with pytest.raises(SourceError, match="org/set: no such file in the set"):
        open_dataset(entry(location), base_dir=tmp_path)


def test_without_the_library_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    write(tmp_path / "org/set/train.jsonl", [{"query": "q", "positive": "p"}])
    with pytest.raises(SourceError, match=r"needs the library datasets.*nvembed\[data\]"):
        open_dataset(entry({"id": "org/set"}), base_dir=tmp_path)
