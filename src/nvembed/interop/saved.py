"""Settings that were saved with a model: its modules, prompts and limits.

A model of stock modules of sentence-transformers is something to start from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from nvembed.core.arguments import check_settings, kind_of, shown_value
from nvembed.core.errors import ConfigError, ModelError
from nvembed.interop.model_folder import (
    COPY_AGAIN,
    ModelSource,
    damaged,
    model_kind,
    read_json_file,
)

# By the last part of the class name: stock modules have moved between packages over the years.
_MODULES = ("Transformer", "Pooling", "Normalize")
_POOLINGS: dict[str, Literal["mean", "last"]] = {"mean": "mean", "lasttoken": "last"}


class ModuleEntry(NamedTuple):
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
        expected = '[{"type": "...", "path": "..."}]'
        raise damaged(f"not a list of modules, but {kind_of(entries)}", path, expected)
    found = []
    for number, entry in enumerate(entries):
        given = entry if isinstance(entry, dict) else {}
        values = {key: given.get(key) for key in ModuleEntry._fields}
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
        raise damaged(error.message, where) from error
    return dict(values)


def read_limit(source: ModelSource, filename: str, key: str) -> int | None:
    """A number of tokens or positions that a settings file gives; ``None`` where it does not."""
    limit = (source.read_json(filename) or {}).get(key)
    # Where there is no limit, tokenizers say 1e30, some of them as a float.
    if limit is None or (isinstance(limit, int | float) and limit >= 1 and limit is not True):
        return None if limit is None else int(limit)
    where = f"{source.name}/{filename}"
    raise damaged(f"{key} is {shown_value(limit)}", where, "a number of tokens")


# --- Stock modules --------------------------------------------------------------------------------


def is_foreign(source: ModelSource) -> bool:
    """Whether it is a sentence-transformers model that has none of our modules."""
    if model_kind(source) != "saved":
        return False
    return not any(entry.type.startswith("nvembed.") for entry in read_modules(source))


class StockModel(NamedTuple):
    """A ready model of stock modules as something to start from.

    With ``mean`` pooling the vectors are those of the model itself.
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
    """Read ``modules.json`` and what it names; ``None`` where some module is no stock one."""
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
            where = f"{source.name}/{source.inside}/config.json"
            raise damaged(f"pooling_mode is {shown_value(mode)}", where, "a text such as mean")
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
