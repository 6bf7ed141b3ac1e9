"""A cut vocabulary tokenises the corpus as before, and any other text into what is left."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from nvembed import NVEmbed
from nvembed.core.errors import ConfigError, ModelError
from nvembed.encoding.compression.vocabulary import (
    Vocabulary,
    cut_tokenizer,
    cut_vocabulary,
    token_counts,
    tokens_to_keep,
)

DECODER = Path(__file__).resolve().parents[3] / "assets" / "decoder-6m"
CORPUS = [
    "def sorted(iterable): return the sorted list of items",
    "The quick brown fox jumps over the lazy dog, and 1,234 others.",
    "    raise ValueError(f'no such file {name!r}')  # naïve – 東京",
]
OTHER = ["Zxqv wholly unrelated prose: photosynthesis, jurisprudence", "émigré 🦊", ""]


def as_byte_fallback(tokenizer: Any) -> Any:
    """A tokenizer of Mistral's kind: ``▁`` for spaces, bytes for characters that it lacks."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    state["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [space, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
    state["decoder"] = {"type": "Sequence", "decoders": decoders}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        **tokenizer.special_tokens_map,
    )


@pytest.fixture(scope="module", params=["6m", "6m whole words", "byte fallback", "byte level"])
def tokenizer(
    request: pytest.FixtureRequest, metaspace_tokenizer: Any, byte_level_tokenizer: Any
) -> Any:
    if request.param.startswith("6m"):
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        own = AutoTokenizer.from_pretrained(DECODER)
        state = json.loads(own.backend_tokenizer.to_str())
        state["model"]["ignore_merges"] = request.param != "6m"
        backend = Tokenizer.from_str(json.dumps(state))
        return PreTrainedTokenizerFast(tokenizer_object=backend, **own.special_tokens_map)
    if request.param == "byte level":
        return byte_level_tokenizer
    return as_byte_fallback(metaspace_tokenizer)


def pieces(tokenizer: Any, text: str) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))


def cut(tokenizer: Any, size: int, corpus: list[str] = CORPUS) -> tuple[Any, list[int]]:
    vocabulary = Vocabulary.of(tokenizer)
    kept = tokens_to_keep(vocabulary, token_counts(tokenizer, corpus), size)
    assert len(kept) <= size
    return cut_tokenizer(tokenizer, vocabulary, kept)


def test_the_corpus_has_the_same_pieces(tokenizer: Any) -> None:
    small, old_ids = cut(tokenizer, len(tokenizer) - 1)
    assert len(small) == len(old_ids) < 0.99 * len(tokenizer)
    for text in CORPUS:
        assert pieces(small, text) == pieces(tokenizer, text)
        ids = [old_ids[token] for token in small(text)["input_ids"]]
        assert ids == tokenizer(text)["input_ids"]
    assert small.special_tokens_map == tokenizer.special_tokens_map


def test_the_cut_vocabulary_is_what_the_corpus_needs(tokenizer: Any) -> None:
    vocabulary = Vocabulary.of(tokenizer)
    kept = tokens_to_keep(vocabulary, token_counts(tokenizer, CORPUS), len(tokenizer))
    used = {piece for text in CORPUS for piece in pieces(tokenizer, text)}
    assert used <= kept
    # Every other one is a byte, a special token or part of the way to one that is used.
    for token in kept - used - vocabulary.needed:
        assert any(token in piece and token != piece for piece in used), token


def test_other_texts_lose_nothing(tokenizer: Any) -> None:
    small, _ = cut(tokenizer, len(tokenizer) - 1)
    unknown = small.unk_token_id
    for text in [*OTHER, *CORPUS]:
        ids = small(text, add_special_tokens=False)["input_ids"]
        before = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert unknown not in ids
        assert len(ids) >= len(before)
        decoded = (each.decode(found) for each, found in ((small, ids), (tokenizer, before)))
        assert len(set(decoded)) == 1


@pytest.mark.parametrize("size", [290, 310, 330])
def test_wherever_all_pieces_are_kept_they_are_the_same(size: int) -> None:
    """Also under a limit that leaves tokens of the corpus out."""
    tokenizer = AutoTokenizer.from_pretrained(DECODER)
    small, old_ids = cut(tokenizer, size)
    rng, words, seen = random.Random(size), " ".join(CORPUS).split(), set()
    for _ in range(300):
        blanks = ["", " ", "  "]
        text = "".join(rng.choice(blanks) + rng.choice(words) for _ in range(rng.randrange(1, 4)))
        before = tokenizer(text)["input_ids"]
        found = [old_ids[token] for token in small(text)["input_ids"]]
        kept = {*before} <= {*old_ids}
        assert (found == before) == kept, text
        seen.add(kept)
    assert seen == {True, False}


def test_a_limit_keeps_the_most_frequent(byte_level_tokenizer: Any) -> None:
    vocabulary = Vocabulary.of(byte_level_tokenizer)
    corpus = ["answer question question", "words in the text"]
    counts = token_counts(byte_level_tokenizer, corpus)
    tree = vocabulary.tree("Ġquestion")
    assert {"Ġquestion", "q", "Ġ"} < tree
    base = len(vocabulary.needed)
    kept = tokens_to_keep(vocabulary, counts, base + len(tree - vocabulary.needed))
    assert kept == vocabulary.needed | tree
    with pytest.raises(ConfigError, match=f"at least {base}"):
        tokens_to_keep(vocabulary, counts, base - 1)
    with pytest.raises(ConfigError, match=f"at least {base + len(tree - vocabulary.needed)}"):
        tokens_to_keep(vocabulary, counts, base, ["Ġquestion"])


def test_vectors_are_bitwise_the_same(tmp_path: Path) -> None:
    model = NVEmbed.from_pretrained(DECODER, max_tokens=64)
    before, others = model.encode(CORPUS), model.encode(OTHER)
    rows = model.backbone.model.get_input_embeddings().weight.clone()
    small, old_ids = cut(model.backbone.tokenizer, 8000)
    cut_vocabulary(model.backbone, small, old_ids)
    assert rows[old_ids].equal(model.backbone.model.get_input_embeddings().weight)
    np.testing.assert_array_equal(model.encode(CORPUS), before)
    model.save_pretrained(str(tmp_path / "m"), create_model_card=False)
    loaded = NVEmbed.from_pretrained(tmp_path / "m")
    config = loaded.backbone.model.config
    assert config.vocab_size == len(old_ids) < 1000
    assert [old_ids[i] for i in (config.bos_token_id, config.eos_token_id)] == [1, 2]
    np.testing.assert_array_equal(loaded.encode(CORPUS), before)
    assert np.abs(loaded.encode(OTHER[:1]) - others[:1]).max() > 1e-3
    assert np.isfinite(loaded.encode(OTHER)).all()


def test_tokenizers_that_cannot_be_cut(metaspace_tokenizer: Any) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    for wrong in (PreTrainedTokenizerFast(tokenizer_object=pieces),):
        with pytest.raises(ModelError, match="cannot be cut to a corpus"):
            Vocabulary.of(wrong)
