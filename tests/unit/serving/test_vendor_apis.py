"""Cohere's, Jina's, Voyage's and Ollama's requests, held against the model's own vectors."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers.util import quantize_embeddings
from starlette.testclient import TestClient

from nvembed import NVEmbed
from nvembed.model.encoder import unit_rows
from nvembed.model.encoding import quantize
from nvembed.serving.engines import build_engine
from nvembed.serving.server import create_app
from nvembed.serving.vectors import as_type
from serving_fakes import make_config

TEXTS = ["a bond", "what is a share of a company"]
PROMPTS = {"query": "ask: ", "document": "", "Clustering": "group: "}
WIDTH = 32


@pytest.fixture(scope="module")
def model(tiny_decoder_dir: Path) -> NVEmbed:
    made = NVEmbed.from_pretrained(tiny_decoder_dir, device="cpu", max_tokens=200)
    made.prompts = dict(PROMPTS)
    return made


@pytest.fixture(scope="module")
def client(model: NVEmbed) -> Iterator[TestClient]:
    with TestClient(create_app(build_engine(model), make_config())) as made:
        yield made


def post(client: TestClient, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client: TestClient, path: str, word: str, **body: Any) -> None:
    answer = client.post(path, json=body)
    assert (answer.status_code, word in answer.text) == (400, True), answer.text


def near(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.array(found, dtype=np.float32), expected, atol=1e-6)


# --- types of numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [4, 20, 1000])
def test_numbers_of_8_bits(width: int) -> None:
    vectors = unit_rows(np.random.default_rng(0).normal(size=(50, width)).astype(np.float32))
    vectors[0], vectors[1] = np.eye(width)[0], -np.eye(width)[1]  # as great as they get
    small = as_type(vectors, "int8")
    assert small.dtype == np.int8
    rounded = np.floor(127 * vectors.astype(np.float64) + 0.5)
    assert np.abs(small - rounded).max() <= 1  # at a border of two steps
    assert (small != rounded).mean() < 0.001
    assert (small[0, 0], small[1, 1], small[0, 1]) == (127, -127, 0)
    np.testing.assert_array_equal(as_type(vectors, "uint8"), small.astype(int) + 128)
    bounds = np.array([[-128.5 / 127] * width, [126.5 / 127] * width])
    np.testing.assert_array_equal(small, quantize_embeddings(vectors, "int8", ranges=bounds))
    np.testing.assert_array_equal(small[7:8], as_type(vectors[7:8], "int8"))  # alone
    products = small.astype(int) @ small.astype(int).T
    np.testing.assert_allclose(products / 127**2, vectors @ vectors.T, atol=0.03)


@pytest.mark.parametrize("dtype", ["binary", "ubinary"])
@pytest.mark.parametrize("width", [8, 20, 1])
def test_bits(dtype: str, width: int) -> None:
    vectors = unit_rows(np.random.default_rng(0).normal(size=(5, width)).astype(np.float32))
    np.testing.assert_array_equal(as_type(vectors, dtype), quantize_embeddings(vectors, dtype))
    expected = quantize(torch.from_numpy(vectors), dtype)  # what encode(precision=...) gives
    np.testing.assert_array_equal(as_type(vectors, dtype), expected.numpy())


# --- Cohere ---------------------------------------------------------------------------------------


def cohere(client: TestClient, **body: Any) -> Any:
    body = {"model": "m", "texts": TEXTS, "input_type": "search_document"} | body
    return post(client, "/v2/embed", **body)["embeddings"]


def test_purposes_of_cohere(client: TestClient, model: NVEmbed) -> None:
    query, document = model.encode_query(TEXTS), model.encode_document(TEXTS)
    assert np.abs(query - document).max() > 1e-3
    near(cohere(client)["float"], document)
    near(cohere(client, input_type="search_query")["float"], query)
    near(cohere(client, input_type="classification")["float"], document)
    grouped = model.encode(TEXTS, prompt="group: ")
    near(cohere(client, input_type="clustering")["float"], grouped)
    told = model.encode_query(TEXTS, task="find it")
    for purpose in ("search_query", "clustering"):
        near(cohere(client, input_type=purpose, instruction="find it")["float"], told)


def test_types_of_cohere(client: TestClient, model: NVEmbed) -> None:
    unit = model.encode_document(TEXTS)
    types = ["int8", "uint8", "binary", "ubinary", "float", "base64", "int8"]
    found = cohere(client, embedding_types=types)
    assert list(found) == types[:-1]
    near(found.pop("float"), unit)
    near([np.frombuffer(base64.b64decode(row), "<f4") for row in found.pop("base64")], unit)
    for name, rows in found.items():
        np.testing.assert_array_equal(rows, as_type(unit, name))
    short = cohere(client, embedding_types=["ubinary", "float"], output_dimension=12)
    near(short["float"], unit_rows(unit[:, :12]))
    np.testing.assert_array_equal(short["ubinary"], np.packbits(unit[:, :12] > 0, axis=1))


def test_the_answer_of_cohere(client: TestClient) -> None:
    body = post(client, "/v2/embed", model="m", texts=["a"], input_type="search_query")
    assert body.keys() == {"id", "response_type", "embeddings", "texts", "meta"}
    assert body["response_type"] == "embeddings_by_type"
    assert body["texts"] == ["a"]
    assert body["meta"]["billed_units"]["input_tokens"] > 2
    texts = {"texts": ["a"], "input_type": "search_query"}
    refused(client, "/v2/embed", "'search_query'", texts=["a"], input_type="query")
    refused(client, "/v2/embed", "'input_type' is missing", texts=["a"])
    refused(client, "/v2/embed", f"has {WIDTH}", **texts, output_dimension=WIDTH + 1)
    refused(client, "/v2/embed", "unknown field", **texts, images=["x"])
    refused(client, "/v2/embed", "at least one", texts=[], input_type="search_query")
    unknown = client.post("/v2/embed", json={**texts, "model": "other"})
    assert (unknown.status_code, unknown.json().keys()) == (404, {"message"})


# --- Jina and Voyage ------------------------------------------------------------------------------


def openai(client: TestClient, **body: Any) -> list[Any]:
    data = post(client, "/v1/embeddings", **{"input": TEXTS} | body)["data"]
    return [row["embedding"] for row in data]


def test_tasks_of_jina(client: TestClient, model: NVEmbed) -> None:
    query, document = model.encode_query(TEXTS), model.encode_document(TEXTS)
    near(openai(client, task="retrieval.query"), query)
    for task in ("retrieval.passage", "text-matching", "classification"):
        near(openai(client, task=task), document)
    near(openai(client, task="separation"), model.encode(TEXTS, prompt="group: "))
    told = model.encode_query(TEXTS, task="find it")
    near(openai(client, task="retrieval.query", instruction="find it"), told)
    near(openai(client, task="find it"), told)
    near(openai(client, task="retrieval.query", instruction=" "), query)
    near(openai(client, task="classification", input_type="query"), query)
    near(openai(client, task="text-matching", prompt_name="query"), query)


@pytest.mark.parametrize("dtype", ["float", "int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("field", ["output_dtype", "embedding_type"])
def test_types_of_numbers(client: TestClient, model: NVEmbed, dtype: str, field: str) -> None:
    expected = as_type(model.encode_document(TEXTS), dtype)
    rows = openai(client, **{field: dtype})
    np.testing.assert_allclose(np.array(rows, dtype=expected.dtype), expected, atol=1e-6)
    rows = openai(client, **{field: dtype}, encoding_format="base64")
    found = [np.frombuffer(base64.b64decode(row), expected.dtype) for row in rows]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    short = openai(client, **{field: "ubinary"}, output_dimension=12)
    signs = model.encode_document(TEXTS)[:, :12] > 0
    np.testing.assert_array_equal(short, np.packbits(signs, axis=1))


def test_other_names_of_fields(client: TestClient, model: NVEmbed, monkeypatch: Any) -> None:
    unit = model.encode_document(TEXTS)
    near(openai(client, output_dimension=8), unit_rows(unit[:, :8]))
    rows = openai(client, embedding_type="base64")
    near([np.frombuffer(base64.b64decode(row), "<f4") for row in rows], unit)
    rows = openai(client, embedding_type="base64", output_dtype="int8")
    found = [np.frombuffer(base64.b64decode(row), np.int8) for row in rows]
    np.testing.assert_array_equal(found, as_type(unit, "int8"))
    for pair in (
        {"dimensions": 8, "output_dimension": 8},
        {"truncate": "END", "truncation": True},
        {"output_dtype": "int8", "embedding_type": "int8"},
    ):
        refused(client, "/v1/embeddings", "send one of them", input="a", **pair)
    monkeypatch.setattr(model.backbone, "max_tokens", 8)
    long = "a text of many more than eight tokens"
    for field in ({"truncation": True}, {"truncate": True}):
        near(openai(client, input=long, **field), openai(client, input=long))
    for field in ({"truncation": False}, {"truncate": False}, {"truncate": "NONE"}):
        answer = client.post("/v1/embeddings", json={"input": long, **field})
        assert (answer.status_code, "takes 8" in answer.text) == (413, True)


def test_rerank_of_jina_and_cohere(client: TestClient, model: NVEmbed) -> None:
    texts = ["a bond", "a share", "something else", "a share of it"]
    documents = [texts[0], {"text": texts[1], "page": 7}, *texts[2:]]
    kept = [{"text": text} for text in texts]
    kept[1]["page"] = 7
    for instruction in (None, "find it"):
        scores = model.encode_document(texts) @ model.encode_query(["share"], task=instruction)[0]
        body = {"query": "share", "documents": documents, "instruction": instruction}
        answer = post(client, "/v1/rerank", **body)
        order = np.argsort(-scores).tolist()
        assert [row["index"] for row in answer["results"]] == order
        near([row["relevance_score"] for row in answer["results"]], scores[order])
        assert [row["document"] for row in answer["results"]] == [kept[row] for row in order]
        assert answer["usage"]["total_tokens"] > 8
        top = post(client, "/v1/rerank", **body, top_n=2, return_documents=False)["results"]
        assert [row.keys() for row in top] == [{"index", "relevance_score"}] * 2
        assert [row["index"] for row in top] == order[:2]
        second = post(client, "/v2/rerank", **body, top_n=9)["results"]
        assert ([row["index"] for row in second], "document" in second[0]) == (order, False)
    for wrong in ([1], [{"page": 7}], "a", [["a"]]):
        refused(client, "/v1/rerank", "objects that have a text", query="a", documents=wrong)
    refused(client, "/v2/rerank", "at least one", query="a", documents=[], top_n=1)
    refused(client, "/v1/rerank", "from 1", query="a", documents=["a"], top_n=0)
    known = post(client, "/rerank", query="a", texts=["a"])  # as it was
    assert known[0].keys() == {"index", "score"}


# --- Ollama ---------------------------------------------------------------------------------------


def test_ollama(client: TestClient, model: NVEmbed, monkeypatch: Any) -> None:
    unit = model.encode_document(TEXTS)
    options = {"num_ctx": 2048, "stop": ["a"], "anything": {"at": "all"}}
    for name in ("m", "m:latest", None):
        for keep in (5, "5m", -1.5, None):
            body = {"model": name, "input": TEXTS, "options": options, "keep_alive": keep}
            answer = post(client, "/api/embed", **body)
            assert answer["model"] == (name or "m")
            near(answer["embeddings"], unit)
    assert answer["prompt_eval_count"] > 4
    assert 0 < answer["total_duration"] < 60e9
    near(post(client, "/api/embed", input=TEXTS[0])["embeddings"], unit[:1])
    short = post(client, "/api/embed", input=TEXTS, dimensions=8)["embeddings"]
    near(short, unit_rows(unit[:, :8]))
    near(post(client, "/api/embeddings", prompt=TEXTS[1])["embedding"], unit[1])
    for given, prompt in (
        ({"instruction": "find it"}, "Instruct: find it\nQuery: "),
        ({"task": "find it"}, "Instruct: find it\nQuery: "),
        ({"prompt_name": "Clustering"}, "group: "),
        ({"input_type": "query"}, "ask: "),
    ):
        expected = model.encode(TEXTS, prompt=prompt)
        near(post(client, "/api/embed", input=TEXTS, options=given)["embeddings"], expected)
        one = post(client, "/api/embeddings", prompt=TEXTS[0], options=given)["embedding"]
        near(one, expected[0])
    monkeypatch.setattr(model.backbone, "max_tokens", 8)
    long = "a text of many more than eight tokens"
    assert len(post(client, "/api/embed", input=long)["embeddings"]) == 1
    answer = client.post("/api/embed", json={"input": long, "truncate": False})
    assert (answer.status_code, answer.json().keys()) == (413, {"error"})


def test_models_of_ollama(client: TestClient) -> None:
    assert [row["model"] for row in client.get("/api/tags").json()["models"]] == ["m", "m:query"]
    shown = post(client, "/api/show", model="m")
    assert shown["capabilities"] == ["embedding"]
    assert shown["model_info"]["nvembed.embedding_length"] == WIDTH
    assert shown["model_info"]["nvembed.context_length"] == 200
    assert shown["details"]["quantization_level"] == "float32"
    for path, body in (("/api/show", {}), ("/api/embed", {"input": "a"})):
        unknown = client.post(path, json={**body, "model": "other:latest"})
        assert (unknown.status_code, unknown.json().keys()) == (404, {"error"})
    missing = client.post("/api/generate", json={})
    assert (missing.status_code, missing.json().keys()) == (404, {"error"})
    refused(client, "/api/embed", "text 0 is empty", input="")
    refused(client, "/api/embed", "'options'", input="a", options={"instruction": 5})
    refused(client, "/api/embed", "'options'", input="a", options=[])
    refused(client, "/api/embed", "unknown field", input="a", images=[])


# --- the client of the hub ------------------------------------------------------------------------


def test_root_takes_similarities_too(client: TestClient, model: NVEmbed) -> None:
    inputs = {"source_sentence": TEXTS[0], "sentences": TEXTS}
    unit = model.encode_document(TEXTS)
    for fields in ({}, {"parameters": {}}, {"parameters": None, "normalize": None}):
        near(post(client, "/", inputs=inputs, **fields), unit @ unit[0])
    named = post(client, "/", inputs=inputs, parameters={"prompt_name": "Clustering"})
    grouped = model.encode(TEXTS, prompt="group: ")
    near(named, grouped @ grouped[0])
    refused(client, "/", "normalize cannot be sent", inputs=inputs, normalize=True)
    refused(client, "/", "parameters cannot be sent", inputs="a", parameters={})
    refused(client, "/", "an object of source_sentence", inputs={"sentences": TEXTS})
