"""What a folder or a hub id is, and what its settings say: the one place that decides it.

A model is an exported ONNX graph, NVIDIA's layout, a saved embedding model (ours, or one of
sentence-transformers) or a bare language model. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nvembed.core.arguments import check_settings, kind_of, shown_value
from nvembed.core.errors import ConfigError, ModelError
from nvembed.interop.source import COPY_AGAIN, ModelSource, read_json_file

ONNX_FILE = "nvembed_onnx.json"
"""What ``nvembed export --format onnx`` writes beside a graph."""
OFFICIAL_TYPE = "nvembed"
"""``model_type`` of NVIDIA's layout."""

# By the last part of the class name: stock modules have moved between packages over the years.
_MODULES = ("Transformer", "Pooling", "Normalize")
_POOLINGS: dict[str, Literal["mean", "last"]] = {"mean": "mean", "lasttoken": "last"}

# --- What it is -----------------------------------------------------------------------------------


def check_model_name(name: str) -> None:
    """Refuse a path to nothing and a folder without a model, before anything slow begins."""
    ModelSource(name).check()
    path = Path(name)
    # A hub id is "name" or "owner/name".
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if path.is_file() or (not path.is_dir() and is_path):
        raise ModelError("no such model folder", where=name, expected="a folder or a hub id")
    listings = (ONNX_FILE, "modules.json", "config.json")
    if path.is_dir() and not any((path / file).is_file() for file in listings):
        raise ModelError(
            "no model in this folder", where=name, expected="modules.json or config.json in it"
        )


def holds_graph(name: str) -> bool:
    """Whether a folder holds an exported ONNX graph."""
    return (Path(name) / ONNX_FILE).is_file()


def is_foreign(source: ModelSource) -> bool:
    """Whether it is a sentence-transformers model that has none of our modules."""
    if model_kind(source) != "saved":
        return False
    return not any(entry.type.startswith("nvembed.") for entry in read_modules(source))


def model_kind(source: ModelSource) -> Literal["official", "saved", "language_model"]:
    """Tell what a model with weights is; ``config.json`` goes before ``modules.json``.

    A ModelError where there is nothing of that name, or its model type is unknown.
    """
    from transformers import CONFIG_MAPPING  # takes seconds

    if source.find(ONNX_FILE) is not None:
        raise ModelError(
            "an exported ONNX graph",
            where=source.name,
            expected="a model with weights",
            hint="nvembed encode and onnxruntime run it; load the model that it was exported from",
        )
    config = source.read_json("config.json")
    if config is not None and config.get("model_type") == OFFICIAL_TYPE:
        return "official"
    if source.find("modules.json") is not None:
        return "saved"
    if config is None:
        source.require("config.json")
    model_type = (config or {}).get("model_type")
    if model_type is not None and model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"unknown model_type {model_type!r} in config.json",
            where=source.name,
            expected=f"{OFFICIAL_TYPE} or a type that the installed transformers knows",
            hint="Upgrade transformers, or check that this is the right folder",
        )
    return "language_model"


# --- What its settings say ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModuleEntry:
    """One entry of ``modules.json``."""

    type: str  # dotted name of the class
    path: str  # folder of the module inside the model's; "" is the model's own


@dataclass(frozen=True, slots=True)
class SavedPrompts:
    """What ``config_sentence_transformers.json`` says that is used here."""

    prompts: dict[str, str] | None = None
    default_prompt_name: str | None = None
    similarity_fn_name: Literal["cosine", "dot", "euclidean", "manhattan"] | None = None


def read_modules(source: ModelSource) -> list[ModuleEntry]:
    """Read ``modules.json``, which must be there."""
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
        given = entry if isinstance(entry, dict) else {}
        values = {key: given.get(key) for key in ("type", "path")}
        where = f"{path}, entry {number}"
        found.append(ModuleEntry(**read_values(ModuleEntry, values, where=where)))
    return found


def read_prompts(source: ModelSource) -> SavedPrompts:
    """Read the prompts that were saved with a model; none where it has no such file."""
    name = "config_sentence_transformers.json"
    saved = source.read_json(name) or {}
    values = {key: saved.get(key) for key in SavedPrompts.__dataclass_fields__}
    return SavedPrompts(**read_values(SavedPrompts, values, where=f"{source.name}/{name}"))


def read_values(of: Callable[..., Any], values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Settings of a file that are the arguments of a constructor, every one of them checked."""
    try:
        check_settings(of, values, where=where)
    except ConfigError as error:
        raise ModelError(error.message, where=where, hint=COPY_AGAIN) from error
    return dict(values)


def read_limit(source: ModelSource, filename: str, key: str) -> int | None:
    """A number of tokens or positions that a settings file gives; ``None`` where it does not."""
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


# --- Stock modules of sentence-transformers -------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StockModel:
    """A ready model of stock modules as something to start from.

    Its ``Transformer`` becomes the backbone; its length limit, its pooling (where no other is asked
    for) and its prompts are taken over. With ``mean`` pooling the vectors are those of the model
    itself (``tests/unit/interop/test_stock.py``).
    """

    folder: str  # of the transformer inside the model; "" is the model's own
    max_tokens: int | None
    pooling_mode: str  # as sentence-transformers names it, such as mean or cls

    def pooling(self, source: ModelSource) -> Literal["mean", "last"]:
        """Its own pooling by our name; a ModelError where we have none of that kind."""
        kind = _POOLINGS.get(self.pooling_mode)
        if kind is None:
            raise ModelError(
                f"its pooling is {self.pooling_mode!r}",
                where=source.name,
                expected=" or ".join(_POOLINGS),
                hint="Say which pooling to start with (pooling=..., or model.pooling of a recipe)",
            )
        return kind


def read_stock(source: ModelSource) -> StockModel | None:
    """Read ``modules.json`` and what it names; ``None`` where the modules are not all stock ones.

    A ModelError where a stock module has no place in a model of ours: it would be lost silently.
    """
    entries = read_modules(source)
    if not all(entry.type.startswith("sentence_transformers.") for entry in entries):
        return None
    names = [entry.type.rpartition(".")[2] for entry in entries]
    if names not in (list(_MODULES), list(_MODULES[:2])):
        raise ModelError(
            f"its modules are {', '.join(names)}",
            where=source.name,
            expected=f"{', '.join(_MODULES)} to start from",
            hint="Use it with SentenceTransformer, or start from the language model inside",
        )
    transformer, pooling = (replace(source, inside=entry.path) for entry in entries[:2])
    pooling.require("config.json", hint=COPY_AGAIN)
    return StockModel(entries[0].path, _limit(transformer), _pooling_mode(pooling))


def _limit(source: ModelSource) -> int | None:
    """Old folders say it themselves, of new ones the tokenizer and the position table do."""
    places = (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
        ("config.json", "max_position_embeddings"),
    )
    own, *others = (read_limit(source, file, key) for file, key in places)
    return own if own is not None else min((x for x in others if x is not None), default=None)


def _pooling_mode(source: ModelSource) -> str:
    """One string in new folders, one flag per mode in old ones."""
    config = source.read_json("config.json") or {}
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        modes = mode if isinstance(mode, list) else [mode]
        if not all(isinstance(part, str) for part in modes):
            raise ModelError(
                f"pooling_mode is {shown_value(mode)}",
                where=f"{source.name}/{source.inside}/config.json",
                expected="a text such as mean",
                hint=COPY_AGAIN,
            )
        return "+".join(modes)
    flags = {
        "cls_token": "cls",
        "mean_tokens": "mean",
        "lasttoken": "lasttoken",
        "max_tokens": "max",
        "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
        "weightedmean_tokens": "weightedmean",
    }
    found = [mode for flag, mode in flags.items() if config.get(f"pooling_mode_{flag}")]
    return "+".join(found) or "mean"
