"""Peak memory and throughput of a training step against the documents in it, 64 to 16,384.

    python benchmarks/train_memory.py
    python benchmarks/train_memory.py --sides nvembed --documents 64 256 1024

Ours is the cached gradient with a small budget for graphs, theirs is
``CachedMultipleNegativesRankingLoss`` with a mini-batch of about the same memory. Texts are cut to
64 tokens; every query has 1 + 3 documents, none comes twice in a step. Memory is the highest
resident memory of a fresh process, less that of one that has loaded model and data.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from peers.data import plan_steps, read_pairs
from peers.job import Job, Outcome, run_job
from peers.report import header, keep, say, table
from peers.setup import prepare
from train_peers import FILES, OURS, ROOT, SENTENCE

from nvembed.core.files import atomic_path

DOCUMENTS = (64, 256, 1024, 4096, 16384)


def measure(job: Job, options: dict[str, Any], step_tokens: list[int]) -> dict[str, float]:
    """Memory over loading in MB and tokens/s of the last step."""
    outcome: Outcome = run_job(job.of(job.side, **options))
    loaded = outcome.loaded_bytes
    if job.side == OURS:
        loaded = run_job(job.of(OURS, **options, load_only=True)).loaded_bytes
    return {
        "memory_mb": (outcome.peak_bytes - loaded) / 1e6,
        "tokens_per_second": step_tokens[-1] / outcome.step_seconds[-1],
        "seconds": outcome.step_seconds[-1],
        "loss": outcome.losses[0],
    }


def draw(found: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Memory and throughput against documents per step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (side, by_size), colour in zip(found.items(), ("#0072b2", "#d55e00"), strict=False):
        sizes = list(by_size)
        memory = [by_size[n]["memory_mb"] for n in sizes]
        rates = [by_size[n]["tokens_per_second"] / 1000 for n in sizes]
        left.plot(sizes, memory, marker="o", color=colour, label=side)
        right.plot(sizes, rates, marker="o", color=colour, label=side)
    left.set_ylabel("peak memory over loading, MB")
    right.set_ylabel("1,000 real tokens per second")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("documents per step")
        axes.grid(color="#e4e4e4")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
        axes.minorticks_off()
    left.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--documents", type=int, nargs="+", default=list(DOCUMENTS))
    add("--sides", nargs="+", choices=(OURS, SENTENCE), default=[OURS, SENTENCE])
    add("--model", type=Path, default=ROOT / "assets" / "decoder-6m")
    add("--data", type=Path, default=ROOT.parent / "shared" / "data" / "train")
    add("--output", type=Path, default=Path("runs/bench"))
    add("--plot", type=Path, default=ROOT / "docs" / "images" / "train-memory.png")
    add("--threads", type=int, default=2)
    add("--max-tokens", type=int, default=64)
    add("--memory-gb", type=float, default=0.5, help="of our graphs")
    add("--pack-tokens", type=int, default=2048, help="of our side")
    add("--mini-batch-size", type=int, default=32, help="texts of the peer's mini-batch")
    add("--one-step-from", type=int, default=4096, help="documents; below, the 2nd step counts")
    arguments = parser.parse_args()
    about = header(arguments.threads)
    pairs = read_pairs([Path(arguments.data, name) for name in FILES])
    options: dict[str, dict[str, Any]] = {
        OURS: {"memory_gb": arguments.memory_gb, "pack_tokens": arguments.pack_tokens},
        SENTENCE: {"cached": True, "mini_batch_size": arguments.mini_batch_size},
    }
    found: dict[str, dict[int, dict[str, float]]] = {side: {} for side in arguments.sides}
    rows = []
    for documents in sorted(arguments.documents):
        steps = 1 if documents >= arguments.one_step_from else 2
        batch_size = documents // 4
        plan = plan_steps(pairs, steps=steps, batch_size=batch_size, num_negatives=3, seed=0)
        work = Path(arguments.output, "memory", str(documents)).absolute()
        job = Job(
            OURS,
            str(work),
            str(arguments.model.absolute()),
            steps=steps,
            batch_size=batch_size,
            max_tokens=arguments.max_tokens,
            threads=arguments.threads,
        )
        made = prepare(job, plan, model=not (work / "stock").exists())
        for side in arguments.sides:
            side_job = made.job.of(side)
            at = measure(side_job, options[side], made.step_tokens)
            found[side][documents] = at
            rows.append(
                (
                    f"{documents:,}",
                    side,
                    f"{made.step_tokens[-1]:,}",
                    f"{at['memory_mb']:,.0f}",
                    f"{at['tokens_per_second']:,.0f}",
                    f"{at['loss']:.6f}",
                )
            )
            say("  " + " · ".join(rows[-1]))
    table(
        ("documents", "side", "tokens", "peak memory over loading, MB", "tokens/s", "first loss"),
        rows,
    )
    if len(found) == 2:
        ratios = [
            found[OURS][n]["tokens_per_second"] / found[SENTENCE][n]["tokens_per_second"]
            for n in found[OURS]
        ]
        say(f"ours is faster by {np.median(ratios):.2f}× (median over the sizes)")
    path = Path(arguments.output, "train-memory.json")
    keep(path, "memory", {"options": options, "found": found}, about)
    if arguments.plot:
        draw(found, arguments.plot)


if __name__ == "__main__":
    main()
