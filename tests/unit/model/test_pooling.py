from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nvembed.core.errors import ModelError
from nvembed.model.packing import flatten
from nvembed.model.pooling import (
    LatentAttentionPooling,
    SelfAttentionPooling,
    build_pooling,
)
from nvembed.model.tokens import TokenizedText
from oracles.padded import latent_attention, mean

KINDS = ("mean", "last", "latent", "self_attention")
WIDTH = 16
LENGTHS = (3, 7, 3, 1, 5)
STARTS = (0, 4, 2, 0, 1)


def make(kind: str) -> torch.nn.Module:
    pooling = build_pooling(kind, WIDTH, num_latents=6, num_heads=2)
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter.normal_(0.0, 0.4)
    return pooling


@pytest.fixture
def texts() -> list[torch.Tensor]:
    return [torch.randn(n, WIDTH) for n in LENGTHS]


def flat_features(texts: list[torch.Tensor]) -> dict[str, object]:
    tokens = [
        TokenizedText(tuple(range(len(text))), start)
        for text, start in zip(texts, STARTS, strict=True)
    ]
    flat = flatten(tokens)
    return {"flat": flat, "token_embeddings": torch.cat([texts[row] for row in flat.order])}


def oracle(kind: str, pooling, text: torch.Tensor, start: int) -> torch.Tensor:
    if kind == "mean":
        return mean(text, start)
    if kind == "last":
        return text[-1]
    if kind == "latent":
        return mean(latent_attention(pooling.layer, text), start)
    query, key, value = (
        part.view(len(text), 2, WIDTH // 2)
        for part in pooling.to_query_key_value(pooling.norm_attention(text)).chunk(3, dim=-1)
    )
    rows = []
    for position in range(len(text)):
        heads = []
        for head in range(2):
            score = key[:, head] @ query[position, head] / (WIDTH // 2) ** 0.5
            heads.append(score.softmax(0) @ value[:, head])
        mixed = text[position] + pooling.to_out.weight @ torch.cat(heads)
        rows.append(mixed + pooling.feed_forward(pooling.norm_feed_forward(mixed)))
    return mean(torch.stack(rows), start)


@pytest.mark.parametrize("kind", KINDS)
def test_flat_equals_the_oracle_in_the_order_of_the_texts(kind: str, texts) -> None:
    pooling = make(kind)
    pooled = pooling(flat_features(texts))["sentence_embedding"]
    for row, (text, start) in enumerate(zip(texts, STARTS, strict=True)):
        torch.testing.assert_close(
            pooled[row], oracle(kind, pooling, text, start), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_states_of_another_model_pool_to_the_same(kind: str, side: str, texts) -> None:
    pooling = make(kind)
    width = max(LENGTHS)
    hidden = torch.full((len(texts), width, WIDTH), 99.0)
    mask = torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        first = 0 if side == "right" else width - len(text)
        hidden[row, first : first + len(text)] = text
        mask[row, first : first + len(text)] = 1
    features = {"token_embeddings": hidden, "attention_mask": mask}
    pooled = pooling(features)["sentence_embedding"]
    for row, text in enumerate(texts):
        torch.testing.assert_close(
            pooled[row], oracle(kind, pooling, text, 0), atol=1e-5, rtol=1e-5
        )
    assert mask.sum() == sum(LENGTHS)  # inputs are left as they were


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", [int, lambda n: torch.tensor([n] * len(LENGTHS))])
def test_a_stock_prompt_is_not_pooled(kind: str, side: str, form, texts) -> None:
    pooling = make(kind)
    texts = [torch.randn(n, WIDTH) for n in (5, 4, 7, 6, 5)]
    width = 8
    hidden = torch.full((len(texts), width, WIDTH), 99.0)
    mask = torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        first = 0 if side == "right" else width - len(text)
        hidden[row, first : first + len(text)] = text
        mask[row, first : first + len(text)] = 1
    features = {"token_embeddings": hidden, "attention_mask": mask, "prompt_length": form(3)}
    pooled = pooling(features)["sentence_embedding"]
    for row, text in enumerate(texts):
        torch.testing.assert_close(
            pooled[row], oracle(kind, pooling, text, 3), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_pooled_state_and_no_other(kind: str, texts) -> None:
    pooling = make(kind)
    features = flat_features(texts)
    hidden = features["token_embeddings"].requires_grad_()
    pooling(features)["sentence_embedding"].square().sum().backward()
    moved = hidden.grad.abs().amax(1) > 0
    if kind == "last":
        ends = features["flat"].segments.cu_seqlens[1:].long() - 1
        assert moved.nonzero()[:, 0].tolist() == ends.tolist()
    elif kind == "self_attention":
        assert moved.all()  # prompt tokens act through attention
    else:
        assert moved.tolist() == features["flat"].pool_mask_T.tolist()
    for name, parameter in pooling.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_bit_identical(kind: str, texts, tmp_path: Path) -> None:
    pooling = make(kind)
    pooling.save(str(tmp_path))
    loaded = type(pooling).load(str(tmp_path))
    one = pooling(flat_features(texts))["sentence_embedding"]
    other = loaded(flat_features(texts))["sentence_embedding"]
    assert torch.equal(one, other)


def test_trained_poolings_start_as_mean_pooling(texts) -> None:
    expected = build_pooling("mean", WIDTH)(flat_features(texts))["sentence_embedding"]
    for kind in ("latent", "self_attention"):
        fresh = build_pooling(kind, WIDTH, num_latents=4, num_heads=2)
        torch.testing.assert_close(fresh(flat_features(texts))["sentence_embedding"], expected)


def test_defaults_are_the_papers() -> None:
    pooling = build_pooling("latent", 64)
    assert isinstance(pooling, LatentAttentionPooling)
    assert (pooling.num_latents, pooling.num_heads) == (512, 8)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ModelError, match="3 heads do not divide the width 16"):
        SelfAttentionPooling(16, num_heads=3)
