"""The model card: what a folder is, what it was made from, how it scored; nothing made up.

Data, recipe and scores come from the run folder that the model lies in; without one the card says
so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvembed.core.errors import DataError, UserError
from nvembed.core.runs import RunFolder
from nvembed.core.text_files import read_json_object
from nvembed.text.instructions import task_prompts

if TYPE_CHECKING:
    from nvembed.model.embedder import NVEmbed

_USE = {
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
tokenizer.enable_truncation(%(max_tokens)d)
tokenizer.enable_padding()

def embed(texts, instruction=None):
    prompt = f"Instruct: {instruction}\\nQuery: " if instruction else ""
    rows = tokenizer.encode_batch([prompt + text for text in texts])
    mask = np.array([row.attention_mask for row in rows])
    pool = mask.copy()
    for row, kept in zip(rows, pool):
        if prompt:
%(start)s
    ids = np.array([row.ids for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask, "pool_mask": pool}
    return session.run(["sentence_embedding"], inputs)[0]

queries = embed(["how do I sort a list?"], "Given a question, retrieve passages that answer it")
documents = embed(["sorted(x) returns a new sorted list."])
print(queries @ documents.T)
```"""

# The first token that holds a character of the text, or the EOS where there is no text.
_OWN_START = """\
            inside = [end > len(prompt) for _, end in row.offsets]
            kept[: inside.index(True) if any(inside) else kept.sum() - 1] = 0"""
_OFFICIAL_START = """\
            kept[: len(tokenizer.encode(prompt, add_special_tokens=False).ids)] = 0"""

_ONNX_OFFICIAL_USE = """
Of texts that are too long NVIDIA's code loses the EOS, and so does `nvembed encode`; the code above
keeps it."""

_ONNX_STOCK_USE = """
`SentenceTransformer(FOLDER, backend="onnx")` gives the same vectors, with
`optimum-onnx` installed, but for queries that start with a character which does not join a space
before it."""


def model_card(model: NVEmbed, kind: str, name: str, *, stock: bool = False) -> str:
    """Render the README of an exported folder.

    Args:
        model: the model that was written.
        kind: the format.
        name: where it was loaded from; in a run folder, the run is described.
        stock: whether sentence-transformers can run an exported graph.
    """
    backbone = model.backbone
    official = backbone.text_style == "official"
    lines = [
        "---",
        "library_name: sentence-transformers",
        "pipeline_tag: sentence-similarity",
        *(["license: cc-by-nc-4.0"] if official else []),
        "---",
        "",
        f"# {Path(name).name}",
        "",
        f"A text-embedding model exported by nvembed as `{kind}` from `{name}`.",
        f"Load it with `{_USE[kind]}`.",
        "",
        f"- backbone: {backbone.model.config.model_type}, {backbone.attention} attention, "
        f"{backbone.model.dtype}".replace("torch.", ""),
        f"- pooling: {type(model.pooling).__name__}, width {model.dimension}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters in all",
        f"- longest text: {backbone.max_tokens} tokens",
    ]
    if official:
        lines += [
            "- token rules: those of NVIDIA's code. Weights that stem from NVIDIA's release keep "
            "its licence, CC-BY-NC-4.0.",
        ]
    of_tasks = task_prompts()
    lines += [
        f"- prompt `{key}`: {json.dumps(text)}"
        for key, text in model.prompts.items()
        if key not in of_tasks
    ]
    if any(key in of_tasks for key in model.prompts):
        lines += ['- prompts of the MTEB tasks by name, such as `prompt_name="FiQA2018"`']
    if kind == "onnx":
        start = _OFFICIAL_START if official else _OWN_START
        use = _ONNX_USE % {"max_tokens": backbone.max_tokens, "start": start}
        use += (_ONNX_OFFICIAL_USE if official else "") + (_ONNX_STOCK_USE if stock else "")
        lines += use.splitlines()
    run = RunFolder(Path(name).parent)
    lines += ["", "## Training", ""]
    try:
        lines += _training(run) if run.exists else ["Not recorded: the model lay in no run folder."]
    except (UserError, KeyError, TypeError, AttributeError):
        lines += [f"Not recorded: {run.config} is not the configuration of a run."]
    lines += ["", "## Scores", ""]
    lines += _scores(run) or ["None recorded."]
    return "\n".join(lines) + "\n"


def _training(run: RunFolder) -> list[str]:
    config = run.read_recipe()
    lora = config.get("lora")
    adapters = f"LoRA of rank {lora['rank']}" if lora else "all weights"
    if config.get("backbone") == "freeze":
        adapters = "nothing of the backbone"
    lines = [
        f"Started from `{config['model']['backbone']}`; trained: {adapters}; "
        f"pooling head: {config.get('pooling_head', 'train')}; seed {config['seed']}.",
        "",
        "| stage | steps | queries per step | learning rate | in-batch negatives |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {stage['name']} | {stage['steps']} | {stage['batch_size']} | {stage['learning_rate']} "
        f"| {'on' if stage['in_batch_negatives'] else 'off'} |"
        for stage in config["stages"]
    ]
    lines += ["", "| data set | kind | instruction |", "|---|---|---|"]
    lines += [
        f"| {data['name']} | {data['kind']} | {data['instruction']} |"
        for data in config["datasets"]
    ]
    commit = ((_json(run.env) or {}).get("git") or {}).get("commit")
    return [*lines, "", f"nvembed at commit {commit}."] if commit else lines


def _scores(run: RunFolder) -> list[str]:
    rows = []
    for path in sorted(run.eval.glob("*.json")):
        for task, result in sorted((_json(path) or {}).items()):
            if isinstance(result, dict) and isinstance(result.get("main_score"), int | float):
                score = f"{result['main_score']:.4f}"
                rows.append(f"| {path.stem} | {task} | {result.get('main_score_name')} | {score} |")
    head = ["| evaluation | task | measure | score |", "|---|---|---|---|"]
    return [*head, *rows] if rows else []


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(path, "an object")
    except DataError:
        return None
