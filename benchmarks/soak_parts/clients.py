"""Well-behaved clients: keep-alive connections, and every vector is compared with the reference."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PATIENCE = 120.0  # seconds until an answer counts as lost
_MOST_AT_ONCE = 400
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def message(
    body: bytes, *, path: str = "/v1/embeddings", length: int | None = None, more: str = ""
) -> bytes:
    """A POST; ``length`` is what it says of its body, ``more`` are further header lines."""
    size = len(body) if length is None else length
    kind = "" if "Content-Type" in more else "Content-Type: application/json\r\n"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{kind}Content-Length: {size}\r\n{more}\r\n"
    return head.encode() + body


def request(texts: Sequence[str]) -> bytes:
    body = {"model": "m", "input": list(texts), "encoding_format": "base64"}
    return message(json.dumps(body).encode())


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Read an answer to its end: status and body."""
    head = await reader.readuntil(b"\r\n\r\n")
    rows = [row.split(b":") for row in head.lower().split(b"\r\n")]
    sizes = [int(row[1]) for row in rows if row[0] == b"content-length"]
    return int(head[9:12]), await reader.readexactly(sizes[0] if sizes else 0)


@dataclass(frozen=True)
class Reference:
    """Texts, and their vectors of length 1 as ``nvembed encode`` makes them."""

    texts: list[str]
    vectors: NDArray[np.float32]  # (N, D)
    least: float  # cosine with the own reference

    def fits(self, rows: Sequence[int], body: bytes) -> bool:
        """Whether an answer holds the vectors of these rows, in their order."""
        data = json.loads(body)["data"]
        found = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in data]
        if len(found) != len(rows):
            return False
        scores_RN = np.stack(found) @ self.vectors.T
        own = scores_RN[np.arange(len(rows)), list(rows)]
        return bool((own >= self.least).all() and (own >= scores_RN.max(axis=1) - 1e-6).all())


@dataclass
class Seen:
    """What came of the requests since it was last asked for."""

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # of those that were answered

    def take(self) -> Seen:
        """What was seen, which begins anew."""
        found = Seen(self.outcomes, self.seconds)
        self.outcomes, self.seconds = Counter(), []
        return found


@dataclass
class Clients:
    """Asks a server for single texts, over as many connections as it takes."""

    port: int
    reference: Reference
    rng: random.Random
    idle: list[Connection] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    resent: int = 0

    async def ask(self, rows: Sequence[int]) -> str:
        """Send one request: ``ok``, ``wrong``, a status, or how the answer was lost."""
        sent = request([self.reference.texts[row] for row in rows])
        while True:
            kept = bool(self.idle)
            try:
                if kept:
                    reader, writer = self.idle.pop()
                else:
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError as error:
                return f"no connection: {type(error).__name__}"
            try:
                writer.write(sent)
                status, body = await asyncio.wait_for(answer_of(reader), _PATIENCE)
            except (OSError, asyncio.IncompleteReadError) as error:
                writer.close()
                late = isinstance(error, TimeoutError)
                if kept and not late and not getattr(error, "partial", b""):
                    self.resent += 1  # the server closed it at that moment, as idle for too long
                    continue
                return f"lost: {type(error).__name__}"
            except asyncio.CancelledError:
                writer.close()
                raise
            self.idle.append((reader, writer))
            if status != 200:
                return str(status)
            return "ok" if self.reference.fits(rows, body) else "wrong"

    async def one(self, due: float) -> None:
        """Ask for a random text; time counts from when the request was due."""
        outcome = await self.ask([self.rng.randrange(len(self.reference.texts))])
        self.seen.outcomes[outcome] += 1
        if outcome == "ok":
            self.seen.seconds.append(time.perf_counter() - due)

    async def closed_loop(self, connections: int, seconds: float) -> float:
        """Answers per second where everybody asks again when answered."""
        start = time.perf_counter()

        async def again() -> None:
            while time.perf_counter() < start + seconds:
                await self.one(time.perf_counter())

        await asyncio.gather(*(again() for _ in range(connections)))
        return self.seen.take().outcomes["ok"] / (time.perf_counter() - start)

    async def open_loop(self, per_second: float, seconds: float) -> None:
        """Ask at random moments, whatever becomes of the requests before; wait for all answers."""
        due, tasks = time.perf_counter(), set[asyncio.Task[Any]]()
        end = due + seconds
        while (due := due + self.rng.expovariate(per_second)) < end:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if len(tasks) >= _MOST_AT_ONCE:
                self.seen.outcomes["not sent: too many wait"] += 1
                continue
            task = asyncio.create_task(self.one(due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def close(self) -> None:
        """Close the connections that are kept."""
        kept, self.idle = self.idle, []
        for _, writer in kept:
            writer.close()
        await asyncio.gather(*(w.wait_closed() for _, w in kept), return_exceptions=True)
