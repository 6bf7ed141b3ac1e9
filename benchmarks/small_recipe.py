"""Train `recipes/small.yaml` and score every stage of it on local tasks, beside BM25.

    python benchmarks/small_recipe.py --tasks ../shared/data/tasks --output runs/small

writes `OUTPUT/eval/{BM25,base,stage 1,stage 2}.json` and prints (and writes to `OUTPUT/table.md`)
one Markdown table with a column each. An interrupted run goes on; scores that are there are kept.
The base is the untrained backbone with mean pooling, cut at the recipe's own `max_tokens`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from nvembed.core.config import load_config
from nvembed.core.files import write_text
from nvembed.evaluation.results import TaskResult, format_markdown, read_results, write_results
from nvembed.evaluation.session import evaluate, evaluate_bm25
from nvembed.evaluation.tasks import load_tasks
from nvembed.kernels.machine import settle_precision
from nvembed.model.embedder import NVEmbed
from nvembed.model.encoder import Encoder, load_encoder
from nvembed.training.config import TrainConfig
from nvembed.training.trainer import train


def scored(
    name: str, output: Path, score: Callable[[], dict[str, TaskResult]]
) -> dict[str, TaskResult]:
    """Return the results of a model: those on disk, or new ones."""
    path = output / "eval" / f"{name}.json"
    if not path.exists():
        started = time.monotonic()
        write_results(path, score())
        print(f"{name}: evaluated in {time.monotonic() - started:.0f} s", flush=True)
    return read_results(path)


def main() -> None:
    """Train, evaluate, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/small.yaml"))
    parser.add_argument("--tasks", type=Path, required=True, help="folder of task folders")
    parser.add_argument("--output", type=Path, default=Path("runs/small"))
    arguments = parser.parse_args()
    config = load_config(TrainConfig, arguments.recipe, [f"output={arguments.output}"])
    tasks = load_tasks([arguments.tasks])
    started = time.monotonic()
    model = train(config, base_dir=arguments.recipe.parent)
    print(f"trained in {time.monotonic() - started:.0f} s", flush=True)
    backbone = arguments.recipe.parent / config.model.backbone

    def base() -> Encoder:
        return NVEmbed.from_pretrained(
            backbone if backbone.is_dir() else config.model.backbone,
            pooling="mean",
            max_tokens=config.model.max_tokens,
            dtype=settle_precision("auto"),
        )

    def on_tasks(encoder: Callable[[], Encoder]) -> Callable[[], dict[str, TaskResult]]:
        return lambda: evaluate(encoder(), tasks, on_result=report)

    stages = [arguments.output / f"model-{stage.name}" for stage in config.stages[:-1]]
    columns = {"BM25": lambda: evaluate_bm25(tasks), "base": on_tasks(base)}
    for number, folder in enumerate([*stages, model], start=1):
        columns[f"stage {number}"] = on_tasks(
            lambda folder=folder: load_encoder(str(folder), "auto")
        )
    results = {name: scored(name, arguments.output, score) for name, score in columns.items()}
    table = format_markdown(results)
    write_text(arguments.output / "table.md", table + "\n")
    print(table)


def report(name: str, result: TaskResult) -> None:
    """Print a finished task."""
    print(f"  {name}: {result.main_score} ({result.seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
