"""Which retrieval tasks leave out the result that has the id of its query, as data."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import yaml


def ignores_identical_ids(name: str) -> str | None:
    """Look up a task by its name in mteb, or by the name of its folder in BEIR's release.

    Returns:
        The name in mteb of a task whose results may not have the id of their query, ``None`` for
        all others.
    """
    return _by_folded_name().get(name.casefold())


@cache
def _by_folded_name() -> dict[str, str]:
    path = files("nvembed.evaluation.reference").joinpath("identical_ids.yaml")
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = {task.casefold(): task for task in table["tasks"]}
    return table["beir"] | names
