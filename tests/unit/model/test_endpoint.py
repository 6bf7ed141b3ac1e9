"""An endpoint that misbehaves: slow, busy, broken, in another order."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hash_encoder import HashEncoder
from nvembed.cli.main import run
from nvembed.core import http
from nvembed.core.errors import ModelError
from nvembed.core.files import read_jsonl, write_jsonl
from nvembed.model import encoder as endpoint
from nvembed.model.encoder import EndpointEncoder

Answer = Callable[[dict[str, Any]], tuple[int, bytes, dict[str, str]]]


def good(request: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
    """Vectors of the hash encoder, twice as long, last text first."""
    vectors = 2 * HashEncoder(32).encode_document(request["input"])
    rows = [{"index": i, "embedding": row.tolist()} for i, row in enumerate(vectors)]
    return 200, json.dumps({"data": rows[::-1]}).encode(), {}


def status(code: int, text: str = "", **headers: str) -> Answer:
    return lambda _: (code, text.encode(), {k.replace("_", "-"): v for k, v in headers.items()})


class Server:
    """Answers by the script, then well; notes what it was sent."""

    def __init__(self) -> None:
        self.script: list[Answer] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append({"path": self.path, **request})
                    outer.keys.append(self.headers.get("Authorization"))
                    answer = outer.script.pop(0) if outer.script else good
                code, body, headers = answer(request)
                try:
                    self.send_response(code)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except BrokenPipeError:  # the client has gone: its time was up
                    pass

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(http, "FIRST_WAIT_SECONDS", 0.001)
    for variable in http.KEY_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    made = Server()
    yield made
    made.close()


def test_vectors_come_back_in_order_at_length_one(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "BATCH_TEXTS", 3)
    encoder = EndpointEncoder(server.url + "/", "small")
    texts = [f"word {i} and {i * i}" for i in range(8)]
    vectors = encoder.encode_document(texts)
    np.testing.assert_allclose(vectors, HashEncoder(32).encode_document(texts), atol=1e-6)
    assert sorted(len(request["input"]) for request in server.requests) == [2, 3, 3]
    assert {(r["path"], r["model"]) for r in server.requests} == {("/v1/embeddings", "small")}
    assert encoder.dimension == 32
    assert encoder.encode_query([]).shape == (0, 32)
    encoder.encode_query(["who"], task="Find it")
    assert server.requests[-1]["input"] == ["Instruct: Find it\nQuery: who"]


def slow(request: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
    time.sleep(0.4)
    return good(request)


@pytest.mark.parametrize(
    "trouble",
    [
        status(429, "busy", Retry_After="0.01"),
        status(500, "broken"),
        status(503),
        status(200, "<html>not JSON"),
        status(200, "[1, 2]"),
        status(200, "\xff"),
        slow,
    ],
)
def test_passing_trouble_is_waited_out(server: Server, trouble: Answer) -> None:
    server.script = [trouble, trouble]
    encoder = EndpointEncoder(server.url, "small", timeout=0.2)
    vectors = encoder.encode_document(["a text"])
    np.testing.assert_allclose(vectors, HashEncoder(32).encode_document(["a text"]), atol=1e-6)
    assert len(server.requests) == 3


def test_it_waits_longer_and_longer_or_as_long_as_it_is_asked(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(http, "FIRST_WAIT_SECONDS", 1.0)
    monkeypatch.setattr(time, "sleep", waits.append)
    server.script = [status(500)] * 2 + [status(429, Retry_After="7")] + [status(500)] * 9
    with pytest.raises(ModelError, match="no usable answer in 7 attempts; the last: status 500"):
        http.post_json(server.url, {"input": []})
    assert waits == [1, 2, 7, 8, 16, 32]


def test_refusals_are_told_at_once_and_hold_no_key(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVEMBED_API_KEY", "secret-1")
    server.script = [status(401, "wrong key secret-1")]
    with pytest.raises(ModelError, match=r"status 401 wrong key ….*NVEMBED_API_KEY") as refused:
        EndpointEncoder(server.url, "small").encode_document(["a"])
    assert "secret" not in str(refused.value)
    assert server.keys == ["Bearer secret-1"]
    server.script = [status(404, "no such model")]
    with pytest.raises(ModelError, match=r"status 404 no such model\. Check the address"):
        EndpointEncoder(server.url, "small").encode_document(["a"])
    assert len(server.requests) == 2


def test_nobody_there(server: Server) -> None:
    server.close()
    with pytest.raises(ModelError, match=r"in 7 attempts; the last: .*refused"):
        EndpointEncoder(server.url, "small").encode_document(["a"])


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"index": 1, "embedding": [1.0]}],
        [{"index": 0, "embedding": ["a"]}],
        [{"index": 0, "embedding": 1.0}],
        [{"embedding": [1.0]}],
    ],
)
def test_answers_without_a_vector_per_text(server: Server, rows: list[Any]) -> None:
    server.script = [status(200, json.dumps({"data": rows}))]
    with pytest.raises(ModelError, match="does not hold one vector per text"):
        EndpointEncoder(server.url, "small").encode_document(["a"])


def test_mining_with_an_endpoint_that_fails_at_times(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NVEMBED_API_KEY", "secret-2")
    words = ["red fox", "blue owl", "green tree", "cold rain"]
    rows = [{"query": word, "positive": f"{word} in the wood"} for word in words]
    write_jsonl("in.jsonl", rows)
    server.script = [status(429), status(200, "{"), good, status(500)]
    command = ["mine", "in.jsonl", "out.jsonl", "--teacher", server.url]
    assert run([*command, "--teacher-model", "small", "num_negatives=2"]) == 0
    printed = capsys.readouterr()
    assert "nearest, without a rule" in printed.out
    assert "refused" in printed.out or "negative" in printed.out
    assert [row["query"] for _, row in read_jsonl("out.jsonl")] == words
    written = Path("out.jsonl").read_text() + Path("out.jsonl.report.json").read_text()
    assert "secret" not in written + printed.out + printed.err
    assert set(server.keys) == {"Bearer secret-2"}
