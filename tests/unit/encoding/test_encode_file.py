from __future__ import annotations

import errno
import io
import json
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from hash_encoder import HashEncoder
from nvembed.cli.main import run
from nvembed.core.errors import ConfigError, DataError, ModelError, UserError
from nvembed.core.files import write_jsonl
from nvembed.core.ownership import MARK
from nvembed.encoding import files
from nvembed.encoding.files import encode_file
from nvembed.encoding.outputs import OutputFormat
from nvembed.model import bulk as embed
from nvembed.model import workers
from nvembed.model.embedder import NVEmbed
from nvembed.model.settings import LongTexts

ROWS: list[dict[str, Any]] = [
    {"_id": "d1", "title": "Lists", "text": "sort in place"},
    {"_id": 2, "title": "", "text": "open a file"},
    {"_id": "d3", "text": "sum\u2028of numbers"},
]
TEXTS = ["Lists sort in place", "open a file", "sum\u2028of numbers"]


class CountingEncoder(HashEncoder):
    """Notes the side, the task and the number of texts of every call."""

    def __init__(self) -> None:
        super().__init__(32)
        self.calls: list[tuple[str, str | None, int]] = []

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> NDArray[np.float32]:
        self.calls.append(("query", task, len(texts)))
        return super().encode_query(texts, task=task)

    def encode_document(
        self, texts: Sequence[str], *, task: str | None = None
    ) -> NDArray[np.float32]:
        self.calls.append(("document", task, len(texts)))
        return super().encode_document(texts, task=task)


@pytest.mark.parametrize("ending", [".npy", ".parquet"])
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "WINDOW_TEXTS", 16)
    output, ids = tmp_path / f"out{ending}", [f"{n:05d} " + "id " * 3000 for n in range(320)]
    write_jsonl(tmp_path / "few.jsonl", [{"id": id, "text": id[:5]} for id in ids[:32]])
    write_jsonl(tmp_path / "many.jsonl", [{"id": id, "text": id[:5]} for id in ids])  # 2.9 MB
    peaks = []
    for name in ("few", "few", "many"):  # the first imports
        tracemalloc.start()
        encode_file(HashEncoder(8), tmp_path / f"{name}.jsonl", output, task=None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 500_000
    if ending == ".npy":
        assert json.loads(output.with_name("out.npy.ids.json").read_text()) == ids
    else:
        assert pq.read_table(output)["id"].to_pylist() == ids


def test_an_input_that_changes_while_it_is_read_is_told(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", ROWS)

    class Cutting(HashEncoder):
        def encode_document(
            self, texts: Sequence[str], *, task: str | None = None
        ) -> NDArray[np.float32]:
            write_jsonl(tmp_path / "in.jsonl", ROWS[:2])
            return super().encode_document(texts, task=task)

    with pytest.raises(DataError, match="the input changed while it was read"):
        encode_file(Cutting(), tmp_path / "in.jsonl", tmp_path / "out.npy", task=None)
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
def test_rows_come_out_in_order_with_their_ids(tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / name, ROWS)
    output = tmp_path / "new" / "out.npy"
    done = encode_file(HashEncoder(), tmp_path / name, output, task=None)
    vectors = np.load(output)
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, HashEncoder().encode_document(TEXTS))
    assert (done.rows, done.dimension, done.output) == (3, 256, output)
    assert done.ids == output.with_name("out.npy.ids.json")
    assert json.loads(done.ids.read_text(encoding="utf-8")) == ["d1", "2", "d3"]
    assert np.load(output, mmap_mode="r").shape == (3, 256)


def test_windows_change_nothing_and_a_task_makes_queries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": f"text number {i}", "text": "no", "title": "no"} for i in range(10)]
    write_jsonl(tmp_path / "in.jsonl", rows)
    monkeypatch.setattr(embed, "WINDOW_TEXTS", 4)
    encoder = CountingEncoder()
    output = tmp_path / "out.npy"
    done = encode_file(
        encoder, tmp_path / "in.jsonl", output, task="Find it", columns={"text": "question"}
    )
    assert encoder.calls == [("query", "Find it", n) for n in (4, 4, 2)]
    texts = [row["question"] for row in rows]
    assert np.array_equal(np.load(output), HashEncoder(32).encode_query(texts, task="Find it"))
    assert done.ids is None


def test_ids_of_an_earlier_run_do_not_stay(tmp_path: Path) -> None:
    output = tmp_path / "out.npy"
    write_jsonl(tmp_path / "with.jsonl", ROWS)
    encode_file(HashEncoder(), tmp_path / "with.jsonl", output, task=None)
    write_jsonl(tmp_path / "without.jsonl", [{"text": "a"}])
    encode_file(HashEncoder(), tmp_path / "without.jsonl", output, task=None)
    assert not (tmp_path / "out.npy.ids.json").exists()
    assert np.load(output).shape == (1, 256)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ['{"text": "a"}', '{"txt": "b"}'],
            r':2: no column "text"; found: txt \(--column text=NAME',
        ),
        (['{"text": "a"}', "", '{"text": " "}'], r':3: "text" is empty'),
        (['{"text": 3}'], r':1: "text" is not a text'),
        (['{"text": "\\ud800"}'], r":1: .*lone surrogate"),
        (['{"text": "a"}', '{"text": "b", "id": 1}'], r":2: only some lines have an id"),
        (['{"_id": "x", "text": "a"}', '{"text": "b"}'], r":2: this line has no id"),
        (['{"_id": [1], "text": "a"}'], r":1: the id is neither"),
        (['{"text": "a"', ""], r":1: not valid JSON"),
        ([""], r"in\.jsonl: the file holds no texts"),
    ],
)
def test_bad_lines_stop_before_the_model_is_loaded(
    tmp_path: Path, lines: list[str], message: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        encode_file("no-such/model", source, tmp_path / "out.npy", task=None)
    assert list(tmp_path.iterdir()) == [source]


def test_missing_files_and_models_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        encode_file(HashEncoder(), tmp_path / "none.jsonl", tmp_path / "out.npy", task=None)
    write_jsonl(tmp_path / "in.jsonl", ROWS)
    with pytest.raises(ModelError, match="no such model folder"):
        encode_file("./no-such-model", tmp_path / "in.jsonl", tmp_path / "out.npy", task=None)
    with pytest.raises(ConfigError, match="same file"):
        encode_file(HashEncoder(), tmp_path / "in.jsonl", tmp_path / "in.jsonl", task=None)
    # A name of the hub is looked for when the work has begun, of which nothing is left.
    with pytest.raises(ModelError):
        encode_file("no-such/model", tmp_path / "in.jsonl", tmp_path / "out.npy", task=None)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    # But for parts of an earlier run.
    part = tmp_path / "out.npy.parts" / f"document-{'0' * 32}.npy"
    part.parent.mkdir()
    part.write_bytes(b"")
    with pytest.raises(ModelError):
        encode_file("no-such/model", tmp_path / "in.jsonl", tmp_path / "out.npy", task=None)
    assert part.exists()


def test_a_failing_run_leaves_the_earlier_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "in.jsonl", ROWS)
    output = tmp_path / "out.npy"
    encode_file(HashEncoder(), tmp_path / "in.jsonl", output, task=None)
    before = output.read_bytes()
    names = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(embed, "WINDOW_TEXTS", 2)

    class FailingEncoder(HashEncoder):
        def encode_document(
            self, texts: Sequence[str], *, task: str | None = None
        ) -> NDArray[np.float32]:
            vectors = super().encode_document(texts, task=task)
            return vectors * np.float32(np.nan) if len(texts) == 1 else vectors

    with pytest.raises(ModelError, match="NaN or infinity"):
        encode_file(FailingEncoder(), tmp_path / "in.jsonl", output, task=None)

    def full(file: Any, **arrays: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(embed.np, "savez", full)
    with pytest.raises(UserError, match="No space left"):
        encode_file(HashEncoder(), tmp_path / "in.jsonl", output, task=None)
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_killed_run_goes_on_and_writes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": i, "text": f"text number {i}"} for i in range(10)]
    write_jsonl(tmp_path / "in.jsonl", rows)
    monkeypatch.setattr(embed, "WINDOW_TEXTS", 3)
    monkeypatch.setattr(files, "computed_fingerprint", lambda model, dtype: "m")
    calls: list[int] = []

    class Dying(HashEncoder):
        def encode_document(
            self, texts: Sequence[str], *, task: str | None = None
        ) -> NDArray[np.float32]:
            calls.append(len(texts))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().encode_document(texts, task=task)

    monkeypatch.setattr(workers, "load_encoder", lambda model, dtype: Dying())
    output = tmp_path / "out.npy"
    with pytest.raises(KeyboardInterrupt):
        encode_file("o/m", tmp_path / "in.jsonl", output, task=None)
    assert not output.exists()
    (tmp_path / ".out.npy.x1y2z3w4.nvembed-new").write_text("what kill -9 leaves")
    done = encode_file("o/m", tmp_path / "in.jsonl", output, task=None)
    assert calls == [3, 3, 3, 3, 1]
    assert done.rows == 10
    wanted = HashEncoder().encode_document([row["text"] for row in rows])
    assert np.array_equal(np.load(output), wanted)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"in.jsonl", "out.npy", "out.npy.ids.json", "out.npy.run.json", MARK}


@pytest.mark.parametrize("damaged", [False, True])
def test_a_machine_that_measures_otherwise_after_a_kill_does_not_mix_types(
    damaged: bool, tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flip is forced between two starts: the second goes on in the type of the first."""
    write_jsonl(tmp_path / "in.jsonl", [{"text": f"text number {i}"} for i in range(10)])
    monkeypatch.setattr(embed, "WINDOW_TEXTS", 3)
    model, output = str(tiny_decoder_dir), tmp_path / "out.npy"
    wanted = {}
    for dtype in ("float32", "bfloat16"):
        done = encode_file(
            model, tmp_path / "in.jsonl", tmp_path / f"{dtype}.npy", task=None, dtype=dtype
        )
        assert done.dtype == dtype
        wanted[dtype] = np.load(done.output)
    assert not np.array_equal(wanted["float32"], wanted["bfloat16"])
    measured = ["float32"]
    monkeypatch.setattr("nvembed.kernels.machine.fastest_precision", lambda device: measured[-1])
    save, saved = embed.save_part, []

    def dying(path: Path, part: embed.Part) -> None:
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "save_part", dying)
        with pytest.raises(KeyboardInterrupt):
            encode_file(model, tmp_path / "in.jsonl", output, task=None, dtype="auto")
    measured.append("bfloat16")
    if damaged:  # what was begun is not known: nothing of it is taken
        (tmp_path / "out.npy.parts" / "begun.json").write_text('{"model"')
    done = encode_file(model, tmp_path / "in.jsonl", output, task=None, dtype="auto")
    expected = "bfloat16" if damaged else "float32"
    assert done.dtype == expected
    assert np.array_equal(np.load(output), wanted[expected])
    record = json.loads((tmp_path / "out.npy.run.json").read_text())
    assert record["model"] == model
    assert record["computing"]["dtype"] == expected
    assert "processor" in record["computing"]


def test_parts_of_other_kernels_are_not_taken(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = []
    for kernels in (["onednn"], ["onednn"], ["onednn", "attention"], []):
        monkeypatch.setattr("nvembed.kernels.machine.kernels", lambda kernels=kernels: kernels)
        named.append(files.computed_fingerprint(str(tiny_decoder_dir), "float32"))
    assert named[0] == named[1]
    assert len(set(named)) == 3


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_all_workers_are_given_the_settled_type(
    engine: Any, tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "in.jsonl", [{"text": "one"}])
    monkeypatch.setattr("nvembed.kernels.machine.fastest_precision", lambda device: "bfloat16")
    given = []

    @contextmanager
    def pool(*arguments: Any) -> Iterator[Any]:
        loader = arguments[-1]
        given.append(loader.dtype)

        def submit(function: Any, *rest: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result(function(loader.encoder, *rest))
            return future

        yield SimpleNamespace(size=2, submit=submit)

    monkeypatch.setattr(embed, "process_pool", pool)
    monkeypatch.setattr(embed, "ray_pool", pool)
    task = SimpleNamespace(remote=lambda choice: choice)
    remote = SimpleNamespace(options=lambda **needs: task)
    cluster = SimpleNamespace(remote=lambda function: remote, get=lambda choice: "float32")
    monkeypatch.setattr("nvembed.model.workers.join_cluster", lambda: (cluster, "CPU", 2))
    encode_file(
        str(tiny_decoder_dir),
        tmp_path / "in.jsonl",
        tmp_path / "out.npy",
        task=None,
        dtype="auto",
        processes=2,
        engine=engine,
    )
    assert given == ["bfloat16" if engine == "local" else "float32"]


def test_the_command_says_in_one_line_what_it_computes_in(
    tmp_path: Path,
    tiny_decoder_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_jsonl(tmp_path / "in.jsonl", [{"text": "one"}])
    monkeypatch.setattr("nvembed.kernels.machine.fastest_precision", lambda device: "float32")
    words = ["encode", str(tiny_decoder_dir), "--input", str(tmp_path / "in.jsonl")]
    assert run([*words, "--output", str(tmp_path / "out.npy")]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "computing in" in line]
    assert line.startswith("computing in float32 (this CPU ")
    assert line.endswith("; fix with --dtype)")
    assert run([*words, "--output", str(tmp_path / "out.npy"), "--dtype", "float32"]) == 0
    assert "computing in" not in capsys.readouterr().err
    assert run(["encode", str(tmp_path / "no"), *words[2:], "--output", "x.npy"]) == 2
    assert capsys.readouterr().err.startswith("error: ")  # and nothing before it
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    assert run(["encode", str(broken), *words[2:], "--output", str(tmp_path / "x.npy")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_parquet_with_ids_and_bad_lines_left_out(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("key,body\na,first\nb,\nc,third\n")
    output = tmp_path / "out.parquet"
    done = encode_file(
        HashEncoder(32),
        [tmp_path / "in.csv"],
        output,
        task=None,
        columns={"text": "body", "id": "key"},
        keep_going=True,
    )
    assert done.skipped is not None
    assert (done.rows, done.skipped.count) == (2, 1)
    assert done.skipped.first[0].place == f"{tmp_path / 'in.csv'}:3"
    table = pq.read_table(output).to_pydict()
    assert table["id"] == ["a", "c"]
    wanted = HashEncoder(32).encode_document(["first", "third"])
    assert np.array_equal(np.array(table["embedding"], dtype=np.float32), wanted)
    with pytest.raises(ConfigError, match="int8 in Parquet"):
        encode_file(
            HashEncoder(), tmp_path / "in.csv", output, task=None, form=OutputFormat(None, "int8")
        )


def test_stdin_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"one\ntwo\n")))
    encode_file(HashEncoder(), Path("-"), tmp_path / "out.npy", task=None)
    assert np.array_equal(
        np.load(tmp_path / "out.npy"), HashEncoder().encode_document(["one", "two"])
    )


def test_a_lance_table_is_what_lancedb_opens(tmp_path: Path, monkeypatch) -> None:
    lancedb = pytest.importorskip("lancedb")
    monkeypatch.setattr(embed, "WINDOW_TEXTS", 4)
    rows = [{"id": i, "text": f"text number {i}"} for i in range(10)]
    write_jsonl(tmp_path / "in.jsonl", rows)
    output = tmp_path / "new" / "out.lance"
    for _ in range(2):  # the second replaces the first
        done = encode_file(HashEncoder(32), tmp_path / "in.jsonl", output, task=None)
        assert (done.rows, done.dimension, done.ids) == (10, 32, None)
        table = lancedb.connect(output.parent).open_table("out").to_arrow().to_pydict()
        assert table["id"] == [str(i) for i in range(10)]
        wanted = HashEncoder(32).encode_document([row["text"] for row in rows])
        assert np.array_equal(np.array(table["embedding"], dtype=np.float32), wanted)
        names = {path.name for path in output.parent.iterdir()}
        assert names == {"out.lance", "out.lance.run.json", MARK}
    (tmp_path / "mine.lance").mkdir()
    (tmp_path / "mine.lance" / "notes.txt").write_text("do not delete")
    with pytest.raises(ConfigError, match=r"nvembed did not make it: notes\.txt"):
        encode_file(HashEncoder(), tmp_path / "in.jsonl", tmp_path / "mine.lance", task=None)
    form = OutputFormat(None, "uint8")
    with pytest.raises(ConfigError, match="uint8 in Lance"):
        encode_file(HashEncoder(), tmp_path / "in.jsonl", output, task=None, form=form)


LONG_ROWS = [
    {"id": "a", "text": "The quick brown fox jumps over the lazy dog. " * 9},
    {"id": "b", "text": "short"},
    {"id": "c", "text": "Pack my box with five dozen liquor jugs. " * 4},
]


def test_long_texts_by_windows_and_by_chunks(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    pytest.importorskip("lancedb")
    write_jsonl(tmp_path / "in.jsonl", LONG_ROWS)
    model = NVEmbed.from_pretrained(tiny_decoder_dir, max_tokens=64, device="cpu")
    texts = [str(row["text"]) for row in LONG_ROWS]

    def encode(name: str, long: LongTexts) -> Path:
        done = encode_file(model, tmp_path / "in.jsonl", tmp_path / name, task=None, long=long)
        return done.output

    windows = LongTexts("windows", overlap=8)
    found = np.load(encode("w.npy", windows))
    np.testing.assert_allclose(found, model.encode_document(texts, long=windows), atol=1e-5)
    late = LongTexts("late", chunk_tokens=100)
    wanted = model.encode_chunks(texts, long=late)
    names = ["a#0", "a#1", "a#2", "a#3", "a#4", "b#0", "c#0", "c#1"]
    np.testing.assert_allclose(
        np.load(encode("c.npy", late)), np.concatenate([w.vectors for w in wanted]), atol=1e-5
    )
    assert json.loads((tmp_path / "c.npy.ids.json").read_text()) == names
    spans = [span for chunks in wanted for span in chunks.spans]
    assert np.load(tmp_path / "c.npy.spans.npy").tolist() == [list(span) for span in spans]
    table = pq.read_table(encode("c.parquet", late)).to_pydict()
    assert table["id"] == names
    assert list(zip(table["start"], table["end"], strict=True)) == spans
    encode("w.npy", LongTexts())
    assert not (tmp_path / "w.npy.spans.npy").exists()
    with pytest.raises(ConfigError, match="cannot read long texts by 'late'"):
        encode_file(HashEncoder(), tmp_path / "in.jsonl", tmp_path / "x.npy", task=None, long=late)


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK not a zip")
    with pytest.raises(DataError, match=r"x\.npz: cannot be read .* made again"):
        embed.read_part(tmp_path / "x.npz")
