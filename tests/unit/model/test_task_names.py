"""A task's name means the same wherever a task can be given: command line, Python and files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hash_encoder import HashEncoder
from nvembed.core.config import load_config
from nvembed.core.errors import ConfigError, DataError, UserError
from nvembed.core.files import write_jsonl
from nvembed.data.config import DatasetConfig
from nvembed.data.instructions import task_instruction
from nvembed.data.loading import read_records
from nvembed.encoding.doctor.examine import DoctorOptions, examine
from nvembed.encoding.file_search import search_file
from nvembed.evaluation.tasks import load_task
from nvembed.index.build import index_documents
from nvembed.index.database import Database
from nvembed.model.encoder import EndpointEncoder, SentenceTransformerEncoder
from task_folders import write_task

NAME = "FiQA2018"
INSTRUCTION = task_instruction(NAME).instruction
PROMPT = f"Instruct: {INSTRUCTION}\nQuery: "
SAVED = {"query": "own query: ", "document": "", "faq": "Instruct: answer\nQuery: "}
TEXTS = ["what is a bond", "what is a share"]
MEANING = [(NAME, PROMPT), ("faq", SAVED["faq"]), ("find it", "Instruct: find it\nQuery: ")]


@pytest.fixture(scope="module")
def model(tiny_decoder_dir: Path):
    from nvembed import NVEmbed

    made = NVEmbed.from_pretrained(tiny_decoder_dir, device="cpu")
    made.prompts = dict(SAVED)
    return made


@pytest.mark.parametrize(("task", "prompt"), MEANING)
def test_in_python(model, task: str, prompt: str) -> None:
    expected = model.encode(TEXTS, prompt=prompt)
    assert np.abs(expected - model.encode(TEXTS)).max() > 1e-3
    np.testing.assert_array_equal(model.encode_query(TEXTS, task=task), expected)
    np.testing.assert_array_equal(model.encode_document(TEXTS, task=task), expected)
    work = model.prepare(TEXTS, side="query", task=task)
    np.testing.assert_array_equal(work.launch()(), expected)
    chunks = model.encode_chunks(TEXTS, task=task)
    np.testing.assert_allclose(np.concatenate([c.vectors for c in chunks]), expected, atol=1e-6)


@pytest.mark.parametrize(("task", "prompt"), MEANING)
def test_of_a_stock_model(model, task: str, prompt: str) -> None:
    encoder = SentenceTransformerEncoder(model)
    assert encoder.follows_instructions
    expected = model.encode(TEXTS, prompt=prompt)
    np.testing.assert_allclose(encoder.encode_query(TEXTS, task=task), expected, atol=1e-6)


def test_a_model_without_instructions_knows_its_own_prompts_alone(model, monkeypatch) -> None:
    monkeypatch.setattr(model, "prompts", {"query": "q: ", "passage": "p: "})
    encoder = SentenceTransformerEncoder(model)
    own, passage = (model.encode(TEXTS, prompt=prompt) for prompt in ("q: ", "p: "))
    for task in (NAME, "find it"):
        np.testing.assert_allclose(encoder.encode_query(TEXTS, task=task), own, atol=1e-6)
    np.testing.assert_allclose(encoder.encode_query(TEXTS, task="passage"), passage, atol=1e-6)


def test_of_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[str]] = []

    def embed(self, texts: list[str]) -> np.ndarray:
        sent.append(texts)
        return np.ones((len(texts), 2), dtype=np.float32)

    monkeypatch.setattr(EndpointEncoder, "_embed", embed)
    EndpointEncoder("http://nowhere/v1", "m").encode_query(["a"], task=NAME)
    assert sent == [[PROMPT + "a"]]


@pytest.mark.parametrize("task", ["FiQA2019", "fiqa2018"])
def test_a_typing_error_is_told_everywhere(model, tmp_path: Path, task: str) -> None:
    path = tmp_path / "docs.jsonl"
    write_jsonl(path, [{"text": text} for text in TEXTS])
    calls = [
        lambda: model.encode_query(TEXTS, task=task),
        lambda: model.prepare(TEXTS, side="document", task=task),
        lambda: SentenceTransformerEncoder(model).encode_query(TEXTS, task=task),
        lambda: EndpointEncoder("http://nowhere/v1", "m").encode_query(TEXTS, task=task),
        lambda: HashEncoder().encode_query(TEXTS, task=task),
        lambda: search_file(model, path, "bond", task=task, top_k=1),
        lambda: index_documents(tmp_path / "db", [path], model=HashEncoder(), task=task),
        lambda: examine(model, "m", DoctorOptions(task=task)),
        lambda: load_config(DatasetConfig, None, [f"instruction={task}"]),
    ]
    for call in calls:
        with pytest.raises(UserError, match=rf"{task}.* perhaps .*FiQA2018"):
            call()
    assert not (tmp_path / "db").exists() or not list((tmp_path / "db").rglob("*.lance"))


def test_a_database_keeps_the_instruction(tmp_path: Path) -> None:
    path, place = tmp_path / "docs.jsonl", tmp_path / "db"
    write_jsonl(path, [{"text": text} for text in TEXTS])
    index_documents(place, [path], model=HashEncoder(), task=NAME)
    assert Database.open(place).record.task == INSTRUCTION
    for same in (NAME, INSTRUCTION, None):
        index_documents(place, [path], model=HashEncoder(), task=same)
    with pytest.raises(ConfigError, match="task is"):
        index_documents(place, [path], model=HashEncoder(), task="SciFact")


def test_in_recipes_and_files(tmp_path: Path) -> None:
    values = {"name": "a", "path": "a.jsonl", "kind": "retrieval", "instruction": NAME}
    assert DatasetConfig(**values).instruction == INSTRUCTION
    assert DatasetConfig(**{**values, "instruction": "find"}).instruction == "find"
    record = {"query": "q", "positive": "p"}
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{**record, "instruction": NAME}, {**record, "instruction": "find"}, record])
    read = [record.instruction for record in read_records(path, "retrieval")]
    assert read == [INSTRUCTION, "find", None]
    write_jsonl(path, [record, {**record, "instruction": "FiQA2019"}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*FiQA2019.* perhaps FiQA2018"):
        list(read_records(path, "retrieval"))


def test_in_an_evaluation_task(tmp_path: Path) -> None:
    folder = tmp_path / "task"
    write_task(folder, "STS")
    path = folder / "task.json"
    header = json.loads(path.read_text())
    path.write_text(json.dumps({**header, "instruction": NAME}))
    assert load_task(folder).instruction == INSTRUCTION
    path.write_text(json.dumps({**header, "instruction": "FiQA2019"}))
    with pytest.raises(DataError, match=r"task\.json: instruction: .*FiQA2019.* perhaps FiQA2018"):
        load_task(folder)
