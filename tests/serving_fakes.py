"""Engines for tests of the server: one that can be held and made to fail, and its clients."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from hash_encoder import HashEncoder
from nvembed.core.errors import DataError
from nvembed.serving.config import ServerConfig
from nvembed.serving.engines import EmbedOptions, EncoderEngine, Item
from nvembed.serving.server import build_server

WIDTH = 16


class HeldEngine:
    """Hash vectors; waits while ``hold`` is set, and fails on texts that say so."""

    dimension = WIDTH
    takes_ids = True
    batch_tokens = 4096

    def __init__(self, forwards: int = 1) -> None:
        self.forwards = forwards
        self._inner = EncoderEngine(HashEncoder(WIDTH))
        self.open = threading.Event()
        self.open.set()
        self.began = threading.Event()
        self.batches: list[list[str]] = []

    max_tokens = 10**6
    supports_tokens = False
    supports_raw = False
    dtype = "float32"
    pooling = "mean"
    prompts: ClassVar[dict[str, str]] = {}

    def tokens(self, texts: Sequence[str], prompt: str, *, special: bool) -> list:
        return self._inner.tokens(texts, prompt, special=special)

    def prepare(self, texts: Sequence[str], options: EmbedOptions) -> list[Item]:
        if options.task == "too long":
            raise DataError("the instruction leaves no room", hint="Shorten it")
        return [Item(text, len(text.split()), options) for text in texts]

    def prepare_ids(self, rows: Sequence[Sequence[int]], options: EmbedOptions) -> list[Item]:
        return [Item(" ".join(map(str, ids)), len(ids)) for ids in rows]

    def embed(self, items: Sequence[Item]) -> np.ndarray:
        texts = [item.content for item in items]
        self.batches.append(texts)
        self.began.set()
        assert self.open.wait(30)
        if any("raise" in text for text in texts):
            raise RuntimeError("secret text in an error")
        vectors = self._inner.embed(items)
        vectors[[row for row, text in enumerate(texts) if "nan" in text]] = np.nan
        return vectors


def make_config(**sections: dict) -> ServerConfig:
    return ServerConfig.model_validate({"model_name": "m", "log_requests": False, **sections})


@contextlib.contextmanager
def running(engine, config: ServerConfig, keys=None) -> Iterator[int]:
    """Serve on a free port of the loopback in a thread; yields the port."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = build_server(engine, config, host="127.0.0.1", port=0, keys=keys)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    until = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < until
        time.sleep(0.005)
    try:
        yield listener.getsockname()[1]
    finally:
        if isinstance(engine, HeldEngine):
            engine.open.set()
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()
