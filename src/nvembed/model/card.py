"""The model card: what a folder is, what it was made from, how it scored; nothing made up.

Data, recipe and scores come from the run folder that the model lies in; without one the card says
so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvembed.core.errors import DataError, UserError
from nvembed.core.files import read_json_object
from nvembed.core.runs import RunFolder
from nvembed.text.instructions import task_prompts

if TYPE_CHECKING:
    from nvembed.model.embedder import NVEmbed

_USE = {
    "nv-embed": "NVEmbed.from_pretrained(FOLDER), or NVIDIA's own code (trust_remote_code=True)",
    "nvembed": "NVEmbed.from_pretrained(FOLDER), or SentenceTransformer(FOLDER, "
    "trust_remote_code=True) with nvembed installed",
    "sentence-transformers": "SentenceTransformer(FOLDER)",
    "onnx": "onnxruntime.InferenceSession(FOLDER/model.onnx); nvembed_onnx.json names its inputs",
}


def model_card(model: NVEmbed, kind: str, name: str) -> str:
    """Render the README of an exported folder.

    Args:
        model: the model that was written.
        kind: the format.
        name: where it was loaded from; in a run folder, the run is described.
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
