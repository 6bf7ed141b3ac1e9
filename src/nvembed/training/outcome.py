"""What a run has come to: its evaluations and BM25 side by side, as its files hold them."""

from __future__ import annotations

from pathlib import Path

from nvembed.core.runs import RunFolder
from nvembed.evaluation.results import TaskResult
from nvembed.evaluation.session import evaluate_bm25
from nvembed.training.config import TrainConfig
from nvembed.training.metrics import load_evaluation_tasks

Columns = dict[str, dict[str, TaskResult]]


def run_scores(config: TrainConfig, base_dir: Path) -> Columns:
    """Main scores by task: before training, after each stage, and of BM25 on retrieval tasks.

    A stage has those of the weights that it ended with. Without evaluation there are none.
    """
    if config.evaluation is None:
        return {}
    tasks, columns = load_evaluation_tasks(config.evaluation, base_dir), Columns()
    run, keep_best = RunFolder(Path(config.output)), config.evaluation.keep_best
    for name, scores in run.read_evaluations(keep_best=keep_best).items():
        columns[name] = {
            task.name: TaskResult(task.type, task.main_score, scores.get(task.name), 0.0, {})
            for task in tasks
        }
    bm25 = evaluate_bm25(tasks) if columns else {}
    return columns | ({"BM25": bm25} if bm25 else {})
