"""A chat endpoint on this machine that answers well, or misbehaves as it is told."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What to do with the n-th request for a prompt, and with the n-th request at all.
Script = Callable[[int, int], str]


def word(*seed: object) -> str:
    return sha256(repr(seed).encode()).hexdigest()[:10]


def good_answer(prompt: str) -> str:
    """A valid answer that is a function of the prompt, unlike that of any other prompt."""
    if found := re.match(r"Think of (\d+)", prompt):
        tasks = [" ".join(word(prompt, i, j) for j in range(6)) for i in range(int(found[1]))]
        return json.dumps({"tasks": tasks})
    texts = {
        key: " ".join(word(prompt, key, j) for j in range(8))
        for key in ("query", "positive", "negative")
    }
    return f"Sure!\n```json\n{json.dumps(texts)}\n```"


class FakeEndpoint:
    """What was asked and how to answer."""

    def __init__(self) -> None:
        self.script: Script = lambda of_prompt, number: "good"
        self.answer: Callable[[str], str] = good_answer
        self.delay = 0.0
        self.url = ""
        self.prompts: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed or give up are no news."""


@contextmanager
def fake_endpoint() -> Iterator[FakeEndpoint]:
    fake = FakeEndpoint()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # header and body are two writes

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][0]["content"]
            with fake.lock:
                of_prompt, number = fake.prompts.count(prompt), len(fake.prompts)
                fake.prompts.append(prompt)
                fake.headers.append(dict(self.headers))
                fake.bodies.append({"path": self.path, **body})
                fake.times.append(time.monotonic())
                fake.in_flight += 1
                fake.most_in_flight = max(fake.most_in_flight, fake.in_flight)
            try:
                time.sleep(fake.delay)
                self._act(fake.script(of_prompt, number), prompt)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with fake.lock:
                    fake.in_flight -= 1

        def _act(self, what: str, prompt: str) -> None:
            name, _, argument = what.partition(":")
            match name:
                case "good":
                    self._chat(fake.answer(prompt))
                case "text":
                    self._chat(argument)
                case "cut":
                    self._chat(fake.answer(prompt)[:-30], finish_reason="length")
                case "status":
                    code, _, header = argument.partition(" ")
                    echo = self.headers.get("Authorization", "")
                    self._send(int(code), f"no: {echo}", {"Retry-After": header} if header else {})
                case "slow":
                    time.sleep(float(argument))
                    self._chat(fake.answer(prompt))
                case "drop":
                    self.close_connection = True
                case "html":
                    self._send(200, "<html>busy</html>", {})
                case "body":
                    self._send(200, argument, {})

        def _chat(self, text: str, finish_reason: str = "stop") -> None:
            message = {"role": "assistant", "content": text}
            body = {
                "choices": [{"message": message, "finish_reason": finish_reason}],
                "usage": {"prompt_tokens": 10, "completion_tokens": 5},
            }
            self._send(200, json.dumps(body), {})

        def _send(self, code: int, text: str, headers: dict[str, str]) -> None:
            data = text.encode()
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
