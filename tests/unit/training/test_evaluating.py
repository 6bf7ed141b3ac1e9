"""Evaluation during training: decisions, what is kept, and training that goes on as before."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nvembed.core.errors import DataError, UserError
from nvembed.evaluation.results import TaskResult
from nvembed.evaluation.session import evaluate
from nvembed.evaluation.tasks import LocalTask, load_tasks
from nvembed.model.embedder import NVEmbed
from nvembed.training import metrics
from nvembed.training.checkpoint import trained_parameters
from nvembed.training.config import EvaluationConfig, OptimizerConfig, StageConfig
from nvembed.training.distributed import DistributedContext
from nvembed.training.metrics import (
    Best,
    Evaluation,
    evaluate_model,
    evaluation_is_due,
    load_evaluation_tasks,
    mean_score,
    should_stop,
)
from nvembed.training.stages import averaged_weights, build_optimizer, training_weights
from task_folders import write_task

TASKS = [LocalTask("t", "STS", None, "cosine_spearman", Path("t"), [])]
STAGE = StageConfig(name="one", steps=9, in_batch_negatives=True, learning_rate=0.01)


def evaluation(**changes: Any) -> EvaluationConfig:
    return EvaluationConfig.model_validate({"tasks": ("tasks",), "every": 2, **changes})


def decide(scores: list[float | None], best: Best | None = None, first: int = 1) -> list[Best]:
    states, best = [], best or Best()
    for step, score in enumerate(scores, start=first):
        best = best.after(score, step)
        states.append(best)
    return states


def test_the_best_of_a_stage_and_when_it_ends() -> None:
    states = decide([None, 0.2, 0.5, 0.5, None, 0.6, 0.1])
    assert [(s.score, s.step, s.since) for s in states] == [
        (None, None, 1),
        (0.2, 2, 0),
        (0.5, 3, 0),
        (0.5, 3, 1),  # as good is not better
        (0.5, 3, 2),
        (0.6, 6, 0),
        (0.6, 6, 1),
    ]
    two = [should_stop(evaluation(patience=2), state) for state in states]
    assert two == [False, False, False, False, True, False, False]
    assert not any(should_stop(evaluation(), state) for state in states)


def test_a_run_that_goes_on_decides_the_same() -> None:
    scores = [0.3, 0.1, 1 / 3, 0.2, 0.1]
    whole = decide(scores)
    for stop in range(1, 5):
        saved = json.loads(json.dumps(asdict(decide(scores[:stop])[-1])))
        rest = decide(scores[stop:], Best.from_json(saved), first=stop + 1)
        assert rest == whole[stop:]
    assert Best.from_json(None) == Best()


def test_every_so_many_steps_and_the_last() -> None:
    due = [step for step in range(1, 8) if evaluation_is_due(evaluation(every=3), step, 7)]
    assert due == [3, 6, 7]


def test_the_mean_needs_all_scores() -> None:
    assert mean_score({"a": 0.25, "b": 0.5}) == 0.375
    assert mean_score({"a": 0.25, "b": None}) is None


def test_tasks_are_read_at_once_and_told_if_they_cannot(tmp_path: Path, monkeypatch) -> None:
    write_task(tmp_path / "tasks" / "similar", "STS")
    assert [t.name for t in load_evaluation_tasks(evaluation(), tmp_path)] == ["similar"]
    with pytest.raises(DataError, match="nowhere: no such folder"):
        load_evaluation_tasks(evaluation(tasks=("tasks", "nowhere")), tmp_path)
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"package 'scikit-learn'.* pip install 'nvembed\[eval\]'"):
        load_evaluation_tasks(evaluation(), tmp_path)


@pytest.fixture(scope="module")
def model(tiny_decoder_dir: Path) -> NVEmbed:
    return NVEmbed.from_pretrained(tiny_decoder_dir, pooling="latent", device="cpu")


def test_training_goes_on_as_if_nothing_had_been_asked(tmp_path: Path, model: NVEmbed) -> None:
    write_task(tmp_path / "similar", "STS")
    write_task(tmp_path / "sorted", "Classification")  # whose classifier draws random numbers
    tasks = load_tasks([tmp_path])
    model.train()
    model.pooling.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    generators = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    scores = evaluate_model(model, tasks, DistributedContext())
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert random.getstate() == generators[0]
    assert np.random.get_state()[1].tolist() == generators[1]
    assert torch.equal(torch.get_rng_state(), generators[2])
    # What it says is what `nvembed evaluate` says.
    results = evaluate(model.eval(), tasks)
    assert scores == {name: result.main_score for name, result in results.items()}
    assert mean_score(scores) == pytest.approx(sum(r.main_score for r in results.values()) / 2)


@dataclass(frozen=True)
class OneOfTwo(DistributedContext):
    """A process whose other one has scores of its own."""

    count: int = 2
    others: tuple[tuple[str, float], ...] = ()

    def of_all(self, value: Any) -> list[Any]:
        both = [value, dict(self.others)]
        return both if self.rank == 0 else both[::-1]


@pytest.mark.parametrize(
    ("rank", "sharded", "own"),
    [(0, False, ["a", "c"]), (1, False, ["b"]), (0, True, ["a", "b", "c"])],
)
def test_processes_share_out_the_tasks(
    monkeypatch: pytest.MonkeyPatch, model: NVEmbed, rank: int, sharded: bool, own: list[str]
) -> None:
    given: list[str] = []

    def fake(model: Any, tasks: Any) -> dict[str, TaskResult]:
        given.extend(task.name for task in tasks)
        return {t.name: TaskResult("STS", "cosine_spearman", 0.5, 0.0, {}) for t in tasks}

    monkeypatch.setattr(metrics, "evaluate", fake)
    tasks = [LocalTask(name, "STS", None, "cosine_spearman", Path(name), []) for name in "abc"]
    others = tuple((name, 0.25) for name in "abc" if sharded or name not in own)
    scores = evaluate_model(model, tasks, OneOfTwo(rank, others=others, sharded=sharded))
    assert given == own
    # Sharded: all have all scores, and every process takes those of the same one.
    assert scores == {n: 0.5 if n in own else 0.25 for n in "abc"}
    assert list(scores) == ["a", "b", "c"]


def scored(monkeypatch: pytest.MonkeyPatch, scores: list[float | None]) -> None:
    """Let the evaluations give these scores, one after the other."""
    left = iter(scores)

    def fake(model: Any, tasks: Any) -> dict[str, TaskResult]:
        return {"t": TaskResult("STS", "cosine_spearman", next(left), 0.0, {})}

    monkeypatch.setattr(metrics, "evaluate", fake)


@pytest.mark.parametrize("kind", ["adamw", "schedule_free"])
def test_the_best_weights_are_kept_and_put_back(
    tmp_path: Path, model: NVEmbed, monkeypatch, kind: str
) -> None:
    if kind == "schedule_free":
        pytest.importorskip("schedulefree")
    kept = Evaluation(evaluation(every=1), TASKS, tmp_path, DistributedContext())
    trained = {name: p for name, p in trained_parameters(model).items() if name.startswith("1.")}
    optimizer = build_optimizer(trained, model.pooling, STAGE, OptimizerConfig(kind=kind))
    training_weights(optimizer)
    scored(monkeypatch, [0.1, 0.7, None, 0.7, 0.3])
    best, rows, evaluated = Best(), [], []
    watched = next(iter(trained.values()))
    fake = metrics.evaluate

    def noted(model: Any, tasks: Any) -> Any:
        evaluated.append(watched.detach().clone())
        return fake(model, tasks)

    monkeypatch.setattr(metrics, "evaluate", noted)
    for step in range(1, 6):
        for parameter in trained.values():
            parameter.grad = torch.sin(parameter.detach() * step)
        optimizer.step()
        before = watched.detach().clone()
        best, row = kept.step(model, trained, optimizer, best, step)
        assert torch.equal(watched, before)
        assert torch.equal(evaluated[-1], before) == (kind == "adamw" or step == 1)
        rows.append(row)
    assert rows[1] == {"tasks": {"t": 0.7}, "mean": 0.7, "best": 0.7, "best_step": 2}
    assert rows[2] == {"tasks": {"t": None}, "mean": None, "best": 0.7, "best_step": 2}
    assert best == Best(0.7, 2, 3)
    averaged_weights(optimizer)
    assert kept.put_back(trained, best, 5)
    assert torch.equal(watched, evaluated[1])
    assert not torch.equal(evaluated[1], evaluated[4])


def test_nothing_is_put_back_where_the_last_is_the_best_or_none_is_kept(
    tmp_path: Path, model: NVEmbed, monkeypatch
) -> None:
    trained = {name: p for name, p in trained_parameters(model).items() if "latents" in name}
    optimizer = build_optimizer(trained, model.pooling, STAGE, OptimizerConfig())
    scored(monkeypatch, [0.5, math.nextafter(0.5, 1)])
    kept = Evaluation(evaluation(), TASKS, tmp_path / "kept", DistributedContext())
    best, _ = kept.step(model, trained, optimizer, Best(), 1)
    assert not kept.put_back(trained, best, 1)
    off = Evaluation(evaluation(keep_best=False), TASKS, tmp_path / "off", DistributedContext())
    best, _ = off.step(model, trained, optimizer, best, 2)
    assert best.step == 2
    assert not (tmp_path / "off").exists()
    assert not off.put_back(trained, best, 3)
    assert not kept.put_back(trained, Best(), 3)
