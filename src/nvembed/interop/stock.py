"""Models of stock modules of sentence-transformers, as something to start from."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

from nvembed.core.arguments import shown_value
from nvembed.core.errors import ModelError
from nvembed.interop.model_folder import COPY_AGAIN, ModelSource, damaged, read_limit, read_modules

# By the last part of the class name: stock modules have moved between packages over the years.
_MODULES = ("Transformer", "Pooling", "Normalize")
_POOLINGS: dict[str, Literal["mean", "last"]] = {"mean": "mean", "lasttoken": "last"}


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
