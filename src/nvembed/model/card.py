"""The README of a model folder: what it is, how to load it, what made it, how it scored.

What was trained is in the run folder around a model. A model that was copied out of it, or saved
anew, keeps what the card of the folder it was loaded from says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import try_to_load_from_cache
from jinja2 import Environment, StrictUndefined, UndefinedError

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
        "origin": shown_place(origin),
        "place": json.dumps(shown_place(place, whole=True), ensure_ascii=False),
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
        "base": shown_place(_base(recipe) or origin),
        "base_licence": base_licence,
        "kept": text.partition(_TRAINING)[2] if not run.exists else "",
    }
    if made:  # whose scores nobody has taken
        parts["kept"] = str(parts["kept"]).partition("\n## Scores\n")[0]
    pages = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    template = pages.from_string(_CARD, globals=parts)
    try:
        return template.render(recipe=recipe, problem=problem)
    except (TypeError, UndefinedError):
        return template.render(recipe=None, problem=_no_recipe(run))


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


def shown_place(name: str, *, whole: bool = False) -> str:
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


# --- The page -------------------------------------------------------------------------------------

_CARD = r"""{% set official = backbone.text_style == "official" %}
{% set task = "Given a question, retrieve passages that answer it" %}
{% set by_task = "" if query_prompt else ', task="%s"' % task %}
{% set by_prompt = "" if query_prompt else ', prompt="Instruct: %s\\nQuery: "' % task %}
{% macro usage(by) %}
queries = model.encode_query(["how do I sort a list?"]{{ by }})
documents = model.encode_document(["sorted(x) returns a new sorted list.", "pi is a constant."])
print(model.similarity(queries, documents))
{% endmacro %}
---
{{ head }}---

# {{ title }}

A text-embedding model written by nvembed {{ version }}{% if kind != "nvembed" %}, as `{{ kind }}`,{% endif %} from `{{ origin }}`. A text becomes {{ dimension }} numbers;
the cosine of two texts says how near they are.

## Use

{% if kind == "onnx" %}
Needs `onnxruntime`, `tokenizers` and `numpy` alone. The tokenizer adds BOS and EOS by itself.
The tokens of an instruction are read and not pooled.

```python
import numpy as np, onnxruntime
from tokenizers import Tokenizer

FOLDER = "."
session = onnxruntime.InferenceSession(f"{FOLDER}/model.onnx")
tokenizer = Tokenizer.from_file(f"{FOLDER}/tokenizer.json")
tokenizer.enable_truncation({{ backbone.max_tokens }})
tokenizer.enable_padding()

def embed(texts, instruction=None):
    prompt = f"Instruct: {instruction}\nQuery: " if instruction else ""
    rows = tokenizer.encode_batch([prompt + text for text in texts])
    mask = np.array([row.attention_mask for row in rows])
    pool = mask.copy()
    for row, kept in zip(rows, pool):
        if prompt:
{% if official %}
            kept[: len(tokenizer.encode(prompt, add_special_tokens=False).ids)] = 0
{% else %}
{# The first token that holds a character of the text, or the EOS where there is no text. #}
            inside = [end > len(prompt) for _, end in row.offsets]
            kept[: inside.index(True) if any(inside) else kept.sum() - 1] = 0
{% endif %}
    ids = np.array([row.ids for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask, "pool_mask": pool}
    return session.run(["sentence_embedding"], inputs)[0]

queries = embed(["how do I sort a list?"], "Given a question, retrieve passages that answer it")
documents = embed(["sorted(x) returns a new sorted list."])
print(queries @ documents.T)
```
{% if official %}
Of texts that are too long NVIDIA's code loses the EOS, and so does `nvembed encode`; the code above
keeps it.
{% endif %}
{% if stock %}
`SentenceTransformer(FOLDER, backend="onnx")` gives the same vectors, with
`optimum-onnx` installed, but for queries that start with a character which does not join a space
before it.
{% endif %}
{% else %}
{% if kind == "sentence-transformers" %}
```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({{ place }})  # or wherever this folder lies
{{ usage(by_prompt) }}```
{% else %}
With nvembed (`pip install nvembed`):

```python
from nvembed import NVEmbed

model = NVEmbed.from_pretrained({{ place }})  # or wherever this folder lies
{{ usage(by_task) }}```
{% if kind == "nvembed" %}

With sentence-transformers, and nvembed installed, whose classes the folder names:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({{ place }}, trust_remote_code=True)
{{ usage(by_prompt) }}```
{% else %}

NVIDIA's own code reads the folder too (`trust_remote_code=True`).
{% endif %}
{% endif %}
{% endif %}

## What it is

- backbone: {{ backbone.model.config.model_type }}, {{ backbone.attention }} attention, {{ dtype }}
- pooling: {{ pooling }}, width {{ dimension }}, {{ "{:,}".format(parameters) }} parameters in all
- longest text: {{ backbone.max_tokens }} tokens, the prompt among them; what is longer is cut
- queries are embedded with an instruction, documents without one
{% if official %}
- token rules: those of NVIDIA's code. Weights that stem from NVIDIA's release keep its licence, CC-BY-NC-4.0.
{% endif %}
{% for name, text in prompts %}
- prompt `{{ name }}`: {{ text }}
{% endfor %}
{% if of_tasks %}
- prompts of the MTEB tasks by name, such as `prompt_name="FiQA2018"`
{% endif %}

{% if made %}
## How it was made smaller

{{ made }}
{% endif %}
## Limits

How good it is on other texts, questions and languages than those below, nobody has measured:
`nvembed evaluate` does, on files of your own. Learned similarities repeat what is in the data.

## Licence

{% if licence %}
{{ licence }}
{% else %}
Not stated. The weights stem from `{{ base }}`{% if base_licence %} ({{ base_licence }}){% endif %}; data sets have licences of their own.
{% endif %}

## Training

{% if kept %}
{{ kept.strip() }}
{% else %}
{% if recipe is none %}
Not recorded: {{ problem }}.
{% else %}
{% set lora = recipe.get("lora") or {} %}
{% set kind = "DoRA" if lora.get("dora") else "LoRA" %}
{% set adapters = "%s of rank %s" % (kind, lora.rank) if lora else "all weights" %}
{% set trained = "nothing of the backbone" if recipe.get("backbone") == "freeze" else adapters %}
Started from `{{ base }}`; trained: {{ trained }}; pooling head: {{ recipe.get("pooling_head", "train") }}; seed {{ recipe.seed }}.

| stage | steps | queries per step | learning rate | in-batch negatives | hard negatives per query | temperature |
|---|---|---|---|---|---|---|
{% for stage in recipe.stages %}
| {{ stage.name }} | {{ stage.steps }} | {{ stage.batch_size }} | {{ stage.learning_rate }} | {{ "on" if stage.in_batch_negatives else "off" }} | {{ stage.get("num_negatives") }}{{ ", mined" if stage.get("mine") }} | {{ stage.get("temperature") }} |
{% endfor %}

| data set | kind | instruction | source | licence |
|---|---|---|---|---|
{% for data in recipe.datasets %}
{% set place = (data.get("hub") or {}).get("id") or (data.get("path") or "").rstrip("/").split("/")[-1] %}
| {{ data.name }} | {{ data.kind }} | {{ data.instruction or "none" }} | {{ place }} | {{ data.get("licence") or "not stated" }} |
{% endfor %}
{% set commit = (env.get("git") or {}).get("commit") %}
{% if commit %}

nvembed at commit {{ commit }}.
{% endif %}
{% endif %}

## Scores

{% if scores %}
| evaluation | task | measure | score |
|---|---|---|---|
{% for row in scores %}
| {{ row | join(" | ") }} |
{% endfor %}
{% else %}
None recorded.
{% endif %}
{% endif %}
"""  # noqa: E501
