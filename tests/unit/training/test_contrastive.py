from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nvembed.core.errors import ConfigError
from nvembed.training import contrastive_loss as contrastive
from nvembed.training.contrastive_loss import ContrastiveStatistics, ScoreSums, scores
from oracles import loss as oracle


def info_nce(
    query_BD: torch.Tensor, document_ND: torch.Tensor, *masks: torch.Tensor, temperature: float
) -> torch.Tensor:
    return contrastive.info_nce(scores(query_BD, document_ND), *masks, temperature=temperature)


def contrastive_statistics(
    query_BD: torch.Tensor, document_ND: torch.Tensor, *masks: torch.Tensor
) -> ContrastiveStatistics:
    return ScoreSums.of_scores(scores(query_BD, document_ND), *masks).means()


def random_case(
    seed: int, queries: int = 5, documents: int = 9, width: int = 4, density: float = 0.5
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors, positives that may be shared, and a mask that leaves positives out."""
    rng = np.random.default_rng(seed)
    query_BD = rng.standard_normal((queries, width))
    document_ND = rng.standard_normal((documents, width))
    query_BD /= np.linalg.norm(query_BD, axis=1, keepdims=True)
    document_ND /= np.linalg.norm(document_ND, axis=1, keepdims=True)
    positive_B = rng.integers(documents, size=queries)
    negative_BN = rng.random((queries, documents)) < density
    negative_BN[np.arange(queries), positive_B] = False
    return query_BD, document_ND, positive_B, negative_BN


def tensors(case: tuple[np.ndarray, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    query_BD, document_ND, positive_B, negative_BN = map(torch.from_numpy, case)
    return [query_BD.to(dtype), document_ND.to(dtype), positive_B, negative_BN]


@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_loop_oracle(seed: int, density: float, temperature: float) -> None:
    case = random_case(seed, density=density)
    loss = info_nce(*tensors(case), temperature=temperature)
    assert loss.item() == pytest.approx(
        oracle.info_nce(*case, temperature=temperature), rel=1e-12, abs=1e-12
    )


def test_closed_form_with_equal_scores() -> None:
    # All scores are 1, so the softmax is uniform over the positive and its K negatives: log(K + 1).
    negative_BN = torch.tensor([[False, True, True, True], [True, False, False, False]])
    loss = info_nce(
        torch.ones(2, 1), torch.ones(4, 1), torch.tensor([0, 1]), negative_BN, temperature=0.02
    )
    assert loss.item() == pytest.approx((math.log(4) + math.log(2)) / 2, rel=1e-6)


def test_gradient_of_both_sides() -> None:
    query_BD, document_ND, positive_B, negative_BN = tensors(random_case(0, density=0.3))
    negative_BN[2] = False  # one query without negatives

    def loss(query_BD: torch.Tensor, document_ND: torch.Tensor) -> torch.Tensor:
        return info_nce(query_BD, document_ND, positive_B, negative_BN, temperature=0.3)

    assert torch.autograd.gradcheck(
        loss, (query_BD.requires_grad_(), document_ND.requires_grad_()), atol=1e-7
    )


def test_gradient_equals_autograd_through_the_written_out_formula() -> None:
    query_BD, document_ND, positive_B, negative_BN = tensors(random_case(3))
    query_BD.requires_grad_()
    document_ND.requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for b, positive in enumerate(positive_B.tolist()):
        up = torch.exp(query_BD[b] @ document_ND[positive] / 0.1)
        down = up
        for n in range(len(document_ND)):
            if negative_BN[b, n]:
                down = down + torch.exp(query_BD[b] @ document_ND[n] / 0.1)
        total = total - torch.log(up / down)
    expected = torch.autograd.grad(total / len(query_BD), (query_BD, document_ND))
    loss = info_nce(query_BD, document_ND, positive_B, negative_BN, temperature=0.1)
    for got, want in zip(torch.autograd.grad(loss, (query_BD, document_ND)), expected, strict=True):
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_negatives", [0, 2])
def test_equals_sentence_transformers_in_batch(num_negatives: int) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    queries = 6
    columns = [
        torch.nn.functional.normalize(torch.randn(queries, 8), dim=1)
        for _ in range(2 + num_negatives)
    ]
    mnrl = MultipleNegativesRankingLoss(
        SentenceTransformer(modules=[torch.nn.Identity()]), scale=50
    )
    expected = mnrl.compute_loss_from_embeddings(columns, torch.empty(0))
    documents = torch.cat(columns[1:])
    negative_BN = torch.ones(queries, len(documents), dtype=torch.bool)
    negative_BN[:, :queries].fill_diagonal_(False)
    loss = info_nce(columns[0], documents, torch.arange(queries), negative_BN, temperature=0.02)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() > 0.1


def test_queries_without_negatives_are_silent_but_counted() -> None:
    query_BD, document_ND, positive_B, negative_BN = tensors(random_case(1), torch.float32)
    negative_BN[[0, 3]] = False
    query_BD.requires_grad_()
    document_ND.requires_grad_()
    loss = info_nce(query_BD, document_ND, positive_B, negative_BN, temperature=0.02)
    loss.backward()
    assert query_BD.grad is not None
    assert document_ND.grad is not None
    assert torch.equal(query_BD.grad[[0, 3]], torch.zeros(2, 4))
    assert query_BD.grad[[1, 2, 4]].abs().amax(dim=1).min() > 0
    rest = [1, 2, 4]
    alone = info_nce(
        query_BD[rest], document_ND, positive_B[rest], negative_BN[rest], temperature=0.02
    )
    assert loss.item() == pytest.approx(alone.item() * 3 / 5, rel=1e-6)


def test_no_negatives_at_all_is_zero_and_not_nan() -> None:
    query_BD, document_ND, positive_B, negative_BN = tensors(random_case(2, density=0.0))
    query_BD.requires_grad_()
    loss = info_nce(query_BD, document_ND, positive_B, negative_BN, temperature=0.01)
    loss.backward()
    assert loss.item() == 0.0
    assert query_BD.grad is not None
    assert torch.equal(query_BD.grad, torch.zeros_like(query_BD))


def test_documents_that_are_masked_get_no_gradient() -> None:
    query_BD, document_ND, positive_B, negative_BN = tensors(random_case(4))
    unused = next(n for n in range(len(document_ND)) if n not in positive_B.tolist())
    negative_BN[:, unused] = False
    document_ND.requires_grad_()
    info_nce(query_BD, document_ND, positive_B, negative_BN, temperature=0.1).backward()
    assert document_ND.grad is not None
    assert torch.equal(document_ND.grad[unused], torch.zeros(4, dtype=torch.float64))
    assert document_ND.grad.abs().max() > 0


def test_stays_finite_at_extreme_scores() -> None:
    # The negative is the query itself and the positive its opposite, at a tiny temperature.
    query_BD = torch.tensor([[1.0, 0.0]], requires_grad=True)
    document_ND = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    mask = torch.tensor([[False, True]])
    loss = info_nce(query_BD, document_ND, torch.tensor([0]), mask, temperature=1e-4)
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert query_BD.grad is not None
    assert torch.isfinite(query_BD.grad).all()


def test_half_precision_embeddings_are_scored_in_float32() -> None:
    case = tensors(random_case(5, width=64), torch.bfloat16)
    exact = info_nce(case[0].double(), case[1].double(), *case[2:], temperature=0.02)
    loss = info_nce(*case, temperature=0.02)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    rounded = (case[0] @ case[1].T).float() / 0.02
    assert (rounded - (case[0].float() @ case[1].float().T) / 0.02).abs().max() > 0.01


def test_autocast_does_not_lower_the_precision() -> None:
    case = tensors(random_case(6, width=64), torch.float32)
    expected = info_nce(*case, temperature=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (case[0] @ case[1].T).dtype == torch.bfloat16
        loss = info_nce(*case, temperature=0.02)
        statistics = contrastive_statistics(*case)
    assert loss.item() == expected.item()
    assert statistics == contrastive_statistics(*case)


def test_arguments_are_left_as_they_were() -> None:
    case = tensors(random_case(7))
    copies = [tensor.clone() for tensor in case]
    info_nce(*case, temperature=0.1)
    contrastive_statistics(*case)
    for tensor, copy in zip(case, copies, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("temperature", [0.0, -0.1, float("nan")])
def test_refuses_a_temperature_of_zero_or_less(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        info_nce(*tensors(random_case(0)), temperature=temperature)


@pytest.mark.parametrize("density", [0.0, 0.15, 0.6])
@pytest.mark.parametrize("seed", range(3))
def test_statistics_equal_the_loop_oracle(seed: int, density: float) -> None:
    case = random_case(seed, density=density)
    got = contrastive_statistics(*tensors(case))
    for name, expected in oracle.statistics(*case).items():
        value = getattr(got, name)
        assert value == (None if expected is None else pytest.approx(expected, abs=1e-6)), name


def test_learning_lowers_the_loss_and_raises_the_accuracy() -> None:
    torch.manual_seed(0)
    weights = torch.randn(16, 8, requires_grad=True)
    positive_B, negative_BN = torch.arange(8), ~torch.eye(8, dtype=torch.bool)

    def vectors() -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.nn.functional.normalize(weights, dim=1).split(8))  # type: ignore[return-value]

    before = contrastive_statistics(*vectors(), positive_B, negative_BN)
    optimizer = torch.optim.SGD([weights], lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        loss = info_nce(*vectors(), positive_B, negative_BN, temperature=0.1)
        loss.backward()
        optimizer.step()
    after = contrastive_statistics(*vectors(), positive_B, negative_BN)
    assert before.accuracy is not None
    assert before.accuracy < 0.5
    assert after.accuracy == 1.0
    assert after.margin is not None
    assert after.margin > 0.3
    assert loss.item() < 0.05
