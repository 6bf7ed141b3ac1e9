"""Learning from a teacher's vectors: losses equal sentence-transformers', and a run end to end."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss, EmbedDistillLoss
from torch.nn.functional import normalize

from forked import in_processes
from hash_encoder import HashEncoder
from interruption import interrupt_after
from noting import Counting
from nvembed.core.errors import ConfigError, DataError, ModelError, TrainingError
from nvembed.core.files import write_jsonl
from nvembed.data.batch import ContrastiveBatch, GivenText, build_batch, given_texts
from nvembed.data.examples import make_source
from nvembed.data.records import LabelRecord, PairRecord, TextRecord
from nvembed.encoding.files import encode_file
from nvembed.model import workers
from nvembed.model.embedder import NVEmbed
from nvembed.training.checkpoint import latest_checkpoint
from nvembed.training.config import TrainConfig
from nvembed.training.contrastive_loss import Objective, evaluate_objective
from nvembed.training.distributed import DistributedContext
from nvembed.training.dry_run import SeveralError, dry_run
from nvembed.training.forecast import print_dry_run
from nvembed.training.loss_config import TeacherConfig
from nvembed.training.teacher import Teacher, fit_projection
from nvembed.training.trainer import train

TEXTS, WIDTH, TAUGHT = 9, 6, 5


def case(seed: int = 0) -> tuple[torch.Tensor, ContrastiveBatch]:
    """Embeddings of bare texts, float64, and their teacher's vectors."""
    rng = np.random.default_rng(seed)
    embedding_UD = normalize(torch.from_numpy(rng.standard_normal((TEXTS, WIDTH))), dim=1)
    teacher_UE = rng.standard_normal((TEXTS, TAUGHT))
    teacher_UE /= np.linalg.norm(teacher_UE, axis=1, keepdims=True)
    none = np.zeros(0, dtype=np.int64)
    batch = ContrastiveBatch(
        texts=tuple(("", str(row)) for row in range(TEXTS)),
        query_B=none,
        document_N=none,
        positive_B=none,
        negative_BN=np.zeros((0, 0), dtype=np.bool_),
        weight_B=np.zeros(0, dtype=np.float32),
        mentioned=TEXTS,
        teacher_UE=teacher_UE.astype(np.float16),
    )
    return embedding_UD, batch


def taught(batch: ContrastiveBatch) -> torch.Tensor:
    assert batch.teacher_UE is not None
    return normalize(torch.from_numpy(batch.teacher_UE).double(), dim=1)


def objective(dimensions: tuple[int, ...] | None = None, **settings: Any) -> Objective:
    teacher = TeacherConfig(model="o/teacher", **settings)
    return Objective(0.1, dimensions=dimensions, teacher=teacher)


def of_sentence_transformers(loss: Any, **settings: Any) -> Any:
    return loss(model=torch.nn.Identity(), **settings)


@pytest.mark.parametrize("piece_scores", [1, 20, 10_000])
@pytest.mark.parametrize("dimensions", [None, (2, 4, 6)])
def test_similarities_equal_distill_kl_div_loss(
    dimensions: tuple[int, ...] | None, piece_scores: int
) -> None:
    embedding_UD, batch = case()
    settings = {"temperature": 0.2, "teacher_temperature": 0.3, "similarities": 0.7}
    found = evaluate_objective(
        objective(dimensions, **settings),
        embedding_UD,
        batch,
        total_weight=0.0,
        piece_scores=piece_scores,
    )
    oracle = of_sentence_transformers(
        DistillKLDivLoss, student_temperature=0.2, teacher_temperature=0.3
    )
    leaf_UD = embedding_UD.clone().requires_grad_()
    others = [[v for v in range(TEXTS) if v != u] for u in range(TEXTS)]
    label_UK = torch.stack([taught(batch)[o] @ taught(batch)[u] for u, o in enumerate(others)])
    expected = torch.zeros((), dtype=torch.float64)
    for width in dimensions or (WIDTH,):
        # Its scores are dot products.
        cut_UD = normalize(leaf_UD[:, :width], dim=1) if width < WIDTH else leaf_UD
        columns = [cut_UD, *(cut_UD[[o[k] for o in others]] for k in range(TEXTS - 1))]
        value = oracle.compute_loss_from_embeddings(columns, label_UK)
        expected = expected + 0.7 * value / 0.2**2 / len(dimensions or (WIDTH,))
    expected.backward()
    assert expected.item() > 0.1
    assert found.parts == {"similarities": pytest.approx(expected.item(), rel=1e-6)}
    assert found.loss == sum(found.parts.values())
    assert leaf_UD.grad is not None
    assert leaf_UD.grad.abs().max() > 1e-2
    torch.testing.assert_close(found.gradient_UD, leaf_UD.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("projected", [True, False])
def test_vectors_equal_embed_distill_loss(projected: bool) -> None:
    embedding_UD, batch = case(1)
    assert batch.teacher_UE is not None
    if not projected:
        embedding_UD = normalize(embedding_UD[:, :TAUGHT], dim=1)
    projection_ED = torch.randn(TAUGHT, WIDTH, dtype=torch.float64).requires_grad_()
    found = evaluate_objective(
        objective(similarities=None, vectors=2.0),
        embedding_UD,
        batch,
        total_weight=0.0,
        projection=projection_ED if projected else None,
    )
    oracle = of_sentence_transformers(EmbedDistillLoss)
    other_ED = projection_ED.detach().clone().requires_grad_()
    leaf_UD = embedding_UD.clone().requires_grad_()
    student_UE = leaf_UD @ other_ED.T if projected else leaf_UD
    expected = 2.0 * oracle.compute_loss_from_embeddings([student_UE], [taught(batch)])
    expected.backward()
    assert expected.item() > 0.1
    assert found.parts == {"vectors": pytest.approx(expected.item(), rel=1e-9)}
    torch.testing.assert_close(found.gradient_UD, leaf_UD.grad, rtol=1e-9, atol=1e-12)
    if projected:
        assert projection_ED.grad is not None
        assert projection_ED.grad.abs().max() > 1e-3
        torch.testing.assert_close(projection_ED.grad, other_ED.grad, rtol=1e-9, atol=1e-12)
    else:
        squared = of_sentence_transformers(EmbedDistillLoss, distance_metric="mse")
        mean = squared.compute_loss_from_embeddings([embedding_UD], [taught(batch)])
        assert found.loss == pytest.approx(2.0 * TAUGHT / 2 * mean.item(), rel=1e-9)


def test_what_the_teacher_reads() -> None:
    records = [PairRecord("q", ("p",), ("n",)), PairRecord("r", ("q",), (), instruction="own")]
    pairs = make_source(records, "retrieval", name="pairs", instruction="find")
    labels = [LabelRecord(text, label) for text in ("a", "b") for label in ("x", "y")]
    classes = make_source(
        [LabelRecord(f"{r.text}{r.label}", r.label) for r in labels],
        "classification",
        name="classes",
        instruction="sort",
    )
    bare = make_source([TextRecord("t")], "text", name="bare", instruction=None)
    asked = make_source([TextRecord("u")], "text", name="asked", instruction="like")
    rng = np.random.default_rng(0)
    examples = [source.example(0, rng, 1) for source in (bare, pairs, classes, asked)]
    examples.append(pairs.example(1, rng, 1))
    batch = build_batch(examples, in_batch_negatives=True)
    assert tuple(given_texts(examples)) == batch.texts
    assert {(given.side, given.instruction) for given in batch.given_U if given.text == "q"} == {
        ("query", "find"),
        ("document", None),
    }
    of_text = {given.text: given[:2] for given in batch.given_U if given.text != "q"}
    negative = examples[2].negatives[0]
    assert of_text["p"] == of_text["n"] == of_text["t"] == ("document", None)
    assert of_text["r"] == ("query", "own")
    assert of_text["u"] == ("query", "like")
    assert of_text["ax"] == of_text[negative] == of_text["bx"] == ("query", "sort")
    # Texts without labels are no rows of the loss, and stand against no query.
    assert len(batch.query_B) == 3
    used = {batch.texts[row][1] for row in (*batch.query_B, *batch.document_N)}
    assert not {"t", "u"} & used
    assert {"t", "u"} < {text for _, text in batch.texts}


WORDS = ["red", "blue", "green", "fox", "owl", "cat", "tree", "lake"]
BARE = [{"text": f"{one} {other}"} for one in WORDS for other in WORDS]
PAIRED: dict[str, Any] = {
    "name": "pairs",
    "path": "pairs.jsonl",
    "kind": "retrieval",
    "instruction": "find",
    "stages": [1],
    "weight": 1.0,
}
BARE_TEXTS = {"name": "bare", "path": "bare.jsonl", "kind": "text", "instruction": None}
PAIRS = [{"query": f"the {word}", "positive": f"{word} is {word[::-1]}"} for word in WORDS]


class Asked(HashEncoder):
    """A teacher that notes what it is asked."""

    def __init__(self, dimension: int = 24) -> None:
        super().__init__(dimension, instruction_weight=0.0)
        self.texts: list[str] = []

    def _encode(self, texts: Any, task: str | None) -> Any:
        self.texts += texts
        return super()._encode(texts, task)


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    made = Asked()
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(workers, "load_encoder", lambda *_: made)
    write_jsonl(tmp_path / "bare.jsonl", BARE)
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    return made


def recipe(folder: Path, decoder: Path, output: str = "run", **changes: Any) -> TrainConfig:
    stage = {"steps": 6, "batch_size": 8, "learning_rate": 2e-3, "warmup_steps": 1}
    stage |= {"name": "one", "in_batch_negatives": True, "temperature": 0.1, "num_negatives": 0}
    stage["teacher"] = {"model": "o/teacher", "vectors": 1.0, "temperature": 0.1}
    return TrainConfig.model_validate(
        {
            "output": str(folder / output),
            "model": {"backbone": str(decoder), "max_tokens": 32, "pooling": {"kind": "mean"}},
            "lora": None,
            "datasets": [
                PAIRED | BARE_TEXTS,
                PAIRED,
            ],
            "stages": [stage | changes],
            "precision": "float32",
            "checkpoint_every": 2,
        }
    )


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def agreement(model: NVEmbed) -> float:
    """Correlation of own and teacher's cosines between the bare texts."""
    texts = [row["text"] for row in BARE]
    places = np.triu_indices(len(texts), 1)
    own, taught = (e.encode_document(texts) for e in (model, HashEncoder(24, 0.0)))
    return float(np.corrcoef((own @ own.T)[places], (taught @ taught.T)[places])[0, 1])


def test_a_tiny_model_learns_from_bare_texts_alone(
    tmp_path: Path, tiny_decoder_dir: Path, teacher: Asked
) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, contrastive=None, steps=25, batch_size=16)
    config = config.model_copy(update={"datasets": config.datasets[:1]})
    before = NVEmbed.from_pretrained(tiny_decoder_dir, pooling="mean", device="cpu")
    low = agreement(before)
    model = NVEmbed.from_pretrained(train(config, base_dir=tmp_path), device="cpu")
    assert agreement(model) > max(low, 0.0) + 0.3
    first, *_, last = rows(tmp_path / "run")
    assert set(first["parts"]) == {"similarities", "vectors"}
    assert last["parts"]["similarities"] < 0.5 * first["parts"]["similarities"]
    # The projection is fitted before the first step: a random one is at about 1.
    assert max(row["parts"]["vectors"] for row in (first, last)) < 0.1
    assert first["loss"] == pytest.approx(sum(first["parts"].values()))
    assert first["positive_similarity"] is None
    # Every text was asked for once, and nothing of the teacher is in the model.
    assert sorted(teacher.texts) == sorted(row["text"] for row in BARE)
    saved = [
        name
        for path in (tmp_path / "run" / "model").rglob("*.safetensors")
        for name in load_file(path)
    ]
    assert saved
    assert not any("projection" in name for name in saved)


@pytest.mark.parametrize("stop_at", [3, 4])
def test_resumed_equals_uninterrupted_and_asks_nothing_again(
    tmp_path: Path,
    tiny_decoder_dir: Path,
    teacher: Asked,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
) -> None:
    train(recipe(tmp_path, tiny_decoder_dir, "whole"), base_dir=tmp_path)
    asked = len(teacher.texts)
    assert 0 < asked == len(set(teacher.texts)) < len(BARE) + 2 * len(PAIRS)
    parts = recipe(tmp_path, tiny_decoder_dir, "parts")
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop_at)
        with pytest.raises(TrainingError, match="interrupted"):
            train(parts, base_dir=tmp_path)
    kept = load_file(latest_checkpoint(tmp_path / "parts" / "checkpoints") / "weights.safetensors")
    assert kept["projection"].shape == (24, 32)
    train(parts, base_dir=tmp_path)
    assert len(teacher.texts) == asked
    one, other = (rows(tmp_path / name) for name in ("whole", "parts"))
    assert [row["parts"] for row in one] == [row["parts"] for row in other]
    assert set(one[0]["parts"]) == {"contrastive", "similarities", "vectors"}
    assert all(row["loss"] == pytest.approx(sum(row["parts"].values())) for row in one)
    first, second = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


GIVEN = [GivenText("document", None, f"text {number}") for number in range(7)]


def prepared_by_one_of_two(teacher: Asked) -> tuple[list[str], Any, list[str]]:
    made, told = Teacher(TeacherConfig(model="o/teacher"), Path()), list[str]()
    made.prepare(GIVEN, DistributedContext.of_environment(), told.append)
    return teacher.texts, made.vectors(GIVEN[::-1]), told


def test_two_processes_share_the_teachers_work(teacher: Asked) -> None:
    (one, first, told), (other, second, _) = in_processes(prepared_by_one_of_two, teacher)
    assert told == ["7 texts to embed by o/teacher", "4 of 4 texts embedded by the teacher"]
    assert (len(one), len(other)) == (4, 3)
    assert sorted(one + other) == [given.text for given in GIVEN]
    expected = HashEncoder(24, 0.0).encode_document([given.text for given in GIVEN[::-1]])
    for found in (first, second):
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_teacher_is_told_sides_and_instructions_and_what_is_known_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(24)
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path))
    monkeypatch.setattr(workers, "load_encoder", lambda *_: counting)
    alone, told = DistributedContext.of_environment(), list[str]()
    given = [GivenText("query", "find", "q"), GivenText("query", "sort", "q"), *GIVEN]
    for instructions, expected in ((True, [*given]), (False, [GivenText("query", None, "q")])):
        settings = TeacherConfig(model="o/teacher", instructions=instructions)
        for _ in range(2):
            Teacher(settings, Path()).prepare([*given, *given], alone, told.append)
        assert counting.asked == [(one.side, one.text, one.instruction) for one in expected]
        counting.asked.clear()
    assert [line for line in told if "to embed" in line] == [
        f"{count} texts to embed by o/teacher" for count in (9, 0, 1, 0)
    ]


@pytest.mark.parametrize("stop_at", [6, 8])
def test_the_next_stage_goes_on_with_the_projection(
    tmp_path: Path,
    tiny_decoder_dir: Path,
    teacher: Asked,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
) -> None:
    def two_stages(output: str, **second: Any) -> TrainConfig:
        config = recipe(tmp_path, tiny_decoder_dir, output)
        data = config.model_dump(mode="json")
        data["stages"].append(data["stages"][0] | {"name": "two", "steps": 4} | second)
        for dataset in data["datasets"]:
            dataset["stages"] = [1, 2]
        return TrainConfig.model_validate_json(json.dumps(data))

    train(two_stages("whole"), base_dir=tmp_path)
    parts = two_stages("parts")
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop_at)
        with pytest.raises(TrainingError, match="interrupted"):
            train(parts, base_dir=tmp_path)
    train(parts, base_dir=tmp_path)
    one, other = (rows(tmp_path / name) for name in ("whole", "parts"))
    assert [row["parts"] for row in one] == [row["parts"] for row in other]
    # With another teacher's name it is fitted anew, to the model as it is by then.
    other_teacher = {"model": "o/another", "vectors": 1.0, "temperature": 0.1}
    train(two_stages("anew", teacher=other_teacher), base_dir=tmp_path)
    anew = rows(tmp_path / "anew")
    assert [row["parts"] for row in anew[:6]] == [row["parts"] for row in one[:6]]
    assert anew[6]["parts"]["similarities"] == one[6]["parts"]["similarities"]
    assert anew[6]["parts"]["vectors"] < one[6]["parts"]["vectors"] - 0.1


def test_the_projection_begins_as_least_squares(tiny_decoder_dir: Path) -> None:
    model = NVEmbed.from_pretrained(tiny_decoder_dir, pooling="mean", device="cpu").train()
    texts = [row["text"] for row in BARE]
    tokens = model.backbone.text_tokenizer(texts, "")
    taught_NE = np.random.default_rng(0).standard_normal((len(texts), 7)).astype(np.float16)
    batch = replace(case()[1], teacher_UE=taught_NE[:40]), tokens[:40]
    other = replace(case()[1], teacher_UE=taught_NE[40:]), tokens[40:]
    projection_ED = torch.nn.Parameter(torch.zeros(7, model.dimension))
    fit_projection(projection_ED, model, iter([batch, other]), 100, nullcontext)
    assert model.training
    # The oracle: a ridge is rows of its root below the vectors.
    own_ND = model.encode_document(texts).astype(np.float64)
    ridge = 0.1 * (own_ND**2).sum() / model.dimension
    own_ND = np.concatenate([own_ND, np.sqrt(ridge) * np.eye(model.dimension)])
    unit_NE = taught_NE / np.linalg.norm(taught_NE.astype(np.float64), axis=1, keepdims=True)
    unit_NE = np.concatenate([unit_NE, np.zeros((model.dimension, 7))])
    expected_DE, *_ = np.linalg.lstsq(own_ND, unit_NE)
    assert np.abs(expected_DE).max() > 0.1
    np.testing.assert_allclose(projection_ED.detach(), expected_DE.T, rtol=1e-3, atol=1e-4)


def test_another_width_without_projection_is_one_line(
    tmp_path: Path, tiny_decoder_dir: Path, teacher: Asked
) -> None:
    settings = {"model": "o/teacher", "vectors": 1.0, "projection": False}
    config = recipe(tmp_path, tiny_decoder_dir, teacher=settings)
    with pytest.raises(ConfigError, match=r"stages\.0\.teacher: .*24 wide.*32") as raised:
        train(config, base_dir=tmp_path)
    assert "\n" not in str(raised.value)


def test_a_teacher_that_is_not_there_is_told_before_anything_begins(
    tmp_path: Path, tiny_decoder_dir: Path, teacher: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded before")

    monkeypatch.setattr("nvembed.training.model.starting_model", loaded)
    config = recipe(tmp_path, tiny_decoder_dir, teacher={"model": "../no/teacher"})
    with pytest.raises(ModelError, match=r"^\.\./no/teacher: no such model folder"):
        train(config, base_dir=tmp_path)
    (tmp_path / "bare.jsonl").unlink()
    with pytest.raises(SeveralError) as raised:
        dry_run(config, base_dir=tmp_path)
    assert len(raised.value.problems) == 2


def test_a_dry_run_tells_what_the_teacher_has_to_embed(
    tmp_path: Path,
    tiny_decoder_dir: Path,
    teacher: Asked,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, in_batch_negatives=False, num_negatives=1)
    found = dry_run(config, base_dir=tmp_path)
    (stage,) = found.stages
    assert stage.teacher is not None
    assert stage.teacher.dimension == 24
    assert stage.teacher.seconds > 0
    assert not [line for line in found.warnings if "bare" in line]
    print_dry_run(found)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{stage.teacher.missing} texts are embedded by o/teacher (24 wide) before one" in shown
    assert "The loss of one: 1 contrastive + 1 similarities + 1 vectors." in shown
    assert not list((tmp_path / "cache").rglob("*.npy"))
    teacher.texts.clear()
    train(config, base_dir=tmp_path)
    assert len(teacher.texts) == stage.teacher.missing
    again = dry_run(config.model_copy(update={"output": "other"}), base_dir=tmp_path)
    assert again.stages[0].teacher is not None
    assert again.stages[0].teacher.missing == 0


@pytest.mark.parametrize("ending", [".npy", ".parquet"])
def test_a_file_of_vectors_teaches_what_its_model_does(
    tmp_path: Path, tiny_decoder_dir: Path, teacher: Asked, ending: str
) -> None:
    texts = [*BARE, *({"text": text} for pair in PAIRS for text in pair.values())]
    write_jsonl(tmp_path / "texts.jsonl", [{"id": f"t{n}", **row} for n, row in enumerate(texts)])
    vectors = tmp_path / f"vectors{ending}"
    encode_file(HashEncoder(24, 0.0), tmp_path / "texts.jsonl", vectors, task=None)
    train(recipe(tmp_path, tiny_decoder_dir, "model"), base_dir=tmp_path)
    asked = len(teacher.texts)
    settings = {"file": {"vectors": vectors.name, "texts": "texts.jsonl"}}
    settings |= {"vectors": 1.0, "temperature": 0.1}
    config = recipe(tmp_path, tiny_decoder_dir, "file", teacher=settings)
    train(config, base_dir=tmp_path)
    one, other = ([row["parts"] for row in rows(tmp_path / name)] for name in ("model", "file"))
    assert one == other
    assert len(teacher.texts) == asked
    # Another file of the same name is another teacher, and one that lacks texts is told.
    write_jsonl(tmp_path / "texts.jsonl", texts[:9])
    with pytest.raises(TrainingError, match="changed since the run was started: teacher of one"):
        train(config, base_dir=tmp_path)
    again = recipe(tmp_path, tiny_decoder_dir, "again", teacher=settings)
    with pytest.raises(DataError, match="80 vectors for 9 texts"):
        train(again, base_dir=tmp_path)
    encode_file(HashEncoder(24, 0.0), tmp_path / "texts.jsonl", vectors, task=None)
    with pytest.raises(DataError, match="texts have no vector, the first is"):
        train(again, base_dir=tmp_path)


def test_an_endpoint_teaches_in_its_own_words(
    tmp_path: Path, tiny_decoder_dir: Path, teacher: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []

    def answer(url: str, body: dict[str, Any], **_: Any) -> dict[str, Any]:
        assert url == "http://teacher/v1/embeddings"
        assert body["model"] == "e5"
        sent.extend(body["input"])
        vectors = HashEncoder(24, 0.0).encode_document(body["input"]).tolist()
        return {"data": [{"index": n, "embedding": v} for n, v in enumerate(vectors)]}

    monkeypatch.setattr("nvembed.model.encoder.post_json", answer)
    settings = {"model": "http://teacher/v1", "endpoint_model": "e5", "instructions": False}
    settings |= {"query_prefix": "query: ", "document_prefix": "passage: "}
    train(recipe(tmp_path, tiny_decoder_dir, teacher=settings), base_dir=tmp_path)
    assert len(sent) == len(set(sent))
    pairs = {f"query: {p['query']}" for p in PAIRS} | {f"passage: {p['positive']}" for p in PAIRS}
    bare = {f"passage: {row['text']}" for row in BARE}
    assert set(sent) - {"width"} <= pairs | bare
    assert set(sent) & {f"query: {p['query']}" for p in PAIRS}
    assert set(sent) & bare


def test_a_step_is_never_cut_where_all_texts_teach_each_other(
    tmp_path: Path, tiny_decoder_dir: Path, teacher: Asked
) -> None:
    changes = {"in_batch_negatives": False, "num_negatives": 1, "steps": 2}
    found = []
    for memory in (0.0003, 1.0):
        config = recipe(tmp_path, tiny_decoder_dir, f"run-{memory}", **changes)
        config = config.model_copy(update={"memory_gb": memory, "pack_tokens": 32})
        train(config, base_dir=tmp_path)
        found.append(rows(tmp_path / f"run-{memory}"))
    assert [row["recomputed"] > 0 for row in found[0]] == [True, True]
    assert [row["recomputed"] > 0 for row in found[1]] == [False, False]
    for cut, whole in zip(*found, strict=True):
        assert cut["parts"] == pytest.approx(whole["parts"], rel=1e-4)
        assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": {}}, "either a model or a file"),
        ({"teacher": None}, "bare has texts without labels"),
        ({"teacher": {"model": "t", "similarities": None}}, "all off"),
        ({"teacher": {"model": "http://x/v1"}}, "give endpoint_model"),
        ({"teacher": {"model": "t", "endpoint_model": "m"}}, "no address of an endpoint"),
        ({"teacher": None, "contrastive": None}, "nothing to learn"),
    ],
)
def test_contradictions_are_told(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recipe(tmp_path, tmp_path, **changes)
