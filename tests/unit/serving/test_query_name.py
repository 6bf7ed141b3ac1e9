"""``NAME:query`` and the setting ``task``: clients that can only name a model get right queries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from hash_encoder import HashEncoder
from nvembed import ConfigError, NVEmbed
from nvembed.model.encoder import SentenceTransformerEncoder, set_query_prompt
from nvembed.serving.config import ServerConfig
from nvembed.serving.engines import EncoderEngine
from nvembed.serving.server import create_app, model_sources
from serving_fakes import make_config, running

TEXTS = ["a bond", "what is a share of a company"]
TASK = "Given a question, retrieve passages that answer it"
NAMES = {"model_name": "docs", "model_aliases": ["alias"]}


@pytest.fixture(scope="module")
def model(tiny_decoder_dir: Path) -> NVEmbed:
    return NVEmbed.from_pretrained(tiny_decoder_dir, device="cpu")


@pytest.fixture(scope="module")
def client(tiny_decoder_dir: Path) -> Iterator[TestClient]:
    config = ServerConfig.model_validate({**NAMES, "task": TASK, "log_requests": False})
    (source,) = model_sources(str(tiny_decoder_dir), config, "float32")
    with TestClient(create_app(source.load(), config, None, [source])) as made:
        yield made


def vectors(client: TestClient, model: str, **body: Any) -> np.ndarray:
    answer = client.post("/v1/embeddings", json={"model": model, "input": TEXTS, **body})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return np.array([row["embedding"] for row in answer.json()["data"]])


def refusal(client: TestClient, **body: Any) -> str:
    answer = client.post("/v1/embeddings", json={"input": TEXTS, **body})
    assert answer.status_code == 400
    return answer.json()["error"]["message"]


def near(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.array(found), expected, atol=1e-6)


def test_the_second_name_is_for_queries(client: TestClient, model: NVEmbed) -> None:
    queries, documents = model.encode_query(TEXTS, task=TASK), model.encode_document(TEXTS)
    assert not np.allclose(queries, documents, atol=1e-2)
    for name in ("docs", "alias"):
        near(vectors(client, name), documents)
        near(vectors(client, f"{name}:query"), queries)
    near(vectors(client, "docs", input_type="query"), queries)  # the setting holds there too
    near(
        vectors(client, "docs:query", instruction="other"), model.encode_query(TEXTS, task="other")
    )
    near(vectors(client, "docs:query", task="retrieval.query"), queries)
    ids = {card["id"] for card in client.get("/v1/models").json()["data"]}
    assert ids >= {"docs", "docs:query", "alias:query"}
    assert client.get("/v1/models/docs:query").json()["id"] == "docs:query"


def test_other_routes_know_the_second_name_and_the_setting(
    client: TestClient, model: NVEmbed
) -> None:
    queries, documents = model.encode_query(TEXTS, task=TASK), model.encode_document(TEXTS)
    for name in ("docs:query", "docs:query:latest"):
        answer = client.post("/api/embed", json={"model": name, "input": TEXTS})
        near(answer.json()["embeddings"], queries)
    body = {"model": "docs", "texts": TEXTS, "input_type": "search_query"}
    near(client.post("/v2/embed", json=body).json()["embeddings"]["float"], queries)
    near(client.post("/embed", json={"inputs": TEXTS, "prompt_name": "query"}).json(), queries)
    ranked = client.post("/rerank", json={"query": TEXTS[0], "texts": TEXTS}).json()
    scores = {row["index"]: row["score"] for row in ranked}
    near([scores[0], scores[1]], documents @ queries[0])


@pytest.mark.parametrize(
    "body",
    [
        {"input_type": "document"},
        {"input_type": "document", "instruction": "other"},
        {"task": "retrieval.passage"},
        {"task": "classification"},
    ],
)
def test_documents_are_refused_there(client: TestClient, body: dict[str, str]) -> None:
    assert refusal(client, model="docs:query", **body) == "docs:query is for queries; ask for docs"


def test_ids_are_refused_there(client: TestClient) -> None:
    assert "bare" in refusal(client, model="docs:query", input=[5, 6])


def test_without_an_instruction_the_second_name_is_refused() -> None:
    with TestClient(create_app(EncoderEngine(HashEncoder(8)), make_config(**NAMES))) as client:
        assert "has no instruction for queries" in refusal(client, model="docs:query")
        assert vectors(client, "docs:query", task=TASK).shape == (2, 8)


def test_a_model_by_that_very_name_wins() -> None:
    config = make_config(model_name="m", model_aliases=["m:query"])
    encoder = HashEncoder(8)
    with TestClient(create_app(EncoderEngine(encoder), config)) as client:
        near(vectors(client, "m:query"), encoder.encode_document(TEXTS))


def test_the_query_prompt_of_an_encoder(model: NVEmbed) -> None:
    class Stock:
        def __init__(self, **prompts: str) -> None:
            self.prompts = prompts

    bare, instructed = Stock(query="", document=""), Stock(query="Instruct: x\nQuery: ")
    assert not set_query_prompt(SentenceTransformerEncoder(bare), TASK)  # type: ignore[arg-type]
    assert bare.prompts["query"] == ""
    assert set_query_prompt(SentenceTransformerEncoder(instructed), TASK)  # type: ignore[arg-type]
    assert instructed.prompts["query"] == f"Instruct: {TASK}\nQuery: "
    with pytest.raises(ConfigError, match="perhaps FiQA2018"):
        set_query_prompt(model, "FiQA2019")


def test_a_plain_client_of_openai(client: TestClient, model: NVEmbed) -> None:
    openai = pytest.importorskip("openai")
    engine = EncoderEngine(model)  # type: ignore[arg-type]
    engine.prompts = {"query": f"Instruct: {TASK}\nQuery: "}
    model.prompts["query"] = engine.prompts["query"]
    with (
        running(engine, make_config(model_name="docs")) as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as plain,
    ):
        found = plain.embeddings.create(model="docs:query", input=TEXTS)
    near([row.embedding for row in found.data], model.encode_query(TEXTS, task=TASK))
