"""The step with a model of one table: its passes, packs and processes, and the dropout of each."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nvembed.data.batch import ContrastiveBatch, build_batch, effective_negatives
from nvembed.data.examples import PairSource
from nvembed.data.records import PairRecord
from nvembed.model.tokens import TokenizedText
from nvembed.training import step
from nvembed.training.contrastive_loss import ContrastiveStatistics, Evaluated, Objective, info_nce
from nvembed.training.distributed import FILLER, DistributedContext
from nvembed.training.step import (
    StepResult,
    StepSettings,
    contrastive_step,
    plan_step,
    recomputed_share,
)

EVERYTHING = 10**9
WIDTH = 6


class Table(nn.Module):
    """A text is the mean of the rows of its tokens; remembers what went through it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_VD = nn.Parameter(torch.randn(64, WIDTH, dtype=torch.float64))
        self.calls: list[tuple[tuple[TokenizedText, ...], bool, Tensor]] = []

    def embed(self, texts: Sequence[TokenizedText]) -> Tensor:
        draw = torch.rand(4)  # what dropout would draw
        self.calls.append((tuple(texts), torch.is_grad_enabled(), draw))
        rows = [self.weight_VD[list(text.ids)].mean(0) for text in texts]
        return nn.functional.normalize(torch.stack(rows), dim=-1)


@pytest.fixture(autouse=True)
def _table_in_place_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def features(model: Any, texts: Any) -> dict[str, Tensor]:
        return {"sentence_embedding": model.embed(texts)}

    monkeypatch.setattr(step, "pack_features", features)


def batch_of(count: int = 7, *, coupled: bool = True) -> tuple[ContrastiveBatch, list[Any]]:
    """Queries with one to three positives, and their tokens."""
    records = [
        PairRecord(
            f"query {i}",
            tuple(f"answer {i} {n}" for n in range(1 + i % 3)),
            (f"no {i}", f"answer {(i + 1) % count} 0"),
        )
        for i in range(count)
    ]
    source = PairSource(records, "d", None)
    draw = np.random.default_rng(0)
    examples = [source.example(i, draw, num_negatives=2, num_positives=3) for i in range(count)]
    batch = build_batch(examples, in_batch_negatives=coupled)
    rng = np.random.default_rng(0)
    texts = [
        TokenizedText(tuple(rng.integers(1, 64, rng.integers(1, 9)).tolist()), 0)
        for _ in batch.texts
    ]
    return batch, texts


@dataclass(frozen=True)
class Alone(DistributedContext):
    """One process that notes which backward pass is said to be the last."""

    lasts: list[bool] = field(default_factory=list)

    @contextmanager
    def syncing(self, model: Any, *, last: bool) -> Iterator[None]:
        self.lasts.append(last)
        yield


@dataclass(frozen=True)
class Together(Alone):
    """One of several processes, which are threads here."""

    barrier: Any = None
    slots: Any = None

    def gather_rows(self, rows_ND: Tensor, counts: Sequence[int]) -> Tensor:
        assert not rows_ND.requires_grad
        assert [len(rows_ND), len(counts)] == [counts[self.rank], self.count]
        self.slots[self.rank] = rows_ND
        self.barrier.wait(10)
        stacked = torch.cat([self.slots[rank] for rank in range(self.count)])
        self.barrier.wait(10)
        return stacked


def settings_of(coupled: bool, activation_budget: int, pack_tokens: int = 16) -> StepSettings:
    return StepSettings(Objective(0.2), coupled, pack_tokens, activation_budget)


def plain(
    batch: ContrastiveBatch, texts: Sequence[TokenizedText], weight_VD: Tensor, temperature: Any
) -> tuple[Tensor, Tensor]:
    """Loss and scores in one graph."""
    rows = [weight_VD[list(text.ids)].mean(0) for text in texts]
    embedding_UD = nn.functional.normalize(torch.stack(rows), dim=-1)
    score_BN = embedding_UD[batch.query_B] @ embedding_UD[batch.document_N].T
    loss = info_nce(
        score_BN,
        torch.from_numpy(batch.positive_B),
        torch.from_numpy(batch.negative_BN),
        temperature=temperature,
        weight_B=torch.from_numpy(batch.weight_B).double() / batch.weight_B.sum(),
    )
    return loss, score_BN.detach()


def statistics_of(batch: ContrastiveBatch, score_BN: Tensor) -> tuple[float, ...]:
    """Row by row."""
    found = []
    for row, scores in enumerate(score_BN.tolist()):
        positive = scores[batch.positive_B[row]]
        hardest = max(scores[column] for column in np.flatnonzero(batch.negative_BN[row]))
        found.append((positive, hardest, positive - hardest, float(positive > hardest)))
    return tuple(np.mean(found, axis=0).tolist())


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("activation_budget", [EVERYTHING, 40, 16])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_sum_to_one_graph(coupled: bool, activation_budget: int, count: int) -> None:
    batch, texts = batch_of(coupled=coupled)
    settings = settings_of(coupled, activation_budget)
    model = Table()
    loss, score_BN = plain(batch, texts, model.weight_VD, 0.2)
    (expected,) = torch.autograd.grad(loss, model.weight_VD)
    barrier, slots = threading.Barrier(count), {}
    copies = [copy.deepcopy(model) for _ in range(count)]

    def one(rank: int) -> StepResult:
        processes = Together(rank, count, barrier=barrier, slots=slots)
        result = contrastive_step(copies[rank], batch, texts, settings, processes, seed=1)
        # Of all backward passes of a step the last one is the last.
        assert processes.lasts == [False] * (len(processes.lasts) - 1) + [True]
        return result

    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(one, range(count)))
    gradient = sum(made.weight_VD.grad for made in copies)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    plans = plan_step(batch, [len(text) for text in texts], settings, count)
    assert (len(plans) > 1) is (not coupled and activation_budget != EVERYTHING)
    for rank, result in enumerate(results):
        assert result.loss == pytest.approx(loss.item(), rel=1e-6)
        assert result.num_tokens == sum(len(text) for text in texts)
        assert result.num_texts == len(texts)
        assert result.duplicates == pytest.approx(1 - len(texts) / batch.mentioned)
        assert result.recomputed == recomputed_share(plans, rank)
        assert result.effective_negatives == effective_negatives(batch)
        found = result.statistics
        assert isinstance(found, ContrastiveStatistics)
        assert (
            found.positive_similarity,
            found.hardest_negative_similarity,
            found.margin,
            found.accuracy,
        ) == pytest.approx(statistics_of(batch, score_BN), abs=1e-6)
    # All run equally many forwards, with and without a graph in the same order.
    kinds = [[with_graph for _, with_graph, _ in made.calls] for made in copies]
    assert all(own == kinds[0] for own in kinds)
    recomputed = any(plan.kept < len(plan.shares[0]) for plan in plans)
    assert (False in kinds[0]) is recomputed


def test_a_process_without_texts_runs_a_filler_and_adds_nothing() -> None:
    batch, texts = batch_of(1)
    texts = [TokenizedText((5, 6), 0), *texts[1:2], *texts[2:]]
    count = len(texts) + 1
    barrier, slots = threading.Barrier(count), {}
    copies = [Table() for _ in range(count)]
    with ThreadPoolExecutor(count) as pool:
        results = list(
            pool.map(
                lambda rank: contrastive_step(
                    copies[rank],
                    batch,
                    texts,
                    settings_of(True, EVERYTHING),
                    Together(rank, count, barrier=barrier, slots=slots),
                    seed=1,
                ),
                range(count),
            )
        )
    idle = [made for made in copies if made.calls[0][0] == (FILLER,)]
    assert len(idle) == 1
    assert torch.equal(idle[0].weight_VD.grad, torch.zeros(64, WIDTH, dtype=torch.float64))
    assert all(made.weight_VD.grad.abs().max() > 0 for made in copies if made is not idle[0])
    assert len({result.loss for result in results}) == 1


@dataclass(frozen=True)
class Beside(Alone):
    """A process whose neighbours always have the same rows."""

    def gather_rows(self, rows_ND: Tensor, counts: Sequence[int]) -> Tensor:
        start = sum(counts[: self.rank])
        stacked = torch.eye(WIDTH, dtype=rows_ND.dtype).repeat(sum(counts), 1)[: sum(counts)]
        stacked[start : start + len(rows_ND)] = rows_ND
        return stacked


def draws(coupled: bool, activation_budget: int, seed: int, rank: int, count: int) -> list[Any]:
    batch, texts = batch_of(coupled=coupled)
    model = Table()
    settings = settings_of(coupled, activation_budget)
    contrastive_step(model, batch, texts, settings, Beside(rank, count), seed=seed)
    return model.calls


@pytest.mark.parametrize("coupled", [True, False])
def test_dropout_differs_between_packs_passes_processes_and_steps(coupled: bool) -> None:
    activation_budget = EVERYTHING if coupled else 40  # many packs of one pass, or many passes
    found = [
        tuple(draw.tolist())
        for seed in (1, 2)
        for rank in (0, 1)
        for _, _, draw in draws(coupled, activation_budget, seed, rank, 2)
    ]
    assert len(found) > 12
    assert len(set(found)) == len(found)
    again = [tuple(draw.tolist()) for _, _, draw in draws(coupled, activation_budget, 1, 0, 2)]
    assert again == found[: len(again)]


def test_a_pack_that_is_embedded_again_draws_the_same() -> None:
    calls = draws(True, 16, 1, 0, 1)
    first = {texts: draw for texts, with_graph, draw in calls if not with_graph}
    again = {texts: draw for texts, with_graph, draw in calls if with_graph and texts in first}
    assert first.keys() == again.keys()
    assert len(first) > 2
    assert all(torch.equal(again[texts], draw) for texts, draw in first.items())
    # Whether kept or not, a pack draws the same.
    kept = {texts: draw for texts, _, draw in draws(True, EVERYTHING, 1, 0, 1)}
    assert all(torch.equal(kept[texts], draw) for texts, _, draw in calls)


def test_graphs_are_freed_one_after_the_other() -> None:
    batch, texts = batch_of()
    model = Table()
    held: list[weakref.ref[Tensor]] = []
    embed = model.embed

    def watched(texts: Sequence[TokenizedText]) -> Tensor:
        embedding = embed(texts)
        held.append(weakref.ref(embedding))
        return embedding

    model.embed = watched  # type: ignore[method-assign]
    alive = []

    class Watching(Alone):
        @contextmanager
        def syncing(self, model: Any, *, last: bool) -> Iterator[None]:
            alive.append(sum(reference() is not None for reference in held))
            yield

    # The rows that are sent back are a view of a graph's output, which lives as long as they do.
    contrastive_step(model, batch, texts, settings_of(True, EVERYTHING), Watching(), seed=1)
    packs = len(held)
    assert packs > 2
    bases = [reference() is None for reference in held]
    assert all(bases)
    assert alive == sorted(alive, reverse=True)
    assert alive[-1] <= 1


def test_a_loss_that_is_not_finite_is_not_sent_back(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, texts = batch_of()
    evaluate = step.evaluate_objective
    for value in (float("nan"), float("inf")):

        def broken(*args: Any, value: float = value, **options: Any) -> Evaluated:
            found = evaluate(*args, **options)
            return Evaluated(found.gradient_UD, {"contrastive": value}, found.sums)

        monkeypatch.setattr(step, "evaluate_objective", broken)
        model = Table()
        with pytest.raises(FloatingPointError) as raised:
            contrastive_step(model, batch, texts, settings_of(True, EVERYTHING), Alone(), seed=1)
        assert str(raised.value) == str(value)
        assert model.weight_VD.grad is None


@pytest.mark.parametrize("coupled", [True, False])
def test_a_learned_temperature_takes_the_place_of_the_fixed_one(coupled: bool) -> None:
    batch, texts = batch_of(coupled=coupled)
    model = Table()
    learned = torch.tensor(0.4).log().requires_grad_()
    result = contrastive_step(
        model, batch, texts, settings_of(coupled, 40), Alone(), seed=1, log_temperature=learned
    )
    free = learned.detach().clone().requires_grad_()
    loss, _ = plain(batch, texts, model.weight_VD, free.exp())
    wanted = torch.autograd.grad(loss, (model.weight_VD, free))
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(model.weight_VD.grad, wanted[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(learned.grad, wanted[1], rtol=1e-4, atol=1e-7)


def test_the_gradient_has_the_type_of_the_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, texts = batch_of()
    model = Table()
    plain = step.pack_features

    def halved(made: Any, texts: Any) -> dict[str, Tensor]:
        return {name: value.bfloat16() for name, value in plain(made, texts).items()}

    monkeypatch.setattr(step, "pack_features", halved)
    sent: list[torch.dtype] = []
    backward = torch.autograd.backward

    def watched(tensors: Tensor, gradients: Any, *others: Any, **options: Any) -> None:
        if isinstance(gradients, Tensor) and gradients.ndim == 2:
            sent.append(gradients.dtype)
        backward(tensors, gradients, *others, **options)

    monkeypatch.setattr(torch.autograd, "backward", watched)
    contrastive_step(model, batch, texts, settings_of(True, EVERYTHING), Alone(), seed=1)
    assert set(sent) == {torch.bfloat16}
