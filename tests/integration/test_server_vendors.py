"""The official clients of other APIs against a real server."""

from __future__ import annotations

import base64
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hash_encoder import HashEncoder
from nvembed.model.encoder import unit_rows
from nvembed.serving.middleware import ApiKeys
from nvembed.serving.vectors import as_type
from serving_fakes import WIDTH, HeldEngine, make_config, running

ENCODER = HashEncoder(WIDTH)
KEY = "k" * 20
TEXTS = ["a red fish", "one"]


@pytest.fixture
def address() -> Iterator[str]:
    with running(HeldEngine(), make_config(), ApiKeys({"me": KEY})) as port:
        yield f"http://127.0.0.1:{port}"


def same(found, expected) -> None:
    np.testing.assert_array_equal(np.array(found, dtype=expected.dtype), expected)


def test_the_client_of_cohere(address: str) -> None:
    cohere = pytest.importorskip("cohere", reason="needs nvembed[clients]")
    with cohere.ClientV2(KEY, base_url=address) as client:
        check_cohere(cohere, client)
    with cohere.Client(KEY, base_url=address) as older:
        ranked = older.rerank(
            model="m", query="fish", documents=[{"text": "a fish"}, "it"], return_documents=True
        )
        assert [row.document.text for row in ranked.results] == ["a fish", "it"]
    with (
        cohere.ClientV2("x", base_url=address) as stranger,
        pytest.raises(cohere.UnauthorizedError, match="no valid API key"),
    ):
        stranger.embed(model="m", texts=TEXTS, input_type="search_query")


def check_cohere(cohere: Any, client: Any) -> None:
    kinds = ["float", "int8", "uint8", "binary", "ubinary"]
    answer = client.embed(
        model="m", texts=TEXTS, input_type="search_query", embedding_types=kinds, truncate="END"
    )
    assert isinstance(answer, cohere.EmbedByTypeResponse)
    again = cohere.EmbedByTypeResponse.model_validate(answer.model_dump(by_alias=True))
    assert again == answer  # strictly by the client's own model, which it does not check itself
    unit = ENCODER.encode_query(TEXTS)
    same(answer.embeddings.float_, unit)
    for kind in kinds[1:]:
        same(getattr(answer.embeddings, kind), as_type(unit, kind))
    assert answer.texts == TEXTS
    assert answer.meta.billed_units.input_tokens == 4
    short = client.embed(
        model="m", texts=TEXTS, input_type="search_document", output_dimension=4
    ).embeddings.float_
    assert np.array(short).shape == (2, 4)
    documents = ["red", "a blue fish", "one red fish"]
    ranked = client.rerank(model="m", query="red fish", documents=documents, top_n=2)
    assert isinstance(ranked, cohere.V2RerankResponse)
    scores = ENCODER.encode_document(documents) @ ENCODER.encode_query(["red fish"])[0]
    assert [row.index for row in ranked.results] == np.argsort(-scores)[:2].tolist()
    found = [row.relevance_score for row in ranked.results]
    np.testing.assert_allclose(found, np.sort(scores)[:0:-1], atol=1e-6)
    with pytest.raises(cohere.NotFoundError, match="ask for 'm'"):
        client.embed(model="other", texts=TEXTS, input_type="search_query")
    with pytest.raises(cohere.BadRequestError, match="text 1 is empty"):
        client.embed(model="m", texts=["a", ""], input_type="search_query")


def test_the_client_of_ollama(address: str) -> None:
    ollama = pytest.importorskip("ollama", reason="needs nvembed[clients]")
    headers = {"Authorization": f"Bearer {KEY}"}
    with ollama.Client(host=address, headers=headers) as client:
        assert [row.model for row in client.list().models] == ["m", "m:query"]
        answer = client.embed("m", TEXTS, truncate=True, keep_alive="5m", options={"num_ctx": 9})
        same(answer.embeddings, ENCODER.encode_document(TEXTS))
        assert (answer.model, answer.prompt_eval_count) == ("m", 4)
        same(client.embed("m:latest", "one").embeddings, ENCODER.encode_document(["one"]))
        typed = client.embed("m", TEXTS, options=ollama.Options(temperature=0.5))
        same(typed.embeddings, ENCODER.encode_document(TEXTS))
        told = client.embed("m", TEXTS, options={"instruction": "find it"}, keep_alive=0)
        same(told.embeddings, ENCODER.encode_query(TEXTS, task="find it"))
        short = client.embed("m", TEXTS, dimensions=4).embeddings
        same(short, unit_rows(ENCODER.encode_document(TEXTS)[:, :4]))
        same([client.embeddings("m", "one").embedding], ENCODER.encode_document(["one"]))
        shown = client.show("m")
        assert shown.capabilities == ["embedding"]
        assert shown.modelinfo["nvembed.embedding_length"] == WIDTH
        with pytest.raises(ollama.ResponseError, match="ask for 'm'") as caught:
            client.embed("other", "a")
        assert caught.value.status_code == 404
    with (
        ollama.Client(host=address) as stranger,
        pytest.raises(ollama.ResponseError, match="API key"),
    ):
        stranger.list()


def test_small_numbers_by_the_client_of_openai(address: str) -> None:
    openai = pytest.importorskip("openai", reason="needs the openai package")
    unit = ENCODER.encode_document(TEXTS)
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY) as client:
        for kind in ("int8", "uint8", "binary", "ubinary"):
            expected = as_type(unit, kind)
            for packed in ("base64", "float"):  # with its own default it takes them for float32
                answer = client.embeddings.create(
                    model="m",
                    input=TEXTS,
                    encoding_format=packed,
                    extra_body={"output_dtype": kind},
                )
                rows = [row.embedding for row in answer.data]
                if packed == "base64":
                    rows = [np.frombuffer(base64.b64decode(row), expected.dtype) for row in rows]
                same(rows, expected)


def test_what_the_client_of_voyage_sends(address: str) -> None:
    body = {  # every field of its embed(), with the encoding that it asks for by itself
        "input": TEXTS,
        "model": "m",
        "input_type": "query",
        "truncation": True,
        "output_dtype": "int8",
        "output_dimension": 8,
        "encoding_format": "base64",
    }
    request = urllib.request.Request(
        f"{address}/v1/embeddings",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        data = json.load(answer)["data"]
    rows = [np.frombuffer(base64.b64decode(row["embedding"]), np.int8) for row in data]
    same(rows, as_type(unit_rows(ENCODER.encode_query(TEXTS)[:, :8]), "int8"))
