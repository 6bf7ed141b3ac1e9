"""The probes on functions whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nvembed.model.attention import probe_direction, probe_pooled

TABLE = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))


def states(kind: str):
    """States of rows of ids: running means, means of the row, or means of everything."""

    def run(rows):
        parts = [TABLE[torch.tensor(row)] for row in rows]
        counts = [torch.arange(1, len(part) + 1)[:, None] for part in parts]
        running = [p.cumsum(0) / n for p, n in zip(parts, counts, strict=True)]
        if kind == "causal":
            return torch.cat(running)
        if kind == "bidirectional":
            return torch.cat([p + p.mean(0) for p in parts])
        everything = torch.cat(parts)
        return everything + everything.mean(0)

    return run


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_direction(kind: str) -> None:
    found = probe_direction(states(kind), 50)
    assert found.direction == kind
    assert not found.neighbours_seen


def test_neighbours() -> None:
    assert probe_direction(states("all"), 50).neighbours_seen


class First(nn.Module):
    def forward(self, features):
        features["token_embeddings"] = features["given"]
        return features


class Pool(nn.Module):
    """Averages the rows named; a layer norm behind it would swallow a plain sum's gradient."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, features):
        pooled = features["token_embeddings"][0][self.rows].mean(0, keepdim=True)
        features["sentence_embedding"] = nn.functional.layer_norm(pooled, pooled.shape[1:])
        return features


def test_pooled_tokens_are_those_with_a_gradient() -> None:
    features = {"given": TABLE[None, :5], "attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}
    with torch.inference_mode():
        features["given"] = features["given"].clone()
    found = probe_pooled([First(), Pool([2, 4])], dict(features))
    assert found is not None
    assert found.tolist() == [False, True, False, True]  # the first is padding
    assert probe_pooled([nn.Identity(), Pool([1])], {"x": torch.ones(1)}) is None
