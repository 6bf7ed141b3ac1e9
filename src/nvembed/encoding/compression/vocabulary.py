"""A vocabulary cut to a corpus: its tokens, and what the tokenizer needs for any other text.

BPE joins the pair of lowest rank again and again, so a token comes about by a tree of joins, which
is the one that its own characters give: no join crossed its ends where it stood. With a token its
whole tree is kept. Then wherever all pieces of a text are kept, so is every join that made them,
and joins that are gone can come in between nowhere: the text has the same pieces as before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from nvembed.core.errors import ConfigError, ModelError
from nvembed.model.backbone import Backbone
from nvembed.model.tokens import CHUNK_TEXTS, TextTokenizer, batches, plain_backend

_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}  # that other BPE falls back to


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokenizer of a model as its file has it, and what has to stay.

    Attributes:
        state: contents of ``tokenizer.json``.
        ids: token → id, added tokens among them.
        ranks: pairs that are joined, the lowest number first.
        needed: tokens without which some texts would have no pieces: bytes and added tokens.
    """

    state: Mapping[str, Any]
    ids: Mapping[str, int]
    ranks: Mapping[tuple[str, str], int]
    needed: frozenset[str]

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """Read a fast tokenizer; a ModelError where it is no BPE over bytes."""
        state = json.loads(plain_backend(tokenizer).to_str())
        model = state["model"]
        plain = not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
        ids = dict(model["vocab"]) if isinstance(model.get("vocab"), dict) else {}
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        base = _BYTES if model.get("byte_fallback") else alphabet
        if model["type"] != "BPE" or not plain or not ids.keys() & base:
            raise ModelError(
                f"its tokenizer ({model['type']}) cannot be cut to a corpus",
                where="vocabulary",
                expected="BPE over bytes, as of Llama, Mistral, Qwen, SmolLM and Gemma",
            )
        added = {token["content"]: token["id"] for token in state["added_tokens"]}
        special = {str(token) for token in tokenizer.special_tokens_map.values() if str(token)}
        needed = (ids.keys() & base) | added.keys() | (special & ids.keys())
        if model.get("unk_token") in ids:
            needed |= {model["unk_token"]}
        ranks = {(first, second): rank for rank, (first, second) in enumerate(model["merges"])}
        return cls(state, ids | added, ranks, frozenset(needed))

    def tree(self, token: str) -> set[str]:
        """A token and all that it is joined from; itself alone where joins do not lead to it."""
        parts, found = list(token), set(token)
        if not found <= self.ids.keys():
            return {token}
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                return {token}
            parts = _joined(parts, best)
            found.add("".join(best))
        return found


def _joined(parts: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """Join a pair wherever it stands, from the left."""
    found: list[str] = []
    place = 0
    while place < len(parts):
        here = tuple(parts[place : place + 2]) == pair
        found.append("".join(pair) if here else parts[place])
        place += 2 if here else 1
    return found


def token_counts(tokenizer: Any, texts: Iterable[str]) -> NDArray[np.int64]:
    """How often each id stands in texts, without special tokens."""
    backend = plain_backend(tokenizer)
    counts = np.zeros(1 + max(backend.get_vocab().values()), dtype=np.int64)
    for batch in batches(texts, CHUNK_TEXTS):
        for encoded in backend.encode_batch_fast(batch, add_special_tokens=False):
            counts += np.bincount(encoded.ids, minlength=len(counts))
    return counts


def tokens_to_keep(
    vocabulary: Vocabulary, counts: NDArray[np.int64], size: int, always: Iterable[str] = ()
) -> set[str]:
    """At most ``size`` tokens: those needed, then by how often they stand in the corpus.

    Every token comes with its tree, so one that does not fit as a whole is passed over. ``always``
    are tokens, such as those of prompts, that are kept whatever their counts.

    Raises:
        ConfigError: there is no room for those that are needed.
    """
    kept = set(vocabulary.needed)
    for token in always:
        kept |= vocabulary.tree(token)
    if len(kept) > size:
        expected = f"at least {len(kept)}: bytes, special tokens and those of the prompts"
        raise ConfigError(f"{size} tokens", where="vocabulary", expected=expected)
    tokens = {number: token for token, number in vocabulary.ids.items()}
    # By falling count, the lower id first.
    for number in np.argsort(-counts, kind="stable").tolist():
        if len(kept) == size or counts[number] == 0:
            break
        tree = {tokens[number]} - kept and vocabulary.tree(tokens[number])
        if len(kept | tree) <= size:
            kept |= tree
    return kept


def cut_tokenizer(tokenizer: Any, vocabulary: Vocabulary, kept: set[str]) -> tuple[Any, list[int]]:
    """A tokenizer of the kept tokens, numbered in their old order, and their old ids.

    Kept are the joins whose parts and result are.
    """
    old = sorted(vocabulary.ids[token] for token in kept)
    place = {number: new for new, number in enumerate(old)}
    new_ids = {token: place[vocabulary.ids[token]] for token in kept}
    model = dict(vocabulary.state["model"])
    model["vocab"] = {token: new_ids[token] for token in model["vocab"] if token in kept}
    model["merges"] = [
        pair for pair in model["merges"] if {*pair, "".join(pair)} <= model["vocab"].keys()
    ]
    state = {
        **vocabulary.state,
        "model": model,
        "added_tokens": [
            {**token, "id": new_ids[token["content"]]} for token in vocabulary.state["added_tokens"]
        ],
        "post_processor": _renumbered(vocabulary.state["post_processor"], new_ids),
    }
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        **tokenizer.special_tokens_map,
        model_max_length=tokenizer.model_max_length,
        split_special_tokens=bool(getattr(tokenizer, "split_special_tokens", False)),
    )
    return made, old


def _renumbered(part: Any, new_ids: Mapping[str, int]) -> Any:
    """A template with the new ids of the tokens that it names."""
    if isinstance(part, dict):
        found = {key: _renumbered(value, new_ids) for key, value in part.items()}
        if "tokens" in part and "ids" in part:
            found["ids"] = [new_ids[token] for token in part["tokens"]]
        return found
    if isinstance(part, list):
        if len(part) == 2 and isinstance(part[0], str) and isinstance(part[1], int):
            return [part[0], new_ids[part[0]]]
        return [_renumbered(value, new_ids) for value in part]
    return part


@torch.no_grad()
def cut_vocabulary(backbone: Backbone, tokenizer: Any, old_ids: Sequence[int]) -> None:
    """Give a backbone the tokenizer and the rows of its table of embeddings, in place."""
    model, config = backbone.model, backbone.model.config.get_text_config()
    table: Any = model.get_input_embeddings()
    rows = torch.tensor(old_ids, device=table.weight.device)
    place = {old: new for new, old in enumerate(old_ids)}
    table.weight = nn.Parameter(table.weight[rows], table.weight.requires_grad)
    table.num_embeddings = config.vocab_size = len(old_ids)
    table.padding_idx = place.get(table.padding_idx)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value: Any = getattr(config, name, None)
        if isinstance(value, list):
            setattr(config, name, [place[one] for one in value if one in place] or None)
        else:
            setattr(config, name, place.get(value))
    own = backbone.text_tokenizer
    backbone.tokenizer = tokenizer
    backbone.text_tokenizer = TextTokenizer(
        tokenizer,
        max_tokens=own.max_tokens,
        style=own.style,
        add_bos=backbone.add_bos,
        add_eos=backbone.add_eos,
    )
