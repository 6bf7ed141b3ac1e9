"""The model card: what a folder is, what it was made from, how it scored; nothing made up.

Data, recipe and scores come from the run folder that the model lies in; without one the card says
so. Its text is ``model_card.jinja``, beside this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

from nvembed.core.errors import DataError, UserError
from nvembed.core.files import read_json_object
from nvembed.core.runs import RunFolder
from nvembed.text.instructions import task_prompts

if TYPE_CHECKING:
    from nvembed.model.embedder import NVEmbed


def model_card(model: NVEmbed, kind: str, name: str, *, stock: bool = False) -> str:
    """Render the README of an exported folder.

    ``kind`` is the format, ``name`` where the model was loaded from, and ``stock`` whether
    sentence-transformers can run an exported graph.
    """
    run, of_tasks = RunFolder(Path(name).parent), task_prompts()
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    card = environment.get_template(
        "model_card.jinja",
        globals={
            "backbone": model.backbone,
            "title": Path(name).name,
            "kind": kind,
            "name": name,
            "stock": stock,
            "dtype": str(model.backbone.model.dtype).removeprefix("torch."),
            "pooling": type(model.pooling).__name__,
            "dimension": model.dimension,
            "parameters": sum(p.numel() for p in model.parameters()),
            "prompts": [(k, json.dumps(v)) for k, v in model.prompts.items() if k not in of_tasks],
            "of_tasks": any(key in of_tasks for key in model.prompts),
            "env": _json(run.env) or {},
            "scores": _scores(run),
        },
    )
    try:
        recipe = run.read_recipe() if run.exists else None
        return card.render(recipe=recipe, problem="the model lay in no run folder")
    except (UserError, TypeError, UndefinedError):
        problem = f"{run.config} is not the configuration of a run"
        return card.render(recipe=None, problem=problem)


def _scores(run: RunFolder) -> list[tuple[object, ...]]:
    """Return evaluation, task, measure and score of every task that was evaluated."""
    return [
        (path.stem, task, result.get("main_score_name"), f"{result['main_score']:.4f}")
        for path in sorted(run.eval.glob("*.json"))
        for task, result in sorted((_json(path) or {}).items())
        if isinstance(result, dict) and isinstance(result.get("main_score"), int | float)
    ]


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(path, "an object")
    except DataError:
        return None
