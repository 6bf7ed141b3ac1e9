"""What the demo starts from when no model is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nvembed.core.errors import ModelError
from pydocs.recipe import LARGE, LARGE_TUNED, SMALL, SMALL_TUNED, preset_for
from pydocs.start import DECODER, MODEL, default_backbone, is_tuned


def put(folder: Path, name: str, content: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def test_the_model_where_its_base_is_here_else_the_decoder(tmp_path: Path) -> None:
    put(tmp_path / DECODER, "config.json", {"model_type": "llama"})
    assert default_backbone(tmp_path) == str(tmp_path / DECODER)
    put(tmp_path / MODEL, "modules.json", [])
    put(tmp_path / MODEL, "nvembed_config.json", {"bases": ["package:no-such-package"]})
    assert default_backbone(tmp_path) == str(tmp_path / DECODER)
    put(tmp_path / "base", "config.json", {"model_type": "llama"})
    put(tmp_path / MODEL, "nvembed_config.json", {"bases": [str(tmp_path / "base")]})
    assert default_backbone(tmp_path) == str(tmp_path / MODEL)


def test_outside_of_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="name a decoder with --backbone"):
        default_backbone(tmp_path)


def test_a_bare_decoder_is_not_an_embedding_model(tiny_decoder_dir: Path) -> None:
    assert not is_tuned(str(tiny_decoder_dir))


def test_presets_by_size_and_kind() -> None:
    assert preset_for(width=256, tuned=False) is SMALL
    assert preset_for(width=256, tuned=True) is SMALL_TUNED
    assert preset_for(width=576, tuned=False) is LARGE
    assert preset_for(width=576, tuned=True) is LARGE_TUNED
    # What is trained already keeps its head and moves less.
    assert LARGE_TUNED.pooling is None
    assert max(LARGE_TUNED.learning_rates) < max(LARGE.learning_rates)
