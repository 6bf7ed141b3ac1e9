"""Training speed, memory and losses against other trainers, same weights, texts and order.

    python benchmarks/train_peers.py
    python benchmarks/train_peers.py --model smollm2-135m --parts uncached cached
    python benchmarks/train_peers.py --model smollm2-135m --parts memory
    python benchmarks/train_peers.py --parts curve --dtypes float32 --runs 1

All start from the same weights and adapters (LoRA 16 on all linear layers, B = 0, no dropout) and
have the same loss, AdamW, schedule and clipping. Every run is a process of its own, the sides take
turns, and tokens are those of all texts of a step without padding. Parts:

    uncached   all graphs kept by everyone
    cached     gradient cache for the peer; ours keeps what fits, and once recomputes nearly all
    memory     peak memory over loading and speed of steps with more and more short documents
    curve      losses of many steps
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from peers.bench import DTYPES, Bench, Case, Options, Side, of_all, one_by_one, option_parser
from peers.data import plan_steps, read_pairs
from peers.environments import interpreter
from peers.job import FLAG, OURS, SENTENCE, Job, run_job
from peers.models import open_models
from peers.report import rate
from peers.setup import Comparison, prepare

FILES = ("squad_train.jsonl.gz", "medquad.jsonl.gz")
PARTS = ("uncached", "cached", "memory", "curve")
PASSES = 2.0  # forward, and gradients of what goes in; frozen weights have none
RECOMPUTING = f"{OURS}, recomputing"


@dataclass(frozen=True)
class Size:
    """Steps of a part: queries with 1 + 3 documents each, and the first steps not timed."""

    queries: int
    steps: int
    skip: int
    max_tokens: int


SMALL = {
    "uncached": Size(16, 7, 2, 512),
    "cached": Size(64, 3, 1, 512),
    "curve": Size(4, 100, 1, 512),
    **{f"memory, {4 * n} documents": Size(n, 2, 1, 64) for n in (16, 256, 1024)},
}
LARGE = {
    "uncached": Size(2, 3, 1, 256),
    "cached": Size(6, 2, 1, 256),
    "curve": Size(1, 20, 1, 128),
    **{f"memory, {4 * n} documents": Size(n, 2, 1, 64) for n in (4, 16, 32)},
}
TINY = {
    "uncached": Size(2, 3, 1, 32),
    "cached": Size(4, 2, 1, 32),
    "curve": Size(2, 3, 1, 32),
    "memory, 16 documents": Size(4, 2, 1, 32),
}


def tried_by_sentence_transformers(dtype: str, part: str) -> list[Options]:
    """Both of its ways for a CPU: all columns in one forward, its default, or one for each."""
    frozen = ("float32", "bfloat16") if dtype == "bfloat16" else ("float32",)
    ways: list[Options] = [{"merge": True}, {"merge": False}]
    if part == "cached":
        ways = [{"cached": True, "mini_batch_size": size} for size in (4, 8, 16)]
    elif part.startswith("memory"):
        ways = [{"cached": True, "mini_batch_size": 16}]
    return [way | {"frozen": held} for held in frozen for way in ways]


def tried_by_us(budget: float | None, part: str) -> list[Options]:
    """Our defaults, or little memory for graphs, so that most packs are recomputed."""
    small = {"memory_gb": budget or 1.0, "pack_tokens": 1024}
    if budget is not None:
        return [small] if part == "cached" else []
    return [small if part.startswith("memory") else {}]


def tried_by_flag(part: str) -> list[Options]:
    """Documents per forward; it has no cache."""
    sizes = (None, 4, 8) if part in ("uncached", "curve") else ()
    return [{"sub_batch_size": size} for size in sizes]


def sides(budget: float) -> list[Side]:
    """All, by type; the first is ours."""
    made = []
    for dtype in DTYPES:
        made.append(Side(OURS, dtype, partial(tried_by_us, None)))
        made.append(Side(OURS, dtype, partial(tried_by_us, budget), RECOMPUTING))
        made.append(Side(SENTENCE, dtype, partial(tried_by_sentence_transformers, dtype)))
        made.append(Side(FLAG, dtype, tried_by_flag))
    return made


class Steps:
    """The texts of every part, and how a case is measured."""

    def __init__(self, bench: Bench, sizes: dict[str, Size]) -> None:
        self.bench, self.sizes = bench, sizes
        self.pairs = read_pairs([bench.given.data / "train" / name for name in FILES])
        self.made = cache(self._made)

    def _made(self, part: str) -> Comparison:
        size, bench = self.sizes[part], self.bench
        plan = plan_steps(
            self.pairs, steps=size.steps, batch_size=size.queries, num_negatives=3, seed=0
        )
        job = Job(
            OURS,
            str(bench.out.absolute() / f"{size.queries}x{size.steps}x{size.max_tokens}"),
            str(bench.models.decoder),
            steps=size.steps,
            batch_size=size.queries,
            models=str(bench.models.folder),
            max_tokens=size.max_tokens,
            threads=bench.given.threads,
        )
        return prepare(job, plan)

    def measure(self, side: Side, case: Case) -> dict[str, Any]:
        made, skip = self.made(case.part), self.sizes[case.part].skip
        job = made.job.of(side.name, side.dtype, **case.options)
        python = interpreter(side.name, self.bench.given.venvs) or ""
        outcome = run_job(job, python, self.bench.seconds_left())
        found: dict[str, Any] = {
            "rate": rate(made.step_tokens, outcome.step_seconds, skip),
            "tokens": float(np.mean(made.step_tokens)),
            "losses": outcome.losses,
            **outcome.process,
        }
        if case.part.startswith("memory"):
            loaded = outcome.loaded_bytes
            if side.name == OURS:
                options = case.options | {"load_only": True}
                loading = made.job.of(side.name, side.dtype, **options)
                loaded = run_job(loading, python, self.bench.seconds_left()).loaded_bytes
            found["over_mb"] = found["peak_mb"] - loaded / 1e6
        return found

    def losses(self, rows: list[dict[str, Any]]) -> str:
        """Mean and largest difference to our losses of the same type."""
        ours = self.bench.found(rows[0]["part"], Side(OURS, rows[0]["dtype"]), run=1)
        if not ours:
            return "–"
        differences = np.abs(np.subtract(rows[0]["losses"], ours[0]["losses"]))
        wrong = rows[0]["dtype"] == "float32" and differences.max() > 1e-3
        said = f"{differences.mean():.1e}, {differences.max():.1e}"
        return f"{said}: NOT THE SAME" if wrong else said


def main() -> None:
    parser = option_parser(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS[:3]))
    add("--tiny", action="store_true", help="a rehearsal: few short texts")
    add("--memory-gb", type=float, default=1.0, help="of graphs where ours recomputes")
    given = parser.parse_args()
    models = open_models(given.model, given.output)
    sizes = TINY if given.tiny else LARGE if models.large else SMALL
    parts = [name for name in sizes if name.split(",")[0] in given.parts]
    shown = {name: astuple(size) for name, size in sizes.items()}
    bench = Bench("train", given, models, shown | {"memory_gb": given.memory_gb})
    steps = Steps(bench, sizes)
    chosen = bench.installed(sides(given.memory_gb))
    bench.turns(parts, chosen, one_by_one(steps.measure))
    columns = {
        "tokens a step": of_all("tokens", ",.0f"),
        "peak, MB": of_all("peak_mb", ",.0f", max),
        "of it over loading": of_all("over_mb", ",.0f", max),
        "losses differ by (mean, most)": steps.losses,
        "whole process, s": of_all("wall_seconds", ",.0f"),
    }
    bench.report(list(sizes), sides(given.memory_gb), columns, passes=PASSES)


if __name__ == "__main__":
    main()
