"""Mining through a work folder: the same as in memory, whatever happens on the way."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from faults import Fault, in_child
from forked import in_processes
from hash_encoder import HashEncoder
from nvembed.cli.main import run
from nvembed.core.errors import DataError, ModelError, UserError
from nvembed.core.files import write_jsonl
from nvembed.core.ownership import MARK
from nvembed.data.config import MiningConfig
from nvembed.mining import ranking
from nvembed.mining.corpus import MemoryCorpus, StoredCorpus, nearly_equal, word_overlap, words
from nvembed.mining.miner import Mining, PairFiles, help_mining, mine_file
from nvembed.model import workers

WORDS = ["red", "blue", "green", "fox", "owl", "cat", "tree", "lake"]
WORDS += ["hill", "sun", "moon", "star", "rain", "snow", "wind", "fire"]
CONFIG = MiningConfig(num_negatives=3, search_depth=9, write_scores=True)


def _text(number: int) -> str:
    rng = np.random.default_rng(number)
    return " ".join(rng.choice(WORDS, 6)) + f" {number}"


class NotedEncoder(HashEncoder):
    """Writes what it is asked into a file, since it may be asked in another process."""

    def __init__(self, calls: Path) -> None:
        super().__init__(dimension=64)
        self.calls = calls

    def _encode(self, texts: Sequence[str], task: str | None) -> NDArray[np.float32]:
        with open(self.calls, "a", encoding="utf-8") as file:
            file.write("".join(f"{os.getpid()}\t{text}\n" for text in texts))
        return super()._encode(texts, task)

    def asked(self) -> list[tuple[int, str]]:
        if not self.calls.exists():
            return []
        rows = (line.split("\t") for line in self.calls.read_text("utf-8").splitlines())
        return [(int(process), text) for process, text in rows]


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NotedEncoder:
    """A teacher by the name "o/noted", files of a few texts, and 30 records over 40 documents."""
    made = NotedEncoder(tmp_path.parent / f"{tmp_path.name}-calls")
    monkeypatch.setattr(workers, "load_encoder", lambda name, dtype: made)
    monkeypatch.setattr(ranking, "SHARD_TEXTS", 16)
    monkeypatch.setattr(ranking, "GROUP_QUERIES", 8)
    monkeypatch.chdir(tmp_path)
    pairs = [{"query": f"{WORDS[i % 16]} {i % 25}", "positive": _text(i)} for i in range(30)]
    write_jsonl("pairs.jsonl", pairs)
    write_jsonl("documents.jsonl", ({"text": _text(i)} for i in range(20, 60)))
    return made


def _mine(teacher: Any = "o/noted", **options: Any) -> Any:
    given: dict[str, Any] = {"documents": Path("documents.jsonl"), "dtype": "float32"} | options
    config = given.pop("config", CONFIG)
    return mine_file(Path("pairs.jsonl"), Path("mined.jsonl"), teacher, config, **given)


def _outputs() -> tuple[bytes, dict[str, Any]]:
    report = json.loads(Path("mined.jsonl.report.json").read_text("utf-8"))
    for key in ("teacher", "dtype", "computing"):
        del report[key]
    return Path("mined.jsonl").read_bytes(), report


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.sampled_from(["a", "A ", "b", "b  b", "B b", "", "ü", "\ud800", "c\n"])))
def test_a_stored_pool_is_the_pool(tmp_path_factory: pytest.TempPathFactory, texts: Any) -> None:
    expected = MemoryCorpus(texts)
    with StoredCorpus(iter(texts), tmp_path_factory.getbasetemp()) as pool:
        assert list(pool.texts) == expected.texts
        assert pool.texts[1:3] == expected.texts[1:3]
        for text in [*texts, "not there"]:
            assert pool.find(text) == expected.find(text)


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(["a", "B", "ab", "ß", "ss", "x-y", "İ", "."]), max_size=8),
        min_size=2,
        max_size=2,
    ),
    threshold=st.sampled_from([0.25, 0.5, 0.6, 0.75, 0.9, 1.0]),
)
def test_nearly_equal_is_the_overlap_of_words(texts: list[list[str]], threshold: float) -> None:
    first, second = map(" ".join, texts)
    expected = word_overlap(words(first), words(second)) >= threshold
    assert nearly_equal(first, words(second), threshold) == expected


@pytest.mark.parametrize("kind", ["retrieval", "sts"])
def test_equals_mining_in_memory(encoder: NotedEncoder, tmp_path: Path, kind: Any) -> None:
    config = CONFIG
    if kind == "sts":
        config = CONFIG.model_copy(update={"write_scores": False})
        rows = [{"sentence1": _text(i), "sentence2": _text(i + 9), "score": 4.5} for i in range(30)]
        write_jsonl("pairs.jsonl", rows)
    _mine(HashEncoder(dimension=64), config=config, kind=kind, instruction="Find")
    expected = _outputs()
    _mine(config=config, kind=kind, instruction="Find")
    assert _outputs() == expected
    assert any("negative" in json.loads(line) for line in expected[0].splitlines())
    if kind == "retrieval":  # every text is embedded once
        assert len(encoder.asked()) == len(set(encoder.asked()))
    names = {"pairs.jsonl", "documents.jsonl", "mined.jsonl", "mined.jsonl.report.json"}
    assert {path.name for path in tmp_path.iterdir()} == {*names, MARK}


def test_records_with_instructions_of_their_own(encoder: NotedEncoder) -> None:
    """In files as in memory; changing one instruction embeds the queries of its file again."""
    pairs = [{"query": f"{WORDS[i % 16]} {i % 25}", "positive": _text(i)} for i in range(30)]
    for number in range(0, 30, 3):
        pairs[number]["instruction"] = f"Find {number % 2}"
    write_jsonl("pairs.jsonl", pairs)
    _mine(HashEncoder(dimension=64), instruction="Find")
    expected = _outputs()
    work = Path("work")
    _mine(work=work, instruction="Find")
    assert _outputs() == expected
    asked = len(encoder.asked())
    # Two of the texts are asked for with two instructions, 25 with their own or that of the set.
    queries = {(row["query"], row.get("instruction", "Find")) for row in pairs}
    documents = {row["positive"] for row in pairs} | {_text(i) for i in range(20, 60)}
    assert asked == len(queries) + len(documents)
    pairs[0]["instruction"] = "Find more"
    write_jsonl("pairs.jsonl", pairs)
    _mine(work=work, instruction="Find")
    assert len(encoder.asked()) == asked + 16


def test_a_kept_folder_saves_embedding(
    encoder: NotedEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Path("work")
    _mine(work=work)
    first, asked = _outputs(), len(encoder.asked())
    # Another rule needs the same vectors and the same search.
    _mine(work=work, config=MiningConfig(strategy="top_k", num_negatives=2, search_depth=9))
    monkeypatch.setattr(workers, "load_encoder", lambda *_: pytest.fail("loaded"))
    _mine(work=work)
    assert _outputs() == first
    assert len(encoder.asked()) == asked
    monkeypatch.setattr(workers, "load_encoder", lambda *_: encoder)
    # Documents that come at the end leave all files but the last as they are.
    write_jsonl("documents.jsonl", ({"text": _text(i)} for i in range(20, 70)))
    _mine(work=work)
    new = [text for _, text in encoder.asked()[asked:]]
    assert {_text(i) for i in range(60, 70)} <= set(new)
    assert len(new) <= 10 + ranking.SHARD_TEXTS
    # Another instruction, or another model, has vectors of its own.
    asked = len(encoder.asked())
    _mine(work=work, instruction="Find")
    assert len(encoder.asked()) == asked + len({f"{WORDS[i % 16]} {i % 25}" for i in range(30)})
    Path("o/noted").mkdir(parents=True)
    Path("o/noted/config.json").write_text("{}")
    _mine(work=work)
    assert len(encoder.asked()) > asked + 60


def _place(tmp_path: Path, number: int) -> Path:
    folder = tmp_path / f"attempt-{number}"
    folder.mkdir()
    for name in ("pairs.jsonl", "documents.jsonl"):
        shutil.copy(tmp_path / name, folder)
    os.chdir(folder)
    return folder


def test_killed_anywhere_and_run_again_gives_the_same_bytes(
    encoder: NotedEncoder, tmp_path: Path
) -> None:
    _mine()
    expected = _outputs()
    whole = in_child(_mine, _place(tmp_path, 0))
    assert whole.error is None, whole.error
    assert len(whole.operations) > 20
    asked = len(encoder.asked()) // 2
    # Every seventh operation in a place of its own, and at all of them one after the other.
    for number in range(1, len(whole.operations), 7):
        folder = _place(tmp_path, number)
        assert in_child(_mine, folder, fault=Fault(number)).died
        before = len(encoder.asked())
        assert in_child(_mine, folder).error is None
        assert len(encoder.asked()) - before <= asked
        assert _outputs() == expected
        assert [path.name for path in folder.glob(".*")] == [MARK]
    folder, kills = _place(tmp_path, -1), 0
    while in_child(_mine, folder, fault=Fault(6 + 2 * kills)).died:
        kills += 1
    assert kills > 3
    assert _outputs() == expected


def test_a_full_disk_is_told_and_loses_nothing(encoder: NotedEncoder, tmp_path: Path) -> None:
    _mine()
    expected = _outputs()
    for number, place in enumerate([r"vectors-", r"near-", r"\.mined\.jsonl\."], start=1):
        folder = _place(tmp_path, number)
        full = in_child(_mine, folder, fault=Fault(place, full=True))
        assert full.error is not None
        assert "UserError" in full.error
        assert "cannot write: No space left" in full.error
        assert not (folder / "mined.jsonl").exists()
        assert in_child(_mine, folder).error is None
        assert _outputs() == expected


def test_two_processes_share_the_work(encoder: NotedEncoder) -> None:
    _mine()
    expected, asked = _outputs(), len(encoder.asked())
    command = ["mine", "pairs.jsonl", "mined.jsonl", "--teacher", "o/noted", "--dtype", "float32"]
    command += ["--documents", "documents.jsonl", "num_negatives=3", "search_depth=9"]
    command += ["write_scores=true", "--work", "work"]
    assert in_processes(run, command) == [0, 0]
    assert _outputs() == expected
    new = encoder.asked()[asked:]
    # Together they embedded what one does, no text twice.
    assert sorted(text for _, text in new) == sorted(text for _, text in encoder.asked()[:asked])
    assert {process for process, _ in new}.isdisjoint({os.getpid()})


def test_commands_at_once_with_one_folder_agree(encoder: NotedEncoder) -> None:
    _mine()
    expected, asked = _outputs(), len(encoder.asked())
    in_processes(functools.partial(_alone, Path("work")))
    assert _outputs() == expected
    assert len(encoder.asked()) == 2 * asked


def _alone(work: Path) -> None:
    for name in ("RANK", "WORLD_SIZE"):  # two commands, not two processes of a launcher
        os.environ.pop(name, None)
    _mine(work=work)


def test_launched_processes_need_a_folder(
    encoder: NotedEncoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(["mine", "pairs.jsonl", "mined.jsonl", "--teacher", "o/noted"]) == 2
    assert "--work: several processes share it; expected a folder" in capsys.readouterr().err


def test_what_cannot_be_used_leaves_no_folder(
    encoder: NotedEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise ModelError("no such model")

    monkeypatch.setattr(workers, "load_encoder", fail)
    with pytest.raises(ModelError):
        _mine()
    Path("documents.jsonl").write_text('{"text": ""}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r'documents\.jsonl:1: "text" is empty'):
        _mine()
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl", "documents.jsonl"}


def test_a_damaged_file_is_named(encoder: NotedEncoder) -> None:
    _mine(work=Path("work"))
    damaged = next(Path("work").glob("vectors-*.npy"))
    damaged.write_bytes(damaged.read_bytes()[:50])
    for near in Path("work").glob("near-*.npy"):
        near.unlink()
    with pytest.raises(UserError, match=rf"{damaged.name}: cannot be read .* Delete it"):
        _mine(work=Path("work"))
    damaged.unlink()
    _mine(work=Path("work"))


def test_a_run_that_goes_on_keeps_the_type_it_was_begun_with(
    encoder: NotedEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine measures otherwise the second time; helpers are bound by the first, too."""
    loaded: list[str | None] = []
    monkeypatch.setattr(
        workers, "load_encoder", lambda name, dtype: (loaded.append(dtype), encoder)[1]
    )
    monkeypatch.setattr(ranking, "SHARD_TEXTS", 4)
    measured = ["bfloat16"]
    monkeypatch.setattr("nvembed.kernels.machine.fastest_precision", lambda device: measured[-1])
    asked, limit = encoder._encode, [2]

    def dying(texts: Sequence[str], task: str | None) -> NDArray[np.float32]:
        limit[0] -= 1
        if limit[0] < 0:
            raise KeyboardInterrupt
        return asked(texts, task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "_encode", dying)
        with pytest.raises(KeyboardInterrupt):
            _mine(dtype="auto", work=Path("work"))
    measured.append("float32")
    files = PairFiles(Path("pairs.jsonl"), "retrieval", "records", {}, Path("documents.jsonl"))
    help_mining(files, Mining("o/noted", CONFIG, None, dtype="auto"), Path("work"))
    _mine(dtype="auto", work=Path("work"))
    assert set(loaded) == {"bfloat16"}
    texts = [text for _, text in encoder.asked()]
    assert len(texts) == len(set(texts))  # nothing was embedded in two types
    report = json.loads(Path("mined.jsonl.report.json").read_text("utf-8"))
    assert report["dtype"] == report["computing"]["dtype"] == "bfloat16"


def test_vectors_of_other_kernels_are_not_taken(
    encoder: NotedEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvembed.kernels.machine.kernels", lambda: ["onednn"])
    _mine(work=Path("work"))
    before = len(encoder.asked())
    _mine(work=Path("work"))
    assert len(encoder.asked()) == before
    monkeypatch.setattr("nvembed.kernels.machine.kernels", list)
    _mine(work=Path("work"))
    assert len(encoder.asked()) == 2 * before


def test_a_cluster_settles_on_what_its_workers_are_fastest_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    class Ray:
        """A cluster with GPUs, of a process that has none."""

        def remote(self, function: Any) -> Any:
            return SimpleNamespace(options=lambda **needs: self.task(needs))

        def task(self, needs: Any) -> Any:
            asked.update(needs)
            return SimpleNamespace(remote=lambda choice: (choice, "bfloat16"))

        def get(self, answer: Any) -> Any:
            assert answer[0] == "auto"
            return answer[1]

    monkeypatch.setattr(workers, "join_cluster", lambda: (Ray(), "GPU", 2))
    monkeypatch.setattr("nvembed.kernels.machine.fastest_precision", lambda device: "float32")
    assert workers.settle_for("ray", "m", "auto") == "bfloat16"
    assert asked == {"num_gpus": 1}
    assert workers.settle_for("ray", "m", "float32") == "float32"
    assert ranking.settled_dtype("m", "auto", tmp_path, "ray") == "bfloat16"
