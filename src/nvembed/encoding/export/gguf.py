"""A model as one GGUF file, as llama.cpp and what is built on it (Ollama, LM Studio) read it.

The way in is ``model/transformer_load.py``; names and layout of tensors are said there, once. Our
pooling of all tokens and attention in both directions are settings of the format; the pool mask,
latents and a limit of tokens are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nvembed.core.arguments import checked
from nvembed.core.errors import ModelError
from nvembed.core.files import atomic_path
from nvembed.core.outputs import check_ending
from nvembed.core.ownership import check_outputs
from nvembed.core.reporting import hold_note
from nvembed.encoding.export.folders import EXPORT, load_own
from nvembed.encoding.export.gguf_tokenizer import ELSEWHERE, prove_tokenizer, tokenizer_settings
from nvembed.encoding.export.stock import HEAD_FREE
from nvembed.interop.gguf import gguf_package
from nvembed.model.backbone import merge_lora
from nvembed.model.embedder import NVEmbed
from nvembed.model.pooling import LastTokenPooling, MeanPooling
from nvembed.model.transformer_load import as_stored, gguf_names

Kind = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]

# Architectures of the format by the ``model_type`` of transformers.
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}
_POOLINGS = {MeanPooling: 1, LastTokenPooling: 3}
_FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "bf16": 32,
}
_TABLE = "token_embd.weight"
_MOST_F16 = np.finfo(np.float16).max
_AT_ONCE = 1 << 22  # values that are encoded at once, which takes several copies of them
_GEMMA_PATTERN = 6  # every sixth layer of Gemma 3 has the full attention's rotary base
_GEMMA_27B_LAYERS = 62
# What else a rope scaling may say, and the values that llama.cpp takes where a file cannot say it.
_ROPE_SAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": ...},
    "yarn": {
        **{"factor": ..., "original_max_position_embeddings": ..., "beta_fast": 32, "beta_slow": 1},
        "truncate": True,
    },
    "llama3": dict.fromkeys(
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ...
    ),
}


@checked
def export_gguf(name: str, to: str | Path, kind: Kind = "f16") -> None:
    """Load an embedding model and write it as a GGUF file.

    Args:
        name: folder or hub id of a model that was saved here.
        to: the file, ``.gguf``; an earlier export there is replaced, nothing else.
        kind: how matrices are stored, by its name in the format; vectors are float32.

    Raises:
        ConfigError: ``to`` is not such a name, or something else is there.
        ModelError: the model cannot be loaded, or the format cannot carry it.
    """
    to = Path(to)
    check_ending(to, (".gguf",))
    check_outputs([to], made_by=EXPORT, inputs=[name])
    gguf_package()
    write_gguf(load_own(name, "auto"), to, kind, name=name)


def write_gguf(model: NVEmbed, to: Path, kind: Kind, *, name: str) -> None:
    """Write a loaded model tensor by tensor; adapters are merged into it first.

    ``name`` is what it is called in errors and in the file; the rest as of ``export_gguf``.
    """
    merge_lora(model.backbone)
    backbone = model.backbone
    decoder: Any = backbone.model
    architecture = _check_carried(model, name)
    values = _settings(model, architecture)
    rows = int(decoder.get_input_embeddings().weight.shape[0])
    tokens = tokenizer_settings(backbone, rows, name=name)
    gguf = gguf_package()
    with atomic_path(to, EXPORT) as temporary:
        with closing(gguf.GGUFWriter(temporary, architecture)) as writer:
            writer.add_name(Path(name).name)
            writer.add_file_type(_FILE_TYPES[kind])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for key, value in (
                {f"{architecture}.{k}": v for k, v in values.items()} | tokens
            ).items():
                _add(writer, key, value)
            tensors = list(_tensors(model, architecture, values, kind))
            for tensor in tensors:
                writer.add_tensor_info(
                    tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, tensor.kind
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(_encoded(tensor, where=name))
        prove_tokenizer(backbone, temporary, name=name)
    if isinstance(model.pooling, MeanPooling) and backbone.text_style != "whole":
        hold_note(
            "llama.cpp pools the tokens of an instruction too: texts without one get this model's "
            "vectors, queries with one get others; nvembed compress --head-free trains that away"
        )


# --- What the format carries ----------------------------------------------------------------------


def _check_carried(model: NVEmbed, name: str) -> str:
    """The architecture in the format; a ModelError where a part of the model has no place there."""
    backbone, config = model.backbone, model.backbone.model.config
    pooling = type(model.pooling)
    if pooling not in _POOLINGS or backbone.text_style == "official":
        raise ModelError(
            f"GGUF has no {pooling.__name__} with {backbone.text_style} token rules",
            where=name,
            expected="mean or last-token pooling, and not the token rules of NVIDIA's code",
            hint=f"First {HEAD_FREE}",
        )
    if config.model_type not in _ARCHITECTURES:
        message = f"a {config.model_type} backbone cannot be written as GGUF here"
        expected = f"one of {', '.join(_ARCHITECTURES)}"
        raise ModelError(message, where=name, expected=expected, hint=ELSEWHERE)
    for what, found, wanted in [*_shape_checks(config), *_rope_checks(config)]:
        if found != wanted:
            message = f"{what} is {found!r}, for which llama.cpp has no setting"
            raise ModelError(message, where=name, expected=repr(wanted), hint=ELSEWHERE)
    return _ARCHITECTURES[config.model_type]


def _shape_checks(config: Any) -> Iterator[tuple[str, Any, Any]]:
    """Settings that llama.cpp's code of the architecture takes for granted."""
    if config.model_type != "gemma3_text":
        yield "hidden_act", config.hidden_act, "silu"
        return
    yield "hidden_activation", config.hidden_activation, "gelu_pytorch_tanh"
    yield "attn_logit_softcapping", config.attn_logit_softcapping, None
    layers = range(config.num_hidden_layers)
    pattern = ["full" if (i + 1) % _GEMMA_PATTERN == 0 else "sliding" for i in layers]
    yield "layer_types", config.layer_types, [f"{kind}_attention" for kind in pattern]
    largest = len(layers) == _GEMMA_27B_LAYERS  # its scores are scaled by another width
    scale = config.hidden_size // config.num_attention_heads if largest else _head_width(config)
    yield "query_pre_attn_scalar", config.query_pre_attn_scalar, scale


def _head_width(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _ropes(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rotary settings of full attention, and of the layers with a window."""
    parameters = config.rope_parameters
    full = parameters.get("full_attention", parameters)
    return full, parameters.get("sliding_attention", full)


def _rope_checks(config: Any) -> Iterator[tuple[str, Any, Any]]:
    """What a rope scaling says, beside what llama.cpp can be told."""
    full, sliding = _ropes(config)
    kind = full.get("rope_type", "default")
    if sliding is not full:
        yield "rope_type of sliding layers", sliding.get("rope_type", "default"), "default"
    llama = config.model_type in ("llama", "mistral")
    if kind not in _ROPE_SAYS or (kind == "llama3" and not llama):
        yield "rope_type", kind, "default, linear, yarn, or Llama's llama3"
    for key, value in full.items():
        wanted = _ROPE_SAYS.get(kind, {}).get(key)
        if key not in ("rope_type", "rope_theta") and wanted is not ... and value is not None:
            yield f"rope {key}", value, wanted


def _settings(model: NVEmbed, architecture: str) -> dict[str, Any]:
    """Settings of the architecture by their keys in the format."""
    config: Any = model.backbone.model.config
    (full, sliding), head_width = _ropes(config), _head_width(config)
    kind = full.get("rope_type", "default")
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_width,
        "attention.value_length": head_width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.causal": model.backbone.attention == "causal",
        "pooling_type": _POOLINGS[type(model.pooling)],
        "rope.dimension_count": head_width,
        "rope.freq_base": float(full["rope_theta"]),
    }
    if kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(full["factor"])}
    if kind == "yarn":
        values["rope.scaling.original_context_length"] = full["original_max_position_embeddings"]
    if architecture == "gemma3":
        # Our attention has no windows: one wider than any text keeps the rotary base of its layers.
        values["attention.sliding_window"] = 4 * config.max_position_embeddings
        values["rope.freq_base_swa"] = float(sliding["rope_theta"])
    return values


def _add(writer: Any, key: str, value: Any) -> None:
    kinds: dict[type, Callable[[str, Any], None]] = {
        **{str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32},
        **{float: writer.add_float32, list: writer.add_array},
    }
    kinds[type(value)](key, value)


# --- Tensors --------------------------------------------------------------------------------------


class _Tensor(NamedTuple):
    """A tensor of the file; ``value`` is still that of the model."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    size: int  # bytes
    value: Callable[[], Tensor]


def _tensors(
    model: NVEmbed, architecture: str, settings: Mapping[str, Any], kind: Kind
) -> Iterator[_Tensor]:
    decoder: Any = model.backbone.model
    state = decoder.state_dict()
    names = gguf_names(architecture, settings["block_count"], state)
    heads = settings.__getitem__
    for own, value in state.items():
        stored = partial(as_stored, value.detach().cpu(), names[own], architecture, heads)
        yield _planned(names[own], tuple(value.shape), kind, stored)
    if _ropes(decoder.config)[0].get("rope_type") == "llama3":
        width = settings["rope.dimension_count"]
        divisors = partial(_llama3_divisors, decoder.config)
        yield _planned("rope_freqs.weight", (width // 2,), kind, divisors)


def _planned(name: str, shape: tuple[int, ...], kind: Kind, value: Callable[[], Tensor]) -> _Tensor:
    """Choose the kind of a tensor: vectors stay float32, rows that fill no blocks float16.

    Of the table of tokens every row is an input of its own, so it has at least 8 bits.
    """
    gguf = gguf_package()
    chosen = gguf.GGMLQuantizationType[kind.upper()]
    if len(shape) == 1:
        chosen = gguf.GGMLQuantizationType.F32
    elif name == _TABLE and kind[:2] in ("q4", "q5"):
        chosen = gguf.GGMLQuantizationType.Q8_0
    if shape[-1] % gguf.GGML_QUANT_SIZES[chosen][0]:
        chosen = gguf.GGMLQuantizationType.F16
    block, size = gguf.GGML_QUANT_SIZES[chosen]
    return _Tensor(name, shape, chosen, prod(shape) // block * size, value)


def _encoded(tensor: _Tensor, *, where: str) -> NDArray[np.uint8]:
    """Bytes of a tensor ``(rows, bytes)``, encoded a few rows at a time."""
    gguf = gguf_package()
    rows_NE = tensor.value().reshape(-1, tensor.shape[-1])
    encoded = np.empty((len(rows_NE), tensor.size // max(len(rows_NE), 1)), np.uint8)
    step = max(_AT_ONCE // tensor.shape[-1], 1)
    for start in range(0, len(rows_NE), step):
        block = rows_NE[start : start + step].float().contiguous().numpy()
        if tensor.kind.name not in ("F32", "BF16") and np.abs(block).max(initial=0) > _MOST_F16:
            message = f"tensor {tensor.name} has values beyond the range of float16"
            hint = "Use --quantize bf16 or f32"
            raise ModelError(message, where=where, expected=f"at most {_MOST_F16:.0f}", hint=hint)
        block_bytes = np.ascontiguousarray(gguf.quantize(block, tensor.kind)).view(np.uint8)
        encoded[start : start + step] = block_bytes.reshape(len(block), -1)
    return encoded


def _llama3_divisors(config: Any) -> Tensor:
    """What Llama 3 divides the frequencies by, ``(E / 2,)``."""
    width = _head_width(config)
    plain_E = _ropes(config)[0]["rope_theta"] ** (-torch.arange(0, width, 2) / width)
    scaled_E: Tensor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    return plain_E / scaled_E
