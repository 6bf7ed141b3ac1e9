"""What a GGUF file holds: its settings, and where its tensors lie. Nothing of torch here.

The format is that of https://github.com/ggml-org/ggml (docs). Settings become those of a
configuration of transformers; what it does not know (rope scaling of some kinds, other layers) is
an error, since a model that is loaded without it would only be a little wrong.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from nvembed.core.errors import ModelError
from nvembed.core.reporting import byte_size
from nvembed.interop.model_folder import MAGIC, check_present, damaged

# By ``general.architecture``: the ``model_type`` of transformers. Mistral's models are llama here.
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
_VERSIONS = (2, 3)
# The numbers of the format by their code; 8 is a text, 9 an array.
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_TEXT, _ARRAY = 8, 9
_MOST_NUMBERS = 4096  # of an array that is kept: values per layer, not per token
_MOST_AXES = 4


class GgufTensor(NamedTuple):
    """A tensor as it is stored."""

    shape: tuple[int, ...]  # as torch has it, the longest stride first
    kind: str  # such as Q4_1
    start: int  # in the file
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a file.

    Attributes:
        path: the file.
        settings: its metadata; of an array of texts, or of many numbers, the length.
        tensors: by name.
    """

    path: Path
    settings: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """Such as llama."""
        return str(self.settings.get("general.architecture"))

    def of_model(self, key: str, default: Any = None) -> Any:
        """A setting of the architecture, such as ``block_count``."""
        return self.settings.get(f"{self.architecture}.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        """A setting that has to be a number of at least 1."""
        value = self.of_model(key, default)
        if type(value) is not int or value < 1:
            what = "is missing" if value is None else f"is {str(value)[:80]}"
            raise damaged(f"{self.architecture}.{key} {what}", self.path, "a number of at least 1")
        return value

    @property
    def elements(self) -> int:
        """Number of weights."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    def described(self) -> str:
        """What it is, in one line."""
        kinds = Counter(tensor.kind for tensor in self.tensors.values())
        said = {
            "": self.settings.get("general.name"),
            "architecture ": self.architecture,
            "layers ": self.of_model("block_count"),
            "width ": self.of_model("embedding_length"),
            "heads ": self.of_model("attention.head_count"),
            "context ": self.of_model("context_length"),
            "tokens ": self.settings.get("tokenizer.ggml.tokens"),
            "tokenizer ": "/".join(filter(None, tokenizer_kind(self))),
            "tensors ": ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
            "weights ": f"{self.elements / 1e6:.1f} M",
            "file ": byte_size(self.path.stat().st_size),
            "licence ": self.settings.get("general.license", "not said"),
        }
        return "; ".join(f"{what}{value}" for what, value in said.items() if value is not None)


def gguf_package() -> Any:
    """The library ``gguf``, which knows the kinds of tensors and their names."""
    try:
        import gguf
    except ImportError as error:
        raise ModelError(
            "GGUF files need the package gguf, which is not installed",
            hint="Install it with: pip install 'nvembed[gguf]'",
        ) from error
    return gguf


def tokenizer_kind(file: GgufFile) -> tuple[str | None, str | None]:
    """Kind of vocabulary (gpt2 is byte-level BPE), and how texts are split before it is used."""
    kind, split = (file.settings.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    return kind, split


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a file; a ModelError where it is none, or the file is cut short."""
    check_present(path)
    gguf_package()
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ModelError(
                "not a GGUF file", where=str(path), expected="a file that begins with GGUF"
            )
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
                found = _header(path, _Cursor(blob, len(MAGIC)))
        except (EOFError, ValueError) as error:
            message = f"its header cannot be read ({error})"
            raise damaged(message, path, "a complete GGUF file") from error
    end = max((tensor.start + tensor.size for tensor in found.tensors.values()), default=0)
    if end > (size := path.stat().st_size):
        message = f"cut short: {byte_size(size)} of {byte_size(end)}"
        raise damaged(message, path, "a complete GGUF file")
    return found


class _Cursor:
    """Reads one value after the other from the bytes of a file."""

    def __init__(self, blob: Any, at: int) -> None:
        self._blob = blob
        self.at = at

    def take(self, format: str) -> Any:
        (value,) = struct.unpack(f"<{format}", self.bytes(struct.calcsize(f"<{format}")))
        return value

    def bytes(self, length: int) -> bytes:
        start, self.at = self.at, self.at + length
        if self.at > len(self._blob):
            raise EOFError("the file ends in it")
        return self._blob[start : self.at]

    def text(self) -> str:
        return self.bytes(self.take("Q")).decode("utf-8", "replace")

    def value(self, code: int) -> Any:
        if code == _TEXT:
            return self.text()
        if code != _ARRAY:
            if code not in _NUMBERS:
                raise ValueError(f"a value of kind {code}")
            return self.take(_NUMBERS[code])
        inner, count = self.take("I"), self.take("Q")
        if inner == _TEXT:
            for _ in range(count):
                self.bytes(self.take("Q"))
            return count
        if inner not in _NUMBERS:
            raise ValueError(f"an array of kind {inner}")
        layout = _NUMBERS[inner]
        raw = self.bytes(count * struct.calcsize(f"<{layout}"))
        return list(struct.unpack(f"<{count}{layout}", raw)) if count <= _MOST_NUMBERS else count


def _header(path: Path, cursor: _Cursor) -> GgufFile:
    version, tensor_count, setting_count = (cursor.take(code) for code in "IQQ")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}, and 2 and 3 are known")
    settings = {}
    for _ in range(setting_count):
        key = cursor.text()
        settings[key] = cursor.value(cursor.take("I"))
    if not isinstance(settings.get("general.architecture"), str):
        raise ValueError("it says no architecture")
    stored = {}
    for _ in range(tensor_count):
        name, axes = cursor.text(), cursor.take("I")
        if axes > _MOST_AXES:
            raise ValueError(f"tensor {name} has {axes} axes")
        shape = tuple(cursor.take("Q") for _ in range(axes))[::-1]
        stored[name] = (shape, cursor.take("I"), cursor.take("Q"))
    alignment = settings.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"an alignment of {alignment}")
    begin = -(-cursor.at // alignment) * alignment
    tensors = {
        name: _tensor(name, shape, code, begin + offset)
        for name, (shape, code, offset) in stored.items()
    }
    return GgufFile(path, settings, tensors)


def _tensor(name: str, shape: tuple[int, ...], code: int, start: int) -> GgufTensor:
    gguf = gguf_package()
    if code not in set(gguf.GGMLQuantizationType):
        raise ValueError(f"tensor {name} is of the unknown kind {code}")
    kind = gguf.GGMLQuantizationType(code)
    values, size = gguf.GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % values:
        raise ValueError(f"tensor {name} of shape {list(shape)} is not made of {kind.name} blocks")
    return GgufTensor(shape, kind.name, start, prod(shape) // values * size)


# --- As a configuration of transformers -----------------------------------------------------------

_KEYS = {
    "context_length": "max_position_embeddings",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
}
_SPECIAL = {"bos": "bos", "eos": "eos", "padding": "pad"}
# Gemma's largest models scale scores by their width per head, and the file does not say so.
_SCALED_BY_WIDTH = {("gemma2", 46), ("gemma3", 62)}


def check_usable(file: GgufFile) -> None:
    """Refuse an architecture, a kind of tensor or a part of a file that cannot be loaded."""
    where = str(file.path)
    if (parts := file.settings.get("split.count", 1)) > 1:
        raise ModelError(
            f"one of the {parts} parts of a split file",
            where=where,
            expected="one file",
            hint="Put them together with: llama-gguf-split --merge",
        )
    if file.architecture not in ARCHITECTURES:
        raise ModelError(
            f"the architecture {file.architecture!r} cannot be loaded from GGUF",
            where=where,
            expected=f"one of {', '.join(ARCHITECTURES)}",
            hint="Take the model's folder (safetensors) instead",
        )
    known = readable_kinds()
    for name, tensor in file.tensors.items():
        if tensor.kind not in known:
            raise ModelError(
                f"tensor {name} is quantised as {tensor.kind}, which cannot be read",
                where=where,
                expected=f"one of {', '.join(known)}",
                hint="Take another quantisation of the model",
            )


def readable_kinds() -> list[str]:
    """Kinds of tensors that ``gguf`` turns back into numbers."""
    import numpy as np

    gguf = gguf_package()
    found = []
    for kind in gguf.GGMLQuantizationType:
        block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        try:
            gguf.dequantize(block, kind)
        except NotImplementedError:
            continue
        found.append(kind.name)
    return found


def configuration(file: GgufFile) -> dict[str, Any]:
    """Arguments of the configuration class of a file that ``check_usable`` has passed."""
    layers, width = file.count("block_count"), file.count("embedding_length")
    if layers > len(file.tensors):
        raise damaged(f"{layers} layers in {len(file.tensors)} tensors", file.path)
    heads = file.count("attention.head_count")
    head_width = file.count("attention.key_length", width // heads)
    values = {ours: found for key, ours in _KEYS.items() if (found := file.of_model(key))}
    values |= {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": file.count("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.count("attention.head_count_kv", heads),
        "head_dim": head_width,
        # The number that was meant, not the one nearest to it in 32 bits.
        "rms_norm_eps": float(f"{file.of_model('attention.layer_norm_rms_epsilon', 1e-6):.6g}"),
        "rope_scaling": _rope_scaling(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if (table := file.tensors.get("token_embd.weight")) is not None:
        values["vocab_size"] = table.shape[0]
    if file.architecture.startswith("gemma"):
        by_width = (file.architecture, layers) in _SCALED_BY_WIDTH
        values["query_pre_attn_scalar"] = width // heads if by_width else head_width
    rotated = file.count("rope.dimension_count", head_width)
    if rotated != head_width:
        values["partial_rotary_factor"] = rotated / head_width
    special = {
        f"{ours}_token_id": file.settings.get(f"tokenizer.ggml.{name}_token_id")
        for name, ours in _SPECIAL.items()
    }
    # A special token that is not said is none, whatever the class takes where nothing is said.
    return {key: value for key, value in values.items() if value is not None} | special


def _rope_scaling(file: GgufFile) -> dict[str, Any] | None:
    """How positions beyond those of training are read; ``None`` where nothing is scaled.

    Llama's (a tensor ``rope_freqs.weight``) is found out where the model is built.
    """
    kind = file.of_model("rope.scaling.type", "none")
    if any(name.startswith("rope_factors") for name in file.tensors):
        kind = "longrope"
    if kind == "none":
        return None
    factor = file.of_model("rope.scaling.factor")
    original = file.of_model("rope.scaling.original_context_length")
    if kind == "linear" and factor:
        return {"rope_type": kind, "factor": factor}
    if kind == "yarn" and factor and original:
        return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    raise ModelError(
        f"its rope scaling is {kind!r}, which cannot be read from GGUF",
        where=str(file.path),
        expected="none, linear, yarn, or Llama 3's",
        hint="Take the model's folder (safetensors) instead",
    )
