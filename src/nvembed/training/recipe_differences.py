"""Which keys of two recipes differ, of those that a run depends on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

FREE_KEYS = frozenset(
    {
        "output",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "trackers",
        "peer_timeout_minutes",
    }
)
"""Keys of a recipe that may change while a run is stopped: no weight depends on them."""


def recipe_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``key: old → new`` for every key that differs and is not one of ``FREE_KEYS``."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    keys = [key for key in {**before, **after} if key.split(".")[0] not in FREE_KEYS]
    return [
        f"{key}: {_shown(before, key)} → {_shown(after, key)}"
        for key in keys
        if _shown(before, key) != _shown(after, key)
    ]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested data by dotted path."""
    inside: Iterator[tuple[Any, Any]] | None = None
    if isinstance(value, Mapping):
        inside = iter(value.items())
    elif isinstance(value, list | tuple):
        inside = iter(enumerate(value))
    if inside is None:
        yield path, value
        return
    for key, item in inside:
        yield from _leaves(item, f"{path}.{key}" if path else str(key))


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "not there"
