"""A database under writers that are killed and readers that go on, counted against dictionaries."""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from soak_parts import processes
from soak_parts.checks import account, quantiles
from soak_parts.run import Run
from soak_parts.texts import real_words

_REFUSED = "another process is writing to the database"
_KILLED = 0.4  # of the runs
_SHARED = "LICENSE.txt"  # a file that all folders have, with the same words
_FIELDS = 6  # names of fields of rows; each holds whole numbers first, then fractions
# Files of a database whose old versions are gone, and bytes for each of its texts'.
_MOST_FILES, _MOST_TIMES = 80, 4.0


@dataclass(frozen=True)
class Row:
    """A row of a writer's table."""

    text: str
    field: str
    value: float


@dataclass
class State:
    """What a folder holds: texts of files by name, rows of its table by id."""

    files: dict[str, str] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)

    def copy(self) -> State:
        return State(dict(self.files), dict(self.rows))


@dataclass
class Seen:
    """What came of the runs and the searches, and the seconds of the searches."""

    runs: Counter[str] = field(default_factory=Counter)
    searches: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


class Writer:
    """Changes a folder of its own and indexes it, again and again."""

    def __init__(self, run: Run, number: int, seen: Seen) -> None:
        self.run, self.number, self.seen = run, number, seen
        self.folder = run.work / f"folder{number}"
        self.folder.mkdir()
        self.log = run.out / f"writer{number}.log"
        self.rng = random.Random(number)
        # Short ones: a text is one passage.
        self.words = [word for word in real_words() if word.isalpha()]
        self.revision = self.round = 0
        self.state = State()  # of the folder
        self.settled = State()  # what the last run that came to its end has indexed
        self.gone: list[str] = []  # rows to delete
        self.generation = 0
        self.took = [0.3 if run.rehearse else 5.0]

    def text(self) -> str:
        """A new text; its first word is in no other."""
        self.revision += 1
        length = self.rng.randint(3, 8) if self.run.rehearse else self.rng.randint(5, 60)
        start = self.rng.randrange(len(self.words) - length)
        name = f"w{self.number}x{self.revision}"
        return " ".join([name, *self.words[start : start + length]])

    def change(self) -> None:
        """Change some files and rows, add some, delete some."""
        state, rng = self.state.copy(), self.rng
        some = 4 if self.run.rehearse else 8
        for _ in range(some):
            state.files[f"part{rng.randrange(3)}/file{rng.randrange(4 * some)}.txt"] = self.text()
            number, name = rng.randrange(4 * some), f"value{self.round % _FIELDS}"
            value = number + (0.5 if self.round >= _FIELDS else 0)
            state.rows[f"w{self.number}-{number}"] = Row(self.text(), name, value)
        for name in rng.sample(sorted(state.files), min(some // 2, len(state.files))):
            del state.files[name]
        if self.round % 3 == self.number % 3:
            state.files.pop(_SHARED, None)
        else:
            state.files[_SHARED] = "You may copy and change this."
        for id in rng.sample(sorted(state.rows), min(some // 2, len(state.rows))):
            del state.rows[id]
            self.gone.append(id)
        self.gone = [id for id in self.gone if id not in state.rows]
        self.state = state
        self.generation += 1
        self._write()

    def _write(self) -> None:
        for path in self.folder.rglob("*.txt"):
            if path.relative_to(self.folder).as_posix() not in self.state.files:
                path.unlink()
        for name, text in self.state.files.items():
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
        rows = [
            json.dumps({"id": id, "text": row.text, row.field: row.value})
            for id, row in self.state.rows.items()
        ]
        (self.folder / "rows.jsonl").write_text("\n".join(rows) + "\n", "utf-8")

    def index(self, *, kill: bool) -> str:
        """Run the command once: ``done``, ``refused``, ``killed`` or what went wrong."""
        words = ["index", str(self.folder), "--to", str(database_of(self.run)), "--keep-going"]
        words += ["--model", self.run.model, "--dtype", self.run.dtype]
        for id in self.gone:
            words += ["--delete", id]
        begun = time.monotonic()
        process = processes.launch(words, self.log)
        if kill:
            usual = statistics.median(self.took[-20:])
            processes.ended(process, self.rng.uniform(0, 1.3 * usual))
            process.kill()
        code = processes.finish(process, 600)
        if code == 0:
            self.took.append(time.monotonic() - begun)
            self.settled, self.gone = self.state.copy(), []
            self.generation += 1
            self.round += 1
            return "done"
        said = processes.last_line(self.log)
        refused = code == 2 and _REFUSED in said
        return "killed" if code == -9 else "refused" if refused else f"failed: {code} {said}"[:200]

    def work(self, over: threading.Event) -> None:
        """Until it is over."""
        outcome = "done"
        while not over.is_set():
            if outcome != "refused":
                self.change()
            kill = self.rng.random() < _KILLED or not self.seen.runs["killed"]
            outcome = self.index(kill=kill)
            self.seen.runs[outcome] += 1
            over.wait(self.rng.uniform(0, 0.1 if outcome != "refused" else 0.5))

    def settle(self) -> None:
        """Run it to its end."""
        while (outcome := self.index(kill=False)) == "refused":
            time.sleep(0.1)
        self.seen.runs[outcome] += 1

    def certain(self) -> tuple[int, list[tuple[str, Row | None]]]:
        """Texts that are in the database whatever the run in progress has done, and a generation.

        They are in the last state that was indexed and in the one that is being indexed.
        """
        generation, before, now = self.generation, self.settled, self.state
        files = [text for name, text in before.files.items() if now.files.get(name) == text]
        rows = [row for id, row in before.rows.items() if now.rows.get(id) == row]
        return generation, [*((text, None) for text in files), *((row.text, row) for row in rows)]


def database_of(run: Run) -> Path:
    return run.work / "db"


# --- Readers --------------------------------------------------------------------------------------

Search = Callable[[str, str | None, bool], list[str]]
"""Texts of hits of a query, a filter, and whether by words too."""


def in_process(run: Run) -> Search:
    from nvembed.index.database import Database
    from nvembed.index.search import SearchOptions, search_database
    from nvembed.model.encoder import load_encoder

    database, encoder = Database.open(database_of(run)), load_encoder(run.model, run.dtype)

    def search(query: str, where: str | None, hybrid: bool) -> list[str]:
        options = SearchOptions(where=where, hybrid=hybrid)
        hits = search_database(database, encoder, query, options)
        if where is not None and not all(where.split()[0] in hit.fields for hit in hits):
            return ["a hit without the field of its filter"]
        return [hit.text for hit in hits]

    return search


def over_server(port: int) -> Search:
    def search(query: str, where: str | None, hybrid: bool) -> list[str]:
        body = {"query": query, "where": where, "top_k": 10, "hybrid": hybrid}
        address = f"http://127.0.0.1:{port}/api/search"
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(asked, timeout=120) as answer:
                return [hit["text"] for hit in json.load(answer)["hits"]]
        except urllib.error.HTTPError as error:
            with error:
                raise RuntimeError(f"{error.code} {error.read()[:200]!r}") from None

    return search


def read(
    name: str, search: Search, writers: list[Writer], seen: Seen, over: threading.Event
) -> None:
    """Look for texts that must be there until it is over."""
    rng = random.Random(name)
    while not over.is_set():
        writer = rng.choice(writers)
        generation, known = writer.certain()
        if not known:
            time.sleep(0.05)
            continue
        text, row = rng.choice(known)
        where = f"{row.field} >= 0" if row is not None and rng.random() < 0.5 else None
        begun = time.perf_counter()
        try:
            found = text in search(text, where, rng.random() < 0.3)
            outcome = "found" if found else "missed"
        except Exception as error:  # whatever a reader may see is told
            outcome = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if outcome == "found":
            seen.seconds.append(time.perf_counter() - begun)
        elif outcome == "missed" and writer.generation != generation:
            outcome = "not judged"  # it was changed or deleted meanwhile
        seen.searches[f"{name}: {outcome}"] += 1


# --- The part -------------------------------------------------------------------------------------


@contextmanager
def page_of(run: Run) -> Iterator[int]:
    """Serve the page of the database; yields its port."""
    log = run.out / "page.log"
    words = ["serve", str(database_of(run)), "--ui", "--port", "0", "--dtype", run.dtype]
    process = processes.launch(words, log)
    try:
        yield processes.announced_port(process, log)
    finally:
        process.kill()


def sizes(folder: Path) -> dict[str, Any]:
    """Files below a folder, and their megabytes; some may go meanwhile."""
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                found.append(os.stat(os.path.join(place, name)).st_size)
            except FileNotFoundError:
                continue
    return {"files": len(found), "mb": sum(found) / 2**20}


def run(run: Run) -> None:
    """The whole part."""
    seen = Seen()
    try:
        writers = [Writer(run, number, seen) for number in range(2 if run.rehearse else 3)]
        for writer in writers:
            writer.change()
            writer.settle()
        if any(name != "done" for name in seen.runs):
            raise SystemExit(f"the first runs failed: {dict(seen.runs)}")
        with page_of(run) as port:
            soak(run, writers, port, seen)
        settle(run, writers, seen)
    finally:
        shutil.rmtree(run.work, ignore_errors=True)


def soak(run: Run, writers: list[Writer], port: int, seen: Seen) -> None:
    """Write and read for the minutes of the run."""
    over = threading.Event()
    searches = {"in process": in_process(run), "by the page": over_server(port)}
    threads = [threading.Thread(target=writer.work, args=(over,)) for writer in writers]
    for name, search in searches.items():
        threads.append(threading.Thread(target=read, args=(name, search, writers, seen, over)))
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    number = 0
    while (left := begun + run.seconds - time.monotonic()) > 0 or not enough(seen, writers):
        time.sleep(min(run.every, left) if left > 0 else run.every)
        number += 1
        took, seen.seconds = seen.seconds, []
        counts = {"runs": dict(seen.runs), "searches": dict(seen.searches)}
        row = {"minute": number * run.every / 60, **counts, **quantiles(took)}
        run.row("minute", **row, **sizes(database_of(run)))
    over.set()
    for thread in threads:
        thread.join()


def enough(seen: Seen, writers: list[Writer]) -> bool:
    """Whether runs came to their end after the first ones, were killed, and all readers read."""
    readers = {name.partition(":")[0] for name in seen.searches}
    return seen.runs["done"] > len(writers) and seen.runs["killed"] > 0 and len(readers) == 2


def settle(run: Run, writers: list[Writer], seen: Seen) -> None:
    """Let every writer finish, then count."""
    for writer in writers:
        writer.settle()
    runs, searches = dict(seen.runs), dict(seen.searches)
    bad = [name for name in runs if name.partition(":")[0] == "failed"]
    run.check("runs", runs, "done, killed or refused by a line", not bad)
    good = ("found", "not judged")
    bad = [name for name in searches if name.partition(": ")[2] not in good]
    run.check("searches", searches, "what must be there is found", bool(searches) and not bad)
    for writer in writers:
        writer.log.write_text("", "utf-8")
        writer.settle()
        said = writer.log.read_text("utf-8")
        calm = "; 0 new, 0 changed," in said and " 0 texts embedded" in said
        run.check(f"writer {writer.number} again", said.split("\n")[0], "nothing is new", calm)
    count(run, writers)


def count(run: Run, writers: list[Writer]) -> None:
    """Compare the table with the dictionaries, vectors with the model's, and look for all texts."""
    import numpy as np

    from nvembed.index import database as of_index
    from nvembed.model.bulk import encode_window
    from nvembed.model.encoder import load_encoder

    database = of_index.Database.open(database_of(run))
    rows: list[dict[str, Any]] = database._table.to_arrow().to_pylist()
    expected = {}
    for writer in writers:
        expected |= {str(writer.folder / name): text for name, text in writer.state.files.items()}
        expected |= {id: row.text for id, row in writer.state.rows.items()}
    accounts = account(expected, [(row.get("file") or row["id"], row["text"]) for row in rows])
    told = {name: len(of) for name, of in vars(accounts).items()}
    run.check("documents", {"there": len(rows), **told}, f"{len(expected)} there", accounts.right)
    if not accounts.right:
        run.row("accounts", **{name: of[:5] for name, of in vars(accounts).items()})
    values = {id: (r.field, r.value) for writer in writers for id, r in writer.state.rows.items()}
    there = {row["id"]: row["fields"] for row in database.get("id", sorted(values))}
    wrong = [id for id, pair in values.items() if there.get(id) != dict([pair])]
    run.check("rows with other fields", wrong[:5], "none", not wrong)
    encoder, texts = load_encoder(run.model, run.dtype), [row["text"] for row in rows]
    made_ND = encode_window(encoder, texts, side="document")
    cosines_N = (made_ND * np.array([row["vector"] for row in rows])).sum(axis=1)
    least = float(cosines_N.min())
    run.check("vectors: least cosine with the model's", least, "0.999", least >= 0.999)
    search, missed = in_process(run), []
    for text in sorted(set(expected.values())):
        if text not in search(text, None, False):
            missed.append(text)
    run.check("texts not found by themselves", missed[:5], "none", not missed)
    kept, of_index._KEPT = of_index._KEPT, timedelta(milliseconds=1)  # as a run sees it later
    with of_index.writing(database_of(run)):
        database.tidy()
    of_index._KEPT = kept
    left = sizes(database_of(run))
    size = sum(len(row["text"]) + 4 * len(row["vector"]) for row in rows)
    few = left["files"] <= _MOST_FILES
    run.check("files when old versions are gone", left, f"at most {_MOST_FILES}", few)
    most = _MOST_TIMES * size / 2**20 + 1
    run.check("megabytes then", left["mb"], f"at most {most:.1f}", left["mb"] <= most)
