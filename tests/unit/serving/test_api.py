"""Every route over a fake model: values, bad input, keys, limits, health, metrics, no CORS."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator

import numpy as np
import pytest
from starlette.testclient import TestClient

from hash_encoder import HashEncoder
from nvembed.data.instructions import task_instruction
from nvembed.model.encoder import unit_rows
from nvembed.serving.engines import EncoderEngine
from nvembed.serving.middleware import ApiKeys
from nvembed.serving.server import create_app
from serving_fakes import WIDTH, HeldEngine, make_config

ENCODER = HashEncoder(WIDTH)
KEYS = {"alice": "a" * 20, "bob": "b" * 20}


@pytest.fixture
def engine() -> HeldEngine:
    return HeldEngine()


@pytest.fixture
def client(engine: HeldEngine) -> Iterator[TestClient]:
    limits = {"max_texts": 4, "max_text_chars": 100, "max_body_bytes": 2000}
    with TestClient(create_app(engine, make_config(limits=limits))) as made:
        yield made


def post(client: TestClient, path: str = "/v1/embeddings", **body):
    if path.startswith("/v1"):
        body = {"model": "m"} | body
    return client.post(path, json=body)


def vectors(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [row["index"] for row in data] == list(range(len(data)))
    rows = [row["embedding"] for row in data]
    if isinstance(rows[0], str):
        return np.stack([np.frombuffer(base64.b64decode(row), "<f4") for row in rows])
    return np.array(rows, dtype=np.float32)


def test_openai_embeddings(client: TestClient) -> None:
    oracle = ENCODER.encode_document(["a b", "c"])
    answer = post(client, input=["a b", "c"])
    np.testing.assert_array_equal(vectors(answer), oracle)
    body = answer.json()
    assert (body["object"], body["model"]) == ("list", "m")
    assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    np.testing.assert_array_equal(vectors(post(client, input="a b")), oracle[:1])
    as_base64 = post(client, input=["a b", "c"], encoding_format="base64", user="me")
    np.testing.assert_array_equal(vectors(as_base64), oracle)
    short = vectors(post(client, input=["a b c d e"], dimensions=4))
    expected = unit_rows(ENCODER.encode_document(["a b c d e"])[:, :4])
    np.testing.assert_allclose(short, expected, atol=1e-6)


def test_token_ids(client: TestClient) -> None:
    np.testing.assert_array_equal(
        vectors(post(client, input=[[5, 6], [7]])), ENCODER.encode_document(["5 6", "7"])
    )
    np.testing.assert_array_equal(
        vectors(post(client, input=[5, 6])), ENCODER.encode_document(["5 6"])
    )
    assert post(client, input=[5, 6], instruction="find").status_code == 400
    with TestClient(create_app(EncoderEngine(ENCODER), make_config())) as other:
        answer = post(other, input=[1])
    assert answer.status_code == 400
    assert "send texts" in answer.json()["error"]["message"]


def test_instructions_and_sides(client: TestClient) -> None:
    plain, query = ENCODER.encode_query(["a"]), ENCODER.encode_query(["a"], task="find it")
    assert not np.allclose(plain, query, atol=1e-3)
    np.testing.assert_array_equal(vectors(post(client, input="a", instruction="find it")), query)
    np.testing.assert_array_equal(
        vectors(post(client, input="a", instruction="find it", input_type="document")), query
    )
    np.testing.assert_array_equal(vectors(post(client, input="a", input_type="query")), plain)
    named = vectors(post(client, input="a", instruction="FiQA2018"))
    oracle = ENCODER.encode_query(["a"], task=task_instruction("FiQA2018").instruction)
    np.testing.assert_array_equal(named, oracle)
    typo = post(client, input="a", instruction="FiQA2019")
    assert typo.status_code == 400
    assert "FiQA2018" in typo.json()["error"]["message"]
    assert post(client, input="a", instruction="too long").status_code == 400


def test_models(client: TestClient) -> None:
    assert [row["id"] for row in client.get("/v1/models").json()["data"]] == ["m", "m:query"]
    assert client.get("/v1/models/m").json()["id"] == "m"
    assert client.get("/v1/models/other").status_code == 404


def test_tei(client: TestClient) -> None:
    oracle = ENCODER.encode_document(["a b", "c"])
    answer = post(client, "/embed", inputs=["a b", "c"], truncate=True)
    np.testing.assert_array_equal(np.array(answer.json(), dtype=np.float32), oracle)
    short = post(client, "/embed", inputs="a b c", dimensions=3).json()
    assert np.linalg.norm(short) == pytest.approx(1)
    texts = ["nothing", "red fish", "one red fish"]
    ranking = post(client, "/rerank", query="one red fish", texts=texts, return_text=True).json()
    scores = ENCODER.encode_document(texts) @ ENCODER.encode_query(["one red fish"])[0]
    assert [row["index"] for row in ranking] == np.argsort(-scores).tolist() == [2, 1, 0]
    assert [row["text"] for row in ranking] == [texts[2], texts[1], texts[0]]
    assert [row["score"] for row in ranking] == pytest.approx(np.sort(scores)[::-1].tolist())
    inputs = {"source_sentence": "one red fish", "sentences": texts}
    assert post(client, "/similarity", inputs=inputs).json() == pytest.approx(scores.tolist())
    refused = post(client, "/embed", inputs="a", truncate=False)
    assert refused.status_code == 400
    assert set(refused.json()) == {"error", "error_type"}


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"input": []}, 400, "at least one"),
        ({"input": ""}, 400, "text 0 is empty"),
        ({"input": ["a", " \n"]}, 400, "text 1 is empty"),
        ({"input": ["a"] * 5}, 413, "takes 4"),
        ({"input": "a" * 101}, 413, "split it"),
        ({"input": 5}, 400, "a list of texts"),
        ({"input": None}, 400, "a list of texts"),
        ({"input": ["a", 1]}, 400, "a list of texts"),
        ({"input": [[]]}, 400, "token ids"),
        ({"input": {"a": 1}}, 400, "a list of texts"),
        ({}, 400, "'input' is missing"),
        ({"input": "a", "model": "gpt"}, 404, "ask for 'm'"),
        ({"input": "a", "dimensions": WIDTH + 1}, 400, f"the model has {WIDTH}"),
        ({"input": "a", "dimensions": 0}, 400, "from 1"),
        ({"input": "a", "dimensions": "8"}, 400, "from 1"),
        ({"input": "a", "encoding_format": "hex"}, 400, "'base64'"),
        ({"input": "a", "input_type": "text"}, 400, "'document'"),
        ({"input": "a", "colour": "red"}, 400, "'colour'"),
        ({"input": "nan"}, 503, "NaN"),
        ({"input": "raise"}, 503, "failed"),
    ],
)
def test_bad_input_is_told_what_to_change(client: TestClient, body, status: int, word: str) -> None:
    if body == {"input": [[]]}:
        with TestClient(create_app(EncoderEngine(ENCODER), make_config())) as other:
            answer = post(other, **body)
    else:
        answer = post(client, **body)
    assert answer.status_code == status
    assert word in answer.json()["error"]["message"]
    assert vectors(post(client, input="fine")).shape == (1, WIDTH)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff\xfe", b'{"input": "\xe4"}', b'{"input": "\\ud800"}', b"[" * 1500, b"null"],
)
def test_broken_bodies(client: TestClient, raw: bytes) -> None:
    for path in ("/v1/embeddings", "/embed", "/rerank", "/similarity"):
        answer = client.post(path, content=raw, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert "JSON" in answer.text


def test_sizes_and_types_of_bodies(client: TestClient) -> None:
    large = post(client, input=["a" * 90] * 30)
    assert large.status_code == 413
    assert "2000 bytes" in large.json()["error"]["message"]
    assert client.post("/v1/embeddings", data={"input": "a"}).status_code == 415
    assert client.get("/v1/embeddings").status_code == 405
    assert client.get("/nothing").status_code == 404


def test_keys(engine: HeldEngine) -> None:
    with TestClient(create_app(engine, make_config(), ApiKeys(KEYS))) as client:
        for header in (None, "Bearer ", "Bearer x", "Bearer é", "Basic " + KEYS["bob"]):
            headers = {} if header is None else {"authorization": header.encode("latin-1")}
            for path in ("/v1/models", "/metrics", "/nothing"):
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
            body = {"input": "a", "model": "m"}
            assert client.post("/v1/embeddings", json=body, headers=headers).status_code == 401
        assert not engine.batches
        good = {"authorization": "Bearer " + KEYS["bob"]}
        assert client.get("/v1/models", headers=good).status_code == 200
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").status_code == 200


def test_no_cors(client: TestClient) -> None:
    origin = {"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
    answers = [
        client.options("/v1/embeddings", headers=origin),
        client.get("/v1/models", headers=origin),
    ]
    assert not [name for a in answers for name in a.headers if name.startswith("access-control")]


def test_metrics_count(client: TestClient) -> None:
    post(client, input=["a b", "c"])
    post(client, input=[])
    page = client.get("/metrics").text
    assert 'nvembed_requests_total{route="/v1/embeddings",status="200"} 1.0' in page
    assert 'nvembed_requests_total{route="/v1/embeddings",status="400"} 1.0' in page
    assert "nvembed_batch_tokens_sum 3.0" in page
    assert "nvembed_queued_tokens 0.0" in page
    client.get("/a-path-per-request")
    assert "a-path" not in client.get("/metrics").text


def test_the_log_holds_no_texts(engine: HeldEngine) -> None:
    lines: list[str] = []
    logger = logging.getLogger("nvembed.serving")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        config = make_config(log_requests=True)
        with TestClient(create_app(engine, config, ApiKeys(KEYS))) as client:
            headers = {"authorization": "Bearer " + KEYS["alice"]}
            for text in ("secret one", "secret raise", "secret nan"):
                body = {"input": text, "model": "m"}
                answer = client.post("/v1/embeddings", json=body, headers=headers)
    finally:
        logger.removeHandler(handler)
    assert "secret" not in "".join(lines)
    assert KEYS["alice"] not in "".join(lines)
    rows = [row for row in map(json.loads, lines) if row["event"] == "request"]
    assert [row["status"] for row in rows] == [200, 503, 503]
    assert rows[0]["client"] == "alice"
    assert (rows[0]["texts"], rows[0]["tokens"]) == (1, 2)
    assert rows[2]["request"] == answer.headers["x-request-id"]
