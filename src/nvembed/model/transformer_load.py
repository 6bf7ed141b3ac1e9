"""A transformer and its tokenizer that no library loads for us: with adapters, or a GGUF file.

transformers reads GGUF files too, in two to three times the time and twice the memory, into models
that cannot be saved, without rope scaling and widths of heads. So here a model is built empty and
filled tensor by tensor, as official checkpoints are (``official_load.py``); the tokenizer is
transformers', put right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nvembed.core.errors import ModelError
from nvembed.interop.gguf import (
    ARCHITECTURES,
    GgufFile,
    check_usable,
    configuration,
    gguf_package,
    read_gguf,
    tokenizer_kind,
)
from nvembed.interop.loading import load_pretrained, loading, with_adapters
from nvembed.interop.model_folder import ADAPTER, ADAPTER_CONFIG, ModelSource, find_base, read_bases
from nvembed.interop.weights import Misfit, StoredTensor, check_finite, fill, read_header
from nvembed.model.attention import FLAT_ATTENTION
from nvembed.model.placement import DeviceMap, place_of, plan_places, spread
from nvembed.model.quantization import Quantizer

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

# --- Saved as adapters ----------------------------------------------------------------------------


def load_adapted(
    source: ModelSource,
    dtype: torch.dtype | str | None,
    device_map: DeviceMap | None,
    quantize: Quantizer | None = None,
) -> tuple[PreTrainedModel, Any]:
    """The base of an adapter's folder with the adapters merged, and the base's tokenizer.

    They are added in float32, since what they add is small beside the weights, and rounded to
    ``dtype`` or quantised afterwards; ``None`` and ``"auto"`` are float32.
    """
    adapted, tokenizer = open_adapted(source, torch.float32, device_map)
    merged: Any = adapted.merge_and_unload()
    check_finite(merged, where=source.place)
    if dtype not in (None, "auto"):
        merged.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    if quantize is not None:
        quantize.quantize(merged.to(quantize.device))
    return merged, tokenizer


def open_adapted(
    source: ModelSource,
    dtype: torch.dtype | str | None,
    device_map: DeviceMap | None,
    check: Callable[[PeftConfig], None] | None = None,
) -> tuple[PeftModel, Any]:
    """The base of an adapter's folder in ``dtype`` under its adapters in float32; its tokenizer.

    ``check`` sees the settings of the adapters before they are put on, and may change them.
    """
    from peft import PeftConfig
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    place = source.place
    file = source.require(ADAPTER)
    folder = source.require(ADAPTER_CONFIG).parent
    found = find_base(source)
    if read_bases(found):
        base, tokenizer = load_adapted(found, dtype, device_map)
    elif found.gguf is not None:
        base, tokenizer = load_gguf(found, dtype, device_map)
    else:
        base, tokenizer = load_pretrained(found, dtype, device_map, FLAT_ATTENTION)
    stored = read_header(file)
    with loading(place, expected="adapters of peft"):
        settings = PeftConfig.from_pretrained(str(folder))
        settings.inference_mode = True
        if check is not None:
            check(settings)
        settings.base_model_name_or_path = base.name_or_path  # peft warns where it is another
        adapted = with_adapters(base, settings)
        needed = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    sizes = {name: tuple(tensor.shape) for name, tensor in needed.items()}
    shapes = {
        name: (list(tensor.shape), list(sizes[name]))
        for name, tensor in stored.items()
        if name in sizes and tensor.shape != sizes[name]
    }
    Misfit([*sizes.keys() - stored.keys()], [*stored.keys() - sizes.keys()], shapes).check(place)
    with loading(place, expected="adapters of peft"):
        set_peft_model_state_dict(adapted, load_file(file))
    return adapted, tokenizer


# --- GGUF -----------------------------------------------------------------------------------------

# What the file holds besides the base model: the head, and tensors that settings are made of.
_NOT_THE_BASE = {"output.weight", "rope_freqs.weight"}
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_AT_ONCE = 1 << 22  # values that are dequantised at once, which takes several copies of them
# Llama 3 was trained on so many positions, and scales by these (its published configurations).
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def load_gguf(
    source: ModelSource,
    dtype: torch.dtype | str | None,
    device_map: DeviceMap | None,
    quantize: Quantizer | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A base model that runs on flat batches, and its tokenizer, from a GGUF file.

    ``dtype`` None is float32, ``"auto"`` the stored one (float32 of a file with blocks).
    """
    path = source.gguf
    assert path is not None, "a GGUF file"
    file = read_gguf(path)
    check_usable(file)
    values = configuration(file)
    if "rope_freqs.weight" in file.tensors:
        values["rope_scaling"] = _llama3_scaling(file, values)
    tokenizer = load_gguf_tokenizer(file)  # first: merges take memory that is free again afterwards
    with loading(str(path), expected="a model in a GGUF file"):
        config = CONFIG_MAPPING[ARCHITECTURES[file.architecture]](**values)
        config.use_cache = False
        with init_empty_weights():  # but for buffers, which are computed
            decoder = AutoModel.from_config(config, attn_implementation=FLAT_ATTENTION)
    wanted = _stored_dtype(file) if dtype == "auto" else dtype or torch.float32
    if isinstance(wanted, str):
        wanted = getattr(torch, wanted)
    places = None if device_map is None else plan_places(decoder, device_map, wanted)
    if quantize is not None:
        quantize.prepare(decoder)
    device = torch.device("cpu" if quantize is None else quantize.device)
    names = gguf_names(file.architecture, file.count("block_count"), decoder.state_dict())
    fill(
        decoder,
        {
            name: StoredTensor(path, tensor.shape)
            for name, tensor in file.tensors.items()
            if name not in _NOT_THE_BASE
        },
        where=str(path),
        stored_name=names.__getitem__,
        place=lambda name: place_of(name, places) if places else device,
        dtype=lambda value: wanted,
        read=lambda name, stored, place, dtype: read_tensor(file, name, dtype).to(place),
        filled=quantize or (lambda name, part: part),
    )
    config.dtype = decoder.config.dtype = wanted
    if places:
        spread(decoder, places)
    else:
        decoder.to(device)  # buffers
    decoder.name_or_path = source.name  # what an adapter says that it belongs to
    return decoder.eval(), tokenizer


def gguf_names(architecture: str, layers: int, names: Iterable[str]) -> dict[str, str]:
    """Names in a file of the tensors of a base model."""
    gguf = gguf_package()
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table = gguf.get_tensor_name_map(number, layers)
    found = {}
    for name in names:
        part, _, ending = name.rpartition(".")
        found[name] = f"{table.get_name(f'model.{part}') or part}.{ending}"
    return found


# Settings with the number of heads of the tensors whose rows Llama's conversion reorders.
_ROTATED = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}


def as_stored(value: Tensor, name: str, architecture: str, heads: Callable[[str], int]) -> Tensor:
    """A tensor as the file has it; ``read_tensor`` undoes it.

    In Llama's the rows of queries and keys are reordered, so dimensions that rotate together stand
    side by side; to the weights of Gemma's norms 1 is added. ``heads`` gives a setting.
    """
    if architecture == "llama" and (key := _ROTATED.get(name.split(".")[-2])):
        halves = value.reshape(heads(key), 2, -1, *value.shape[1:])
        return halves.transpose(1, 2).reshape(value.shape)
    return value.float() + 1 if _plus_one(architecture, name) else value


def _plus_one(architecture: str, name: str) -> bool:
    return architecture.startswith("gemma") and name.endswith("norm.weight")


def read_tensor(file: GgufFile, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """One tensor as transformers has it, a few rows at a time, so little more is in memory.

    What the conversion does (``as_stored``) is undone.
    """
    gguf = gguf_package()
    kind, shape = file.tensors[name].kind, file.tensors[name].shape
    plus_one = _plus_one(file.architecture, name)
    whole = torch.empty(shape, dtype=torch.float32 if plus_one else dtype or torch.float32)
    stored, rows_NE = _stored_rows(file, name), whole.view(-1, shape[-1])
    step = max(_AT_ONCE // shape[-1], 1)
    for start in range(0, len(rows_NE), step):
        block = np.array(stored[start : start + step])
        rows = gguf.dequantize(block, gguf.GGMLQuantizationType[kind])
        rows_NE[start : start + step] = torch.from_numpy(rows)
    if plus_one:
        whole = (whole - 1).to(dtype)
    if file.architecture == "llama" and (key := _ROTATED.get(name.split(".")[-2])):
        count = file.count(key, file.count("attention.head_count"))
        whole = whole.view(count, -1, 2, *shape[1:]).transpose(1, 2).reshape(shape)
    return whole


def _stored_rows(file: GgufFile, name: str) -> Any:
    """Bytes of a tensor by its rows; mapped anew for each, as pages count as memory."""
    tensor = file.tensors[name]
    rows = int(np.prod(tensor.shape[:-1]))
    size = (rows, tensor.size // max(rows, 1))
    return np.memmap(file.path, np.uint8, "r", offset=tensor.start, shape=size)


def _stored_dtype(file: GgufFile) -> torch.dtype:
    """Of most weights; float32 where they are blocks."""
    largest = max(file.tensors.values(), key=lambda tensor: tensor.size)
    return _FLOATS.get(largest.kind, torch.float32)


def _llama3_scaling(file: GgufFile, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that give the divisors of frequencies which the file holds in their place."""
    divisors_E = read_tensor(file, "rope_freqs.weight")
    scaling = {**_LLAMA3, "factor": float(divisors_E.max())}
    config = CONFIG_MAPPING["llama"](**{**values, "rope_scaling": scaling})
    base, width = config.rope_parameters["rope_theta"], config.head_dim
    plain_E = base ** (-torch.arange(0, width, 2) / width)
    scaled_E = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    same = scaled_E.shape == divisors_E.shape
    if not (same and torch.allclose(plain_E / divisors_E, scaled_E, rtol=1e-4, atol=0)):
        raise ModelError(
            "its frequencies (rope_freqs.weight) are scaled in an unknown way",
            where=str(file.path),
            expected="Llama 3's, with 8192 positions",
            hint="Take the model's folder (safetensors) instead",
        )
    return scaling


# How a byte-level vocabulary splits texts: these as GPT-2, with and without every digit for itself;
# transformers knows others (llama.cpp: src/llama-vocab.cpp, by ``tokenizer.ggml.pre``).
_LIKE_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4"}
_SINGLE_DIGITS = {
    *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
}
_WHOLE_PIECES = {
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
    *("lfm2", "jina-v5-nano", "tekken"),
}
_COMPOSED = {"qwen2", "qwen35", "deepseek-r1-qwen", "f2llmv2", "kormo", "megrez"}


def split_rules(split: str | None) -> pre_tokenizers.PreTokenizer | None:
    """How byte-level vocabularies of the name split a text; ``None`` where that is not known."""
    if split in _LIKE_GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split in _SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if (pattern := _their_splits().get(str(split))) is None:
        return None
    pieces = pre_tokenizers.Split(Regex(pattern), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pieces, plain])


def whole_pieces(split: str | None) -> bool:
    """Whether a piece that is a token is taken whole, whatever the merges say."""
    return split in _WHOLE_PIECES


def _their_splits() -> Mapping[str, str]:
    from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs

    return theirs.GGUF_PRE_TOKENIZER_SPLITS


def load_gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer that transformers makes, with the rules that it leaves out.

    It also adds tokens that its classes have and the file has not, for which there is no embedding.
    """
    where = str(file.path)
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs
    except ImportError as error:
        raise ModelError(
            "the installed transformers does not read tokenizers of GGUF files",
            where=where,
            hint="Install it with: pip install 'nvembed[gguf]'",
        ) from error
    kind, split = tokenizer_kind(file)
    rules = split_rules(split)
    if kind == "gpt2" and rules is None:
        known = {*_their_splits(), *_LIKE_GPT2, *_SINGLE_DIGITS}
        raise ModelError(
            f"its tokenizer splits texts by the rules of {split!r}, which are not known",
            where=where,
            expected=f"one of {', '.join(sorted(known))}",
            hint="Take a newer conversion, or the model's folder (safetensors)",
        )
    with loading(where, expected="a tokenizer in a GGUF file"):
        architecture, vocabulary, special = theirs.get_gguf_tokenizer(where)
        made, _ = theirs.convert_gguf_tokenizer(architecture, vocabulary)
        if kind == "gpt2":
            made.pre_tokenizer = rules
        if kind == "llama" and not file.architecture.startswith("gemma"):
            # A space in front even where there is one, after special tokens too; or none at all.
            first = file.settings.get("tokenizer.ggml.add_space_prefix", True)
            prepended = [normalizers.Prepend("▁")] if first else []
            made.normalizer = normalizers.Sequence([*prepended, normalizers.Replace(" ", "▁")])
            made.pre_tokenizer = None
        if whole_pieces(split):
            made.model.ignore_merges = True
        if split in _COMPOSED:
            made.normalizer = normalizers.NFC()
        state, count = json.loads(made.to_str()), len(vocabulary["tokens"])
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < count]
        backend = Tokenizer.from_str(json.dumps(state))
        return PreTrainedTokenizerFast(tokenizer_object=backend, **special)
