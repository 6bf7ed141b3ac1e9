"""Training steps and an encode beside processes that take the CPUs, by number of threads.

    python benchmarks/busy.py
    python benchmarks/busy.py --model smollm2-135m --spinners 0 2 4
    python benchmarks/busy.py --tiny --spinners 1 --runs 1      # a rehearsal

Parts are numbers of processes that spin, on a machine where nothing else runs. A run is a process
of its own; for training its rate is that of all steps, the first included, since a run with
``auto`` finds its number of threads in the first ones. ``encode`` has no automatic number: only
``OMP_NUM_THREADS``, as the command tells a user whose CPUs are busy.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

from peers.bench import DTYPES, Bench, Case, Options, Side, of_all, one_by_one, option_parser
from peers.data import plan_steps, read_pairs
from peers.job import OURS, Job, run_job, run_program
from peers.models import length_parts, open_models
from peers.report import rate
from peers.setup import Comparison, prepare
from train_peers import FILES

from nvembed.core.files import write_json

SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(100_000))"
TRAINING, ENCODING = "train", "encode"
# By title: threads, and what OpenMP's do while they wait for each other (spin, or sleep).
WAYS: dict[str, Options] = {
    "threads 2": {"threads": 2},
    "threads 1": {"threads": 1},
    "threads auto": {"threads": "auto"},
    "threads 2, asleep while waiting": {"threads": 2, "policy": "passive"},
}


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """So many processes that want a CPU all the time; they end with this one."""
    processes = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def sides() -> list[Side]:
    """All ways in each type; encoding has no automatic number of threads."""

    def tried(way: Options, part: str) -> list[Options]:
        return [] if part.startswith(ENCODING) and way["threads"] == "auto" else [way]

    return [
        Side(OURS, dtype, partial(tried, way), title)
        for dtype in DTYPES
        for title, way in WAYS.items()
    ]


def written(bench: Bench, steps: int, queries: int, max_tokens: int) -> Comparison:
    """The steps, and texts to encode."""
    pairs = read_pairs([bench.given.data / "train" / name for name in FILES])
    plan = plan_steps(pairs, steps=steps, batch_size=queries, num_negatives=3, seed=0)
    job = Job(
        OURS,
        str(bench.out.absolute() / "steps"),
        str(bench.models.decoder),
        steps=steps,
        batch_size=queries,
        models=str(bench.models.folder),
        max_tokens=max_tokens,
    )
    return prepare(job, plan)


def main() -> None:
    parser = option_parser(__doc__)
    add = parser.add_argument
    add("--spinners", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    add("--tiny", action="store_true", help="few short texts")
    given = parser.parse_args()
    models = open_models(given.model, given.output)
    shape = (3, 2, 32) if given.tiny else (8, 2, 256) if models.large else (30, 16, 256)
    bench = Bench("busy", given, models, {"steps": shape})
    models.need("ours")
    made = written(bench, *shape)
    texts = length_parts(given.data, 0.01 if models.large else 0.1)["paragraphs"]
    texts = texts[: 4 if given.tiny else None]
    file = bench.out / "texts.json"
    write_json(file, {"texts": texts})
    parts = {f"{what}, {n} beside": n for n in given.spinners for what in (TRAINING, ENCODING)}

    def train(side: Side, threads: int | str) -> dict[str, Any]:
        job = made.job.of(OURS, side.dtype, threads=threads)
        seconds = run_job(job, seconds=bench.seconds_left()).step_seconds
        found = {"first": seconds[0], "last": seconds[-1], "slowest": max(seconds)}
        return {"rate": rate(made.step_tokens, seconds, 0), **found}

    def encode(side: Side, threads: int) -> dict[str, Any]:
        job = {"side": OURS, "dtype": side.dtype, "threads": threads, "checks": ["x"]}
        job |= {"models": str(models.folder), "texts": str(file.absolute())}
        job["cases"] = [("texts", {})]
        left = bench.seconds_left()
        found = run_program("peers.encoders", job, threads=threads, seconds=left)
        return {"rate": models.count_tokens(texts) / found["seconds"][0]}

    def measure(side: Side, case: Case) -> dict[str, Any]:
        policy = case.options.get("policy", os.environ.get("OMP_WAIT_POLICY", ""))
        do = train if case.part.startswith(TRAINING) else encode
        with spinning(parts[case.part]), patch.dict(os.environ, OMP_WAIT_POLICY=policy):
            return do(side, case.options["threads"])

    bench.turns(list(parts), bench.installed(sides()), one_by_one(measure))
    columns = {f"{name} step, s": of_all(name, ".2f") for name in ("first", "last", "slowest")}
    bench.report(list(parts), sides(), columns, passes=0)


if __name__ == "__main__":
    main()
