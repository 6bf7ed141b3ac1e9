"""Packed = alone = padded oracle for every family; direction proven; windows off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from families import DECODERS, FAMILIES, make_family
from nvembed.core.errors import ModelError
from nvembed.model.attention import FLAT_ATTENTION
from nvembed.model.backbone import Backbone, prove_direction
from nvembed.model.packing import flatten
from oracles.padded import padded_hidden

TEXTS = ["a", "short text", "a text that is much longer than any sliding window here", "same len.."]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory, tiny_tokenizer) -> Path:
    return make_family(request.param, tmp_path_factory.mktemp(request.param), tiny_tokenizer)


def states(backbone: Backbone, texts) -> list[torch.Tensor]:
    """States per text from one pack."""
    flat = flatten(texts)
    with torch.no_grad():
        parts = backbone.hidden(flat).split(list(flat.segments.lengths))
    found = dict(zip(flat.order, parts, strict=True))
    return [found[row] for row in range(len(texts))]


@pytest.mark.parametrize("prompt", ["", "Instruct: find it\nQuery: "])
def test_packed_equals_alone_equals_padded(family: Path, prompt: str) -> None:
    backbone = Backbone.from_pretrained(str(family)).eval()
    texts = backbone.tokenize_texts(TEXTS, prompt)
    packed = states(backbone, texts)
    for row, text in enumerate(texts):
        torch.testing.assert_close(packed[row], states(backbone, [text])[0], atol=1e-5, rtol=1e-5)
    for side in ("right", "left"):
        for mine, oracle in zip(
            packed, padded_hidden(str(family), texts, causal=False, side=side), strict=True
        ):
            torch.testing.assert_close(mine, oracle, atol=1e-5, rtol=1e-5)


def test_direction_follows_the_option(family: Path) -> None:
    both = Backbone.from_pretrained(str(family)).eval()
    texts = both.tokenize_texts(["abcdefgh", "abcdefgX"])
    first, second = states(both, texts)
    assert (first[0] - second[0]).abs().max() > 1e-4  # a late token moves an early state
    causal = Backbone.from_pretrained(str(family), attention="causal").eval()
    first, second = states(causal, texts)
    torch.testing.assert_close(first[:8], second[:8], atol=0, rtol=0)
    assert (first[8] - second[8]).abs().max() > 1e-4


@pytest.mark.parametrize("name", DECODERS)
def test_causal_option_equals_the_familys_own_causal_model(
    name: str, tmp_path: Path, tiny_tokenizer
) -> None:
    folder = make_family(name, tmp_path, tiny_tokenizer)
    backbone = Backbone.from_pretrained(str(folder), attention="causal").eval()
    texts = backbone.tokenize_texts(TEXTS)
    for mine, oracle in zip(
        states(backbone, texts), padded_hidden(str(folder), texts, causal=True), strict=True
    ):
        torch.testing.assert_close(mine, oracle, atol=1e-5, rtol=1e-5)


def test_probe_refuses_a_model_that_goes_the_other_way(tiny_decoder_dir: Path) -> None:
    backbone = Backbone.from_pretrained(str(tiny_decoder_dir), attention="causal")
    backbone.attention = "bidirectional"
    original = backbone.hidden

    def stays_causal(flat):
        backbone.attention = "causal"
        try:
            return original(flat)
        finally:
            backbone.attention = "bidirectional"

    backbone.hidden = stays_causal
    with pytest.raises(ModelError, match="attention is causal; expected bidirectional"):
        prove_direction(backbone, name="stubborn")


def test_probe_refuses_texts_that_see_each_other(tiny_decoder_dir: Path) -> None:
    backbone = Backbone.from_pretrained(str(tiny_decoder_dir))
    original = backbone.hidden
    backbone.hidden = lambda flat: original(flat) + flat.token_ids_T.sum() * 0.01
    with pytest.raises(ModelError, match="see each other"):
        prove_direction(backbone, name="leaky")


def test_unknown_folder_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a Hugging Face model folder"):
        Backbone.from_pretrained(str(tmp_path))


def test_runs_behind_the_attention_interface(tiny_decoder_dir: Path) -> None:
    backbone = Backbone.from_pretrained(str(tiny_decoder_dir))
    assert backbone.model.config._attn_implementation == FLAT_ATTENTION
    assert backbone.model.config.use_cache is False
    assert not hasattr(backbone.model, "lm_head")
