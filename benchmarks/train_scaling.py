"""How the cost of a training step grows: with tokens, with documents, with processes.

    python benchmarks/train_scaling.py
    python benchmarks/train_scaling.py --parts processes

``tokens`` fits a line to seconds over tokens of a step; ``documents`` gives the loss's share
of a step; ``processes`` compares two gloo processes of one thread with one process of one thread.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import add_row
from peers.data import plan_steps, read_pairs
from peers.job import OURS, Job, run_job
from peers.models import SHARED, open_models
from peers.report import header, median, rate, say, straight_line, table
from peers.setup import Comparison, prepare
from train_peers import FILES

from nvembed.data.batch import build_batch
from nvembed.data.examples import Example
from nvembed.training.contrastive_loss import Objective, evaluate_objective

PARTS = ("tokens", "documents", "processes")
WIDTH = 256
DOCUMENTS = (64, 256, 1024, 4096, 16384)


class Bench:
    """The options of a run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.models = open_models(arguments.model, arguments.output)
        self.out = self.models.folder / "scaling"
        self.out.mkdir(parents=True, exist_ok=True)
        self.about = header(arguments.threads)

    def keep(self, part: str, value: dict[str, Any]) -> None:
        """Add a part's results to ``results.jsonl``."""
        add_row(self.out, {"part": part, "about": self.about, **value})

    def comparison(self, batch_size: int, steps: int, *, threads: int) -> Comparison:
        """Texts of a run of our side."""
        pairs = read_pairs([self.arguments.data / "train" / name for name in FILES])
        plan = plan_steps(pairs, steps=steps, batch_size=batch_size, num_negatives=3, seed=0)
        job = Job(
            OURS,
            str(self.out / f"{batch_size}x{steps}"),
            str(self.models.decoder),
            steps=steps,
            batch_size=batch_size,
            threads=threads,
            models=str(self.models.folder),
            options={"pack_tokens": self.arguments.pack_tokens},
        )
        return prepare(job, plan)


def tokens(bench: Bench) -> None:
    """Seconds against tokens, one run per batch size; all steps after the second count."""
    x, y, rows = [], [], []
    for batch_size in bench.arguments.queries:
        made = bench.comparison(batch_size, bench.arguments.steps, threads=bench.arguments.threads)
        seconds = run_job(made.job).step_seconds
        x.append(median(made.step_tokens[2:]))
        y.append(median(seconds[2:]))
        rows.append((batch_size, f"{x[-1]:,.0f}", f"{y[-1]:.3f}", f"{x[-1] / y[-1]:,.0f}"))
        say(f"  {batch_size} queries: {x[-1]:,.0f} tokens in {y[-1]:.3f} s")
    intercept, slope, explained = straight_line(x, y)
    table(("queries", "tokens per step, median", "seconds", "tokens/s"), rows)
    say(f"{1e6 * slope:.1f} µs per token and {intercept:.3f} s per step; R² = {explained:.5f}")
    line = {"seconds": intercept, "seconds_per_token": slope, "r2": explained}
    bench.keep("tokens", {"tokens": x, "seconds": y, "line": line})


def synthetic_batch(documents: int) -> Any:
    """A batch of queries with 1 + 3 documents, all different."""
    examples = [
        Example(
            query=f"q{n}",
            positive=f"p{n}",
            negatives=(f"a{n}", f"b{n}", f"c{n}"),
            known_positives=(f"p{n}",),
            labels=(),
            instruction=None,
            symmetric=False,
            dataset="made",
        )
        for n in range(documents // 4)
    ]
    return build_batch(examples, in_batch_negatives=True)


def loss_seconds(documents: int, repeats: int) -> float:
    """Seconds of value, gradient and statistics of the loss, median."""
    batch = synthetic_batch(documents)
    generator = torch.Generator().manual_seed(0)
    embedding_UD = torch.randn(len(batch.texts), WIDTH, generator=generator)
    embedding_UD = torch.nn.functional.normalize(embedding_UD, dim=1)
    found = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        evaluate_objective(
            Objective(temperature=0.05),
            embedding_UD,
            batch,
            total_weight=float(documents // 4),
        )
        found.append(time.perf_counter() - started)
    return median(found[1:])


def documents(bench: Bench) -> None:
    """Seconds of the loss beside those of embedding as many texts of 64 tokens."""
    torch.set_num_threads(bench.arguments.threads)
    made = bench.comparison(16, bench.arguments.steps, threads=bench.arguments.threads)
    speed = rate(made.step_tokens, run_job(made.job).step_seconds, 2)
    rows, found = [], {}
    for count in bench.arguments.documents:
        seconds = loss_seconds(count, bench.arguments.repeats)
        embedding = 1.25 * count * 64 / speed
        found[count] = {"loss_seconds": seconds, "share": seconds / (seconds + embedding)}
        rows.append((f"{count:,}", f"{1000 * seconds:,.1f}", f"{found[count]['share']:.2%}"))
        say("  " + " · ".join(rows[-1]))
    say(f"embedding and its gradient: {speed:,.0f} tokens/s, here for texts of 64 tokens")
    table(("documents", "loss and its gradient, ms", "share of the step"), rows)
    bench.keep("documents", {"tokens_per_second": speed, "found": found})


def processes(bench: Bench) -> None:
    """One thread against two processes of one thread; the losses must agree."""
    made = bench.comparison(16, bench.arguments.steps, threads=1)
    one, two = made.job, Job(**{**vars(made.job), "processes": 2})
    rates: dict[str, list[float]] = {"1 process": [], "2 processes": []}
    worst = 0.0
    for repeat in range(bench.arguments.repeats):
        outcomes = [run_job(one), run_job(two)]
        for name, outcome in zip(rates, outcomes, strict=True):
            rates[name].append(rate(made.step_tokens, outcome.step_seconds, 2))
            say(f"  run {repeat + 1}: {name}, 1 thread each: {rates[name][-1]:,.0f} tokens/s")
        worst = float(np.abs(np.subtract(outcomes[0].losses, outcomes[1].losses)).max())
    speedup = median(rates["2 processes"]) / median(rates["1 process"])
    table(
        ("", "tokens/s, median"), [(name, f"{median(found):,.0f}") for name, found in rates.items()]
    )
    say(f"two processes are {speedup:.2f}× as fast; losses differ by at most {worst:.1e}")
    value = {"rates": rates, "speedup": speedup, "loss_difference": worst}
    bench.keep("processes", value)


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--model", default="decoder-6m", help="as of train_peers.py")
    add("--data", type=Path, default=SHARED)
    add("--output", type=Path, default=Path("runs/bench"))
    add("--threads", type=int, default=2, help="of one process, but for `processes`")
    add("--pack-tokens", type=int, default=2048)
    add("--queries", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    add("--documents", type=int, nargs="+", default=list(DOCUMENTS))
    add("--steps", type=int, default=6)
    add("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    programs = {f.__name__: f for f in (tokens, documents, processes)}
    for part in arguments.parts:
        say(f"== {part}")
        programs[part](bench)


if __name__ == "__main__":
    main()
