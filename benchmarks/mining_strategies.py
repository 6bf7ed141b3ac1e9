"""What hard negatives are worth, by mining strategy, over several seeds.

    python benchmarks/mining_strategies.py --output runs/mining-strategies

One teacher is trained first: the small backbone on retrieval pairs with in-batch negatives. With it
negatives are mined once per strategy. Every arm then tunes the teacher further, all with the same
steps, queries, order and in-batch negatives; only the own negatives differ ("none" has none). Every
arm is scored on all local tasks; spread is over seeds. An interrupted run goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.report import header, say, table

from nvembed.core.config import load_config
from nvembed.core.files import write_json
from nvembed.data.config import DatasetConfig, MiningConfig
from nvembed.evaluation.encoders import CachedEncoder
from nvembed.evaluation.results import TaskResult, read_results, write_results
from nvembed.evaluation.session import evaluate
from nvembed.evaluation.tasks import LocalTask, load_tasks
from nvembed.interop.model_folder import model_fingerprint
from nvembed.mining.miner import mine_file
from nvembed.model.encoder import Encoder, load_encoder
from nvembed.training.config import TrainConfig
from nvembed.training.trainer import train

ROOT = Path(__file__).parents[1]
NUM_NEGATIVES = 4
STRATEGIES: Mapping[str, dict[str, Any] | None] = {
    "none": None,
    "naive": {"strategy": "top_k"},
    "margin": {"strategy": "margin", "threshold": 0.05},
    "percentage": {"strategy": "percent_of_positive", "threshold": 0.95},
}
LEFT_OUT = "medquad"  # large and templated: mining it would take longer than everything else


def base_recipe(arguments: argparse.Namespace, output: Path) -> dict[str, Any]:
    """The small recipe, cut to its pairs and to one stage."""
    config = load_config(TrainConfig, arguments.recipe, [])
    recipe = config.model_dump(mode="json", exclude_defaults=True)
    recipe["datasets"] = [
        {**row, "stages": [1], "path": str((arguments.recipe.parent / row["path"]).resolve())}
        for row in recipe["datasets"]
        if row["kind"] in ("retrieval", "nli") and row["name"] != LEFT_OUT
    ]
    backbone = (arguments.recipe.parent / config.model.backbone).resolve()
    recipe["model"] = {**recipe["model"], "backbone": str(backbone)}
    stage = {**recipe["stages"][0], "in_batch_negatives": True}
    stage["steps"] = arguments.teacher_steps
    recipe["stages"] = [stage]
    recipe["output"] = str(output)
    return recipe


def mined_datasets(
    strategy: str, recipe: dict[str, Any], teacher: Encoder, folder: Path
) -> list[dict[str, Any]]:
    """The data sets with their own negatives replaced by mined ones, or taken away."""
    settings = STRATEGIES[strategy]
    found = []
    for row in recipe["datasets"]:
        dataset = DatasetConfig.model_validate(row)
        target = folder / strategy / f"{dataset.name}.jsonl.gz"
        if settings is not None and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            config = MiningConfig(**settings, num_negatives=NUM_NEGATIVES, given="replace")
            report = mine_file(
                Path(dataset.path),
                target,
                teacher,
                config,
                kind=dataset.kind,
                instruction=dataset.instruction,
            )
            say(
                f"{strategy} {dataset.name}: positive {report.mean_positive_score:.3f}, "
                f"negative {report.mean_negative_score or 0:.3f}, "
                f"without any {report.share_with_none:.1%}"
            )
        found.append(row if settings is None else {**row, "path": str(target)})
    return found


def run_arm(
    recipe: dict[str, Any], tasks: Sequence[LocalTask], folder: Path, *, seed: int
) -> dict[str, TaskResult]:
    """Train and score one arm with one seed, unless it was."""
    config = TrainConfig.model_validate({**recipe, "output": str(folder), "seed": seed})
    started = time.monotonic()
    model = train(config, base_dir=ROOT)
    say(f"{folder.name}: trained {time.monotonic() - started:.0f} s")
    return scored(lambda: load_encoder(str(model), "auto"), tasks, folder / "scores.json")


def scored(
    load: Callable[[], Encoder], tasks: Sequence[LocalTask], path: Path
) -> dict[str, TaskResult]:
    """The scores on these tasks; those that are on disk are not computed again."""
    kept = read_results(path) if path.exists() else {}
    missing = [task for task in tasks if task.name not in kept]
    if missing:
        started = time.monotonic()
        kept |= evaluate(load(), missing)
        write_results(path, kept)
        say(f"{path.parent.name}: scored {time.monotonic() - started:.0f} s")
    return {task.name: kept[task.name] for task in tasks}


def mean_by_type(results: Mapping[str, TaskResult]) -> dict[str, float]:
    """Mean of the main scores (× 100) by type of task, and over all tasks."""
    by_type: dict[str, list[float]] = {}
    for result in results.values():
        for key in (result.type, "all"):
            by_type.setdefault(key, []).append(100 * (result.main_score or 0.0))
    return {key: float(np.mean(values)) for key, values in by_type.items()}


def main() -> None:
    """Train the teacher, mine, train and score the arms, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--recipe", type=Path, default=ROOT / "recipes" / "small.yaml")
    everything = ROOT.parent / "shared" / "data" / "tasks"
    add(
        "--tasks",
        type=Path,
        nargs="+",
        default=[everything],
        help="task folders, or folders of them",
    )
    add("--output", type=Path, default=Path("runs/mining-strategies"))
    add("--strategies", nargs="+", choices=tuple(STRATEGIES), default=list(STRATEGIES))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--teacher-steps", type=int, default=160)
    add("--steps", type=int, default=60)
    add("--batch-size", type=int, default=32)
    add("--learning-rate", type=float, default=3e-4)
    add("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    about = header(arguments.threads)
    output = arguments.output.absolute()
    tasks = load_tasks(arguments.tasks)
    recipe = base_recipe(arguments, output / "teacher")
    teacher_folder = train(TrainConfig.model_validate(recipe), base_dir=ROOT)
    teacher = CachedEncoder(
        load_encoder(str(teacher_folder), "auto"),
        output / "teacher" / "vectors",
        model_fingerprint(str(teacher_folder), "auto"),
    )
    results = scored(lambda: teacher, tasks, output / "teacher" / "scores.json")
    columns = {"teacher": [mean_by_type(results)]}
    # Seeds outermost: an interrupted run has whole rows of the table.
    datasets = {
        strategy: mined_datasets(strategy, recipe, teacher, output / "mined")
        for strategy in arguments.strategies
    }
    for seed in arguments.seeds:
        for strategy in arguments.strategies:
            stage = {
                **recipe["stages"][0],
                "name": "tuned",
                "steps": arguments.steps,
                "batch_size": arguments.batch_size,
                "learning_rate": arguments.learning_rate,
                "warmup_steps": arguments.steps // 10,
                "num_negatives": 0 if strategy == "none" else NUM_NEGATIVES,
            }
            model = {
                "backbone": str(teacher_folder),
                "max_tokens": recipe["model"]["max_tokens"],
            }
            arm = {**recipe, "stages": [stage], "model": model, "datasets": datasets[strategy]}
            results = run_arm(arm, tasks, output / f"{strategy}-{seed}", seed=seed)
            columns.setdefault(strategy, []).append(mean_by_type(results))
    write_json(output / "table.json", {"about": about, "columns": columns})
    kinds = list(columns["teacher"][0])
    table(
        ["strategy", *kinds],
        [[name, *(_cell(values, kind) for kind in kinds)] for name, values in columns.items()],
    )


def _cell(values: Sequence[Mapping[str, float]], kind: str) -> str:
    numbers = [value[kind] for value in values]
    spread = f" ± {np.std(numbers, ddof=1):.2f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.2f}{spread}"


if __name__ == "__main__":
    main()
