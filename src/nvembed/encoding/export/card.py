"""The model card: what a folder is, what it was made from, how it scored; nothing made up.

Data, recipe and scores come from the run folder that the model lies in; without one the card says
so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvembed.core.errors import DataError, UserError
from nvembed.core.runs import RunFolder
from nvembed.core.text_files import read_json_object
from nvembed.text.instructions import task_prompts

if TYPE_CHECKING:
    from nvembed.model.embedder import NVEmbed

_LOAD = {
    "nv-embed": "NVEmbed.from_pretrained(FOLDER), or NVIDIA's own code (trust_remote_code=True)",
    "nvembed": "NVEmbed.from_pretrained(FOLDER), or SentenceTransformer(FOLDER, "
    "trust_remote_code=True) with nvembed installed",
    "sentence-transformers": "SentenceTransformer(FOLDER)",
    "onnx": "nvembed encode FOLDER, or onnxruntime as below",
}

_ONNX_USE = """
## Use

Needs `onnxruntime`, `tokenizers` and `numpy` alone. The tokenizer adds BOS and EOS by itself.
The tokens of an instruction are read and not pooled.

```python
import numpy as np, onnxruntime
from tokenizers import Tokenizer

FOLDER = "."
session = onnxruntime.InferenceSession(f"{FOLDER}/model.onnx")
tokenizer = Tokenizer.from_file(f"{FOLDER}/tokenizer.json")
tokenizer.enable_truncation(%d)
tokenizer.enable_padding()

def embed(texts, instruction=None):
    prompt = f"Instruct: {instruction}\\nQuery: " if instruction else ""
    rows = tokenizer.encode_batch([prompt + text for text in texts])
    mask = np.array([row.attention_mask for row in rows])
    pool = mask.copy()
    for row, kept in zip(rows, pool):
        if prompt:
%s
    ids = np.array([row.ids for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask, "pool_mask": pool}
    return session.run(["sentence_embedding"], inputs)[0]

queries = embed(["how do I sort a list?"], "Given a question, retrieve passages that answer it")
documents = embed(["sorted(x) returns a new sorted list."])
print(queries @ documents.T)
```
"""

_LICENCE = "license: cc-by-nc-4.0\n"
_OF_STAGE = ("name", "steps", "batch_size", "learning_rate")

_OFFICIAL_RULES = """\
- token rules: those of NVIDIA's code. Weights that stem from NVIDIA's release keep its licence, \
CC-BY-NC-4.0.
"""

# The first token that holds a character of the text, or the EOS where there is no text.
_OWN_START = """\
            inside = [end > len(prompt) for _, end in row.offsets]
            kept[: inside.index(True) if any(inside) else kept.sum() - 1] = 0"""
_OFFICIAL_START = """\
            kept[: len(tokenizer.encode(prompt, add_special_tokens=False).ids)] = 0"""

_ONNX_OFFICIAL_USE = """\
Of texts that are too long NVIDIA's code loses the EOS, and so does `nvembed encode`; the code above
keeps it.
"""

_ONNX_STOCK_USE = """\
`SentenceTransformer(FOLDER, backend="onnx")` gives the same vectors, with
`optimum-onnx` installed, but for queries that start with a character which does not join a space
before it.
"""


def model_card(model: NVEmbed, kind: str, name: str, *, stock: bool = False) -> str:
    """Render the README of an exported folder.

    ``kind`` is the format, ``name`` where the model was loaded from, and ``stock`` whether
    sentence-transformers can run an exported graph.
    """
    backbone = model.backbone
    official = backbone.text_style == "official"
    usage = ""
    if kind == "onnx":
        usage = _ONNX_USE % (backbone.max_tokens, _OFFICIAL_START if official else _OWN_START)
        usage += (_ONNX_OFFICIAL_USE if official else "") + (_ONNX_STOCK_USE if stock else "")
    run = RunFolder(Path(name).parent)
    dtype = str(backbone.model.dtype).removeprefix("torch.")
    return f"""\
---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
{_LICENCE if official else ""}---

# {Path(name).name}

A text-embedding model exported by nvembed as `{kind}` from `{name}`.
Load it with `{_LOAD[kind]}`.

- backbone: {backbone.model.config.model_type}, {backbone.attention} attention, {dtype}
- pooling: {type(model.pooling).__name__}, width {model.dimension}, \
{sum(p.numel() for p in model.parameters()):,} parameters in all
- longest text: {backbone.max_tokens} tokens
{_OFFICIAL_RULES if official else ""}{_prompts(model.prompts)}{usage}
## Training

{_training(run)}

## Scores

{_scores(run) or "None recorded."}
"""


def _prompts(prompts: Mapping[str, str | None]) -> str:
    of_tasks = task_prompts()
    own = {name: text for name, text in prompts.items() if name not in of_tasks}
    lines = [f"- prompt `{name}`: {json.dumps(text)}\n" for name, text in own.items()]
    if len(own) < len(prompts):
        lines.append('- prompts of the MTEB tasks by name, such as `prompt_name="FiQA2018"`\n')
    return "".join(lines)


def _training(run: RunFolder) -> str:
    if not run.exists:
        return "Not recorded: the model lay in no run folder."
    try:
        config = run.read_recipe()
        lora, freeze = config.get("lora"), config.get("backbone") == "freeze"
        adapters = f"LoRA of rank {lora['rank']}" if lora else "all weights"
        trained = "nothing of the backbone" if freeze else adapters
        stages = [
            [*map(stage.__getitem__, _OF_STAGE), "on" if stage["in_batch_negatives"] else "off"]
            for stage in config["stages"]
        ]
        data = [[row["name"], row["kind"], row["instruction"]] for row in config["datasets"]]
        commit = ((_json(run.env) or {}).get("git") or {}).get("commit")
        return "\n\n".join(
            [
                f"Started from `{config['model']['backbone']}`; trained: {trained}; "
                f"pooling head: {config.get('pooling_head', 'train')}; seed {config['seed']}.",
                _table("stage|steps|queries per step|learning rate|in-batch negatives", stages),
                _table("data set|kind|instruction", data),
                *([f"nvembed at commit {commit}."] if commit else []),
            ]
        )
    except (UserError, KeyError, TypeError, AttributeError):
        return f"Not recorded: {run.config} is not the configuration of a run."


def _scores(run: RunFolder) -> str:
    rows = [
        (path.stem, task, result.get("main_score_name"), f"{result['main_score']:.4f}")
        for path in sorted(run.eval.glob("*.json"))
        for task, result in sorted((_json(path) or {}).items())
        if isinstance(result, dict) and isinstance(result.get("main_score"), int | float)
    ]
    return _table("evaluation|task|measure|score", rows) if rows else ""


def _table(head: str, rows: Sequence[Sequence[object]]) -> str:
    """Render a table of Markdown; the names of its columns are given with ``|`` between them."""
    names = head.split("|")
    lines = [f"| {' | '.join(map(str, row))} |" for row in (names, *rows)]
    return "\n".join([lines[0], "|---" * len(names) + "|", *lines[1:]])


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(path, "an object")
    except DataError:
        return None
