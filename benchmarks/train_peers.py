"""Training throughput and loss curves against other trainers, in one run on one machine.

    python benchmarks/train_peers.py
    python benchmarks/train_peers.py --parts uncached --steps 16 --repeats 3
    python benchmarks/train_peers.py --model ../shared/models/base-8m --name base-8m

Sides: our trainer, ``SentenceTransformerTrainer``, and FlagEmbedding's decoder-only runner where
its interpreter exists. All start from the same weights and the same adapters (LoRA 16 on all linear
layers, B = 0, no dropout) in float32, see the same texts in the same order, and use the same loss,
AdamW, schedule and clipping. Every run is a process of its own, the sides take turns, and tokens
are those of all texts of a step without padding: the same number for every side.

Parts: ``equal`` compares embeddings; ``tune_…`` find the peers' best options; ``uncached``
and ``cached`` measure; ``curve`` compares losses over many steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from peers.data import plan_steps, read_pairs
from peers.job import Job, JobError, Outcome, run_job
from peers.report import header, keep, median, rate, say, table
from peers.setup import Comparison, prepare

ROOT = Path(__file__).parents[1]
PARTS = ("equal", "tune_uncached", "tune_cached", "tune_flag", "uncached", "cached", "curve")
OURS, SENTENCE, FLAG = "nvembed", "sentence-transformers", "FlagEmbedding"
FLAG_PYTHON = Path("runs/bench/flag-venv/bin/python")
FLAG_INSTALL = (
    "python -m venv runs/bench/flag-venv && runs/bench/flag-venv/bin/pip install "
    "torch==2.13.0 transformers==5.6.0 FlagEmbedding==1.4.2"
)
FILES = ("squad_train.jsonl.gz", "medquad.jsonl.gz")
# What is tried for the peers; the first is the default of the library.
UNCACHED_OPTIONS: tuple[dict[str, Any], ...] = tuple(
    {"attention": attention, "merge": merge}
    for attention, merge in product(("sdpa", "eager"), (True, False))
)
CACHED_SIZES = (4, 8, 16, 32, 64)
FLAG_SIZES = (None, 4, 8, 16, 32)


class Bench:
    """The options of a run, and what it found so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.work = Path(arguments.output, f"peers-{arguments.name}").absolute()
        self.results = self.work / "results.json"
        self.pairs = read_pairs([Path(arguments.data, name) for name in FILES])
        self.about = header(arguments.threads)
        self.has_flag = Path(arguments.flag_python).exists()
        if not self.has_flag:
            say(f"FlagEmbedding: peer not installed. To install it: {FLAG_INSTALL}")

    def comparison(self, batch_size: int, steps: int) -> Comparison:
        """Texts of a run, written for all sides."""
        plan = plan_steps(self.pairs, steps=steps, batch_size=batch_size, num_negatives=3, seed=0)
        job = Job(
            side=OURS,
            work=str(self.work / f"{batch_size}x{steps}"),
            decoder=str(Path(self.arguments.model).absolute()),
            steps=steps,
            batch_size=batch_size,
            threads=self.arguments.threads,
            options=self.ours(),
        )
        ready = Path(job.work, "stock").exists()
        made = prepare(job, plan, model=not ready)
        say(
            f"{steps} steps of {batch_size} queries with 1 + 3 documents, "
            f"{np.mean(made.step_tokens):,.0f} real tokens a step; "
            f"put off to a later step because of a repeated text: {plan.put_off} queries"
        )
        return made

    def ours(self, **more: Any) -> dict[str, Any]:
        """Options of our side."""
        return {"pack_tokens": self.arguments.pack_tokens, **more}

    def run(self, job: Job) -> Outcome:
        """One process; the peers' interpreter for the peer that has one."""
        python = self.arguments.flag_python if job.side == FLAG else sys.executable
        return run_job(job, Path(python).absolute())

    def best(self, part: str, default: dict[str, Any]) -> dict[str, Any]:
        """The options that tuning found in this or an earlier run."""
        kept = json.loads(self.results.read_text()) if self.results.exists() else {}
        found: dict[str, Any] = kept.get(part, {}).get("best", default)
        return found


def equal(bench: Bench) -> None:
    """Largest difference between our embeddings and the peer's, and of the first loss."""
    from sentence_transformers import SentenceTransformer

    from nvembed.model.embedder import NVEmbed

    made = bench.comparison(16, 2)
    job, columns = made.job, made.job.columns()
    mine = NVEmbed.from_pretrained(
        job.decoder, pooling="mean", max_tokens=job.max_tokens, dtype="float32", device="cpu"
    )
    stock = SentenceTransformer(str(Path(job.work, "stock")), device="cpu", local_files_only=True)
    differences = {}
    for name, prompt in (("query", job.prompt), ("positive", "")):
        options: dict[str, Any] = {"prompt": prompt, "show_progress_bar": False}
        ours = mine.encode(columns[name], **options)
        theirs = stock.encode(columns[name], **options)
        differences[name] = float(np.abs(ours - theirs).max())
    say(f"largest difference of an embedding: {differences} ({ours.shape[1]} numbers of length 1)")
    first = {job.side: bench.run(job).losses}
    first[SENTENCE] = bench.run(job.of(SENTENCE)).losses
    if bench.has_flag:
        first[FLAG] = bench.run(job.of(FLAG)).losses
    say(f"losses of the first two steps: {first}")
    worst = max(abs(a - b) for side in first for a, b in zip(first[side], first[OURS], strict=True))
    if max(differences.values()) > 1e-4 or worst > 1e-3:
        sys.exit("the sides do not compute the same")
    keep(bench.results, "equal", {"embeddings": differences, "losses": first}, bench.about)


def fastest(bench: Bench, part: str, made: Comparison, jobs: list[Job]) -> None:
    """Try the jobs for a few steps each and keep the best one's options."""
    rates = []
    for job in jobs:
        rates.append(rate(made.step_tokens, bench.run(job).step_seconds, 1))
        say(f"  {job.side} {job.options}: {rates[-1]:,.0f} tokens/s")
    best = jobs[int(np.argmax(rates))].options
    tried = [[job.options, value] for job, value in zip(jobs, rates, strict=True)]
    keep(bench.results, part, {"best": best, "tried": tried}, bench.about)


def tune_uncached(bench: Bench) -> None:
    """sentence-transformers: kind of attention, one forward for all documents or one per column."""
    made = bench.comparison(16, bench.arguments.tune_steps)
    jobs = [made.job.of(SENTENCE, **options) for options in UNCACHED_OPTIONS]
    fastest(bench, "tune_uncached", made, jobs)


def tune_cached(bench: Bench) -> None:
    """sentence-transformers: texts per mini-batch of its gradient cache."""
    made = bench.comparison(64, 2)
    attention = bench.best("tune_uncached", UNCACHED_OPTIONS[0])["attention"]
    jobs = [
        made.job.of(SENTENCE, cached=True, attention=attention, mini_batch_size=size)
        for size in bench.arguments.cached_sizes
    ]
    fastest(bench, "tune_cached", made, jobs)


def tune_flag(bench: Bench) -> None:
    """FlagEmbedding: texts per forward."""
    if bench.has_flag:
        made = bench.comparison(16, bench.arguments.tune_steps)
        jobs = [made.job.of(FLAG, sub_batch_size=size) for size in FLAG_SIZES]
        fastest(bench, "tune_flag", made, jobs)


def measure(bench: Bench, part: str, made: Comparison, jobs: dict[str, Job], skip: int) -> None:
    """Repeat all jobs in turn; medians of tokens/s and of the ratio within a repeat."""
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    walls: dict[str, list[float]] = {name: [] for name in jobs}
    others: dict[str, list[float]] = {name: [] for name in jobs}
    losses: dict[str, list[float]] = {}
    for repeat in range(bench.arguments.repeats):
        for name, job in jobs.items():
            outcome = bench.run(job)
            rates[name].append(rate(made.step_tokens, outcome.step_seconds, skip))
            walls[name].append(outcome.wall_seconds)
            others[name].append(outcome.others_share)
            losses[name] = outcome.losses
            say(f"  run {repeat + 1}: {name} {rates[name][-1]:,.0f} tokens/s")
    first = next(iter(jobs))
    ratios = {
        name: median([a / b for a, b in zip(rates[first], rates[name], strict=True)])
        for name in jobs
    }
    rows = [
        (
            name,
            f"{median(rates[name]):,.0f}",
            f"{min(rates[name]):,.0f}–{max(rates[name]):,.0f}",
            f"{ratios[name]:.2f}×",
            f"{np.mean(np.abs(np.subtract(losses[name], losses[first]))):.1e}",
            f"{median(walls[name]):.0f}",
            json.dumps(jobs[name].options),
        )
        for name in jobs
    ]
    head = (part, "tokens/s, median", "range", f"{first} is faster by", "loss differs by (mean)")
    table((*head, "whole process, s", "options"), rows)
    value = {"rates": rates, "ratios": ratios, "walls": walls, "losses": losses, "skipped": skip}
    value["others_share"] = others
    keep(bench.results, part, value, bench.about)


def uncached(bench: Bench) -> None:
    """16 queries a step, all graphs kept by everyone."""
    arguments = bench.arguments
    made = bench.comparison(16, arguments.steps)
    jobs = {OURS: made.job}
    jobs[SENTENCE] = made.job.of(SENTENCE, **bench.best("tune_uncached", UNCACHED_OPTIONS[0]))
    if bench.has_flag:
        jobs[FLAG] = made.job.of(FLAG, **bench.best("tune_flag", {"sub_batch_size": 8}))
    measure(bench, "uncached", made, jobs, min(arguments.skip, arguments.steps - 1))


def cached(bench: Bench) -> None:
    """Many queries a step: gradient cache on both sides, and ours within its memory budget."""
    arguments = bench.arguments
    made = bench.comparison(arguments.cached_queries, arguments.cached_steps)
    small = bench.ours(memory_gb=arguments.small_memory_gb)
    jobs = {f"{OURS}, {arguments.small_memory_gb} GB": made.job.of(OURS, **small), OURS: made.job}
    default = {"cached": True, "mini_batch_size": 8}
    jobs[SENTENCE] = made.job.of(SENTENCE, **bench.best("tune_cached", default))
    measure(bench, "cached", made, jobs, 1)


def curve(bench: Bench) -> None:
    """Losses of many steps; nothing is timed, so other work on the machine does no harm."""
    made = bench.comparison(bench.arguments.curve_queries, bench.arguments.curve_steps)
    losses = {OURS: bench.run(made.job).losses}
    losses[SENTENCE] = bench.run(made.job.of(SENTENCE)).losses
    if bench.has_flag:
        losses[FLAG] = bench.run(made.job.of(FLAG)).losses
    rows = []
    for name, values in losses.items():
        differences = np.abs(np.subtract(values, losses[OURS]))
        start, end = np.mean(values[:10]), np.mean(values[-10:])
        mean, most = f"{differences.mean():.1e}", f"{differences.max():.1e}"
        rows.append((name, f"{start:.4f}", f"{end:.4f}", mean, most))
    head = (f"{len(made.step_tokens)} steps", "loss, first 10", "last 10", "mean difference")
    table((*head, "largest"), rows)
    keep(bench.results, "curve", {"losses": losses}, bench.about)


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--model", type=Path, default=ROOT / "assets" / "decoder-6m", help="a decoder's folder")
    add("--name", default="decoder-6m", help="of the results' folder")
    add("--data", type=Path, default=ROOT.parent / "shared" / "data" / "train")
    add("--output", type=Path, default=Path("runs/bench"))
    add("--flag-python", type=Path, default=FLAG_PYTHON, help="interpreter that has FlagEmbedding")
    add("--threads", type=int, default=2)
    add("--pack-tokens", type=int, default=2048, help="of our side")
    small = "for our graphs in `cached`; should hold one pack, so that all others are recomputed"
    add("--small-memory-gb", type=float, default=1.0, help=small)
    add("--steps", type=int, default=30, help="of a run of `uncached`")
    add("--skip", type=int, default=10, help="steps at the beginning that are not timed")
    add("--repeats", type=int, default=3)
    add("--tune-steps", type=int, default=3)
    add(
        "--cached-sizes", type=int, nargs="+", default=list(CACHED_SIZES), help="mini-batches tried"
    )
    add("--cached-queries", type=int, default=128)
    add("--cached-steps", type=int, default=3, help="the first is not timed")
    add("--curve-steps", type=int, default=100)
    add("--curve-queries", type=int, default=16, help="a step of `curve`")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    tuning = (tune_uncached, tune_cached, tune_flag)
    programs = {f.__name__: f for f in (equal, *tuning, uncached, cached, curve)}
    for part in arguments.parts:
        say(f"== {part}")
        try:
            programs[part](bench)
        except JobError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
