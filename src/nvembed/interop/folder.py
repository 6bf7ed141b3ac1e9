"""What the files of a model folder say, checked before a library reads them.

Libraries take a damaged file for something else, or fail far from it. Here every file that will be
read is looked at first: settings are parsed, of weights the header is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nvembed.core.arguments import check_settings, kind_of, shown_value
from nvembed.core.errors import ConfigError, ModelError
from nvembed.interop.shards import INDEX, read_header, stored_tensors
from nvembed.interop.source import COPY_AGAIN, ModelSource, check_present, read_json_file

# Settings that transformers and sentence-transformers read where they are there; all are objects.
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "nvembed_config.json",
    "adapter_config.json",
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, slots=True)
class ModuleEntry:
    """One entry of ``modules.json``.

    Attributes:
        type: dotted name of the class.
        path: folder of the module inside the model's; "" is the model's own.
    """

    type: str
    path: str


@dataclass(frozen=True, slots=True)
class SavedPrompts:
    """What ``config_sentence_transformers.json`` says that is used here.

    Attributes:
        prompts: prompt by name.
        default_prompt_name: the one that ``encode`` takes where none is asked for.
        similarity_fn_name: as sentence-transformers names it.
    """

    prompts: dict[str, str] | None = None
    default_prompt_name: str | None = None
    similarity_fn_name: Literal["cosine", "dot", "euclidean", "manhattan"] | None = None


def read_modules(source: ModelSource) -> list[ModuleEntry]:
    """Read ``modules.json``.

    Raises:
        ModelError: there is none, or it is not a list of modules.
    """
    path = source.require("modules.json")
    entries = read_json_file(path)
    if not isinstance(entries, list) or not entries:
        raise ModelError(
            f"not a list of modules, but {kind_of(entries)}",
            where=str(path),
            expected='[{"type": "...", "path": "..."}]',
            hint=COPY_AGAIN,
        )
    found = []
    for number, entry in enumerate(entries):
        values = (
            {key: entry.get(key) for key in ("type", "path")} if isinstance(entry, dict) else {}
        )
        found.append(
            ModuleEntry(**read_values(ModuleEntry, values, where=f"{path}, entry {number}"))
        )
    return found


def read_prompts(source: ModelSource) -> SavedPrompts:
    """Read the prompts that were saved with a model; none where it has no such file.

    Raises:
        ModelError: a value is of a wrong type.
    """
    name = "config_sentence_transformers.json"
    saved = source.read_json(name) or {}
    values = {key: saved.get(key) for key in SavedPrompts.__dataclass_fields__}
    return SavedPrompts(**read_values(SavedPrompts, values, where=f"{source.name}/{name}"))


def read_values(of: Callable[..., Any], values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Settings of a file that are the arguments of a constructor, every one of them checked.

    Raises:
        ModelError: one is missing, unknown or of a wrong type.
    """
    try:
        check_settings(of, values, where=where)
    except ConfigError as error:
        raise ModelError(error.message, where=where, hint=COPY_AGAIN) from error
    return dict(values)


def read_limit(source: ModelSource, filename: str, key: str) -> int | None:
    """A number of tokens or positions that a settings file gives; ``None`` where it does not.

    Raises:
        ModelError: it is not a number above 0.
    """
    limit = (source.read_json(filename) or {}).get(key)
    # Where there is no limit, tokenizers say 1e30, some of them as a float.
    if limit is None or (isinstance(limit, int | float) and limit >= 1 and limit is not True):
        return None if limit is None else int(limit)
    raise ModelError(
        f"{key} is {shown_value(limit)}",
        where=f"{source.name}/{filename}",
        expected="a number of tokens",
        hint=COPY_AGAIN,
    )


def check_files(folder: Path) -> None:
    """Look at every file of a model folder that will be read.

    Raises:
        ModelError: one is damaged, or ``config.json`` describes another model than the weights.
    """
    for place in _module_folders(folder):
        source = ModelSource(str(place))
        for name in _SETTINGS:
            source.read_json(name)
        for name in (*_TOKENIZERS, *_WEIGHTS):
            path = place / name
            if path.is_file():
                check_present(path)
                if path.suffix == ".safetensors":
                    read_header(path)
        if (place / INDEX).is_file():
            stored_tensors(source)
        _check_depth(source)


def _module_folders(folder: Path) -> Iterator[Path]:
    yield folder
    source = ModelSource(str(folder))
    if not (folder / "modules.json").is_file():
        return
    for entry in read_modules(source):
        place = folder / entry.path
        if not place.is_dir():
            # A module without settings, such as a normalisation, may have no folder.
            continue
        if place != folder:
            yield place


def _check_depth(source: ModelSource) -> None:
    """Refuse more layers than there are tensors, which a library would build for hours."""
    config = source.read_json("config.json") or {}
    inner = config.get("text_config")
    layers = (inner if isinstance(inner, dict) else config).get("num_hidden_layers")
    weights = [name for name in (INDEX, _WEIGHTS[0]) if source.find(name) is not None]
    if isinstance(layers, int) and weights and layers > (count := len(stored_tensors(source))):
        raise ModelError(
            f"num_hidden_layers is {layers}",
            where=f"{source.name}/config.json",
            expected=f"those of the weights, which are {count} tensors",
            hint=COPY_AGAIN,
        )
