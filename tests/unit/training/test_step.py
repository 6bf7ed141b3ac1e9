"""The step: whatever is recomputed or taken apart, loss and gradients are those of one graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nvembed.core.errors import TrainingError
from nvembed.data.batch import build_batch
from nvembed.data.examples import Example
from nvembed.model.backbone import add_lora
from nvembed.model.embedder import NVEmbed
from nvembed.model.packs import embed_pack
from nvembed.model.settings import LoraSettings
from nvembed.training.contrastive_loss import Objective, info_nce, scores
from nvembed.training.distributed import DistributedContext
from nvembed.training.model import counted_graph, graph_bytes_per_token
from nvembed.training.stages import tokenized
from nvembed.training.step import StepResult, StepSettings, contrastive_step

EVERYTHING = 10**9
PACK = 120


def examples(count: int = 10) -> list[Example]:
    rng = np.random.default_rng(0)
    words = [f"{'word ' * int(rng.integers(1, 8))}{i}" for i in range(40)]
    return [
        Example(
            query=f"what is {words[i]}",
            positive=words[i],
            negatives=(words[(i * 3 + 11) % 40], words[(i * 5 + 2) % 40], words[i // 2 + 20]),
            known_positives=(words[i],),
            labels=(),
            instruction="find",
            symmetric=False,
            dataset="d",
        )
        for i in range(count)
    ]


def model(decoder: Path, *, lora: bool = True, dropout: float = 0.0) -> NVEmbed:
    torch.manual_seed(1)
    made = NVEmbed.from_pretrained(
        decoder, pooling="latent", num_latents=8, num_heads=2, device="cpu", max_tokens=64
    )
    if lora:
        add_lora(made.backbone, LoraSettings(rank=4, alpha=8, dropout=dropout))
    with torch.no_grad():  # away from the start, at which much has the gradient 0
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return made.train()


def run(
    made: NVEmbed, *, coupled: bool, activation_budget: int, pack_tokens: int = PACK, seed: int = 3
) -> tuple[StepResult, dict[str, torch.Tensor]]:
    made.zero_grad()
    batch = build_batch(examples(), in_batch_negatives=coupled)
    texts = tokenized(made.backbone.text_tokenizer, batch.texts)
    settings = StepSettings(Objective(0.1), coupled, pack_tokens, activation_budget)
    result = contrastive_step(
        made, batch, texts, settings, DistributedContext.of_environment(), seed=seed
    )
    gradients = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    return result, gradients


def one_graph(made: NVEmbed, *, coupled: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """The oracle: every text embedded alone, one loss, one backward pass."""
    made.zero_grad()
    batch = build_batch(examples(), in_batch_negatives=coupled)
    texts = [made.backbone.tokenize_texts([text], prompt)[0] for prompt, text in batch.texts]
    embedding_UD = torch.cat([embed_pack(made, [text]) for text in texts])
    loss = info_nce(
        scores(embedding_UD[batch.query_B], embedding_UD[batch.document_N]),
        torch.from_numpy(batch.positive_B),
        torch.from_numpy(batch.negative_BN),
        temperature=0.1,
    )
    loss.backward()
    return loss.item(), {
        name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("activation_budget", [EVERYTHING, 300, PACK])
def test_loss_and_every_gradient_equal_one_graph(
    tiny_decoder_dir: Path, lora: bool, coupled: bool, activation_budget: int
) -> None:
    made = model(tiny_decoder_dir, lora=lora)
    loss, expected = one_graph(made, coupled=coupled)
    result, gradients = run(made, coupled=coupled, activation_budget=activation_budget)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert loss > 0.1
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1e-3, float(value.abs().max()))
        torch.testing.assert_close(
            gradients[name], value, rtol=0, atol=2e-5 * scale, msg=lambda m, name=name: name + m
        )
    trained = [name for name, p in made.named_parameters() if p.requires_grad]
    assert set(gradients) == set(trained)
    assert sum(bool(value.abs().max() > 1e-4) for value in expected.values()) > len(expected) / 2


@pytest.mark.parametrize("activation_budget", [PACK, 250, 400])
def test_recomputing_changes_no_bit_even_with_dropout(
    tiny_decoder_dir: Path, activation_budget: int
) -> None:
    made = model(tiny_decoder_dir, dropout=0.3)
    whole, expected = run(made, coupled=True, activation_budget=EVERYTHING)
    result, gradients = run(made, coupled=True, activation_budget=activation_budget)
    assert whole.recomputed == 0
    assert 0.3 < result.recomputed < 1
    assert result.loss == whole.loss
    assert all(torch.equal(gradients[name], value) for name, value in expected.items())
    other, changed = run(made, coupled=True, activation_budget=EVERYTHING, seed=4)
    assert other.loss != whole.loss  # there is dropout, and its seed matters
    assert any(not torch.equal(changed[name], value) for name, value in expected.items())


def test_recomputing_under_autocast_changes_no_bit(tiny_decoder_dir: Path) -> None:
    made = model(tiny_decoder_dir, lora=False)
    with torch.autocast("cpu", torch.bfloat16):
        _, expected = run(made, coupled=True, activation_budget=EVERYTHING)
    for activation_budget in (PACK, 250):
        with torch.autocast("cpu", torch.bfloat16):
            _, gradients = run(made, coupled=True, activation_budget=activation_budget)
        assert gradients.keys() == expected.keys()
        assert all(torch.equal(gradients[name], value) for name, value in expected.items())


def test_a_stage_without_in_batch_negatives_never_recomputes(tiny_decoder_dir: Path) -> None:
    made = model(tiny_decoder_dir)
    result, _ = run(made, coupled=False, activation_budget=2 * PACK)
    assert result.recomputed == 0
    with counted_graph(made) as held:
        run(made, coupled=False, activation_budget=2 * PACK)
    assert held


def test_duplicates_are_counted(tiny_decoder_dir: Path) -> None:
    result, _ = run(model(tiny_decoder_dir), coupled=True, activation_budget=EVERYTHING)
    batch = build_batch(examples(), in_batch_negatives=True)
    mentioned = 10 * 5
    assert result.num_texts == len(batch.texts) < mentioned
    assert result.duplicates == pytest.approx(1 - len(batch.texts) / mentioned)


def test_a_text_that_does_not_fit_is_named(tiny_decoder_dir: Path) -> None:
    made = model(tiny_decoder_dir)
    with pytest.raises(
        TrainingError, match=r"pack of .* longest text has \d+ tokens \('what is .*graph of 30"
    ):
        run(made, coupled=True, activation_budget=30)


def test_bytes_per_token_are_those_of_a_real_graph(tiny_decoder_dir: Path) -> None:
    """Counted in another way: what freeing the graph gives back."""
    made = model(tiny_decoder_dir)
    found = graph_bytes_per_token(made, 128)
    twice = graph_bytes_per_token(made, 256)
    assert found == pytest.approx(twice, rel=0.05)  # a graph grows with its tokens
    # Per layer at least: two normed inputs, queries and what they mix (4 · width), gate and up.
    assert found > 2 * 4 * (4 * 32 + 2 * 64)
    assert found < 40 * 2 * 4 * (6 * 32 + 3 * 64)
