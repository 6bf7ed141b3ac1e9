"""A recipe that teaches a smaller model the vectors of the whole one."""

from __future__ import annotations

import json
import os
from pathlib import Path

from nvembed.data.instructions import prompt_instruction, task_prompts
from nvembed.model.embedder import NVEmbed

RECIPE = "recover.yaml"
_MOST_PROMPTS = 16
_INSTRUCTION = "Given a question, retrieve passages that answer the question"


def instructions_of(model: NVEmbed) -> list[str]:
    """Some of a model's instructions: its own, then MTEB's, both from all over their lists."""
    of_tasks = task_prompts()
    own, others = dict[str, None](), dict[str, None]()
    for name, prompt in model.prompts.items():
        if instruction := prompt_instruction(prompt):
            (others if name in of_tasks else own)[instruction] = None
    known = _spread(list(own), _MOST_PROMPTS // 2)
    rest = [instruction for instruction in others if instruction not in known]
    return known + _spread(rest, _MOST_PROMPTS - len(known)) or [_INSTRUCTION]


def _spread(items: list[str], most: int) -> list[str]:
    """The first of equal parts of a list."""
    return items[:: -(-len(items) // most) or 1]


def recovery_recipe(model: NVEmbed, name: str, texts: Path, to: Path, count: int) -> str:
    """A recipe, to lie in the folder ``to``, that teaches it the vectors of the whole model.

    It reads documents and as many queries, which have some of the model's instructions in turn.
    """
    prompts = instructions_of(model)

    def seen_from(path: str | Path) -> str:
        place = os.path.relpath(Path(path).resolve(), to.resolve())
        return json.dumps(place if Path(path).exists() else str(path), ensure_ascii=False)

    backbone = json.dumps(f"../{to.resolve().name}", ensure_ascii=False)
    batch, path, many = min(128, count), seen_from(texts), len(prompts)
    output = json.dumps(f"{to}-recovered", ensure_ascii=False)
    queries = "".join(
        f"  - {{name: queries-{number}, path: {path}, kind: text, "
        f"instruction: {json.dumps(prompt, ensure_ascii=False)}, stages: [1], weight: 1}}\n"
        for number, prompt in enumerate(prompts, start=1)
    )
    return f"""\
# What `nvembed compress` took is learned back from the whole model: nvembed train {RECIPE}
output: {output}   # from the folder in which the command runs; other paths from here
model: {{backbone: {backbone}}}
lora: null   # all weights; for a large model {{rank: 16}}
datasets:
  - {{name: texts, path: {path}, kind: text, instruction: null, stages: [1], weight: {many}}}
{queries}stages:
  - name: recover
    steps: {max(20, min(2000, 3 * count // batch))}
    batch_size: {batch}
    in_batch_negatives: false
    num_negatives: 0
    contrastive: null
    teacher: {{model: {seen_from(name)}, similarities: 1.0, vectors: 1.0}}
"""
