"""Load ``nvidia/NV-Embed-v1``, ``-v2`` or a folder in their layout, without their code.

Both modules are built without memory (on the meta device), every tensor is checked against them by
name and shape, and only then read: one at a time, straight into the wanted dtype on the wanted
device. So the peak is the model plus its largest tensor. Next file: ``model/embedder.py``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModel, MistralConfig, PreTrainedModel, PreTrainedTokenizerFast

from nvembed.interop.loading import loading
from nvembed.interop.model_folder import ModelSource, read_limit
from nvembed.interop.official import LatentShape, official_name, own_name, read_config
from nvembed.interop.weights import check_finite_tensor, fit, read_tensor, stored_tensors
from nvembed.model.attention import FLAT_ATTENTION
from nvembed.model.backbone import Backbone, prove_direction
from nvembed.model.placement import DeviceMap, place_of, plan_places, spread
from nvembed.model.pooling import LatentAttentionPooling

# The official default of encode(); used where the folder does not say.
DEFAULT_MAX_TOKENS = 4096


def load_official(
    source: ModelSource,
    *,
    device: str,
    device_map: DeviceMap | None = None,
    dtype: torch.dtype | Literal["auto"] | None = None,
    max_tokens: int | None = None,
) -> tuple[Backbone, LatentAttentionPooling]:
    """Load an official checkpoint into our modules, with the official token rules.

    Args:
        source: folder or hub id; its ``config.json`` is official.
        device: where the weights go; with ``device_map`` those of the pooling.
        device_map: spread the backbone over devices, see ``model/placement.py``.
        dtype: of the weights; ``None`` means bfloat16 on CUDA and float32 elsewhere, ``"auto"`` the
            stored dtype.
        max_tokens: longest sequence; ``None`` takes the folder's limit.
    """
    config_path = source.require("config.json")
    source = source.pinned(config_path)
    config = source.read_json("config.json")
    assert config is not None
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    wanted = None if dtype == "auto" else dtype
    with loading(source.name, expected="the layout of nvidia/NV-Embed-v2"):
        decoder_config, latent = read_config(config, where=str(config_path))
        tokenizer = _load_tokenizer(source)
        decoder, pooling = empty_modules(decoder_config, latent)
    stored = stored_tensors(source)
    names = fit(official_shapes(decoder, pooling), stored, where=source.name)
    main = torch.device(device)
    places = None if device_map is None else plan_places(decoder, device_map, wanted)
    weights: dict[str, dict[str, Tensor]] = {"0.model": {}, "1": {}}
    for name, stored_name in names.items():
        module, own_key = _own_key(name)
        place = place_of(own_key, places) if places and module == "0.model" else main
        tensor = read_tensor(stored_name, stored[stored_name], place, wanted)
        check_finite_tensor(tensor, stored_name, where=source.name)
        weights[module][own_key] = tensor
    decoder.load_state_dict(weights["0.model"], assign=True)
    pooling.load_state_dict(weights["1"], assign=True)
    # Its buffers are computed, not stored, so building without memory left them empty.
    rotary_place = place_of("rotary_emb", places) if places else main
    decoder.rotary_emb = type(decoder.rotary_emb)(decoder_config).to(rotary_place)
    if places:
        spread(decoder, places)
    limit = max_tokens or read_limit(source, "sentence_bert_config.json", "max_seq_length")
    backbone = Backbone(
        decoder.eval(),
        tokenizer,
        max_tokens=limit or DEFAULT_MAX_TOKENS,
        text_style="official",
    )
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
    shapes = {}
    for prefix, module in (("0.model.", decoder), ("1.", pooling)):
        for name, value in module.state_dict().items():
            official = official_name(prefix + name)
            assert official is not None, name
            shapes[official] = tuple(value.shape)
    return shapes


def _own_key(official: str) -> tuple[str, str]:
    """The module of ours, ``0.model`` or ``1``, and the name in it of an official tensor."""
    own = own_name(official)
    assert own is not None, official
    module = "0.model" if own.startswith("0.model.") else "1"
    return module, own.removeprefix(f"{module}.")


def _load_tokenizer(source: ModelSource) -> PreTrainedTokenizerFast:
    """The tokenizer file as it is.

    AutoTokenizer would ask about the remote code that ``auto_map`` names, and transformers 5
    rebuilds the pre-tokenizer of a LlamaTokenizer (docs/log.md).
    """
    path = source.require("tokenizer.json", hint="The tokenizer comes with the model")
    settings = source.read_json("tokenizer_config.json") or {}
    special = {}
    for key, default in (
        ("bos_token", "<s>"),
        ("eos_token", "</s>"),
        ("unk_token", "<unk>"),
        ("pad_token", "</s>"),
    ):
        value: Any = settings.get(key) or default
        special[key] = str(value["content"] if isinstance(value, dict) else value)
    with loading(str(path), expected="a tokenizer"):
        return PreTrainedTokenizerFast(tokenizer_file=str(path), **special)
