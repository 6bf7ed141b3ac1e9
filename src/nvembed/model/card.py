"""The README of a model folder: what it is, how to load it, what made it, how it scored.

What was trained is in the run folder around a model. A model that was copied out of it, or saved
anew, keeps what the card of the folder it was loaded from says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import try_to_load_from_cache
from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

from nvembed.core import __version__
from nvembed.core.config import parse_yaml
from nvembed.core.errors import DataError, UserError
from nvembed.core.files import read_json_object
from nvembed.core.runs import RunFolder
from nvembed.data.instructions import task_prompts
from nvembed.model.encoding import EncodingModel

CARD = "README.md"
CardKind = Literal["nv-embed", "nvembed", "sentence-transformers", "onnx"]
_TRAINING = "\n## Training\n"
# What a card keeps of the head of the one that it follows.
_INHERITED = ("license", "license_link", "license_name", "base_model", "datasets", "language")


def model_card(
    model: EncodingModel,
    kind: CardKind = "nvembed",
    *,
    origin: str,
    place: str,
    run: RunFolder | None = None,
    stock: bool = False,
    made: str = "",
) -> str:
    """Render the card of a model folder.

    Args:
        model: what the folder holds.
        kind: format of the folder.
        origin: folder or hub id that the model was loaded from, or was trained on.
        place: folder or hub id of the new model, for the code that loads it.
        run: the run that made the model; ``None`` looks for one around ``origin``.
        stock: whether sentence-transformers can run an exported graph.
        made: Markdown that says how the model became another one than ``origin``.
    """
    earlier, text = read_card(origin)
    base_licence = earlier.get("license")
    if run is not None:  # what is trained on a model is another one, under a licence of its own
        earlier = {key: value for key, value in earlier.items() if "license" not in key}
    run, of_tasks = run or RunFolder(Path(origin).parent), task_prompts()
    recipe, problem = _recipe(run)
    head = _head(model, earlier, recipe, origin)
    parts = {
        "kind": kind,
        "title": _title(place, run if run.exists else None),
        "origin": _shown(origin),
        "place": json.dumps(_shown(place, whole=True), ensure_ascii=False),
        "stock": stock,
        "made": made,
        "version": __version__,
        "backbone": model.backbone,
        "dtype": str(model.backbone.model.dtype).removeprefix("torch."),
        "pooling": type(model.pooling).__name__,
        "dimension": model.dimension,
        "parameters": sum(p.numel() for p in model.parameters()),
        "query_prompt": model.prompts.get("query"),
        "prompts": [(k, json.dumps(v)) for k, v in model.prompts.items() if k not in of_tasks],
        "of_tasks": any(key in of_tasks for key in model.prompts),
        "licence": head.get("license"),
        "env": _json(run.env) or {},
        "scores": [] if made else _scores(run),
        "head": yaml.safe_dump(head, sort_keys=False, allow_unicode=True),
        "base": _shown(_base(recipe) or origin),
        "base_licence": base_licence,
        "kept": text.partition(_TRAINING)[2] if not run.exists else "",
    }
    if made:  # whose scores nobody has taken
        parts["kept"] = str(parts["kept"]).partition("\n## Scores\n")[0]
    template = _environment().get_template("model_card.jinja", globals=parts)
    try:
        return template.render(recipe=recipe, problem=problem)
    except (TypeError, UndefinedError):
        return template.render(recipe=None, problem=_no_recipe(run))


def merged_card(place: Path, parts: Sequence[tuple[str, float]], method: str) -> str:
    """Render the card of a model merged of others, by their folders and shares.

    Licence and base are said where the cards of all parts say the same.
    """
    heads = [read_card(name)[0] for name, _ in parts]
    head: dict[str, Any] = {
        key: heads[0][key]
        for key in ("license", "base_model", "language")
        if heads[0].get(key) and all(other.get(key) == heads[0][key] for other in heads)
    }
    rows = [f"| `{_shown(name)}` | {share:.4g} |" for name, share in parts]
    return "\n".join(
        (
            f"---\n{yaml.safe_dump(head | {'tags': ['merge', 'nvembed']}, sort_keys=False)}---\n",
            f"# {place.name}\n",
            f"Merged by nvembed {__version__} ({method}), tensor by tensor; what is not weights is",
            "that of the first. Each part has a card of its own.\n",
            "| part | share |\n|---|---|",
            *rows,
            "",
        )
    )


def read_card(name: str) -> tuple[dict[str, Any], str]:
    """Head (its YAML) and text of a model's card, in its folder or in the cache of the hub."""
    path: Any = Path(name) / CARD
    with suppress(OSError, ValueError):  # ValueError: not the form of a hub id, or no YAML
        if not Path(name).is_dir():
            path = try_to_load_from_cache(name, CARD)
        if isinstance(path, str | Path):
            text = Path(path).read_text(encoding="utf-8")
            head, _, rest = text.removeprefix("---\n").partition("\n---")
            if not text.startswith("---\n"):
                return {}, text
            values = parse_yaml(head).value
            return (values if isinstance(values, dict) else {}), rest
    return {}, ""


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )


def _head(
    model: EncodingModel, earlier: Mapping[str, Any], recipe: Mapping[str, Any] | None, origin: str
) -> dict[str, Any]:
    """What the hub reads of a card; nothing is said that no file says."""
    head: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "nvembed"],
    }
    head |= {key: earlier[key] for key in _INHERITED if earlier.get(key) is not None}
    if model.backbone.text_style == "official":  # its weights stem from NVIDIA's
        head["license"] = "cc-by-nc-4.0"
    base = _base(recipe) or origin
    if _is_hub_id(base):
        head["base_model"] = base
    sets = [row for row in (recipe or {}).get("datasets") or () if isinstance(row, dict)]
    places = [*(earlier.get("datasets") or ()), *((row.get("hub") or {}).get("id") for row in sets)]
    if ids := [place for place in dict.fromkeys(places) if place and _is_hub_id(place)]:
        head["datasets"] = ids
    return head


def _base(recipe: Mapping[str, Any] | None) -> str | None:
    """What a recipe starts from."""
    model = (recipe or {}).get("model")
    return str(model["backbone"]) if isinstance(model, dict) and model.get("backbone") else None


def _recipe(run: RunFolder) -> tuple[dict[str, Any] | None, str]:
    """The recipe of a run, or why there is none."""
    if not run.exists:
        return None, "the model lay in no run folder"
    with suppress(UserError):
        return run.read_recipe(), ""
    return None, _no_recipe(run)


def _no_recipe(run: RunFolder) -> str:
    return f"{run.config} is not the configuration of a run"


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not Path(name).exists()


def _title(place: str, run: RunFolder | None) -> str:
    name = Path(place).name
    if run is None or Path(place).parent.resolve() != run.path.resolve():
        return name
    folder = run.path.resolve()
    of_run = folder.parent.name if folder.name == "run" else folder.name  # as init calls it
    return of_run if name == run.model.name else f"{of_run}, {name}"


def _shown(name: str, *, whole: bool = False) -> str:
    """A place as it may be published: nothing of the disk above the working folder."""
    path = Path(name)
    if not path.is_absolute():
        return name
    if path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd()).as_posix()
    return name if whole else path.name


def _scores(run: RunFolder) -> list[tuple[object, ...]]:
    """Return evaluation, task, measure and score of every task that was evaluated."""
    rows: list[tuple[object, ...]] = []
    with suppress(UserError, AttributeError, KeyError, TypeError):  # no run, or a damaged one
        settings = run.read_recipe().get("evaluation") or {}
        evaluations = run.read_evaluations(keep_best=settings.get("keep_best", True))
        rows += [
            (evaluation, task, "main score", f"{score:.4f}")
            for evaluation, scores in evaluations.items()
            for task, score in scores.items()
            if score is not None
        ]
    return rows + [
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
