"""How long a text a run reads: what the recipe says, or the limit of the model that it tunes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from nvembed.model.embedder import NVEmbed
from nvembed.training.config import TrainConfig
from nvembed.training.model import build_model
from official_folders import write_official
from tiny_run import DATASET, STAGE


@pytest.fixture(scope="module")
def starts(
    tmp_path_factory: pytest.TempPathFactory,
    wide_decoder_dir: Path,
    byte_level_tokenizer: PreTrainedTokenizerFast,
) -> dict[str, Path]:
    """A decoder, a model saved by nvembed that reads 40 tokens, and one of NVIDIA's layout."""
    folder = tmp_path_factory.mktemp("starts")
    model = NVEmbed.from_pretrained(wide_decoder_dir, pooling="mean", max_tokens=40, device="cpu")
    model.save_pretrained(str(folder / "saved"))
    official = write_official(folder / "official", byte_level_tokenizer)
    return {"decoder": wide_decoder_dir, "saved": folder / "saved", "official": official}


@pytest.mark.parametrize(
    ("start", "said", "expected"),
    [
        ("saved", None, 40),
        ("saved", 24, 24),
        ("saved", 48, 48),
        ("decoder", None, 512),
        ("decoder", 24, 24),
        ("official", None, 512),
        ("official", 24, 24),
    ],
)
def test_a_saved_model_keeps_its_own(
    starts: dict[str, Path], start: str, said: int | None, expected: int
) -> None:
    settings: dict[str, Any] = {"backbone": str(starts[start])}
    if said is not None:
        settings["max_tokens"] = said
    config = TrainConfig.model_validate(
        {
            "output": "run",
            "model": settings,
            "datasets": [{**DATASET, "stages": [1]}],
            "stages": [{"name": "one", "in_batch_negatives": True, **STAGE}],
        }
    )
    model = build_model(config, starts[start].parent, device="cpu")
    assert model.backbone.max_tokens == model.max_seq_length == expected
