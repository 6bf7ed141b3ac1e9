"""A real server on the loopback: the openai client, rude clients, overload, SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hash_encoder import HashEncoder
from serving_fakes import WIDTH, HeldEngine, make_config, running

ROOT = Path(__file__).resolve().parents[2]
DECODER = ROOT / "assets" / "decoder-6m"


def raw_request(body: bytes, length: int | None = None, path: str = "/v1/embeddings") -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body


def body_of(text: str | list[str]) -> bytes:
    return json.dumps({"model": "m", "input": text}).encode()


def call(port: int, text: str | list[str], **headers: str) -> tuple[int, dict]:
    address = f"http://127.0.0.1:{port}/v1/embeddings"
    request = urllib.request.Request(
        address, body_of(text), {"Content-Type": "application/json", **headers}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def connect(port: int) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port), timeout=20)
    return made


def next_status(connection: socket.socket) -> int:
    """Read one answer to its end."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    answer.read()
    return answer.status


def wait_for(condition) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        found = re.search(rf"^{re.escape(name)} (\S+)$", answer.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


@pytest.fixture
def engine() -> Iterator[HeldEngine]:
    made = HeldEngine()
    yield made
    made.open.set()


def test_a_client_that_leaves_frees_its_place(engine: HeldEngine) -> None:
    with running(engine, make_config()) as port:
        engine.open.clear()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(call, port, "held")
            engine.began.wait(10)
            left = connect(port)
            left.sendall(raw_request(body_of("gone")))
            wait_for(lambda: metric(port, "nvembed_queued_requests") == 1)
            left.close()
            wait_for(lambda: metric(port, "nvembed_cancelled_total") == 1)
            assert metric(port, "nvembed_queued_tokens") == 0
            engine.open.set()
            assert first.result()[0] == 200
        assert call(port, "next")[0] == 200
    assert engine.batches == [["held"], ["next"]]


def test_a_client_that_leaves_with_several_requests(engine: HeldEngine) -> None:
    with running(engine, make_config()) as port:
        engine.open.clear()
        with connect(port) as left:
            left.sendall(raw_request(body_of("first")) + raw_request(body_of("second")))
            engine.began.wait(10)
        wait_for(lambda: metric(port, "nvembed_cancelled_total") == 1)
        engine.open.set()
        assert call(port, "next")[0] == 200
    assert engine.batches == [["first"], ["next"]]


def test_half_closed_and_broken_connections(engine: HeldEngine) -> None:
    with running(engine, make_config()) as port:
        for sent in (
            b"",
            b"\x16\x03\x01\x02\x00",
            b"GARBAGE\r\n\r\n",
            raw_request(b"{", length=500),
            raw_request(body_of("a"))[:60],
        ):
            with connect(port) as rude:
                rude.sendall(sent)
                rude.shutdown(socket.SHUT_WR)
                answer = rude.recv(4096)
                assert not answer or re.match(rb"HTTP/1.1 4\d\d", answer)
        assert call(port, "fine")[0] == 200
        wait_for(lambda: metric(port, "nvembed_inflight_requests") == 1)  # this one itself


def test_a_client_that_half_closes_counts_as_gone(engine: HeldEngine) -> None:
    with running(engine, make_config()) as port:
        engine.open.clear()
        with connect(port) as half:
            half.sendall(raw_request(body_of("half")))
            engine.began.wait(10)
            half.shutdown(socket.SHUT_WR)
            assert half.recv(4096) == b""
        wait_for(lambda: metric(port, "nvembed_cancelled_total") == 1)
        wait_for(lambda: metric(port, "nvembed_inflight_requests") == 1)  # this one itself
        engine.open.set()
        assert call(port, "fine")[0] == 200


def test_slow_headers_are_given_up(engine: HeldEngine) -> None:
    head = raw_request(body_of("a"))
    with running(engine, make_config(limits={"header_seconds": 0.3})) as port:
        with connect(port) as silent, connect(port) as dripping:
            with contextlib.suppress(ConnectionError):
                for at in range(40):  # each byte well in time, all of them much too late
                    dripping.sendall(head[at : at + 1])
                    time.sleep(0.02)
            assert silent.recv(4096).startswith(b"HTTP/1.1 408")
            with contextlib.suppress(ConnectionError):
                assert dripping.recv(4096).startswith(b"HTTP/1.1 408")
        with connect(port) as patient:  # neither a long answer nor a pause between requests is slow
            engine.open.clear()
            patient.sendall(head + head[:10])
            time.sleep(0.4)
            engine.open.set()
            assert next_status(patient) == 200
            patient.sendall(head[10:])
            assert next_status(patient) == 200
            time.sleep(0.4)
            patient.sendall(head)
            assert next_status(patient) == 200


def test_idle_connections_are_closed_in_time(engine: HeldEngine) -> None:
    with running(engine, make_config(limits={"idle_seconds": 1})) as port, connect(port) as idle:
        idle.sendall(raw_request(body_of("a")))
        assert next_status(idle) == 200
        start = time.monotonic()
        assert idle.recv(4096) == b""
        assert 0.5 < time.monotonic() - start < 15


def test_large_headers_and_many_connections(engine: HeldEngine) -> None:
    limits = {"max_header_bytes": 5000, "max_connections": 3}
    with running(engine, make_config(limits=limits)) as port:
        with connect(port) as large:
            large.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 6000)
            assert large.recv(4096).startswith(b"HTTP/1.1 431")
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(connect(port)) for _ in range(3)]
            time.sleep(0.1)
            one_more = stack.enter_context(connect(port))
            with contextlib.suppress(ConnectionError):
                assert one_more.recv(4096) == b""
            held[0].sendall(raw_request(body_of("a")))
            assert next_status(held[0]) == 200

        def fine() -> bool:
            try:
                return call(port, "fine")[0] == 200
            except OSError:
                return False

        wait_for(fine)


def test_a_body_that_was_refused_unread_is_no_header(engine: HeldEngine) -> None:
    limits = {"max_header_bytes": 5000, "max_requests": 1}
    body = b" " * 200_000
    with running(engine, make_config(limits=limits)) as port:
        engine.open.clear()
        with ThreadPoolExecutor(1) as pool, connect(port) as refused:
            first = pool.submit(call, port, "held")
            engine.began.wait(10)
            refused.sendall(raw_request(b"", length=len(body)))
            assert next_status(refused) == 429
            for at in range(0, len(body), 50_000):
                refused.sendall(body[at : at + 50_000])
                time.sleep(0.02)
            engine.open.set()
            assert first.result()[0] == 200
            refused.sendall(raw_request(body_of("a")))
            assert next_status(refused) == 200


def is_open(port: int, client: socket.socket) -> bool:
    """Whether the server's end of a connection is, as the system says."""
    ends = [f":{port:04X}", f":{client.getsockname()[1]:04X}", "01"]
    rows = (line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines())
    return any([row[0][-5:], row[1][-5:], row[2]] == ends for row in rows)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux")
def test_a_client_that_does_not_take_its_answer_is_cut_off(engine: HeldEngine) -> None:
    echoed = {"model": "m", "texts": ["a" * 900_000], "input_type": "search_document"}
    large = raw_request(gzip.compress(json.dumps(echoed).encode()), path="/v2/embed")
    large = large.replace(b"Host: x", b"Host: x\r\nContent-Encoding: gzip")
    last = large.replace(b"Host: x", b"Host: x\r\nConnection: close")
    limits = {"send_seconds": 0.6, "idle_seconds": 1}
    with running(engine, make_config(limits=limits)) as port:
        with socket.socket() as stalled, connect(port) as slow:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.connect(("127.0.0.1", port))
            for client in (stalled, slow):
                client.sendall(large * 5 + last)  # beyond what the system keeps
            assert is_open(port, stalled)
            answers = b""  # one that takes a part now and then is answered to the end
            while part := slow.recv(2**16):
                answers += part
                time.sleep(0.005)
            assert answers.count(b"HTTP/1.1 200") == 6
            wait_for(lambda: not is_open(port, stalled))
        assert call(port, "fine")[0] == 200


@pytest.mark.parametrize("held", [True, False])
def test_what_is_no_body_is_bounded(engine: HeldEngine, held: bool) -> None:
    """The next request's headers while one is answered, and fields behind a body in chunks."""
    start = raw_request(body_of("held")) + b"GET / HTTP/1.1\r\nA: "
    if not held:
        chunked = b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nA: "
        start = raw_request(b"").replace(b"Content-Length: 0\r\n\r\n", chunked)

    def flood(client: socket.socket) -> None:
        for _ in range(100):
            client.sendall(b"a" * 1000)
            time.sleep(0.01)

    with running(engine, make_config(limits={"max_header_bytes": 5000})) as port:
        engine.open.clear()
        with connect(port) as flooding:
            flooding.sendall(start)
            with pytest.raises(ConnectionError):
                flood(flooding)
        engine.open.set()
        assert call(port, "fine")[0] == 200


def test_slow_bodies_are_given_up(engine: HeldEngine) -> None:
    with running(engine, make_config(limits={"body_seconds": 0.1})) as port:
        with connect(port) as slow:
            slow.sendall(raw_request(b'{"model"', length=500))
            assert slow.recv(4096).startswith(b"HTTP/1.1 408")
        assert call(port, "fine")[0] == 200


def test_a_huge_body_is_refused_before_it_is_read(engine: HeldEngine) -> None:
    with running(engine, make_config()) as port:
        for length in (10 * 2**20, 10**15):
            with connect(port) as large:
                large.sendall(raw_request(b"{", length=length))
                assert large.recv(4096).startswith(b"HTTP/1.1 413")
        with connect(port) as chunked:
            chunked.sendall(
                b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n"
            )
            with contextlib.suppress(ConnectionError):
                for _ in range(90):
                    chunked.sendall(b"20000\r\n" + b" " * 0x20000 + b"\r\n")
                assert chunked.recv(4096).startswith(b"HTTP/1.1 413")
        assert call(port, "a" * 1_000_001)[0] == 413
        assert call(port, "fine")[0] == 200


def test_a_request_out_of_time_is_answered(engine: HeldEngine) -> None:
    with running(engine, make_config(limits={"request_seconds": 0.2})) as port:
        engine.open.clear()
        status, answer = call(port, "held")
        assert (status, answer["error"]["code"]) == (503, "timeout")
        engine.open.set()
        assert call(port, "fine")[0] == 200


def test_overload_every_request_is_answered_by_its_own_vectors(engine: HeldEngine) -> None:
    config = make_config(
        limits={"max_requests": 12}, batching={"queue_tokens": 30, "batch_tokens": 10}
    )
    encoder = HashEncoder(WIDTH)
    with running(engine, config) as port:
        engine.open.clear()

        def ask(number: int) -> int:
            texts = [f"text number {number} {part}" for part in range(2)]
            status, answer = call(port, texts)
            if status == 200:
                found = np.array([row["embedding"] for row in answer["data"]], dtype=np.float32)
                np.testing.assert_array_equal(found, encoder.encode_document(texts))
            return status

        with ThreadPoolExecutor(40) as pool:
            answers = [pool.submit(ask, number) for number in range(80)]
            wait_for(lambda: sum(answer.done() for answer in answers) > 30)
            engine.open.set()
            statuses = [answer.result() for answer in answers]
        assert set(statuses) == {200, 429}
        assert metric(port, "nvembed_queued_tokens") == 0
        assert call(port, "fine")[0] == 200


TEXTS = ["how do I sort a list?", "math.pi is a constant.", "x"]


@pytest.fixture(scope="module")
def model():
    from nvembed import NVEmbed

    return NVEmbed.from_pretrained(DECODER)


@pytest.fixture(scope="module")
def served(model) -> Iterator[str]:
    """The decoder of the repository behind a real server; yields its address."""
    from nvembed.serving.engines import build_engine

    with running(build_engine(model), make_config()) as port:
        yield f"http://127.0.0.1:{port}"


def test_the_openai_client_gets_the_models_vectors(served: str, model) -> None:
    openai = pytest.importorskip("openai", reason="needs the openai package")
    with openai.OpenAI(base_url=f"{served}/v1", api_key="none") as client:
        assert [row.id for row in client.models.list()] == ["m", "m:query"]
        answer = client.embeddings.create(model="m", input=TEXTS)  # base64 by itself
        found = np.array([row.embedding for row in answer.data])
        np.testing.assert_allclose(found, model.encode_document(TEXTS), atol=1e-5)
        ids = [model.backbone.tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
        answer = client.embeddings.create(model="m", input=ids, encoding_format="float")
        by_ids = np.array([row.embedding for row in answer.data])
        np.testing.assert_allclose(by_ids, found, atol=1e-5)
        answer = client.embeddings.create(
            model="m", input=TEXTS[0], dimensions=32, extra_body={"instruction": "find the answer"}
        )
        oracle = model.encode_query(TEXTS[:1], task="find the answer", truncate_dim=32)
        oracle = oracle / np.linalg.norm(oracle)
        np.testing.assert_allclose(answer.data[0].embedding, oracle[0], atol=1e-5)
        with pytest.raises(openai.BadRequestError, match="not in the vocabulary"):
            client.embeddings.create(model="m", input=[[10**6]])
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="gpt", input="a")


@pytest.mark.filterwarnings("default")  # of their own dependencies
def test_langchain(served: str, model) -> None:
    module = pytest.importorskip("langchain_openai", reason="needs nvembed[clients]")
    client = module.OpenAIEmbeddings(
        base_url=f"{served}/v1", api_key="none", model="m", check_embedding_ctx_length=False
    )
    found = np.array(client.embed_documents(TEXTS))
    np.testing.assert_allclose(found, model.encode_document(TEXTS), atol=1e-5)


@pytest.mark.filterwarnings("default")  # of their own dependencies
def test_llama_index(served: str, model) -> None:
    module = pytest.importorskip(
        "llama_index.embeddings.openai_like", reason="needs nvembed[clients]"
    )
    client = module.OpenAILikeEmbedding(
        model_name="m", api_base=f"{served}/v1", api_key="none", reuse_client=False
    )
    found = np.array(client.get_text_embedding_batch(TEXTS))
    np.testing.assert_allclose(found, model.encode_document(TEXTS), atol=1e-5)


# The bound keeps the request waiting while the signal comes.
WITHOUT_MODEL = """
from hash_encoder import HashEncoder
from nvembed.serving.config import ServerConfig
from nvembed.serving.engines import EncoderEngine
from nvembed.core.http import bound_socket
from nvembed.serving.server import run_server
config = ServerConfig.model_validate({"model_name": "m", "batching": {"max_wait_ms": 700}})
run_server(EncoderEngine(HashEncoder(16)), config, bound_socket("127.0.0.1", 0))
"""
SERVE = ["serve", str(DECODER), "model_name=m", "batching.max_wait_ms=700", "--port", "0"]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["-c", WITHOUT_MODEL], id="without model"),
        pytest.param(["-m", "nvembed", *SERVE], id="serve", marks=pytest.mark.slow),
    ],
)
def test_sigterm_finishes_what_was_accepted(command: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, *command],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"},
    ) as process:
        try:
            port = announced_port(process)
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(call, port, TEXTS)
                wait_for(lambda: metric(port, "nvembed_queued_requests") == 1)
                process.send_signal(signal.SIGTERM)
                status, body = answer.result()
            assert (status, len(body["data"])) == (200, 3)
            assert process.wait(20) == 0
            with pytest.raises(OSError):
                connect(port)
        finally:
            process.kill()


def announced_port(process: subprocess.Popen) -> int:
    seen = []
    for line in process.stderr:
        seen.append(line)
        if found := re.search(r"^nvembed serves \S+ on http://127.0.0.1:(\d+)$", line.strip()):
            return int(found[1])
    raise AssertionError("".join(seen))


def test_asyncio_is_free_while_the_model_works(engine: HeldEngine) -> None:
    async def main(port: int) -> None:
        blocked = asyncio.create_task(asyncio.to_thread(call, port, "held"))
        await asyncio.to_thread(engine.began.wait, 10)
        start = time.monotonic()
        assert await asyncio.to_thread(metric, port, "nvembed_inflight_requests") == 2
        assert time.monotonic() - start < 5
        engine.open.set()
        assert (await blocked)[0] == 200

    with running(engine, make_config()) as port:
        engine.open.clear()
        asyncio.run(main(port))
