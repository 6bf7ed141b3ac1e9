"""The tokenizer of a model as settings of a GGUF file, proven by reading it back.

Byte-level BPE is kind ``gpt2`` there, with a name for how texts are split; a vocabulary of
SentencePiece is kind ``llama``, with scores in place of merges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from nvembed.core.errors import ModelError
from nvembed.core.reporting import hold_note
from nvembed.interop.gguf import read_gguf
from nvembed.model.backbone import Backbone
from nvembed.model.tokens import plain_backend
from nvembed.model.transformer_load import load_gguf_tokenizer, split_rules, whole_pieces

# Names of the format, by how texts are split; of equal ones the first is taken.
_SPLITS = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "dbrx", "gpt-4o", "qwen35")
# Kinds of tokens in the format.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_SPACE = "▁"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ELSEWHERE = "Use --format onnx or sentence-transformers"
_PROBES = (
    "How do I sort a list of 1,234 numbers in Python 3.14?",
    "Instruct: Given a question, retrieve its answer\nQuery: what's the WORLD's 2nd-highest peak",
    "  two spaces   in front,\ttabs\t\tand\r\nlines\n \n\n end   ",
    "naïve café, Ångström, Größe: 3,14 · 日本語のテキスト, 한국어, мир, مرحبا, ไทย, हिन्दी 🙂👍🏽",
    "def f(x): return {'a': [1, 2.5e-3]} != None  # snake_case camelCase HTTPServer",
    "",
)


def tokenizer_settings(backbone: Backbone, rows: int, *, name: str) -> dict[str, Any]:
    """Settings of the vocabulary and of what stands around a text.

    Args:
        backbone: whose tokenizer it is.
        rows: how many the table of tokens has; each gets a token, if an unused one.
        name: what the model is called in errors.

    Raises:
        ModelError: llama.cpp has no such kind of vocabulary, or no name for how it splits texts.
    """
    tokenizer: Any = backbone.tokenizer
    backend = plain_backend(tokenizer)
    state = json.loads(backend.to_str())
    model = state["model"]
    if not model.get("merges"):
        raise _refusal(f"its tokenizer is {model['type']} without merges", "BPE with merges", name)
    if any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        raise _refusal("its tokenizer is BPE with affixes or dropout", "plain BPE", name)
    added = {token["id"]: token["special"] for token in state["added_tokens"]}
    by_id = {number: token for token, number in backend.get_vocab().items()}
    tokens = [by_id.get(row, f"[PAD{row}]") for row in range(rows)]
    kinds = [
        (_CONTROL if added[row] else _USER)
        if row in added
        else (_NORMAL if row in by_id else _UNUSED)
        for row in range(rows)
    ]
    write = _pieces if model.get("byte_fallback") else _byte_level
    settings = {"tokens": tokens, "token_type": kinds} | write(state, tokens, kinds, name)
    around = backbone.text_tokenizer.whole([""])[0]
    head, tail = around.head, around.tail
    settings |= {"add_bos_token": bool(head), "add_eos_token": bool(tail)}
    special = {
        "bos": head[0] if head else tokenizer.bos_token_id,
        "eos": tail[0] if tail else tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    # A class of transformers may add tokens that have no row.
    held = {key: value for key, value in special.items() if value is not None and value < rows}
    settings |= {f"{key}_token_id": value for key, value in held.items()}
    return {f"tokenizer.ggml.{key}": value for key, value in settings.items()}


def _byte_level(
    state: Mapping[str, Any], tokens: list[str], kinds: list[int], name: str
) -> dict[str, Any]:
    """Byte-level BPE; its tokens and their kinds stay as they are."""
    whole = bool(state["model"].get("ignore_merges"))
    rules = _canonical(state["pre_tokenizer"])
    normalizer = _flat(state["normalizer"], "normalizers")
    found = next((s for s in _SPLITS if _named(s) == rules and whole_pieces(s) == whole), None)
    if found is None or any(part != {"type": "NFC"} for part in normalizer):
        raise _refusal(
            "its tokenizer splits or normalises texts by rules that llama.cpp has no name for",
            f"those of one of {', '.join(_SPLITS)}",
            name,
        )
    if normalizer:
        hold_note(
            "llama.cpp does not compose characters (NFC), as this tokenizer does: compose texts "
            "that may hold others before they are sent"
        )
    merges = [" ".join(merge) for merge in state["model"]["merges"]]
    return {"model": "gpt2", "pre": found, "merges": merges}


def _pieces(
    state: Mapping[str, Any], tokens: list[str], kinds: list[int], name: str
) -> dict[str, Any]:
    """As SentencePiece: what is merged first has the highest score; kinds are settled in place."""
    if missing := [token for token in _BYTES if token not in tokens]:
        raise _refusal(f"its tokenizer has no token for the byte {missing[0]}", "all 256", name)
    normalizer = _flat(state["normalizer"], "normalizers")
    splits = _flat(state["pre_tokenizer"], "pretokenizers")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    metaspace = [part for part in splits if part["type"] == "Metaspace"]
    # Gemma's split by spaces, of which none are left then.
    others = [p for p in splits if p not in metaspace and p.get("pattern") != {"String": " "}]
    if metaspace and not normalizer and not others:
        first = metaspace[0]["prepend_scheme"] != "never"
    elif not metaspace and not others and normalizer in ([replace], [prepend, replace]):
        first = prepend in normalizer
    else:
        raise _refusal("its tokenizer normalises texts by rules of its own", "spaces as ▁", name)
    if metaspace and first:
        hold_note(
            "llama.cpp puts a space in front of every text, this tokenizer of those that begin "
            "with none: strip texts before they are sent"
        )
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(state["model"]["merges"]):
        ranks.setdefault("".join(merge), rank)
    scores = [-float(ranks.get(token, len(ranks) + 1)) for token in tokens]
    unknown = state["model"].get("unk_token")
    for row, token in enumerate(tokens):
        if token == unknown:
            kinds[row] = _UNKNOWN
        elif token in _BYTES:
            kinds[row] = _BYTE
        elif kinds[row] == _USER and not token.strip(_SPACE):
            tokens[row] = " " * len(token)  # looked for in the text as it is
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": first}


def prove_tokenizer(backbone: Backbone, path: Path, *, name: str) -> None:
    """Read the tokenizer of a file back and compare ids; a ModelError names the first text."""
    own, theirs = plain_backend(backbone.tokenizer), load_gguf_tokenizer(read_gguf(path))
    strips = any(part["type"] == "Metaspace" for part in _flat(*_splits_of(own)))
    for text in _PROBES:
        probe = text.lstrip() if strips else text
        expected = own.encode(probe, add_special_tokens=False).ids
        if theirs(probe, add_special_tokens=False).input_ids != expected:
            raise _refusal(
                f"the file's tokenizer gives other ids than the model's for {probe[:40]!r}",
                "the same",
                name,
            )


def _splits_of(backend: Tokenizer) -> tuple[Any, str]:
    return json.loads(backend.to_str())["pre_tokenizer"], "pretokenizers"


def _named(split: str) -> list[dict[str, Any]]:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = split_rules(split)
    return _canonical(_splits_of(backend)[0])


def _canonical(pre_tokenizer: Any) -> list[dict[str, Any]]:
    """Steps without what decides places in the text alone."""
    return [
        {key: value for key, value in part.items() if key != "trim_offsets"}
        for part in _flat(pre_tokenizer, "pretokenizers")
    ]


def _flat(step: Any, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, as ``tokenizer.json`` has it."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [part for each in step[inner] for part in _flat(each, inner)]
    return [step]


def _refusal(message: str, expected: str, name: str) -> ModelError:
    return ModelError(message, where=name, expected=expected, hint=ELSEWHERE)
