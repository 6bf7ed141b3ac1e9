"""Load ``nvidia/NV-Embed-v1``, ``-v2`` or a folder in their layout, without their code.

Modules are built without memory, and every tensor is checked by name and shape before it is read
straight to its place, so the peak is the model plus its largest tensor.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModel, MistralConfig, PreTrainedModel, PreTrainedTokenizerFast

from nvembed.interop.loading import loading
from nvembed.interop.model_folder import ModelSource
from nvembed.interop.official import LatentShape, official_name, read_config
from nvembed.interop.saved import read_limit
from nvembed.interop.weights import fill, stored_tensors
from nvembed.model.attention import FLAT_ATTENTION
from nvembed.model.backbone import Backbone, prove_direction
from nvembed.model.placement import DeviceMap, place_of, plan_places, spread
from nvembed.model.pooling import LatentAttentionPooling
from nvembed.model.quantization import Quantizer

# The official default of encode(); used where the folder does not say.
DEFAULT_MAX_TOKENS = 4096
_SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "</s>",
}


def load_official(
    source: ModelSource,
    *,
    device: str,
    device_map: DeviceMap | None = None,
    dtype: torch.dtype | Literal["auto"] | None = None,
    max_tokens: int | None = None,
    quantize: Quantizer | None = None,
) -> tuple[Backbone, LatentAttentionPooling]:
    """Load an official checkpoint into our modules, with the official token rules.

    ``dtype`` None is bfloat16 on CUDA and float32 elsewhere, ``"auto"`` the stored one;
    ``max_tokens`` None takes the folder's limit.
    """
    config_path = source.require("config.json")
    source = source.pinned(config_path)
    main = torch.device(device)
    if dtype is None:
        dtype = torch.bfloat16 if main.type == "cuda" else torch.float32
    wanted = None if dtype == "auto" else dtype
    with loading(source.name, expected="the layout of nvidia/NV-Embed-v2"):
        config = source.read_json("config.json") or {}
        decoder_config, latent = read_config(config, where=str(config_path))
        tokenizer = load_tokenizer(source)
        decoder, pooling = empty_modules(decoder_config, latent)
    if quantize is not None:
        quantize.prepare(decoder)
    places = None if device_map is None else plan_places(decoder, device_map, wanted)

    def place(name: str) -> torch.device:
        inner = name.removeprefix("0.model.")
        return place_of(inner, places) if places and inner != name else main

    fill(
        _whole(decoder, pooling),
        stored_tensors(source),
        where=source.name,
        stored_name=_official,
        place=place,
        dtype=lambda value: wanted,
        filled=lambda name, part: (
            part if quantize is None or not name.startswith("0.") else quantize(name, part)
        ),
    )
    # Its buffers are computed, not stored, so building without memory left them empty.
    decoder.rotary_emb = type(decoder.rotary_emb)(decoder_config).to(place("0.model.rotary_emb"))
    if places:
        spread(decoder, places)
    limit = max_tokens or read_limit(source, "sentence_bert_config.json", "max_seq_length")
    limit = limit or DEFAULT_MAX_TOKENS
    backbone = Backbone(decoder.eval(), tokenizer, max_tokens=limit, text_style="official")
    prove_direction(backbone, name=source.name)
    return backbone, pooling.eval()


def empty_modules(
    decoder_config: MistralConfig, latent: LatentShape
) -> tuple[PreTrainedModel, LatentAttentionPooling]:
    """Backbone and latent pooling of an official checkpoint, without memory for their weights."""
    with torch.device("meta"):
        decoder = AutoModel.from_config(decoder_config, attn_implementation=FLAT_ATTENTION)
        pooling = LatentAttentionPooling(
            decoder_config.hidden_size, latent.num_latents, latent.num_heads, latent.head_width
        )
    return decoder, pooling


def official_shapes(
    decoder: PreTrainedModel, pooling: LatentAttentionPooling
) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights by their official names."""
    weights: dict[str, Tensor] = _whole(decoder, pooling).state_dict()
    return {_official(name): tuple(value.shape) for name, value in weights.items()}


def _whole(decoder: PreTrainedModel, pooling: LatentAttentionPooling) -> nn.Module:
    """Both with the names that they have in ``NVEmbed``."""
    return nn.ModuleList([nn.ModuleDict({"model": decoder}), pooling])


def _official(own: str) -> str:
    name = official_name(own)
    assert name is not None, own
    return name


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerFast:
    """The tokenizer file as it is.

    AutoTokenizer would ask about remote code and rebuild the pre-tokenizer (docs/log.md).
    """
    path = source.require("tokenizer.json", hint="The tokenizer comes with the model")
    settings = source.read_json("tokenizer_config.json") or {}
    special = {}
    for key, default in _SPECIAL_TOKENS.items():
        value: Any = settings.get(key) or default
        special[key] = str(value["content"] if isinstance(value, dict) else value)
    with loading(str(path), expected="a tokenizer"):
        return PreTrainedTokenizerFast(tokenizer_file=str(path), **special)
