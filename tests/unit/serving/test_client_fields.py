"""Every field that clients send, on every route, held against the model's own vectors."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from starlette.testclient import TestClient

from hash_encoder import HashEncoder
from nvembed import NVEmbed
from nvembed.data.instructions import task_instruction
from nvembed.model.encoder import SentenceTransformerEncoder, unit_rows
from nvembed.model.packing import flatten
from nvembed.model.packs import embed_pack
from nvembed.model.tokens import TokenizedText
from nvembed.serving.engines import EncoderEngine, build_engine
from nvembed.serving.server import create_app
from serving_fakes import make_config

LIMIT = 24
PROMPTS = {"query": "ask: ", "document": "", "faq": "Instruct: answer it\nQuery: "}
TEXTS = ["a bond", "what is a share of a company"]
LONG = "first words of a text that is much too long for this model, and then its last words"
FIQA = f"Instruct: {task_instruction('FiQA2018').instruction}\nQuery: "


@pytest.fixture(scope="module")
def model(tiny_decoder_dir: Path) -> NVEmbed:
    made = NVEmbed.from_pretrained(tiny_decoder_dir, device="cpu", max_tokens=200)
    made.prompts = dict(PROMPTS)
    return made


@pytest.fixture(scope="module")
def client(model: NVEmbed) -> Iterator[TestClient]:
    config = make_config(model_name="docs", model_aliases=["owner/name", "name"])
    with TestClient(create_app(build_engine(model), config)) as made:
        yield made


def post(client: TestClient, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client: TestClient, path: str, status: int, word: str, **body: Any) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    message = answer.json().get("error") or answer.json()["message"]
    assert word in (message if isinstance(message, str) else message["message"])


def near(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.array(found, dtype=np.float32), expected, atol=1e-6)


def openai(client: TestClient, **body: Any) -> list[list[float]]:
    return [row["embedding"] for row in post(client, "/v1/embeddings", **body)["data"]]


def pooled(model: NVEmbed, texts: list[str], prompt: str = "") -> np.ndarray:
    """The mean of the states of the text's tokens, text by text."""
    rows = []
    for tokens in model.backbone.tokenize_texts(texts, prompt):
        with torch.inference_mode():
            states = model.backbone.hidden(flatten([tokens]))
        rows.append(states[tokens.pool_start :].mean(0))
    return torch.stack(rows).numpy()


def of_ids(model: NVEmbed, ids: list[int]) -> np.ndarray:
    """The vector of ids between BOS and EOS."""
    frame = model.backbone.tokenize_texts([""])[0].ids
    with torch.inference_mode():
        text = TokenizedText((frame[0], *ids, frame[-1]), 0)
        return embed_pack(model, [text])[0].numpy()


@pytest.mark.parametrize("path", ["/embed", "/"])
def test_normalize(client: TestClient, model: NVEmbed, path: str) -> None:
    unit, raw = model.encode_document(TEXTS), pooled(model, TEXTS)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.05
    near(post(client, path, inputs=TEXTS), unit)
    near(post(client, path, inputs=TEXTS, normalize=True), unit)
    near(post(client, path, inputs=TEXTS, normalize=False), raw)
    near(post(client, path, inputs=TEXTS, normalize=False, dimensions=8), raw[:, :8])
    near(post(client, path, inputs=TEXTS, dimensions=8), unit_rows(raw[:, :8]))
    rows = post(client, path, inputs=TEXTS, normalize=False, encoding_format="base64")
    near([np.frombuffer(base64.b64decode(row), "<f4") for row in rows], raw)
    prompted = pooled(model, TEXTS, FIQA)
    near(post(client, path, inputs=TEXTS, normalize=False, instruction="FiQA2018"), prompted)


def test_requests_with_and_without_length_share_a_batch(model: NVEmbed) -> None:
    engine = build_engine(model)
    from nvembed.serving.engines import EmbedOptions

    items = engine.prepare(TEXTS, EmbedOptions(normalize=False)) + engine.prepare(
        TEXTS, EmbedOptions()
    )
    expected = np.concatenate([pooled(model, TEXTS), model.encode_document(TEXTS)])
    near(engine.embed(items), expected)


@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings"])
def test_token_ids(client: TestClient, model: NVEmbed, path: str) -> None:
    key = "input" if path.startswith("/v1") else "inputs"
    tokenizer = model.backbone.tokenizer
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    expected = model.encode_document(TEXTS)
    for content, rows in ((ids, expected), (ids[0], expected[:1])):
        found = post(client, path, **{key: content})
        near(found if key == "inputs" else [r["embedding"] for r in found["data"]], rows)


TRUNCATION = [
    ({"truncate": True}, {"truncate": "END"}, "end"),
    ({"truncate": None, "truncation_direction": None}, {"truncate": None}, "end"),
    ({"truncation_direction": "Right"}, {}, "end"),
    ({"truncation_direction": "Left"}, {"truncate": "START"}, "start"),
    ({"truncate": True, "truncation_direction": "left"}, {"truncate": "START"}, "start"),
    ({"truncate": False}, {"truncate": "NONE"}, "none"),
    ({"truncate": False, "truncation_direction": "Left"}, {"truncate": "NONE"}, "none"),
]


@pytest.mark.parametrize(("tei", "nim", "cut"), TRUNCATION)
def test_truncation(
    client: TestClient, model: NVEmbed, monkeypatch, tei: dict, nim: dict, cut: str
) -> None:
    monkeypatch.setattr(model.backbone, "max_tokens", LIMIT)
    ids = model.backbone.tokenizer(LONG, add_special_tokens=False)["input_ids"]
    assert len(ids) > LIMIT
    room = LIMIT - len(model.backbone.tokenize_texts([""])[0])
    kept = {"end": ids[:room], "start": ids[-room:]}.get(cut)
    short = model.encode_document(["short"])
    for content in (LONG, ids):
        if kept is None:
            refused(client, "/embed", 413, f"the model takes {LIMIT}", inputs=content, **tei)
            refused(client, "/v1/embeddings", 413, "takes 24", input=content, **nim)
        else:
            near(post(client, "/embed", inputs=content, **tei), [of_ids(model, kept)])
            near(openai(client, input=content, **nim), [of_ids(model, kept)])
    near(post(client, "/embed", inputs="short", **tei), short)
    near(openai(client, input="short", **nim), short)


def test_the_prompt_survives_truncation(client: TestClient, model: NVEmbed, monkeypatch) -> None:
    monkeypatch.setattr(model.backbone, "max_tokens", LIMIT)
    body = {"inputs": LONG, "prompt_name": "query"}
    left = post(client, "/embed", **body, truncation_direction="Left")
    near(post(client, "/embed", **body), model.encode([LONG], prompt=PROMPTS["query"]))
    assert not np.allclose(left, post(client, "/embed", **body), atol=1e-3)
    tokens = model.backbone.text_tokenizer.whole([LONG], PROMPTS["query"])[0]
    room = LIMIT - len(tokens.head) - len(tokens.tail)
    with torch.inference_mode():
        oracle = embed_pack(model, [tokens.part(len(tokens.body) - room, len(tokens.body))])
    near(left, oracle.numpy())


@pytest.mark.parametrize(
    ("field", "prompt"),
    [
        ({"prompt_name": "query"}, "ask: "),
        ({"prompt_name": "document"}, ""),
        ({"prompt_name": "faq"}, PROMPTS["faq"]),
        ({"prompt_name": "FiQA2018"}, FIQA),
        ({"prompt_name": None}, ""),
        ({"instruction": "FiQA2018"}, FIQA),
        ({"task": "FiQA2018"}, FIQA),
        ({"instruction": "faq"}, PROMPTS["faq"]),
        ({"task": "find it", "instruction": None}, "Instruct: find it\nQuery: "),
        ({"instruction": " "}, ""),
    ],
)
def test_prompts(client: TestClient, model: NVEmbed, field: dict, prompt: str) -> None:
    expected = model.encode(TEXTS, prompt=prompt)
    near(post(client, "/embed", inputs=TEXTS, **field), expected)
    near(openai(client, input=TEXTS, **field), expected)


def test_sides(client: TestClient, model: NVEmbed) -> None:
    query, document = model.encode_query(TEXTS), model.encode_document(TEXTS)
    assert np.abs(query - document).max() > 1e-3
    near(openai(client, input=TEXTS, input_type="query"), query)
    for side in ("passage", "document", None):
        near(openai(client, input=TEXTS, input_type=side), document)


@pytest.mark.parametrize("path", ["/embed", "/", "/v1/embeddings", "/tokenize"])
def test_prompts_that_are_none(client: TestClient, path: str) -> None:
    body = {"input" if path.startswith("/v1") else "inputs": "a"}
    refused(client, path, 400, "known are document, faq, query", **body, prompt_name="qery")
    if path != "/tokenize":
        refused(client, path, 400, "perhaps FiQA2018", **body, instruction="FiQA2019")
        refused(client, path, 400, "not both", **body, instruction="find it", prompt_name="faq")
        refused(client, path, 400, "one of them", **body, instruction="find it", task="find it")


NULLS = {
    "/v1/embeddings": (
        {"input": TEXTS},
        "model dimensions encoding_format user input_type truncate instruction task prompt_name "
        "truncation output_dimension output_dtype embedding_type",
    ),
    "/embed": (
        {"inputs": TEXTS},
        "normalize truncate truncation_direction prompt_name dimensions encoding_format "
        "instruction task",
    ),
    "/rerank": (
        {"query": TEXTS[0], "texts": TEXTS},
        "raw_scores return_text truncate truncation_direction instruction task",
    ),
    "/similarity": (
        {"inputs": {"source_sentence": TEXTS[0], "sentences": TEXTS}},
        "parameters",
    ),
    "/tokenize": ({"inputs": TEXTS}, "add_special_tokens prompt_name"),
    "/v2/embed": (
        {"texts": TEXTS, "input_type": "search_query"},
        "model embedding_types output_dimension truncate instruction task",
    ),
    "/api/embed": ({"input": TEXTS}, "model truncate dimensions options keep_alive"),
    "/api/embeddings": ({"prompt": TEXTS[0]}, "model options keep_alive"),
    "/api/show": ({}, "model verbose"),
    "/v1/rerank": (
        {"query": TEXTS[0], "documents": TEXTS},
        "model top_n return_documents instruction task",
    ),
    "/v2/rerank": (
        {"query": TEXTS[0], "documents": TEXTS},
        "model top_n return_documents instruction task",
    ),
}


@pytest.mark.parametrize("path", NULLS)
def test_null_is_the_same_as_leaving_out(client: TestClient, path: str) -> None:
    body, optional = NULLS[path]

    def answer(**fields: Any) -> Any:
        found = post(client, path, **fields)
        for name in ("id", "total_duration"):  # are different every time
            if isinstance(found, dict):
                found.pop(name, None)
        return found

    expected = answer(**body)
    nulls = dict.fromkeys(optional.split())
    assert answer(**body, **nulls) == expected
    schema = client.get("/openapi.json").json()["paths"][path]["post"]["requestBody"]
    fields = schema["content"]["application/json"]["schema"]["properties"]
    assert set(fields) == set(body) | set(nulls)  # no field was forgotten here
    told = {name: fields[name]["default"] for name in nulls if "default" in fields[name]}
    assert answer(**body, **told) == expected
    for name in body:
        refused(client, path, 400, name, **{**body, name: None})
    refused(client, path, 400, "unknown field", **body, colour=None)


def test_rerank_and_similarity_truncate(client: TestClient, model: NVEmbed, monkeypatch) -> None:
    monkeypatch.setattr(model.backbone, "max_tokens", LIMIT)
    texts = [LONG, *TEXTS]
    query = model.encode_query(TEXTS[:1])[0]
    inputs = {"source_sentence": TEXTS[0], "sentences": texts}
    for direction in ("Left", "Right"):
        vectors = post(client, "/embed", inputs=texts, truncation_direction=direction)
        ranked = post(
            client, "/rerank", query=TEXTS[0], texts=texts, truncation_direction=direction
        )
        scores = {row["index"]: row["score"] for row in ranked}
        near([scores[row] for row in range(3)], np.array(vectors) @ query)
        given = {"truncation_direction": direction}
        found = post(client, "/similarity", inputs=inputs, parameters=given)
        near(found, np.array(vectors) @ model.encode_document(TEXTS[:1])[0])
    refused(client, "/rerank", 413, "takes 24", query="a", texts=texts, truncate=False)
    refused(client, "/similarity", 413, "takes 24", inputs=inputs, parameters={"truncate": False})
    short = {**inputs, "sentences": TEXTS}
    found = post(client, "/similarity", inputs=short, parameters={"prompt_name": "query"})
    queries = model.encode_query(TEXTS)
    near(found, queries @ queries[0])
    refused(client, "/similarity", 400, "'parameters'", inputs=short, parameters={"prompt": "a"})


def test_tokenize(client: TestClient, model: NVEmbed) -> None:
    rows = post(client, "/tokenize", inputs=TEXTS)
    for text, row, tokens in zip(TEXTS, rows, model.backbone.tokenize_texts(TEXTS), strict=True):
        assert [token["id"] for token in row] == list(tokens.ids)
        assert [token["special"] for token in row] == [True, *[False] * (len(row) - 2), True]
        assert row[0].keys() == {"id", "text", "special", "start", "stop"}
        assert (row[0]["start"], row[0]["stop"]) == (None, None)
        assert row[-1]["text"] == model.backbone.tokenizer.eos_token
        for token in row[1:-1]:
            assert token["text"] == text[token["start"] : token["stop"]]
        assert "".join(token["text"] for token in row[1:-1]).split() == text.split()
    bare = post(client, "/tokenize", inputs=TEXTS[0], add_special_tokens=False)
    assert bare == [rows[0][1:-1]]
    prompted = post(client, "/tokenize", inputs=TEXTS[0], prompt_name="query")[0]
    expected = model.backbone.tokenize_texts(TEXTS[:1], PROMPTS["query"])[0]
    assert [token["id"] for token in prompted] == list(expected.ids)
    assert prompted[-2]["stop"] == len(PROMPTS["query"] + TEXTS[0])


def test_info(client: TestClient) -> None:
    info = client.get("/info").json()
    assert (info["model_id"], info["model_dtype"]) == ("docs", "float32")
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert (info["max_input_length"], info["max_client_batch_size"]) == (200, 2048)
    assert info["max_concurrent_requests"] == 512
    assert info["max_batch_tokens"] == 1024


def test_names_of_the_model(client: TestClient) -> None:
    names = ["docs", "owner/name", "name"]
    listed = [row["id"] for row in client.get("/v1/models").json()["data"]]
    assert listed == [*names, *(f"{name}:query" for name in names)]
    for name in names:
        assert client.get(f"/v1/models/{name}").json()["id"] == name
        assert post(client, "/v1/embeddings", input="a", model=name)["model"] == name
    assert post(client, "/v1/embeddings", input="a")["model"] == "docs"
    refused(client, "/v1/embeddings", 404, "'docs' or 'owner/name'", input="a", model="other")


# --- a stock sentence-transformers model ----------------------------------------------------------


@pytest.fixture(scope="module")
def stock(tiny_decoder_dir: Path) -> SentenceTransformer:
    transformer = Transformer(str(tiny_decoder_dir), max_seq_length=200)
    transformer.tokenizer.pad_token = "</s>"
    modules = [transformer, Pooling(32, pooling_mode="mean"), Normalize()]
    return SentenceTransformer(modules=modules, prompts=dict(PROMPTS), device="cpu")


@pytest.fixture(scope="module")
def stock_client(stock: SentenceTransformer) -> Iterator[TestClient]:
    engine = build_engine(SentenceTransformerEncoder(stock))
    with TestClient(create_app(engine, make_config())) as made:
        yield made


def test_stock_vectors(stock_client: TestClient, stock: SentenceTransformer) -> None:
    unit = stock.encode_document(TEXTS)
    near(post(stock_client, "/embed", inputs=TEXTS), unit)
    raw = np.array(post(stock_client, "/embed", inputs=TEXTS, normalize=False))
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.05
    near(unit_rows(raw), unit)
    states = stock.encode(TEXTS, output_value="token_embeddings")
    near(raw, np.stack([rows.mean(0).numpy() for rows in states]))
    near(openai(stock_client, input=TEXTS, input_type="query"), stock.encode_query(TEXTS))
    for field in ({"prompt_name": "FiQA2018"}, {"task": "FiQA2018"}):
        near(openai(stock_client, input=TEXTS, **field), stock.encode(TEXTS, prompt=FIQA))


def test_stock_truncation(stock_client: TestClient, stock, monkeypatch) -> None:
    monkeypatch.setattr(stock, "max_seq_length", LIMIT)
    refused(stock_client, "/embed", 413, f"the model takes {LIMIT}", inputs=LONG, truncate=False)
    near(post(stock_client, "/embed", inputs=TEXTS[0], truncate=False), stock.encode(TEXTS[:1]))
    near(post(stock_client, "/embed", inputs=LONG), stock.encode([LONG]))
    left = post(stock_client, "/embed", inputs=LONG, truncation_direction="Left")
    tokenizer = stock.tokenizer
    offsets = tokenizer(LONG, return_offsets_mapping=True)["offset_mapping"]
    near(left, stock.encode([LONG[offsets[-LIMIT][0] :]]))


def test_stock_tokens(stock_client: TestClient, stock: SentenceTransformer) -> None:
    rows = post(stock_client, "/tokenize", inputs=TEXTS)
    for text, row in zip(TEXTS, rows, strict=True):
        assert [token["id"] for token in row] == stock.tokenizer(text)["input_ids"]
    assert stock_client.get("/info").json()["model_type"] == {"embedding": {"pooling": "mean"}}
    refused(stock_client, "/embed", 400, "send texts", inputs=[1, 2])


def test_what_an_unknown_encoder_cannot_do_is_refused() -> None:
    with TestClient(create_app(EncoderEngine(HashEncoder(16)), make_config())) as client:
        refused(client, "/embed", 400, "length 1 only", inputs="a", normalize=False)
        refused(client, "/embed", 400, "cuts the end", inputs="a", truncate=False)
        refused(client, "/embed", 400, "cuts the end", inputs="a", truncation_direction="Left")
        refused(client, "/tokenize", 400, "not known", inputs="a")
        refused(client, "/embed", 400, "no prompt", inputs="a", prompt_name="query")
