"""Small vocabularies of the kinds that a GGUF file can hold, and texts that tell them apart."""

from __future__ import annotations

import json

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    trainers,
)
from tokenizers import pre_tokenizers as rules
from transformers import PreTrainedTokenizerFast

TRICKY = [
    "Hello  1 2 1234  \n\n  two   spaces  9",
    "don't DON'T I'll we've 3.14,15 ½ ²x",
    "tabs\t\tand\r\nlines\n \n end   ",
    "naïve cafe\u0301 Ångström 日本語 مرحبا 🙂",
    "<s>special</s> x<unk>",
    "",
    " leading",
    "snake_case(camelCase) == {a: [1, 2]}",
]
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]


def trained(pre: str) -> PreTrainedTokenizerFast:
    """A byte-level vocabulary with the rules of a family, whose merges cross what they split."""
    byte_level = rules.ByteLevel(add_prefix_space=False)
    plain = rules.ByteLevel(add_prefix_space=False, use_regex=False)
    splits = {
        "gpt-2": [byte_level],
        "smollm": [rules.Digits(individual_digits=True), byte_level],
        "qwen2": [rules.Split(Regex(QWEN2), "isolated"), plain],
        "llama-bpe": [rules.Split(Regex(LLAMA3), "isolated"), plain],
    }
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=rules.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.pre_tokenizer = byte_level
    tokenizer.train_from_iterator([*TRICKY, "café 1234 12 34 \n\n\n     spaces  "] * 9, trainer)
    tokenizer.pre_tokenizer = rules.Sequence(splits[pre])
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if pre == "llama-bpe":
        # "Hello" is a token that no merges lead to, which Llama 3 takes whole all the same.
        found = json.loads(tokenizer.to_str())
        found["model"]["ignore_merges"] = True
        found["model"]["merges"] = [m for m in found["model"]["merges"] if "".join(m) != "Hello"]
        tokenizer = Tokenizer.from_str(json.dumps(found))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return _whole(tokenizer)


def sentencepiece(*, prefix: bool = True) -> PreTrainedTokenizerFast:
    """As in Llama 2 and Mistral: bytes where there is no token, a space in front of a text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL + BYTES, show_progress=False
    )
    tokenizer.train_from_iterator(["a cat in the hat, and the hats of two cats"] * 20, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][: len(SPECIAL)]
    return _whole(Tokenizer.from_str(json.dumps(state)))


def _whole(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
