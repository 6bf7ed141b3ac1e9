"""The server at 80 % of what it can do, among clients that misbehave, and then killed."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import shutil
import time
import urllib.request
from collections import Counter
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from soak_parts import processes, rude
from soak_parts.checks import Bound, drift, quantiles
from soak_parts.clients import Clients, Reference
from soak_parts.run import Run
from soak_parts.texts import real_texts

_LEVELS = (1, 2, 4, 8, 16, 32)
# What may rise in the second half: of memory a twentieth, of what is counted a few.
BOUNDS = {
    "p99": Bound(0.5, 20.0),
    "rss_mb": Bound(0.05, 20.0),
    "files": Bound(0.1, 12.0),
    "threads": Bound(0.0, 2.0),
    "sockets": Bound(0.1, 12.0),
}
_STATED = {"header_seconds": 10.0, "body_seconds": 10.0, "send_seconds": 30.0}


class Server:
    """A server of one model as a process, begun again where it was killed."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.log = run.out / "server.log"
        self.port = 0
        self.process: BaseProcess | None = None

    def start(self) -> BaseProcess:
        """Begin, at the same address as before."""
        run = self._run
        words = ["serve", run.model, "model_name=m", "log_requests=false", "--dtype", run.dtype]
        words += [f"limits.{name}={value:g}" for name, value in limits_of(run).items()]
        log = self.log.with_suffix(f".{len(list(run.out.glob('server.*')))}.log")
        self.process = processes.launch([*words, "--port", str(self.port)], log)
        self.port = processes.announced_port(self.process, log)
        return self.process

    @property
    def number(self) -> int:
        """Its process."""
        assert self.process is not None
        return self.process.pid or 0

    def metric(self, name: str) -> float:
        """A number of ``/metrics``."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as page:
            found = re.search(rf"^{name} (\S+)$", page.read().decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0


def limits_of(run: Run) -> dict[str, float]:
    """The limits of the server; a rehearsal has no time for those that it has by itself."""
    return dict.fromkeys(_STATED, 1.0) if run.rehearse else _STATED


def reference_of(run: Run) -> Reference:
    """Texts with the vectors that ``nvembed encode`` gives them."""
    texts = real_texts(24 if run.rehearse else 400, 30 if run.rehearse else 400)
    rows = [json.dumps({"id": str(at), "text": text}) for at, text in enumerate(texts)]
    file = run.work / "texts.jsonl"
    file.write_text("\n".join(rows) + "\n", "utf-8")
    made = run.work / "reference.npy"
    words = ["encode", run.model, "--input", str(file), "--output", str(made), "--dtype", run.dtype]
    processes.run_command(words, run.out / "encode.log")
    return Reference(texts, np.load(made), 0.9999 if run.dtype == "float32" else 0.99)


async def misbehave(
    target: rude.Target, pause: float, over: asyncio.Event, found: Counter[tuple[str, str]]
) -> None:
    """Play all kinds of rude clients, in turn and several at once, until it is over."""
    kinds = itertools.cycle(target.rng.sample(sorted(rude.KINDS), len(rude.KINDS)))

    tried = set[str]()

    async def player() -> None:
        while not over.is_set() or len(tried) < len(rude.KINDS):
            kind = next(kinds)
            tried.add(kind)
            try:
                outcome = await rude.KINDS[kind][0](target)
            except OSError as error:  # it could not connect, as no client should find
                outcome = type(error).__name__
            found[kind, outcome] += 1
            await asyncio.sleep(target.rng.expovariate(1 / pause))

    await asyncio.gather(*(player() for _ in range(12)))


async def watch(run: Run, server: Server, clients: Clients, over: asyncio.Event) -> None:
    """Write a row every minute: what was answered, how fast, and what the server holds."""
    begun = time.monotonic()
    for number in itertools.count(1):
        rest = begun + number * run.every - time.monotonic()
        try:
            await asyncio.wait_for(over.wait(), max(0.0, rest))
            return
        except TimeoutError:
            pass
        seen = clients.seen.take()
        held = await asyncio.to_thread(processes.holdings, server.number)
        failed = {name: count for name, count in seen.outcomes.items() if name != "ok"}
        row = {"minute": number * run.every / 60, "ok": seen.outcomes["ok"]}
        run.row("minute", **row, failed=failed, **quantiles(seen.seconds), **held)


async def soak(run: Run, server: Server, reference: Reference) -> None:
    """The ramp, the minutes, and what is left after them."""
    rng = random.Random(1)
    clients = Clients(server.port, reference, rng)
    seconds = 0.2 if run.rehearse else 8.0
    found = {}
    for level in _LEVELS[:3] if run.rehearse else _LEVELS:
        found[level] = await clients.closed_loop(level, seconds)
        run.row("ramp", clients=level, per_second=found[level])
    capacity = max(found.values())
    run.check("the ramp was answered", capacity, "above 0", capacity > 0)
    clients.seen.take()
    before = processes.holdings(server.number)
    over = asyncio.Event()
    outcomes: Counter[tuple[str, str]] = Counter()
    batch = max(
        4, min(128, int(capacity / 4))
    )  # a quarter of a second: rude load is on top of 80 %
    target = rude.Target(server.port, reference, limits_of(run), batch, rng)
    players = asyncio.create_task(misbehave(target, 0.01 if run.rehearse else 4.0, over, outcomes))
    watching = asyncio.create_task(watch(run, server, clients, over))
    await clients.open_loop(0.8 * capacity, run.seconds)
    over.set()
    await asyncio.gather(players, watching)
    rest = clients.seen.take()
    run.row("rest", ok=rest.outcomes["ok"], failed=dict(rest.outcomes - Counter(ok=10**9)))
    await clients.close()
    for kind in rude.KINDS:
        seen = {outcome: count for (name, outcome), count in outcomes.items() if name == kind}
        wrong = [outcome for outcome in seen if rude.unexpected(kind, outcome)]
        if run.rehearse:  # on a machine that others use, anything may take longer than its limits
            wrong = [outcome for outcome in wrong if outcome != "408"]
        run.check(f"rude: {kind}", seen, " or ".join(rude.KINDS[kind][1]), bool(seen) and not wrong)
    await judge(run, server, before)


async def judge(run: Run, server: Server, before: dict[str, Any]) -> None:
    """Nothing lost, nothing wrong, nothing that grows, nothing kept for clients that left."""
    rows = [row for row in run.rows() if row["row"] in ("minute", "rest")]
    failed = sum((Counter(row["failed"]) for row in rows), Counter())
    answered = sum(row["ok"] for row in rows)
    run.check("good requests that failed", dict(failed), "none", answered > 0 and not failed)
    minutes = [row for row in rows if row["row"] == "minute"]
    for name, bound in BOUNDS.items():
        curve = [row[name] for row in minutes if row[name] is not None]
        if len(curve) >= 4 and not run.rehearse:
            rise, most = drift(curve), bound.of(curve)
            run.check(f"rise of {name}", round(rise, 2), f"at most {most:.1f}", rise <= most)
    until, held = time.monotonic() + 90, before
    while time.monotonic() < until:  # what was closed goes within the limits
        held = await asyncio.to_thread(processes.holdings, server.number)
        waiting = await asyncio.to_thread(server.metric, "nvembed_queued_tokens")
        under_way = await asyncio.to_thread(server.metric, "nvembed_inflight_requests")
        if held["sockets"] <= 1 and waiting == 0 and under_way == 1:
            break
        await asyncio.sleep(0.1)
    left = held["sockets"]
    run.check("sockets when all have left", left, "1, which listens", left <= 1)
    run.check("requests under way then", under_way, "1, which asks this", under_way == 1)
    run.check("tokens in the queue then", waiting, "0", waiting == 0)


async def end_badly(run: Run, server: Server, reference: Reference) -> None:
    """kill -9 with requests under way, a new start at the same address, and SIGTERM."""
    clients = Clients(server.port, reference, random.Random(2))
    size = 6 if run.rehearse else 64
    rows = [list(range(at, at + size)) for at in range(8)]

    async def under_way(stop: str) -> Counter[str]:
        await asyncio.gather(*(clients.ask(part[:1]) for part in rows))  # all are connected
        asked = [asyncio.create_task(clients.ask(part)) for part in rows]
        await asyncio.sleep(0.05)
        assert server.process is not None
        getattr(server.process, stop)()
        return Counter(await asyncio.gather(*asked))

    held = processes.holdings(server.number)
    run.row("workers", count=held["workers"], told="threads of one process, no worker to kill")
    found = await under_way("kill")
    wrong = [name for name in found if name != "ok" and not name.startswith(("lost", "no conn"))]
    run.check("kill -9: requests under way", dict(found), "answered right, or cut off", not wrong)
    assert server.process is not None
    processes.finish(server.process)
    await clients.close()
    begun = time.monotonic()
    await asyncio.to_thread(server.start)
    answer = await clients.ask([0])
    run.check("begun again at the same address", answer, "ok", answer == "ok")
    run.row("begun again", seconds=time.monotonic() - begun)
    found = await under_way("terminate")
    # One that had not been read yet finds the port closed.
    wrong = [name for name in found if name != "ok" and not name.startswith("no conn")]
    run.check("SIGTERM: requests under way", dict(found), "all answered", not wrong)
    await clients.close()
    code = await asyncio.to_thread(processes.finish, server.process)
    run.check("SIGTERM: exit code", code, "0", code == 0)
    logs = "".join(path.read_text("utf-8", "replace") for path in run.out.glob("server.*.log"))
    faults = [line for line in logs.split("\n") if "Traceback" in line or '"bug"' in line]
    run.check("faults in its log", faults[:5], "none", not faults)


def run(run: Run) -> None:
    """The whole part."""
    reference = reference_of(run)
    server = Server(run)
    try:
        server.start()
        asyncio.run(soak(run, server, reference))
        asyncio.run(end_badly(run, server, reference))
    finally:
        if server.process is not None:
            server.process.kill()
        shutil.rmtree(run.work, ignore_errors=True)
