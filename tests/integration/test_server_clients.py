"""What other servers' clients send: the hub's client, gzip, slashes; with keys and limits."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from collections.abc import Iterator
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import numpy as np
import pytest
from starlette.testclient import TestClient

from hash_encoder import HashEncoder
from nvembed.serving.middleware import ApiKeys
from nvembed.serving.server import create_app
from serving_fakes import WIDTH, HeldEngine, make_config, running

ENCODER = HashEncoder(WIDTH)
KEY = "k" * 20
ROUTES = {
    "/v1/embeddings": {"input": "a b"},
    "/embed": {"inputs": "a b"},
    "/": {"inputs": "a b"},
    "/rerank": {"query": "a", "texts": ["a b"]},
    "/similarity": {"inputs": {"source_sentence": "a", "sentences": ["a b"]}},
    "/tokenize": {"inputs": "a b"},
    "/v1/rerank": {"query": "a", "documents": ["a b"]},
    "/v2/rerank": {"query": "a", "documents": [{"text": "a b"}]},
    "/api/embed": {"model": "m:latest", "input": "a b"},
    "/api/embeddings": {"prompt": "a b"},
    "/v2/embed": {"texts": ["a b"], "input_type": "search_query"},
}
JSON = {"content-type": "application/json"}
GZIP = {**JSON, "content-encoding": "gzip"}


FORMS = {  # of errors, by the beginning of the path; TEI's else
    "v1": {"error", "error.message", "error.type", "error.param", "error.code"},
    "v2": {"message"},
    "api": {"error"},
}


def error_form(body: dict) -> set[str]:
    inner = body.get("error")
    return body.keys() | {f"error.{name}" for name in (inner if isinstance(inner, dict) else ())}


def plain(answer: Any) -> Any:
    """An answer without what is different every time."""
    body = answer.json()
    varying = ("id", "total_duration")
    return (
        {name: body[name] for name in body if name not in varying}
        if isinstance(body, dict)
        else body
    )


class WordEngine(HeldEngine):
    """The fake engine with a tokenizer: a token per word."""

    supports_tokens = True

    def tokens(self, texts, prompt: str, *, special: bool) -> list:
        return [[{"id": len(word), "text": word} for word in text.split()] for text in texts]


@pytest.fixture
def engine() -> WordEngine:
    return WordEngine()


@pytest.fixture
def client(engine: WordEngine) -> Iterator[TestClient]:
    limits = {"max_body_bytes": 2_000_000, "max_inflight_bytes": 3_000_000}
    with TestClient(create_app(engine, make_config(limits=limits))) as made:
        yield made


def compressed(body: Any) -> bytes:
    return gzip.compress(json.dumps(body).encode())


def test_the_client_of_the_hub(engine: WordEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # of the tests alone
    scores = ENCODER.encode_document(["a b", "c"]) @ ENCODER.encode_document(["a b"])[0]
    with running(engine, make_config(), ApiKeys({"me": KEY})) as port:
        address = f"http://127.0.0.1:{port}"
        for url in (address, f"{address}/embed", f"{address}/embed/"):
            hub = huggingface_hub.InferenceClient(url, token=KEY)
            found = hub.feature_extraction(["a b", "c"], normalize=True, truncate=True)
            np.testing.assert_array_equal(found, ENCODER.encode_document(["a b", "c"]))
            one = hub.feature_extraction("a b", truncation_direction="right", dimensions=4)
            assert np.asarray(one).shape == (1, 4)
        for url in (address, f"{address}/similarity"):
            hub = huggingface_hub.InferenceClient(url, token=KEY)
            found = hub.sentence_similarity("a b", ["a b", "c"])
            np.testing.assert_allclose(found, scores, atol=1e-6)
        stranger = huggingface_hub.InferenceClient(address, token="wrong")
        with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="401"):
            stranger.feature_extraction("a")


@pytest.mark.parametrize("path", ROUTES)
def test_a_trailing_slash_changes_nothing(client: TestClient, path: str) -> None:
    expected = client.post(path, json=ROUTES[path])
    assert expected.status_code == 200
    for other in (f"{path.rstrip('/')}/", f"{path}//"):
        answer = client.post(other, json=ROUTES[path])
        assert plain(answer) == plain(expected)
    refused = client.post(f"{path}/", json={})
    assert refused.status_code == 400
    assert refused.json() == client.post(path, json={}).json()  # in the form of the same API
    page = client.get("/metrics/").text
    assert f'nvembed_requests_total{{route="{path}",status="200"}} 3.0' in page


def test_slashes_on_routes_that_are_read(client: TestClient) -> None:
    for path in (
        "/health",
        "/ready",
        "/v1/models",
        "/v1/models/m",
        "/info",
        "/api/tags",
        "/openapi.json",
        "/docs",
    ):
        answer = client.get(f"{path}/")
        assert (answer.status_code, answer.text) == (200, client.get(path).text)


@pytest.mark.parametrize("path", ROUTES)
def test_keys_limits_and_errors_of_every_route(engine: WordEngine, path: str) -> None:
    config = make_config(limits={"max_texts": 1, "max_text_chars": 5, "max_body_bytes": 200})
    with TestClient(create_app(engine, config, ApiKeys({"me": KEY}))) as client:
        for other in (path, f"{path}/"):
            assert client.post(other, json=ROUTES[path]).status_code == 401
        client.headers["authorization"] = f"Bearer {KEY}"
        large = client.post(path, json={**ROUTES[path], "user": "a" * 300})
        assert large.status_code == 413
        assert client.post(path, content=b"{}").status_code == 415
        body = json.loads(json.dumps(ROUTES[path]).replace("a b", "a b a b"))
        long = client.post(path, json=body)
        assert long.status_code == 413
        assert "takes 5" in long.text
        assert error_form(long.json()) == FORMS.get(path.split("/")[1], {"error", "error_type"})
        assert client.get(path).status_code == 405


def test_requests_under_way_are_limited_on_tokenize_too(engine: WordEngine) -> None:
    config = make_config(batching={"queue_tokens": 4})
    with TestClient(create_app(engine, config)) as client:
        assert client.post("/tokenize", json={"inputs": ["a b", "c d"]}).status_code == 200
        answer = client.post("/tokenize", json={"inputs": ["a b", "c d", "e"]})
        assert (answer.status_code, answer.json()["error_type"]) == (413, "Validation")


def test_gzip_bodies(client: TestClient) -> None:
    for path, body in ROUTES.items():
        expected = plain(client.post(path, json=body))
        packed = compressed(body)
        members = (
            gzip.compress(json.dumps(body).encode()[:7]),
            gzip.compress(json.dumps(body).encode()[7:]),
        )
        for content in (packed, b"".join(members)):
            assert plain(client.post(path, content=content, headers=GZIP)) == expected
    raw = json.dumps(ROUTES["/embed"]).encode()
    identity = {**JSON, "content-encoding": "identity"}
    assert client.post("/embed", content=raw, headers=identity).status_code == 200
    upper = {**JSON, "content-encoding": "GZIP"}
    assert client.post("/embed", content=gzip.compress(raw), headers=upper).status_code == 200


def test_gzip_in_small_pieces(client: TestClient) -> None:
    body = {"inputs": [f"text {number}" for number in range(500)]}
    packed = compressed(body)
    pieces = (packed[at : at + 7] for at in range(0, len(packed), 7))
    answer = client.post("/embed", content=pieces, headers=GZIP)
    assert answer.json() == client.post("/embed", json=body).json()


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "gzip, gzip", "x"])
def test_other_encodings_are_refused(client: TestClient, encoding: str) -> None:
    headers = {**JSON, "content-encoding": encoding}
    answer = client.post("/embed", content=b"{}", headers=headers)
    assert (answer.status_code, "gzip" in answer.json()["error"]) == (415, True)


def test_damaged_gzip(client: TestClient) -> None:
    packed = compressed(ROUTES["/embed"])
    flipped = bytes([*packed[:-6], packed[-6] ^ 1, *packed[-5:]])
    for content in (b"", b"{}", packed[:-3], packed[:10], packed + b"rest", flipped):
        answer = client.post("/embed", content=content, headers=GZIP)
        assert (answer.status_code, "gzip" in answer.json()["error"]) == (400, True)
    assert client.post("/embed", content=packed, headers=GZIP).status_code == 200
    assert "nvembed_inflight_requests 1.0" in client.get("/metrics").text


def bomb(megabytes: int) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    parts = [packer.compress(b" " * 2**20) for _ in range(megabytes)]
    return b"".join([*parts, packer.flush()])


def test_a_gzip_bomb_is_refused_in_little_memory(client: TestClient) -> None:
    content = bomb(60)
    assert len(content) < 100_000
    tracemalloc.start()
    try:
        answer = client.post("/embed", content=content, headers=GZIP)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (answer.status_code, "2000000 bytes" in answer.json()["error"]) == (413, True)
    assert peak < 12e6
    nested = gzip.compress(gzip.compress(json.dumps(ROUTES["/embed"]).encode()))
    assert client.post("/embed", content=nested, headers=GZIP).status_code == 400
    assert client.post("/embed", json=ROUTES["/embed"]).status_code == 200


def test_unpacked_bytes_count_among_those_under_way(engine: WordEngine) -> None:
    limits = {"max_body_bytes": 2_000_000, "max_inflight_bytes": 1_000_000}
    with TestClient(create_app(engine, make_config(limits=limits))) as client:
        for content in (bomb(1), bomb(2)):
            assert client.post("/embed", content=content, headers=GZIP).status_code == 429
        assert client.post("/embed", json=ROUTES["/embed"]).status_code == 200
