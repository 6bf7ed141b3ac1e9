"""A mean-pooled model as stock sentence-transformers modules, proven equal before it is kept.

What our backbone does by itself is said by files: attention in both directions (``is_causal``,
which transformers 5 reads in every causal mask), no sliding window, BOS and EOS from the tokenizer,
and a prompt that is left out of pooling; rotary positions also by the names of transformers 4.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.processors import TemplateProcessing

from nvembed.core.errors import ModelError
from nvembed.core.files import write_json
from nvembed.data.instructions import query_prompt
from nvembed.model.backbone import Backbone
from nvembed.model.embedder import NVEmbed
from nvembed.model.pooling import MeanPooling
from nvembed.model.settings import AttentionDirection
from nvembed.model.tokens import TextTokenizer, plain_backend

_QUERY_PROMPT = query_prompt("Find it")  # short: it must leave room in a model of short texts
PROOF_PROMPTS = ("", _QUERY_PROMPT)
_TEXTS = ["how do I sort a list?", "x", "A longer passage, " * 6 + "cut or not."]
Vectors = NDArray[np.float32]
HEAD_FREE = "distil it into plain mean pooling: nvembed compress --head-free"
_HINT = "Use --format nvembed"
_PROMPT_HINT = f"{_HINT}, or first {HEAD_FREE}"


def write_stock(model: NVEmbed, folder: Path, *, name: str) -> None:
    """Write the files; a ModelError where the pooling or the tokens have no stock counterpart."""
    backbone = model.backbone
    if not isinstance(model.pooling, MeanPooling) or backbone.text_style == "official":
        raise ModelError(
            f"{type(model.pooling).__name__} with {backbone.text_style} token rules",
            where=name,
            expected="MeanPooling, and not the token rules of NVIDIA's code; sentence-transformers "
            "has no other that would give the same vectors",
            hint=f"{_PROMPT_HINT}; plain sentence-transformers loads the former with "
            "trust_remote_code=True",
        )
    backbone.model.save_pretrained(folder)
    open_attention(folder / "config.json", backbone)
    whole = backbone.text_style == "whole"
    backend = (
        closed_tokenizer(backbone.text_tokenizer) if whole else counting_tokenizer(backbone, name)
    )
    write_tokenizer(backend, backbone, folder)
    write_modules(model, folder)


def write_modules(model: NVEmbed, folder: Path, *, transformer: str = "") -> None:
    """Write stock modules, limit and prompts; the first module lies in the folder or inside it."""
    modules = ((transformer, "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    entries = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for i, (place, kind) in enumerate(modules)
    ]
    write_json(folder / "modules.json", entries)
    # The keys of earlier versions, which later ones read too.
    pooling = {"word_embedding_dimension": model.dimension, "pooling_mode_mean_tokens": True}
    prompted = {"include_prompt": model.backbone.text_style == "whole"}
    write_json(folder / "1_Pooling" / "config.json", pooling | prompted)
    limit = {"max_seq_length": model.backbone.max_tokens, "do_lower_case": False}
    write_json(folder / transformer / "sentence_bert_config.json", limit)
    prompts = {"prompts": model.prompts, "default_prompt_name": model.default_prompt_name}
    write_json(
        folder / "config_sentence_transformers.json", {**prompts, "similarity_fn_name": "cosine"}
    )


def prove_stock(model: NVEmbed, folder: Path, *, name: str) -> None:
    """Compare vectors with plain sentence-transformers: not all families do what they are told."""
    refusal = partial(
        ModelError,
        where=name,
        expected="the same vectors as ours; transformers reads the "
        f"{model.backbone.model.config.model_type} family's files, or its tokenizer, its own way",
    )
    for prompt in PROOF_PROMPTS:
        options: dict[str, Any] = {"prompt": prompt, "show_progress_bar": False}
        expected = model.encode(_TEXTS, **options)
        try:
            plain = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
            difference = largest_difference(expected, partial(plain.encode, **options), _TEXTS)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise refusal(f"stock modules do not run it ({error})", hint=_HINT) from error
        if not difference <= (rounding(model) if model.dtype == torch.float32 else 2e-2):
            what = "queries with a prompt" if prompt else "texts"
            found = f"stock modules give other vectors for {what} (by up to {difference:.1e})"
            raise refusal(found, hint=_PROMPT_HINT if prompt else _HINT)


def rounding(model: NVEmbed) -> float:
    """How far vectors of two float32 implementations may lie apart: each layer rounds anew.

    30 layers of SmolLM2-135M differ by 2e-5; another mask or pooling by 1e-2 and more.
    """
    layers: int = model.backbone.model.config.get_text_config().num_hidden_layers
    return max(1e-5, 2e-6 * layers)


def largest_difference(
    expected: NDArray[np.float32],
    encode: Callable[[Any], NDArray[np.float32]],
    texts: Sequence[Any],
) -> float:
    """Encode texts in a batch and each alone; return the largest difference to what is expected."""
    alone = np.concatenate([encode([text]) for text in texts])
    return float(np.abs(np.stack([encode(texts), alone]) - expected).max())


def open_attention(config_path: Path, backbone: Backbone) -> None:
    """Say by configuration what our attention does by itself."""
    config = json.loads(config_path.read_text(encoding="utf-8"))
    attention = attention_settings(config, backbone.attention)
    write_json(config_path, config | attention | older_rope_settings(config))


def attention_settings(config: Mapping[str, Any], attention: AttentionDirection) -> dict[str, Any]:
    """Settings of a transformer by which others attend as we do, and find what they look for."""
    bidirectional = attention == "bidirectional"
    settings: dict[str, Any] = {"is_causal": not bidirectional}
    settings["use_bidirectional_attention"] = bidirectional
    if config.get("sliding_window"):
        # Wider than any text. Removing it breaks families that still build the windowed mask, and
        # some halve the number when they read use_bidirectional_attention.
        settings["sliding_window"] = 4 * int(config["max_position_embeddings"])
    return settings


def older_rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 5 writes as ``rope_parameters``, by the names that all others look for.

    transformers 4, TEI and others read nothing else, and have a default where a name is missing.
    """
    rope = config.get("rope_parameters") or {}
    everywhere, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    settings: dict[str, Any] = {}
    if "rope_theta" in everywhere:
        settings["rope_theta"] = everywhere["rope_theta"]
    if "rope_theta" in local:
        settings["rope_local_base_freq"] = local["rope_theta"]
    if everywhere.get("rope_type", "default") != "default":
        scaling = {key: value for key, value in everywhere.items() if key != "rope_theta"}
        settings["rope_scaling"] = scaling
    return settings


def closed_tokenizer(text_tokenizer: TextTokenizer) -> Tokenizer:
    """Copy the model's tokenizer, with a template that adds the BOS and EOS of the model."""
    tokenizer: Any = text_tokenizer.tokenizer
    backend = plain_backend(tokenizer)
    ids = text_tokenizer(["x"])[0].ids
    inner = backend.encode("x", add_special_tokens=False).ids
    start = ids.index(inner[0])
    head, tail = (
        [(tokenizer.convert_ids_to_tokens(token), token) for token in part]
        for part in (ids[:start], ids[start + len(inner) :])
    )
    template = " ".join([*(name for name, _ in head), "$A", *(name for name, _ in tail)])
    special = list(dict.fromkeys([*head, *tail]))
    backend.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return backend


def counting_tokenizer(backbone: Backbone, name: str) -> Tokenizer:
    """Close the tokenizer so that a prompt alone has as many tokens as we leave out of pooling."""
    backend = closed_tokenizer(backbone.text_tokenizer)

    def missed() -> int:
        alone = len(backend.encode(_QUERY_PROMPT).ids) - int(backbone.add_eos)
        return alone - backbone.tokenize_texts(["how"], _QUERY_PROMPT)[0].pool_start

    if missed() == 1:
        # Alone, the prompt ends in a token for its last space, which joins the text otherwise;
        # sentence-transformers counts it alone. Only a string that ends so is changed.
        bare = normalizers.Replace(Regex(r"\nQuery: \z"), "\nQuery:")
        own = [backend.normalizer] if backend.normalizer is not None else []
        backend.normalizer = normalizers.Sequence([bare, *own])
    if missed():
        message = "the length of a prompt cannot be expressed in a stock tokenizer"
        raise ModelError(message, where=name, hint=_PROMPT_HINT)
    return backend


def write_tokenizer(
    backend: Tokenizer, backbone: Backbone, folder: Path, *, official: bool = False
) -> None:
    """Write a tokenizer as every version of transformers, 4 and 5, reads it: the file as it is.

    The ``official`` code pads with EOS and knows neither CLS nor SEP.
    """
    tokenizer: Any = backbone.tokenizer
    backend.save(str(folder / "tokenizer.json"))
    names = ["bos_token", "eos_token", "pad_token", "unk_token"]
    special = {name: getattr(tokenizer, name) for name in names}
    if official or special["pad_token"] is None:
        special["pad_token"] = tokenizer.eos_token
    if not official:
        special |= {"cls_token": tokenizer.cls_token, "sep_token": tokenizer.sep_token}
    special = {name: token for name, token in special.items() if token is not None}
    write_json(folder / "special_tokens_map.json", special)
    settings = {**special, "model_max_length": backbone.max_tokens, "padding_side": "right"}
    # transformers 5 would name a class that 4 does not have.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(folder / "tokenizer_config.json", settings)
