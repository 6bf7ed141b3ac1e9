"""Teachers beside models: BM25, endpoints, cross-encoders, workers of ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hash_encoder import HashEncoder
from nvembed.core.errors import ConfigError, ModelError
from nvembed.core.files import read_jsonl, write_jsonl
from nvembed.core.ownership import MARK
from nvembed.data.config import MiningConfig
from nvembed.data.loading import read_records
from nvembed.data.records import PairRecord
from nvembed.mining import ranking
from nvembed.mining.miner import mine_file, mine_negatives
from nvembed.model import workers
from oracles import bm25 as bm25_oracle

DOCUMENTS = [
    "the cat sat on the mat",
    "a cat and another cat ran away from the mat",
    "the dog sat on the cat",
    "a moon far away",
    "dogs and cats",
    "the mat on the moon is a mat for a cat",
]
ROWS = [
    {"query": "cat on the mat", "positive": DOCUMENTS[0]},
    {"query": "moon far away", "positive": [DOCUMENTS[3]]},
    {"query": "words of none", "positive": [DOCUMENTS[4]]},
]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl("in.jsonl", ROWS)
    write_jsonl("documents.jsonl", ({"text": text} for text in DOCUMENTS))


def _mined(teacher: Any, config: MiningConfig, **options: Any) -> list[PairRecord]:
    documents = Path("documents.jsonl")
    mine_file(Path("in.jsonl"), Path("out.jsonl"), teacher, config, documents=documents, **options)
    return read_records("out.jsonl", "retrieval")


def test_bm25_as_teacher_equals_its_loops(tmp_path: Path) -> None:
    config = MiningConfig(num_negatives=9, near_duplicate=None, write_scores=True)
    pool = list(dict.fromkeys([*(DOCUMENTS[i] for i in (0, 3, 4)), *DOCUMENTS]))
    for record, row in zip(_mined("bm25", config), ROWS, strict=True):
        scores = bm25_oracle.rank(pool, str(row["query"]))
        (positive,) = record.positives
        level = 0.95 * scores.get(pool.index(positive), 0.0)
        near = sorted(scores, key=lambda n: (-scores[n], n))
        expected = [n for n in near if pool[n] != positive and scores[n] < level]
        assert record.negatives == tuple(pool[n] for n in expected)
        assert record.negative_scores == pytest.approx([scores[n] for n in expected], rel=1e-6)
    assert read_records("out.jsonl", "retrieval")[0].negatives
    # The third query shares no word with its positive: nothing can be said about others.
    assert read_records("out.jsonl", "retrieval")[2].negatives == ()
    names = {"in.jsonl", "documents.jsonl", "out.jsonl", "out.jsonl.report.json"}
    assert {path.name for path in tmp_path.iterdir()} == {*names, MARK}


class LengthScorer:
    """Scores a pair by the length of the document; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        self.asked += pairs
        return np.array([len(document) / 64 for _, document in pairs], dtype=np.float32)


def test_scores_of_a_cross_encoder_replace_the_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = LengthScorer()
    monkeypatch.setattr(ranking, "load_cross_encoder", lambda name: scorer)
    config = MiningConfig(
        num_negatives=9, near_duplicate=None, write_scores=True, rerank="by length"
    )
    records = [PairRecord("cat on the mat", (DOCUMENTS[2],))]
    mined, report = mine_negatives(records, DOCUMENTS, HashEncoder(), config)
    # 22 characters are the positive's; the others come longest first, below 95 % of that.
    expected = [DOCUMENTS[3], DOCUMENTS[4]]
    assert mined[0].negatives == tuple(expected)
    assert mined[0].positive_scores == (22 / 64,)
    assert mined[0].negative_scores == (15 / 64, 13 / 64)
    assert report.mean_positive_score == 22 / 64
    assert {query for query, _ in scorer.asked} == {"cat on the mat"}
    # Only the nearest by cosine are scored again.
    scorer.asked.clear()
    shallow = config.model_copy(update={"rerank_depth": 2, "write_scores": False})
    mine_negatives(records, DOCUMENTS, HashEncoder(), shallow)
    assert len(scorer.asked) == 2 + 1


def test_scores_of_a_cross_encoder_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = LengthScorer()
    monkeypatch.setattr(workers, "load_encoder", lambda *_: HashEncoder())
    monkeypatch.setattr(ranking, "load_cross_encoder", lambda name: scorer)
    config = MiningConfig(near_duplicate=None, rerank="by/length", num_negatives=2)
    options: dict[str, Any] = {"dtype": "float32", "work": Path("work")}
    first = _mined("o/hash", config, **options)
    asked = len(scorer.asked)
    assert asked
    assert _mined("o/hash", config, **options) == first
    assert len(scorer.asked) == asked

    def broken(_: Any) -> NDArray[np.float32]:
        return np.array([np.nan], dtype=np.float32)

    monkeypatch.setattr(ranking, "load_cross_encoder", lambda name: broken)
    other = config.model_copy(update={"rerank": "o/broken"})
    with pytest.raises(ModelError, match="the cross-encoder gave no score"):
        _mined("o/hash", other, **options)


@pytest.mark.slow
def test_a_real_cross_encoder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "cross"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "mat", "moon", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    config = transformers.BertConfig(vocab_size=9, num_hidden_layers=1, num_labels=1, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    transformers.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(folder)
    score = ranking.load_cross_encoder(str(folder))
    scores = score([("cat", "mat"), ("moon", "dog")])
    assert scores.shape == (2,)
    assert scores.dtype == np.float32
    with pytest.raises(ModelError, match="cannot be loaded"):
        ranking.load_cross_encoder(str(tmp_path / "nothing"))


@pytest.mark.slow
def test_ray_workers_write_the_same_files(
    monkeypatch: pytest.MonkeyPatch, tiny_decoder_dir: Path, request: pytest.FixtureRequest
) -> None:
    ray = pytest.importorskip("ray")
    request.addfinalizer(ray.shutdown)
    config = MiningConfig(num_negatives=2, near_duplicate=None)
    monkeypatch.setattr(ranking, "SHARD_TEXTS", 2)
    options: dict[str, Any] = {"dtype": "float32"}
    expected = _mined(str(tiny_decoder_dir), config, work=Path("local"), **options)
    made = sorted(path.name for path in Path("local").glob("vectors-*"))
    monkeypatch.setattr(workers, "load_encoder", lambda *_: pytest.fail("loaded here"))
    assert _mined(str(tiny_decoder_dir), config, work=Path("ray"), engine="ray", **options) == (
        expected
    )
    assert sorted(path.name for path in Path("ray").glob("vectors-*")) == made
    for name in made:
        assert Path("ray", name).read_bytes() == Path("local", name).read_bytes()


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        ("http://localhost/v1", {}, "--teacher-model: an endpoint serves models by name"),
        ("folder", {"teacher_model": "m"}, "only endpoints take a name"),
        ("bm25", {"config": MiningConfig(strategy="margin")}, "strategy margin is made for cosine"),
        ("bm25", {"engine": "ray"}, "--engine: there is nothing to embed"),
    ],
)
def test_what_does_not_go_together(teacher: str, options: dict[str, Any], message: str) -> None:
    config = options.pop("config", MiningConfig())
    with pytest.raises(ConfigError, match=message):
        _mined(teacher, config, **options)


def test_the_report_says_how_many_may_be_positives() -> None:
    class Given:
        dimension = 2

        def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> Any:
            return np.array([[1.0, 0.0]] * len(texts), dtype=np.float32)

        def encode_document(self, texts: Sequence[str], *, task: str | None = None) -> Any:
            cosines = np.array([float(text) for text in texts], dtype=np.float32)
            return np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)

    corpus = ["0.9", "0.79", "0.77", "0.7", "0.65", "0.3"]
    config = MiningConfig(num_negatives=4, near_duplicate=None)
    _, report = mine_negatives([PairRecord("q", ("0.8",))], corpus, Given(), config)
    # The positive scores .8. Mined: .7, .65, .3 (below .76); nearest: .9, .79, .77, .7.
    rows = [(row.of_positive, row.mined, row.nearest) for row in report.near_positive]
    assert rows[0] == (0.8, pytest.approx(2 / 3), 1.0)
    assert rows[1:] == [(0.9, 0.0, 0.75), (0.95, 0.0, 0.75), (1.0, 0.0, 0.25)]
    (sample,) = report.samples
    assert [scored.text for scored in sample.refused] == ["0.9", "0.79", "0.77"]
    assert [scored.text for scored in sample.negatives] == ["0.7", "0.65", "0.3"]
    assert json.loads(json.dumps(report.to_json()))["near_positive"][3]["nearest"] == 0.25


def test_rows_are_numbered_as_in_the_file() -> None:
    # The output keeps other keys, whatever the teacher.
    write_jsonl("in.jsonl", (row | {"id": number} for number, row in enumerate(ROWS)))
    _mined("bm25", MiningConfig())
    assert [row["id"] for _, row in read_jsonl("out.jsonl")] == [0, 1, 2]
