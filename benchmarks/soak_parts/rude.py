"""Clients that misbehave, each with the answers that are right for it.

They come from 127.0.0.2, so that the server takes them for another client than the good ones.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from soak_parts.clients import Connection, Reference, answer_of, message, request

_SLACK = 30.0  # seconds beyond a limit, on a machine that others use
_CLOSED, _LEFT, _KEPT = "closed", "left", "kept"
_GONE = (OSError, asyncio.IncompleteReadError)


@dataclass(frozen=True)
class Target:
    """The server, what is right to ask it, and its limits in seconds."""

    port: int
    reference: Reference
    limits: dict[str, float]  # by the names of settings
    batch: int  # texts of a huge batch
    rng: random.Random

    async def connect(self) -> Connection:
        """Open a connection from another address than good clients have."""
        return await asyncio.open_connection("127.0.0.1", self.port, local_addr=("127.0.0.2", 0))

    def some(self, count: int) -> list[int]:
        """Numbers of random texts."""
        return [self.rng.randrange(len(self.reference.texts)) for _ in range(count)]

    def batch_request(self) -> bytes:
        """A request that keeps the model busy for a while."""
        return request([self.reference.texts[row] for row in self.some(self.batch)])


Rude = Callable[[Target], Awaitable[str]]


def body(**fields: object) -> bytes:
    return message(json.dumps({"model": "m", **fields}).encode())


def sends(sent: bytes) -> Rude:
    """A client that sends this and reads what comes: a status, or ``closed``."""

    async def client(target: Target) -> str:
        reader, writer = await target.connect()
        try:
            writer.write(sent)
            return str((await asyncio.wait_for(answer_of(reader), _SLACK))[0])
        except _GONE as error:
            return _KEPT if isinstance(error, TimeoutError) else _CLOSED
        finally:
            writer.close()

    return client


def drips(start: bytes, drop: bytes, limit: str, pause: float = 0.25) -> Rude:
    """A client that sends a byte now and then, or nothing, until the server has had enough."""

    async def client(target: Target) -> str:
        reader, writer = await target.connect()
        seconds = target.limits[limit]
        answer = asyncio.ensure_future(answer_of(reader))
        until = time.monotonic() + seconds + _SLACK
        try:
            writer.write(start)
            while time.monotonic() < until:
                await asyncio.wait([answer], timeout=min(pause, seconds / 4))
                if answer.done():
                    return str(answer.result()[0])
                writer.write(drop)
            return _KEPT
        except _GONE:
            return _CLOSED
        finally:
            answer.cancel()
            writer.close()

    return client


async def comes_and_goes(target: Target) -> str:
    _, writer = await target.connect()
    writer.close()
    return _LEFT


async def leaves(target: Target, *, reset: bool = False) -> str:
    """Leave while the model is at work."""
    _, writer = await target.connect()
    writer.write(target.batch_request())
    await asyncio.sleep(target.rng.uniform(0, 0.2))
    if reset:
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
    return _LEFT


async def leaves_by_reset(target: Target) -> str:
    return await leaves(target, reset=True)


async def half_closes(target: Target) -> str:
    """Close the sending half alone: counts as gone, unless the answer was ready before."""
    reader, writer = await target.connect()
    try:
        writer.write(target.batch_request())
        writer.write_eof()
        return str((await asyncio.wait_for(answer_of(reader), _SLACK))[0])
    except _GONE as error:
        return _KEPT if isinstance(error, TimeoutError) else _CLOSED
    finally:
        writer.close()


async def asks_for_much(target: Target) -> str:
    """A huge batch is a request like others: all of its vectors must be right."""
    reader, writer = await target.connect()
    try:
        rows = target.some(target.batch)
        writer.write(request([target.reference.texts[row] for row in rows]))
        status, found = await asyncio.wait_for(answer_of(reader), 4 * _SLACK)
        fits = status == 200 and target.reference.fits(rows, found)
        return "ok" if fits else "wrong" if status == 200 else str(status)
    except _GONE as error:
        return type(error).__name__
    finally:
        writer.close()


async def takes_nothing(target: Target) -> str:
    """Ask for more than the system keeps, and do not read it: ``cut off`` after a while."""
    loop, text = asyncio.get_running_loop(), "word " * 12_000
    sent = message(json.dumps({"inputs": [text]}).encode(), path="/tokenize") * 8
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.setblocking(False)
        stalled.bind(("127.0.0.2", 0))
        await loop.sock_connect(stalled, ("127.0.0.1", target.port))
        ends = (f":{target.port:04X}", f":{stalled.getsockname()[1]:04X}")
        until = time.monotonic() + 3 * target.limits["send_seconds"] + 2 * _SLACK
        sending = asyncio.ensure_future(loop.sock_sendall(stalled, sent))
        try:
            while is_open(*ends):
                if time.monotonic() > until:
                    return _KEPT
                await asyncio.sleep(target.limits["send_seconds"] / 4)
            return "cut off"
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


def is_open(server: str, client: str) -> bool:
    """Whether the server's end of a connection is open, by the ends of both addresses."""
    rows = (line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines())
    return any(a.endswith(server) and b.endswith(client) and c == "01" for a, b, c in rows)


def floods(start: bytes, drop: bytes) -> Rude:
    """A client whose headers have no end: it is cut off, or told 431."""

    async def client(target: Target) -> str:
        reader, writer = await target.connect()
        try:
            writer.write(start)
            for _ in range(400):
                writer.write(drop)
                await asyncio.wait_for(writer.drain(), _SLACK)
            await asyncio.wait_for(reader.read(), _SLACK)  # the system's buffers may have held all
            return "cut off"
        except TimeoutError:
            return "took it all"
        except _GONE:
            return "cut off"
        finally:
            writer.transport.abort()

    return client


_VALID = body(input="a text")
_TRAILED = message(b"").replace(
    b"Content-Length: 0\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
)
_ANY_REFUSAL = ("400", "408", _CLOSED)


def rubbish(seed: int) -> Rude:
    return sends(random.Random(seed).randbytes(400) + b"\r\n\r\n")


KINDS: dict[str, tuple[Rude, tuple[str, ...]]] = {
    "comes and goes": (comes_and_goes, (_LEFT,)),
    "says nothing": (drips(b"", b"", "header_seconds"), ("408",)),
    "stalls in headers": (drips(_VALID[:40], b"", "header_seconds"), ("408",)),
    "drips headers": (drips(_VALID[:60], b"a", "header_seconds"), ("408", _CLOSED)),
    "stalls in the body": (drips(_VALID[:-9], b"", "body_seconds"), ("408",)),
    "drips the body": (
        drips(message(b"{", length=4000), b" ", "body_seconds"),
        ("408", _CLOSED),
    ),
    "leaves while it waits": (leaves, (_LEFT,)),
    "resets while it waits": (leaves_by_reset, (_LEFT,)),
    "closes its half": (half_closes, (_CLOSED, "200")),
    "takes no answer": (takes_nothing, ("cut off",)),
    "endless next headers": (floods(_VALID + b"GET / HTTP/1.1\r\nA: ", b"a" * 8000), ("cut off",)),
    "endless headers": (floods(b"GET / HTTP/1.1\r\nA: ", b"a" * 8000), ("cut off",)),
    "endless trailers": (floods(_TRAILED, b"A: " + b"a" * 8000 + b"\r\n"), ("cut off",)),
    "a huge batch": (asks_for_much, ("ok",)),
    "rubbish": (rubbish(1), _ANY_REFUSAL),
    "rubbish in a request": (sends(_VALID[:30] + b"\0\xff\r\n:\r\n\r\n"), _ANY_REFUSAL),
    "TLS": (sends(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)), _ANY_REFUSAL),
    "cut-off JSON": (sends(message(b'{"model": "m", "input": ')), ("400",)),
    "deep JSON": (sends(message(b"[" * 50_000)), ("400",)),
    "JSON of another kind": (sends(message(b"[1, 2]")), ("400",)),
    "no UTF-8": (sends(message(b'{"model": "m", "input": "\xff\xfe"}')), ("400",)),
    "no JSON, it says": (sends(message(b"{}", more="Content-Type: text/plain\r\n")), ("415",)),
    "no gzip": (sends(message(b"{}", more="Content-Encoding: gzip\r\n")), ("400",)),
    "a body too large": (sends(message(b"{", length=9 * 2**20)), ("413",)),
    "an endless length": (sends(message(b"{", length=10**17)), ("413",)),
    "a wrong method": (sends(b"DELETE /v1/embeddings HTTP/1.1\r\nHost: x\r\n\r\n"), ("405",)),
    "an unknown route": (sends(b"GET /v1/nothing HTTP/1.1\r\nHost: x\r\n\r\n"), ("404",)),
    "an unknown model": (sends(body(model="gpt", input="a")), ("404",)),
    "an unknown field": (sends(body(input="a", colour="red")), ("400",)),
    "an empty text": (sends(body(input=["a", " "])), ("400",)),
    "an empty list": (sends(body(input=[])), ("400",)),
    "no text": (sends(body(input=None)), ("400",)),
    "too many texts": (sends(body(input=["a"] * 2049)), ("413",)),
    "a text too long": (sends(body(input="a" * 1_000_001)), ("413",)),
    "ids out of range": (sends(body(input=[[10**9]])), ("400",)),
}
"""By name: the client, and what is right for it."""


def unexpected(kind: str, outcome: str) -> bool:
    """Whether the server has done something else than it should."""
    return outcome not in KINDS[kind][1]
