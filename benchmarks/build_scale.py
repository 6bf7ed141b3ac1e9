"""How fast a large set is built, and in how much memory.

    python benchmarks/build_scale.py --records 1000000

A JSONL file of synthetic pairs is written (queries of about 8 words, documents of about 60; 5 % of
the records are equal to an earlier one, 5 % share its query, 0.5 % hold a query of the evaluation
task, 0.1 % are bad), then ``nvembed data build`` runs on it in a process of its own. Printed are
records per second of each step and of all, and the largest resident memory of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

SOURCE = Path(__file__).resolve().parents[1] / "src"
# Runs the command, and tells when each step was done.
PROGRAM = """
import resource, sys, time
from nvembed.building.set_build import SetBuild
from nvembed.cli.main import run

def timed(step):
    method = getattr(SetBuild, "_" + step)
    def call(*arguments):
        started = time.perf_counter()
        result = method(*arguments)
        print("step", step, time.perf_counter() - started)
        return result
    return call

for step in ("read", "distinct", "decontaminate", "finish"):
    setattr(SetBuild, "_" + step, timed(step))
code = run(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


def write_inputs(folder: Path, records: int) -> None:
    """Write the set, the task and the recipe."""
    choose = random.Random(0)
    words = [f"{choose.choice('bcdfgklmnprstvz')}{i:x}a" for i in range(20_000)]
    asked = [" ".join(choose.choices(words, k=8)) for _ in range(1000)]
    task = folder / "task"
    (task / "qrels").mkdir(parents=True)
    header = {"name": "t", "type": "Retrieval", "instruction": None, "main_score": "ndcg_at_10"}
    (task / "task.json").write_text(json.dumps(header))
    rows = [json.dumps({"_id": f"q{i}", "text": text}) for i, text in enumerate(asked)]
    (task / "queries.jsonl").write_text("\n".join(rows))
    (task / "corpus.jsonl").write_text(json.dumps({"_id": "d", "text": "a document"}))
    judged = "".join(f"q{i}\td\t1\n" for i in range(len(asked)))
    (task / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    recent: list[tuple[str, str]] = []
    with open(folder / "pairs.jsonl", "w") as out:
        for number in range(records):
            query = " ".join(choose.choices(words, k=8))
            document = " ".join(choose.choices(words, k=60))
            sort = choose.random()
            if recent and sort < 0.10:
                query, known = choose.choice(recent)
                document = known if sort < 0.05 else document
            elif sort < 0.105:
                query = choose.choice(asked)
            if number % 50 == 0:
                recent = [*recent[-9999:], (query, document)]
            row = {"query": query, "positive": [document] if sort < 0.999 else []}
            out.write(json.dumps(row) + "\n")
    recipe = {
        "output": "run",
        "model": {"backbone": "none", "pooling": {"kind": "mean"}},
        "datasets": [
            {
                "name": "pairs",
                "path": "pairs.jsonl",
                "kind": "retrieval",
                "instruction": None,
                "stages": [1],
            }
        ],
        "build": {"folder": "built", "tasks": ["task"]},
        "stages": [{"name": "one", "steps": 1, "in_batch_negatives": True}],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--inputs", type=Path, help="written there, or taken from there")
    given = parser.parse_args()
    records = given.records
    with tempfile.TemporaryDirectory() as name:
        folder = given.inputs or Path(name)
        if not (folder / "recipe.yaml").exists():
            write_inputs(folder, records)
        shutil.rmtree(folder / "built", ignore_errors=True)
        size = (folder / "pairs.jsonl").stat().st_size
        command = [sys.executable, "-c", PROGRAM, "data", "build", str(folder / "recipe.yaml")]
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
        started = time.perf_counter()
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        seconds = time.perf_counter() - started
        manifest = json.loads((folder / "built" / "pairs" / "manifest.json").read_text())
        started = time.perf_counter()
        subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        again = time.perf_counter() - started
    for step, taken in re.findall(r"^step (\w+) ([\d.]+)", done.stdout, re.MULTILINE):
        print(f"{step:<14}{float(taken):8.1f} s {records / float(taken):10,.0f} records/s")
    peak = int(done.stdout.split()[-1])
    print(f"{'all':<14}{seconds:8.1f} s {records / seconds:10,.0f} records/s")
    print(f"input {size / 1e6:,.0f} MB, peak memory {peak / 1e6:,.0f} MB, again {again:.1f} s")
    print(json.dumps(manifest["steps"]), "written", manifest["rows"])


if __name__ == "__main__":
    main()
