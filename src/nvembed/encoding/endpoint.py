"""An encoder behind an OpenAI-compatible endpoint (vLLM, TEI, Infinity, hosted ones …)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import ModelError
from nvembed.core.http import post_json
from nvembed.encoding.encoder import unit_rows
from nvembed.text.instructions import resolve_prompt

BATCH_TEXTS = 64
PARALLEL_REQUESTS = 4


def is_endpoint(name: str) -> bool:
    """Tell an address from a folder or a hub id."""
    return name.startswith(("http://", "https://"))


class EndpointEncoder:
    """Sends texts to ``<url>/embeddings``; vectors come back at length 1.

    The instruction is put before queries as NVEmbed models have it; endpoints of models that know
    no instructions want none. Batches are sent four at a time; what fails for the moment is tried
    again (``core/http.py``).

    Args:
        url: up to and with ``/v1``.
        model: name that the endpoint knows it by.
        timeout: seconds for one batch.
    """

    def __init__(self, url: str, model: str, *, timeout: float = 120.0) -> None:
        self._url = url.rstrip("/") + "/embeddings"
        self._model = model
        self._timeout = timeout

    @cached_property
    def dimension(self) -> int:
        """Width of the vectors, found by embedding a word."""
        return int(self._embed(["width"]).shape[1])

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> NDArray[np.float32]:
        """Embed queries; see :class:`Encoder`."""
        prompt = resolve_prompt(task) or ""
        batches = [
            [prompt + text for text in texts[start : start + BATCH_TEXTS]]
            for start in range(0, len(texts), BATCH_TEXTS)
        ]
        if not batches:
            return np.empty((0, self.dimension), dtype=np.float32)
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            return unit_rows(np.concatenate(list(pool.map(self._embed, batches))))

    # The prompt of documents is that of their task too; mostly there is none.
    encode_document = encode_query

    def _embed(self, texts: list[str]) -> NDArray[np.float32]:
        answer = post_json(self._url, {"model": self._model, "input": texts}, timeout=self._timeout)
        try:
            rows = sorted(answer["data"], key=lambda row: int(row["index"]))
            vectors = np.array([row["embedding"] for row in rows], dtype=np.float32)
            if vectors.ndim != 2 or [int(row["index"]) for row in rows] != list(range(len(texts))):
                raise ValueError
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                "the answer does not hold one vector per text",
                where=self._url,
                expected='{"data": [{"index": int, "embedding": [float]}]}',
            ) from error
        return vectors
