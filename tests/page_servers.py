"""The servers of docs/serving-elsewhere.md: its blocks, started and asked as a reader would."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

PAGE = Path(__file__).resolve().parents[1] / "docs" / "serving-elsewhere.md"


def blocks(language: str, section: str) -> list[str]:
    """The blocks of a language below a heading."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {section}")[2].partition("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def ask(block: str, **environment: str) -> tuple[list[str], np.ndarray]:
    """Start the server of a block's first line and send the request of its second."""
    serve, request = (shlex.split(line) for line in block.replace("\\\n", " ").strip().split("\n"))
    with running(serve, request[1], **environment):
        answer = subprocess.run(request, check=True, capture_output=True).stdout
    return json.loads(request[request.index("-d") + 1])["input"], vectors(answer)


def vectors(answer: bytes) -> np.ndarray:
    """The vectors in an answer of ``/v1/embeddings``."""
    return np.array([row["embedding"] for row in json.loads(answer)["data"]])


@contextmanager
def running(serve: list[str], address: str, **environment: str) -> Iterator[None]:
    """A server while it answers at the address of its embeddings."""
    with subprocess.Popen(
        serve,
        env={**os.environ, **environment},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    ) as server:
        try:
            _wait(server, address.replace("/v1/embeddings", "/health"))
            yield
        finally:
            server.terminate()


def _wait(server: subprocess.Popen[bytes], address: str) -> None:
    for _ in range(6000):
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(address) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not start")
