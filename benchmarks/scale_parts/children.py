"""The parts, each in a process of its own: the function of its name gives what it found.

All but ``make`` go on where a process before them was killed. The parts after ``encode`` read its
vectors in place of the model (``Stored``), so they take what they would take with any model.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed.core.files import read_jsonl, write_jsonl
from nvembed.encoding import files
from nvembed.encoding.vector_file import VectorFile
from nvembed.model import bulk
from scale_parts.corpus import document, planted, query, read_pool
from scale_parts.place import (
    AGAIN,
    DATABASE,
    DOCUMENTS,
    KILLED,
    PAIRS,
    PARTS,
    QUERIES,
    QUERY_VECTORS,
    SOME,
    VECTORS,
    Place,
)

TASK = "Given some words of a document, retrieve it"
TOP = 10
PROBES = (20, 40, 80)  # partitions of the approximate index that are looked at
WIDTH = 256  # of hashed vectors
_SCRIPT = Path(__file__).resolve().parents[1] / "scale.py"


def make(place: Place) -> dict[str, Any]:
    """Write documents, queries, and pairs to mine for."""
    pool, seed = read_pool([Path(file) for file in place.texts]), place.seed
    write_jsonl(place.at(DOCUMENTS), (document(pool, n, seed) for n in range(place.documents)))
    numbers = planted(max(place.queries, place.mine_queries), place.documents, seed)
    asked = [query(pool, number, seed) for number in numbers]
    write_jsonl(place.at(QUERIES), asked)
    write_jsonl(
        place.at(PAIRS),
        (
            {"query": each["text"], "positive": document(pool, number, seed)["text"]}
            for each, number in zip(asked[: place.mine_queries], numbers, strict=False)
        ),
    )
    return {"bytes": place.at(DOCUMENTS).stat().st_size, "sentences": len(pool.sentences)}


# --- Encode ---------------------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the texts and tokens that are embedded here."""
    totals, original = {"texts": 0, "tokens": 0}, files.embed

    def telling(missing: Any, model: Any, options: Any, made: Any, **how: Any) -> None:
        def told(texts: int, tokens: int | None) -> None:
            totals["texts"] += texts
            totals["tokens"] += tokens or 0
            made(texts, tokens)

        original(missing, model, options, told, **how)

    files.embed = telling
    try:
        yield totals
    finally:
        files.embed = original


def encoded(place: Place, source: Path, output: Path, *options: str) -> dict[str, int]:
    """``nvembed encode``: how many texts and tokens were embedded, by this attempt."""
    with counted() as totals:
        if place.vectors == "hash":
            sys.path.insert(0, str(_SCRIPT.parents[1] / "tests"))
            from hash_encoder import HashEncoder

            files.encode_file(HashEncoder(WIDTH), source, output, task=None)
        else:
            from nvembed.cli.main import run

            where = ["--input", str(source), "--output", str(output), "--dtype", place.dtype]
            if code := run(["encode", place.model, *where, *options]):
                raise SystemExit(code)
    return totals


def encode(place: Place, output: Path | None = None, *options: str) -> dict[str, Any]:
    """Embed all documents."""
    output = output or place.at(VECTORS)
    totals = encoded(place, place.at(DOCUMENTS), output, *options)
    found: dict[str, Any] = {"bytes": output.stat().st_size}
    if totals["tokens"]:  # of what an attempt before this one did, as many per text
        found["tokens"] = round(totals["tokens"] / totals["texts"] * place.documents)
    return found


def queries(place: Place) -> dict[str, Any]:
    """Embed the queries."""
    encoded(place, place.at(QUERIES), place.at(QUERY_VECTORS), "--task", TASK)
    return {}


def processes(place: Place) -> dict[str, Any]:
    """Embed all documents by several processes."""
    return _again(place, "--processes", str(place.processes)) | {"processes": place.processes}


def ray(place: Place) -> dict[str, Any]:
    """Embed all documents by the workers of a Ray cluster of this machine."""
    import ray

    ray.init(num_cpus=place.ray, include_dashboard=False, log_to_driver=False)
    try:
        return _again(place, "--engine", "ray") | {"workers": place.ray}
    finally:
        ray.shutdown()


def _again(place: Place, *options: str) -> dict[str, Any]:
    output = place.at(AGAIN)
    found = encode(place, output, *options)
    one, other = (np.load(path, mmap_mode="r") for path in (place.at(VECTORS), output))
    starts = range(0, len(one), 4096)
    differences = [float(np.abs(one[n : n + 4096] - other[n : n + 4096]).max()) for n in starts]
    for path in place.folder.glob(f"{AGAIN}*"):
        path.unlink()
    return found | {"largest_difference": max(differences)}


# --- Index, search, mine --------------------------------------------------------------------------


class Stored(VectorFile):
    """Vectors of a file in place of a model; those of the texts by which it is known are made."""

    def _encode(self, side: Any, texts: Sequence[str], task: str | None) -> NDArray[np.float32]:
        from nvembed.index.search import _PROBE

        if tuple(texts) == _PROBE:
            return np.eye(len(texts), self.dimension, dtype=np.float32)
        return super()._encode(side, texts, task)


def stored(place: Place) -> Stored:
    return Stored(place.at(VECTORS), place.at(DOCUMENTS))


def index(place: Place) -> dict[str, Any]:
    """Write the database, and again with nothing new; then the index of vectors."""
    from nvembed.index.database import Database, is_database

    database, encoder, found = place.at(DATABASE), stored(place), dict[str, Any]()
    whole = not is_database(database)
    added, seconds = _written(place, database, encoder)
    if whole:  # else it is the rest of what an attempt before this one wrote
        found |= {"write_seconds": seconds, "documents_per_second": added / seconds}
    added, found["again_seconds"] = _written(place, database, encoder)
    assert added == 0, "nothing had changed"
    started = time.perf_counter()
    Database.open(database).tidy(ann_above=0)
    found["vector_index_seconds"] = time.perf_counter() - started
    found["bytes"] = sum(path.stat().st_size for path in database.rglob("*") if path.is_file())
    return found


def _written(place: Place, database: Path, encoder: Stored) -> tuple[int, float]:
    """Documents that were added, and the seconds; the index of vectors is made later."""
    from nvembed.index.build import IndexOptions, index_documents

    options = IndexOptions(ann_above=10 * place.documents)
    started = time.perf_counter()
    done = index_documents(database, [place.at(DOCUMENTS)], model=encoder, options=options)
    return done.added, time.perf_counter() - started


def search(place: Place) -> dict[str, Any]:
    """Search exactly and approximately: recall of one against the other, latencies."""
    from nvembed.index import database as module
    from nvembed.index.search import SearchOptions, find
    from nvembed.kernels.nearest import top_k

    database = module.Database.open(place.at(DATABASE))
    rows = [row for _, row in islice(read_jsonl(place.at(QUERIES)), place.queries)]
    vectors = np.load(place.at(QUERY_VECTORS))[: len(rows)]

    def ask(options: SearchOptions) -> tuple[list[float], list[list[str]]]:
        find(database, rows[0]["text"], vectors[0], options)  # warms up
        times, answers = [], []
        for row, vector in zip(rows, vectors, strict=True):
            started = time.perf_counter()
            hits = find(database, row["text"], vector, options)
            times.append(1000 * (time.perf_counter() - started))
            answers.append([hit.id for hit in hits])
        return times, answers

    def latency(name: str, times: list[float]) -> dict[str, float]:
        shares = {"p50": 50, "p95": 95}
        return {f"{name}_{key}_ms": float(np.percentile(times, q)) for key, q in shares.items()}

    times, exact = ask(SearchOptions(exact=True))
    right = [[row["document"]] for row in rows]
    found: dict[str, Any] = latency("exact", times)
    found["planted_found_exactly"] = overlap(exact, right)
    _, best = top_k(vectors, np.load(place.at(VECTORS), mmap_mode="r"), TOP)
    found["exact_is_brute_force"] = overlap(exact, [[f"d{n}" for n in row] for row in best])
    recalls = {}
    for probes in dict.fromkeys((module._PROBES, *PROBES)):
        module._PROBES = probes
        times, near = ask(SearchOptions())
        recalls[str(probes)] = overlap(near, exact)
        if len(recalls) == 1:  # the package's own
            found |= latency("approximate", times) | {f"recall_at_{TOP}": recalls[str(probes)]}
            found["planted_found"] = overlap(near, right)
    found["recall_by_probes"] = recalls
    for name, options in (
        ("filtered", SearchOptions(where="year > 2000")),
        ("hybrid", SearchOptions(hybrid=True)),
    ):
        found |= latency(name, ask(options)[0])
    return found


def overlap(found: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> float:
    """Share of what is wanted that was found, over all queries."""
    shares = [len({*a} & {*b}) / len(b) for a, b in zip(found, wanted, strict=True)]
    return float(np.mean(shares))


def mine(place: Place) -> dict[str, Any]:
    """Mine hard negatives for the pairs among all documents."""
    from nvembed.data.config import MiningConfig
    from nvembed.mining.miner import mine_file
    from nvembed.model import workers

    asked, searched = VectorFile(place.at(QUERY_VECTORS), place.at(QUERIES)), stored(place)

    class Both:
        dimension = searched.dimension
        encode_query = staticmethod(asked.encode_query)
        encode_document = staticmethod(searched.encode_document)

    both: Any = Both()
    workers.load_encoder = lambda *_: both
    output, name = place.at("mined.jsonl"), place.model
    started = time.perf_counter()
    report = mine_file(
        place.at(PAIRS),
        output,
        name,
        MiningConfig(),
        documents=place.at(DOCUMENTS),
        dtype="float32",
    )
    seconds = time.perf_counter() - started
    wrong = sum(row["positive"] in row["negative"] for _, row in read_jsonl(output))
    return {
        "seconds": seconds,
        "queries": report.records,
        "queries_per_second": report.records / seconds,
        "negatives": report.negatives,
        "positives_among_negatives": wrong,
        "positive_not_found": report.share_positive_not_found,
    }


# --- Killed and resumed ---------------------------------------------------------------------------


def die_after(owner: Any, name: str, calls: int, fraction: float) -> None:
    """Kill this process in a later call: after ``calls`` of them, a part of the time of one on."""
    original, times = getattr(owner, name), [time.perf_counter()]

    def timed(*given: Any, **named: Any) -> Any:
        times.append(time.perf_counter())
        if len(times) == calls + 1:
            delay = fraction * (times[-1] - times[-2])
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return original(*given, **named)

    setattr(owner, name, timed)


def _killed(place: Place, name: str, count: int) -> dict[str, Any]:
    """Run a child that is killed at a random place, and again; what the second had to do."""
    window = place.window or bulk.WINDOW_TEXTS
    choose = Random(f"kill {name} {place.seed} {place.documents}")
    windows = -(-count // window)
    least = min(2, windows)
    calls, fraction = choose.randint(least, max(least, windows // 2)), choose.random()
    command = [sys.executable, str(_SCRIPT), "--child", name, "--folder", str(place.folder)]
    first = subprocess.run([*command, "--die", str(calls), str(fraction)], check=False)
    if first.returncode != -signal.SIGKILL:
        raise SystemExit(f"{name} was to be killed and ended with {first.returncode}")
    subprocess.run(command, check=True)
    again = json.loads(place.at(f"{name}.result.json").read_text())
    return {"killed_after": calls, "of_windows": windows, "kept": count - again["made"]}


def encode_some(place: Place) -> dict[str, Any]:
    """Embed the first documents."""
    some = place.at(SOME)
    count = _some(place)
    with open(place.at(DOCUMENTS), "rb") as source, open(some, "wb") as out:
        out.writelines(islice(source, count))
    return {"made": encoded(place, some, place.at("some.npy"))["texts"]}


def _some(place: Place) -> int:
    """Whole windows, or all documents: then batches are those of the whole file."""
    window = place.window or bulk.WINDOW_TEXTS
    return min(place.documents, -(-place.kill_documents // window) * window)


def kill_encode(place: Place) -> dict[str, Any]:
    """Kill and resume the encoding of the first documents: to the same bytes."""
    for path in place.folder.glob("some.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = _killed(place, "encode_some", _some(place))
    some = np.load(place.at("some.npy"), mmap_mode="r")
    whole = np.load(place.at(VECTORS), mmap_mode="r")[: len(some)]
    found["equal"] = len(some) == _some(place) and some.tobytes() == whole.tobytes()
    for path in place.folder.glob("some.*"):
        path.unlink()
    return found | {"of_documents": len(some)}


def index_killed(place: Place) -> dict[str, Any]:
    """Write a second database."""
    return {"made": _written(place, place.at(KILLED), stored(place))[0]}


def kill_index(place: Place) -> dict[str, Any]:
    """Kill and resume the indexing: every document is there once, with its text and vector."""
    from nvembed.index.database import Database

    shutil.rmtree(place.at(KILLED), ignore_errors=True)
    found = _killed(place, "index_killed", place.documents)
    database, vectors = Database.open(place.at(KILLED)), stored(place)
    equal = database.count() == place.documents
    rows = (row for _, row in read_jsonl(place.at(DOCUMENTS)))
    while block := list(islice(rows, 1000)):
        kept = {row["id"]: row for row in database.get("id", [row["id"] for row in block])}
        wanted = vectors.encode_document([row["text"] for row in block])
        equal &= len(kept) == len(block) and all(
            kept[row["id"]]["text"] == row["text"]
            and kept[row["id"]]["vector"].tobytes() == vector.tobytes()
            for row, vector in zip(block, wanted, strict=True)
        )
    shutil.rmtree(place.at(KILLED))
    return found | {"equal": equal, "of_documents": place.documents}


# What the last two parts start and kill.
KILLED_CHILDREN = ("encode_some", "index_killed")


def run_child(name: str, place: Place, die: tuple[int, float] | None) -> dict[str, Any]:
    """Run a part, or one that it starts, in this process."""
    from nvembed.index import build
    from nvembed.index.database import Database

    if place.window is not None:
        bulk.WINDOW_TEXTS = build.WINDOW_TEXTS = place.window
    if die is not None:
        owner: Any = (bulk, "save_part") if name == "encode_some" else (Database, "upsert")
        die_after(*owner, *die)
    assert name in (*PARTS, *KILLED_CHILDREN)
    found: dict[str, Any] = globals()[name](place)
    return found
