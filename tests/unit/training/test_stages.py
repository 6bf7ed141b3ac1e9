"""The data of the stages: read as the files hold them, or with negatives mined by the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hash_encoder import HashEncoder
from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import write_jsonl
from nvembed.core.ownership import MARK, problem_of
from nvembed.data.batch import Mixture, tempered_weights
from nvembed.data.config import DatasetConfig, MiningConfig
from nvembed.data.examples import Example
from nvembed.data.records import PairRecord, StsRecord
from nvembed.mining.miner import mine_negatives
from nvembed.training.config import TrainConfig
from nvembed.training.stage_mining import mine_mixture, mined_dataset, mined_file
from nvembed.training.stages import load_mixtures

WORDS = ["red", "blue", "green", "fox", "owl", "cat", "tree", "lake", "hill", "sun", "moon", "star"]
PAIRS = [PairRecord(f"{word} first", (f"{word} answer",)) for word in WORDS]
STS = [
    StsRecord(f"{word} one", f"{other} two", score)
    for word, other, score in zip(WORDS, WORDS[1:], [5.0, 4.0, 1.0, 4.5] * 3, strict=False)
]
CLASSES = [{"text": f"{word} {kind}", "label": kind} for word in WORDS[:4] for kind in ("a", "b")]
MINE = MiningConfig(strategy="top_k", num_negatives=2, near_duplicate=None)


class Teacher:
    """A hashed bag of words that remembers what it was asked."""

    def __init__(self) -> None:
        self._encoder = HashEncoder()
        self.dimension = self._encoder.dimension
        self.queries: list[tuple[str, str | None]] = []
        self.documents: list[tuple[str, str | None]] = []

    def encode_query(
        self, texts: Sequence[str], /, *, task: str | None = None
    ) -> NDArray[np.float32]:
        self.queries += [(text, task) for text in texts]
        return self._encoder.encode_query(texts, task=task)

    def encode_document(
        self, texts: Sequence[str], /, *, task: str | None = None
    ) -> NDArray[np.float32]:
        self.documents += [(text, task) for text in texts]
        return self._encoder.encode_document(texts, task=task)


def recipe(folder: Path, *, pairs: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    """Pairs in both stages, further pairs in the first one, STS and classes in the second."""
    write_jsonl(folder / "pairs.jsonl", (record.to_json() for record in PAIRS))
    write_jsonl(folder / "sts.jsonl", (record.to_json() for record in STS))
    write_jsonl(folder / "classes.jsonl", CLASSES)
    write_jsonl(folder / "more.jsonl", (record.to_json() for record in PAIRS[:3]))
    stage = {"steps": 1, "batch_size": 2, "learning_rate": 1e-3, "num_negatives": 2}
    stages = [
        {"name": "one", "in_batch_negatives": True, "mixture_temperature": 3.0, **stage},
        {"name": "two", "in_batch_negatives": False, "mixture_temperature": 2.0, **stage},
    ]
    sets: list[dict[str, Any]] = [
        {"name": "pairs", "kind": "retrieval", "instruction": "find", "stages": [1, 2]},
        {"name": "sts", "kind": "sts", "instruction": "compare", "stages": [2]},
        {"name": "classes", "kind": "classification", "instruction": "sort", "stages": [2]},
        {"name": "more", "kind": "retrieval", "instruction": "again", "stages": [1]},
    ]
    sets[0] |= pairs or {}
    data = {
        "output": "run",
        "model": {"backbone": "none"},
        "datasets": [{"path": f"{own['name']}.jsonl", **own} for own in sets],
        "stages": stages,
    }
    return TrainConfig.model_validate({**data, **changes})


def mine(
    config: TrainConfig, folder: Path, stage: int = 1, settings: MiningConfig = MINE
) -> tuple[Mixture, Teacher, list[str]]:
    teacher, said = Teacher(), []
    mixture = mine_mixture(
        config,
        stage,
        settings,
        base_dir=folder,
        mined_dir=folder / "mined",
        teacher=teacher,
        log=said.append,
    )
    return mixture, teacher, said


def examples(mixture: Mixture, name: str, num_negatives: int = 9) -> list[Example]:
    (source,) = [source for source in mixture.sources if source.name == name]
    return [
        source.example(index, np.random.default_rng(0), num_negatives)
        for index in range(len(source))
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_stages_have_their_sets_and_their_temperature(tmp_path: Path) -> None:
    one, two = load_mixtures(recipe(tmp_path), tmp_path)
    assert [source.name for source in one.sources] == ["pairs", "more"]
    assert one.weights == tempered_weights([12, 3], [None, None], 3.0)
    assert [source.name for source in two.sources] == ["pairs", "sts", "classes"]
    assert two.weights == tempered_weights([12, 16, 8], [None] * 3, 2.0)
    assert two.weights != tempered_weights([12, 16, 8], [None] * 3, 1.0)
    assert [example.query for example in examples(one, "pairs")] == [r.query for r in PAIRS]
    assert examples(one, "pairs")[0].negatives == ()


def test_a_stage_that_learns_from_scores_needs_some(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    stages = [stage.model_dump() for stage in config.stages]
    stages[0]["distillation"] = {"weight": 1.0}
    config = recipe(tmp_path, stages=stages)
    with pytest.raises(ConfigError, match=r"stages\.0\.distillation.*no record of pairs, more has"):
        load_mixtures(config, tmp_path)


def test_built_sets_lie_beside_the_recipe(tmp_path: Path) -> None:
    config = recipe(tmp_path, build={"folder": "built"})
    for read in (lambda: load_mixtures(config, tmp_path), lambda: mine(config, tmp_path)):
        with pytest.raises(DataError, match="pairs is not built") as found:
            read()
        assert found.value.where == str(tmp_path / "built")


def test_pairs_and_sts_are_mined_with_their_instruction_and_classes_are_not(
    tmp_path: Path,
) -> None:
    mixture, teacher, said = mine(recipe(tmp_path), tmp_path)
    assert said == [
        "mining 2 negatives per query of pairs",
        "mining 2 negatives per query of sts",
    ]
    assert [source.name for source in mixture.sources] == ["pairs", "sts", "classes"]
    assert mixture.weights == tempered_weights([12, 16, 8], [None] * 3, 2.0)
    # As the miner finds them in the records of each set.
    pairs, pair_report = mine_negatives(PAIRS, None, HashEncoder(), MINE, instruction="find")
    sts, sts_report = mine_negatives(STS, None, HashEncoder(), MINE, instruction="compare")
    assert lines(tmp_path / "mined" / "pairs.jsonl") == [record.to_json() for record in pairs]
    assert lines(tmp_path / "mined" / "sts.jsonl") == [record.to_json() for record in sts]
    for name, report in (("pairs", pair_report), ("sts", sts_report)):
        found = json.loads((tmp_path / "mined" / f"{name}.report.json").read_text())
        assert found == json.loads(json.dumps(report.to_json()))
    asked = dict(teacher.queries)
    assert {asked[record.query] for record in PAIRS} == {"find"}
    assert {asked[r.sentence1] for r in STS if r.score >= 4} == {"compare"}
    assert ("red answer", None) in teacher.documents
    assert not any(text in asked for text in ("red a", "red b"))
    # And so they are trained on.
    for record, example in zip(pairs, examples(mixture, "pairs"), strict=True):
        assert len(example.negatives) == 2
        assert (example.query, set(example.negatives)) == (record.query, set(record.negatives))
        assert (example.positive, example.instruction) == (record.positives[0], "find")
    assert len(examples(mixture, "sts")) == 2 * sum(record.score >= 4 for record in STS)
    assert len(examples(mixture, "classes")) == len(CLASSES)


def test_only_the_sets_of_the_stage_are_mined(tmp_path: Path) -> None:
    mixture, _, said = mine(recipe(tmp_path), tmp_path, stage=0)
    assert [line.rsplit(" ", 1)[1] for line in said] == ["pairs", "more"]
    assert [source.name for source in mixture.sources] == ["pairs", "more"]
    assert mixture.weights == tempered_weights([12, 3], [None, None], 3.0)
    assert sorted(path.name for path in (tmp_path / "mined").iterdir()) == [
        MARK,
        "more.jsonl",
        "more.report.json",
        "pairs.jsonl",
        "pairs.report.json",
    ]
    for name in ("pairs.jsonl", "pairs.report.json"):
        assert problem_of(tmp_path / "mined" / name, "train") is None


def test_mined_files_are_used_as_they_are_and_others_are_made(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    whole, _, _ = mine(config, tmp_path)
    target = tmp_path / "mined" / "pairs.jsonl"
    changed = [{**row, "negative": ["mine"]} for row in lines(target)]
    write_jsonl(target, changed)
    (tmp_path / "mined" / "sts.jsonl").unlink()
    again, teacher, said = mine(config, tmp_path)
    assert said == ["mining 2 negatives per query of sts"]
    assert {task for _, task in teacher.queries} == {"compare"}
    assert lines(target) == changed
    assert {example.negatives for example in examples(again, "pairs")} == {("mine",)}
    assert examples(again, "sts") == examples(whole, "sts")
    _, teacher, said = mine(config, tmp_path)
    assert (said, teacher.queries, teacher.documents) == ([], [], [])


@pytest.mark.parametrize(
    ("most", "places"), [(5, [0, 2, 4, 7, 9]), (12, range(12)), (13, range(12))]
)
def test_of_pairs_only_those_are_mined_that_training_sees(
    tmp_path: Path, most: int, places: Sequence[int]
) -> None:
    config = recipe(tmp_path, pairs={"max_records": most})
    unmined = load_mixtures(config, tmp_path)[1]
    mixture, teacher, _ = mine(config, tmp_path)
    chosen = [PAIRS[place].query for place in places]
    assert [example.query for example in examples(mixture, "pairs")] == chosen
    assert [example.query for example in examples(unmined, "pairs")] == chosen
    assert {text for text, task in teacher.queries if task == "find"} == set(chosen)
    assert all(len(example.negatives) == 2 for example in examples(mixture, "pairs"))


def test_what_answers_a_query_beyond_the_cap_is_not_mined(tmp_path: Path) -> None:
    config = recipe(tmp_path, pairs={"max_records": 5})
    beyond = PairRecord("red first", ("green answer",))  # green is trained on, this record is not
    pairs = [PAIRS[0], beyond, *PAIRS[2:]]
    write_jsonl(tmp_path / "pairs.jsonl", (record.to_json() for record in pairs))
    settings = MINE.model_copy(update={"num_negatives": 4})
    mixture, _, _ = mine(config, tmp_path, settings=settings)
    expected = {f"{WORDS[place]} answer" for place in (4, 7, 9)}
    (red,) = [one for one in examples(mixture, "pairs") if one.query == "red first"]
    assert set(red.negatives) == expected
    assert set(lines(tmp_path / "mined" / "pairs.jsonl")[0]["negative"]) == expected


def test_of_sts_all_are_mined_and_directions_are_chosen(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    datasets = [own.model_dump() for own in config.datasets]
    datasets[1]["max_records"] = 5
    config = recipe(tmp_path, datasets=datasets)
    unmined = load_mixtures(config, tmp_path)[1]
    mixture, teacher, _ = mine(config, tmp_path)
    found = [(example.query, example.positive) for example in examples(mixture, "sts")]
    assert found == [(one.query, one.positive) for one in examples(unmined, "sts")]
    assert len(found) == 5
    asked = {text for text, task in teacher.queries if task == "compare"}
    assert asked >= {record.sentence1 for record in STS if record.score >= 4}
    assert len(lines(tmp_path / "mined" / "sts.jsonl")) == len(STS)


def test_places_are_absolute_and_the_settings_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = recipe(tmp_path, pairs={"weight": 3.5})
    pairs: DatasetConfig = config.datasets[0]
    assert mined_file(pairs, Path("mined")) == tmp_path / "mined" / "pairs.jsonl"
    mined = mined_dataset(pairs, Path("mined"))
    assert mined.path == str(tmp_path / "mined" / "pairs.jsonl")
    kept = ("name", "kind", "instruction", "weight", "stages")
    assert all(getattr(mined, key) == getattr(pairs, key) for key in kept)
