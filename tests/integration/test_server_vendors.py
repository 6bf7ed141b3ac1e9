"""The official clients of other APIs against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hash_encoder import HashEncoder
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
    with pytest.raises(cohere.NotFoundError, match="ask for 'm'"):
        client.embed(model="other", texts=TEXTS, input_type="search_query")
    with pytest.raises(cohere.BadRequestError, match="text 1 is empty"):
        client.embed(model="m", texts=["a", ""], input_type="search_query")
