from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml

from nvembed.building import set_build
from nvembed.building.build import build_recipe
from nvembed.building.set_build import BuildContext
from nvembed.cli.main import run
from nvembed.core.config import load_config
from nvembed.core.errors import DataError, SourceError
from nvembed.core.files import alone_in, read_jsonl, write_jsonl
from nvembed.data.config import DatasetConfig, MiningConfig
from nvembed.data.loading import read_records, training_datasets
from nvembed.data.records import BadRow, Converted, LabelRecord, PairRecord, StsRecord
from nvembed.data.sources.rows import OpenedDataset
from nvembed.mining.miner import mine_file
from nvembed.training.config import TrainConfig
from nvembed.training.stages import load_mixtures
from tiny_build import CLASSES, KINDS, PAIRS, STS, contents, write_inputs


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_inputs(tmp_path)


def build(recipe: Path, *arguments: str) -> int:
    return run(["data", "build", str(recipe), *arguments])


def manifest(recipe: Path, name: str) -> dict[str, Any]:
    return json.loads((recipe.parent / "built" / name / "manifest.json").read_text())


def same(text: str) -> str:
    return " ".join(text.lower().split())


def plain_pairs() -> list[PairRecord]:
    """What the pairs must become before mining, in plain loops."""
    found: dict[str, list[str]] = {}
    spelled: dict[str, str] = {}
    for row in PAIRS:
        query, positive = row["query"], row["positive"]
        if not positive or same(positive) == same(query) or same(query) == "what is asked":
            continue
        spelled.setdefault(same(query), query)
        texts = found.setdefault(same(query), [])
        if same(positive) not in map(same, texts):
            texts.append(positive)
    return [PairRecord(spelled[key], tuple(texts)) for key, texts in found.items()]


def test_pairs_are_those_of_plain_loops(recipe: Path) -> None:
    assert build(recipe) == 0
    whole = plain_pairs()
    kept = [whole[i] for i in sorted({-(-i * len(whole) // 30) for i in range(30)})]
    write_jsonl(recipe.parent / "kept.jsonl", (record.to_json() for record in kept))
    documents = ({"text": text} for record in whole for text in record.positives)
    write_jsonl(recipe.parent / "documents.jsonl", documents)
    report = mine_file(
        recipe.parent / "kept.jsonl",
        recipe.parent / "expected.jsonl",
        "bm25",
        MiningConfig(num_negatives=2, strategy="top_k"),
        documents=recipe.parent / "documents.jsonl",
    )
    expected = read_records(recipe.parent / "expected.jsonl", "retrieval")
    folder = recipe.parent / "built" / "pairs"
    assert read_records(folder, "retrieval") == expected
    assert all(len(record.negatives) == 2 for record in expected)
    found = manifest(recipe, "pairs")
    assert found["steps"]["read"] == {
        "in": len(PAIRS),
        "out": len(PAIRS) - 2,
        "refused": 2,
        "source_rows": len(PAIRS),
    }
    assert found["steps"]["distinct"] == {
        "in": len(PAIRS) - 2,
        "out": len(PAIRS) - 4,
        "equal": 1,
        "merged": 1,
    }
    assert found["steps"]["decontaminate"] == {
        "in": len(PAIRS) - 4,
        "out": len(whole),
        "rules": {"exact": 1},
        "tasks": {"task": 1},
    }
    assert found["steps"]["select"]["beyond_cap"] == len(whole) - 30
    assert found["steps"]["mine"]["negatives"] == report.negatives == 60
    refused = [row for _, row in read_jsonl(folder / "refused.jsonl")]
    assert [row["place"].rpartition(":")[2] for row in refused] == ["6", "10"]
    assert "empty list" in refused[0]["problem"]
    assert "query itself" in refused[1]["problem"]
    (dropped,) = [row for _, row in read_jsonl(folder / "contaminated.jsonl")]
    assert dropped["place"].endswith(f"pairs.jsonl:{len(PAIRS)}")
    assert dropped["found"] == ["What is  asked"]


def test_positives_beyond_the_cap_are_no_negatives(tmp_path: Path) -> None:
    """The same question under two instructions is two records, of which the cap keeps the first."""
    pairs = []
    for number in range(6):
        query = f"colour number {number}"
        pairs.append({"query": query, "positive": f"{query} is red", "instruction": "first"})
        pairs.append({"query": query, "positive": f"{query} is blue", "instruction": "second"})
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    mine = {"teacher": "bm25", "strategy": "top_k", "num_negatives": 20}
    dataset = {"name": "pairs", "path": "pairs.jsonl", "kind": "retrieval", "instruction": "find"}
    stage = {"name": "one", "steps": 1, "in_batch_negatives": True}
    config = TrainConfig.model_validate(
        {
            "output": "run",
            "model": {"backbone": "none"},
            "datasets": [{**dataset, "max_records": 6, "stages": [1]}],
            "stages": [stage],
            "build": {"folder": "built", "mine": mine},
        }
    )
    build_recipe(config, base_dir=tmp_path, folder="built")
    records = read_records(tmp_path / "built" / "pairs", "retrieval")
    everything = {row["positive"] for row in pairs}
    assert len(records) == 6
    for record in records:
        own = {f"{record.query} is red", f"{record.query} is blue"}
        assert set(record.negatives) == everything - own


def test_bare_texts_stand_once_and_none_is_of_a_task(recipe: Path) -> None:
    texts = ["one", "two", "ONE ", "what is asked", "three"]
    write_jsonl(recipe.parent / "bare.jsonl", [{"text": text} for text in texts])
    config = yaml.safe_load(recipe.read_text())
    config["datasets"] += [{**config["datasets"][0], "name": "bare", "kind": "text"}]
    config["datasets"][-1] |= {"path": "bare.jsonl", "max_records": 2}
    for stage in config["stages"]:
        stage["teacher"] = {"model": "any"}
    recipe.write_text(yaml.safe_dump(config))
    assert build(recipe) == 0
    records = read_records(recipe.parent / "built" / "bare", "text")
    assert [record.text for record in records] == ["one", "three"]
    found = manifest(recipe, "bare")
    assert "mine" not in found["steps"]
    assert found["steps"]["select"]["beyond_cap"] == 1


def test_shards_have_a_fixed_length_and_the_checksums_of_the_manifest(recipe: Path) -> None:
    assert build(recipe) == 0
    found = manifest(recipe, "pairs")
    assert [shard["rows"] for shard in found["shards"]] == [12, 12, 6]
    for shard in found["shards"]:
        path = recipe.parent / "built" / "pairs" / shard["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        assert pyarrow.parquet.read_metadata(path).num_rows == shard["rows"]
    assert found["rows"] == 30
    assert found["licence"] is None
    assert manifest(recipe, "sts")["licence"] == "CC0-1.0"


def test_classes_with_one_text_go(recipe: Path) -> None:
    assert build(recipe) == 0
    folder = recipe.parent / "built" / "classes"
    assert read_records(folder, "classification") == [
        LabelRecord(row["text"], row["label"]) for row in CLASSES if row["label"] != "single"
    ]
    assert manifest(recipe, "classes")["steps"]["select"]["unusable_classes"] == 1
    ((_, refused),) = read_jsonl(folder / "refused.jsonl")
    assert "'single' has one text only" in refused["problem"]
    assert refused["place"].endswith(f":{len(CLASSES)}")


def test_a_second_build_does_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(recipe) == 0
    table = capsys.readouterr().out
    assert "nothing to do" not in table
    cells = next(line for line in table.splitlines() if line.strip().startswith("pairs")).split()
    assert cells == ["pairs", str(len(PAIRS)), "2", "2", "1", "16", "60", "30", "built"]
    before = {path: path.stat().st_mtime_ns for path in recipe.parent.rglob("*")}
    assert build(recipe) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in recipe.parent.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "rebuilt"),
    [
        ("build.rows_per_shard=13", set(KINDS)),
        ("build.mine.num_negatives=1", {"pairs", "sts"}),
        ("datasets.2.licence=MIT", {"classes"}),
        ("datasets.0.instruction=look", {"pairs"}),
        ("datasets.2.instruction=look", set()),
        ("datasets.0.weight=2", set()),
        ("seed=1", set()),
    ],
)
def test_what_a_change_of_the_recipe_builds_again(
    recipe: Path, change: str, rebuilt: set[str]
) -> None:
    assert build(recipe) == 0
    before = {name: (recipe.parent / "built" / name).stat().st_ino for name in KINDS}
    assert build(recipe, change) == 0
    after = {name: (recipe.parent / "built" / name).stat().st_ino for name in KINDS}
    assert {name for name in KINDS if before[name] != after[name]} == rebuilt


def test_changed_inputs_are_seen(recipe: Path) -> None:
    assert build(recipe) == 0
    write_jsonl(recipe.parent / "sts.jsonl", STS[:-2])
    assert build(recipe) == 0
    assert manifest(recipe, "sts")["rows"] == len(STS) - 2
    queries = recipe.parent / "task" / "queries.jsonl"
    queries.write_text(queries.read_text().replace("What is  asked", "Red Red"))
    before = manifest(recipe, "pairs")
    assert build(recipe) == 0
    assert manifest(recipe, "pairs")["inputs"]["tasks"] != before["inputs"]["tasks"]
    texts = {record.query for record in read_records(recipe.parent / "built" / "pairs", "nli")}
    assert "red red" not in texts


def test_a_teacher_and_a_reranker_that_changed_inside_are_seen(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same names, sizes and times; the difference is in the middle of the weights."""
    monkeypatch.chdir(tmp_path)
    mine = {"teacher": "teacher", "rerank": "reranker", "num_negatives": 2}
    changed = config(recipe, f"build.mine={json.dumps(mine)}")
    assert changed.build is not None
    for name in ("teacher", "reranker"):
        (recipe.parent / name).mkdir()
        (recipe.parent / name / "model.safetensors").write_bytes(bytes(70_000_000))
    pairs, _, classes = changed.datasets
    shared = BuildContext(changed.build, recipe.parent, recipe.parent)
    first = shared.inputs_of(pairs)
    assert set(first) == {"source", "tasks", "teacher", "reranker"}
    assert set(shared.inputs_of(classes)) == {"source", "tasks", "teacher"}
    for name in ("teacher", "reranker"):
        with open(recipe.parent / name / "model.safetensors", "r+b") as weights:
            weights.seek(35_000_000)
            weights.write(b"x")
        now = BuildContext(changed.build, recipe.parent, recipe.parent).inputs_of(pairs)
        assert {key for key in now if now[key] != first[key]} == {name}
        first = now


@pytest.mark.parametrize("damage", ["[]", "{}", "[" * 9999, "settings", "shards", "name"])
def test_a_damaged_manifest_is_no_set(
    recipe: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(recipe, "build.mine=null") == 0
    file = recipe.parent / "built" / "sts" / "manifest.json"
    whole = file.read_text()
    values = json.loads(whole)
    file.write_text(json.dumps({**values, damage: 5}) if damage in values else damage)
    with pytest.raises(DataError, match="sts is not built"):
        sets_of(config(recipe, "build.mine=null"), recipe.parent)
    assert build(recipe, "build.mine=null") == 2  # somebody has changed it
    assert "manifest.json" in capsys.readouterr().err
    shutil.rmtree(file.parent)
    assert build(recipe, "build.mine=null") == 0
    assert file.read_text() == whole


def test_two_builds_do_not_share_a_folder(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with alone_in(recipe.parent / "built"):
        assert build(recipe) == 2
    assert "another build is at work here" in capsys.readouterr().err
    assert build(recipe) == 0


def test_too_many_bad_rows(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(recipe, "build.max_refused=0.01") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"pairs: 2 of {len(PAIRS)} rows are bad; the first, " in error
    assert "pairs.jsonl:6" in error
    assert "at most 1.00%" in error
    kept = recipe.parent / "built" / "pairs.refused.jsonl"
    assert str(kept) in error
    assert len(list(read_jsonl(kept))) == 2
    assert not (recipe.parent / "built" / "pairs").exists()
    assert build(recipe) == 0
    assert not kept.exists()


def write_bytes(content: bytes) -> Any:
    return lambda path: path.write_bytes(content)


BROKEN = {
    "missing": (lambda path: path.unlink(), "no such file"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "pairs.jsonl"),
    "empty": (write_bytes(b""), "holds no row"),
    "utf8": (write_bytes(b'{"query": "\xff\xfe", "positive": "b"}\n'), "not UTF-8"),
    "no positives": (write_bytes(b'{"query": "a", "positive": []}\n'), "at least one"),
    "json": (write_bytes(b'{"query": "a", "posit'), "not valid JSON"),
    "gigantic": (
        lambda path: write_jsonl(path, [{"query": "a", "positive": "b" * 1_000_001}]),
        "a text of 1,000,001 characters",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_input_that_cannot_be_used_leaves_no_half_set(
    recipe: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = BROKEN[name]
    spoil(recipe.parent / "pairs.jsonl")
    assert build(recipe, "--keep-going") == 2
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "1 of 3 data sets failed: pairs" in error
    assert message in error
    # The others are built, and the next time there is but one to do.
    assert read_records(recipe.parent / "built" / "sts", "sts")
    assert read_records(recipe.parent / "built" / "classes", "classification")
    assert not (recipe.parent / "built" / "pairs").exists()
    assert "failed" in captured.out
    assert build(recipe, "--keep-going") == 2
    assert capsys.readouterr().out.count("unchanged") == 2


def test_without_keep_going_the_first_failure_ends_it(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe.parent / "pairs.jsonl").unlink()
    assert build(recipe) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not (recipe.parent / "built" / "sts").exists()


def test_a_failed_build_leaves_the_one_before(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(recipe) == 0
    before = contents(recipe.parent / "built")

    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(set_build, "write_shards", full)
    assert build(recipe, "build.rows_per_shard=5") == 2
    assert "No space left" in capsys.readouterr().err
    assert contents(recipe.parent / "built") == before


def test_a_set_of_one_class_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(recipe.parent / "classes.jsonl", CLASSES[-1:] * 3)
    assert build(recipe, "--keep-going") == 2
    assert "classes: no record is left" in capsys.readouterr().err
    assert not (recipe.parent / "built" / "classes").exists()


def test_names_that_are_no_folders_are_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(recipe, "datasets.0.name=../pairs") == 2
    assert "cannot be a folder" in capsys.readouterr().err


def test_a_recipe_without_build_section_has_a_default_folder(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(recipe, "build=null", "datasets.0.max_records=null", "--keep-going") == 2
    assert f"pairs: 2 of {len(PAIRS)} rows are bad" in capsys.readouterr().err
    assert len(read_records(recipe.parent / "data" / "recipe" / "sts", "sts")) == len(STS) - 1
    assert not (recipe.parent / "built").exists()


def test_a_cap_takes_its_share_of_every_class(recipe: Path) -> None:
    rows = [{"text": f"{label} {i}", "label": label} for label in "abc" for i in range(10)]
    rows += [{"text": f"d {i}", "label": "d"} for i in range(2)]
    write_jsonl(recipe.parent / "classes.jsonl", rows)
    assert build(recipe, "datasets.2.max_records=16") == 0
    found = read_records(recipe.parent / "built" / "classes", "classification")
    assert "".join(record.label for record in found) == "aaaaabbbbbcccccdd"
    assert [record.text for record in found[:5]] == ["a 0", "a 2", "a 4", "a 6", "a 8"]


def of_the_hub(recipe: Path) -> None:
    rows = yaml.safe_load(recipe.read_text())
    rows["datasets"][1] |= {"path": None, "hub": {"id": "organisation/sts"}}
    recipe.write_text(yaml.safe_dump(rows))


def test_a_set_of_the_hub_is_fetched_once(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_the_hub(recipe)
    with pytest.raises(DataError, match=r"sts: on the hub, and the recipe has no `build` section"):
        load_mixtures(config(recipe, "build=null"), recipe.parent)
    opened = []
    original = set_build.open_dataset

    def open_dataset(dataset: DatasetConfig, *, base_dir: Path) -> OpenedDataset:
        if dataset.hub is None:
            return original(dataset, base_dir=base_dir)
        opened.append(dataset.hub.id)
        return OpenedDataset("f00d", rows(fails=len(opened) == 1))

    def rows(*, fails: bool) -> Iterator[Converted | BadRow]:
        for number, row in enumerate(STS):
            if fails and number == 5:
                raise SourceError("the connection ended", where="organisation/sts")
            record = StsRecord(row["sentence1"], row["sentence2"], row["score"])
            yield Converted(record, f"organisation/sts train row {number}")

    monkeypatch.setattr(set_build, "open_dataset", open_dataset)
    assert build(recipe) == 2
    assert "organisation/sts: the connection ended" in capsys.readouterr().err
    assert not (recipe.parent / "built" / "sts").exists()
    assert build(recipe) == 0
    assert manifest(recipe, "sts")["revision"] == "f00d"
    assert manifest(recipe, "sts")["inputs"]["source"] is None
    assert build(recipe) == 0
    assert opened == ["organisation/sts"] * 2
    assert len(sets_of(config(recipe), recipe.parent)) == 3


def test_positives_that_the_corpus_lacks_are_refused(recipe: Path) -> None:
    folder = recipe.parent / "beir"
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": f"text {i}"} for i in range(20)])
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": f"ask {i}"} for i in range(20)])
    (folder / "qrels").mkdir()
    judged = "".join(f"q{i}\td{i + 1}\t1\n" for i in range(20))
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    assert build(recipe, "datasets.0.path=beir", "datasets.0.layout=beir") == 0
    found = manifest(recipe, "pairs")["steps"]["read"]
    assert (found["in"], found["refused"]) == (20, 1)
    ((_, refused),) = read_jsonl(recipe.parent / "built" / "pairs" / "refused.jsonl")
    assert "d20" in refused["problem"]
    assert refused["place"] == "beir/qrels/train.tsv:21"


# --- Training on it -------------------------------------------------------------------------------


def sets_of(recipe: TrainConfig, base_dir: Path) -> Any:
    return training_datasets(recipe.datasets, recipe.build, base_dir)


def config(recipe: Path, *overrides: str) -> TrainConfig:
    return load_config(TrainConfig, recipe, overrides)


def test_training_reads_what_was_built(recipe: Path) -> None:
    assert build(recipe) == 0
    one, _ = load_mixtures(config(recipe), recipe.parent)
    sizes = {source.name: len(source) for source in one.sources}
    assert sizes == {"pairs": 30, "sts": 2 * (len(STS) - 1), "classes": len(CLASSES) - 1}
    plain = sets_of(config(recipe, "build=null"), recipe.parent)
    assert [dataset.path for dataset in plain] == [f"{name}.jsonl" for name in KINDS]


def test_training_refuses_what_was_not_built_from_the_recipe(recipe: Path) -> None:
    with pytest.raises(DataError, match=r"pairs is not built.*Run `nvembed data build RECIPE`"):
        sets_of(config(recipe), recipe.parent)
    assert build(recipe) == 0
    for change, named in {
        "build.mine.num_negatives=3": "pairs was built with another mine.num_negatives; sts was",
        "build.tasks=[]": "another decontaminate",
        "datasets.1.path=other.jsonl": "sts was built with another source.path",
    }.items():
        with pytest.raises(DataError, match=named):
            sets_of(config(recipe, change), recipe.parent)
    (recipe.parent / "built" / "sts" / "part-00000.parquet").write_bytes(b"cut")
    with pytest.raises(DataError, match="sts is not built"):
        sets_of(config(recipe), recipe.parent)


def test_the_build_section_is_checked_with_the_recipe(recipe: Path) -> None:
    rows = yaml.safe_load(recipe.read_text())
    rows["build"]["bm25"] = {"nothing": 0.5}
    recipe.write_text(yaml.safe_dump(rows))
    assert build(recipe) == 2


def test_all_sets_of_a_build_are_mined_in_one_type(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first set, on a machine that measures otherwise when it goes on."""
    mine = {"teacher": str(tiny_decoder_dir), "num_negatives": 2, "strategy": "top_k"}
    recipe = write_inputs(tmp_path, mine=mine)
    measured = ["float32"]
    monkeypatch.setattr("nvembed.kernels.machine.fastest_precision", lambda device: measured[-1])
    mined, calls = set_build.mined, []

    def stopped(dataset: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(dataset.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return mined(dataset, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(set_build, "mined", stopped)
        assert build(recipe) == 130
    measured.append("bfloat16")
    assert build(recipe) == 0
    types = [manifest(recipe, name)["steps"]["mine"]["computing"]["dtype"] for name in calls]
    assert types == ["float32", "float32"]
    assert len(set(calls)) == 2
