"""From the fields of a body to items: which prompt, what is cut, texts or token ids."""

from __future__ import annotations

from typing import Literal

from nvembed.core.errors import UserError
from nvembed.serving.engine import Cut, Engine, Item, Wish
from nvembed.serving.errors import RequestError
from nvembed.serving.service import Service
from nvembed.text.instructions import Side, find_instruction, read_task, resolve_prompt

Inputs = str | list[str] | list[int] | list[list[int]]
"""A text, a list of texts, the ids of a text, or a list of such lists."""

Direction = Literal["Left", "Right", "left", "right"]

INPUTS = "a text, a list of texts, a list of token ids, or a list of such lists"
TASK = "what the texts are for, the name of an MTEB task or of a prompt of the model, or null"
PROMPT_NAME = "the name of a prompt of the model, or of an MTEB task, or null"
TRUNCATE = "a boolean; false refuses texts that are too long for the model, which true cuts"
DIRECTION = "'Right' (the end is cut) or 'Left' (the beginning is)"


def read_cut(truncate: bool, direction: Direction) -> Cut:
    """Return what becomes of long texts, as TEI's two fields say it."""
    if not truncate:
        return "none"
    return "end" if direction.lower() == "right" else "start"


def read_instruction(instruction: str | None, task: str | None) -> str | None:
    """Return what stands in one of two fields that mean the same; blank is none.

    Raises:
        RequestError: it stands in both (400).
    """
    given = [text for text in (instruction, task) if text is not None and text.strip()]
    if len(given) > 1:
        raise _bad("instruction and task are the same; send one of them", "task")
    return given[0] if given else None


def read_wish(
    engine: Engine,
    *,
    instruction: str | None = None,
    prompt_name: str | None = None,
    side: Side | None = None,
    cut: Cut = "end",
    normalize: bool = True,
) -> Wish:
    """Read how texts are to be embedded.

    Args:
        engine: the model.
        instruction: see ``TASK``.
        prompt_name: see ``PROMPT_NAME``.
        side: ``None`` is queries with an instruction, documents without.
        cut: what becomes of long texts.
        normalize: bring vectors to length 1.

    Raises:
        RequestError: no prompt of that name, a word that is nearly a task's name, both given, or
            the model cannot do it (400).
    """
    if instruction is not None and prompt_name is not None:
        raise _bad("send an instruction or prompt_name, not both", "prompt_name")
    if not normalize and not engine.supports_raw:
        raise _bad("this model gives vectors of length 1 only; leave normalize out", "normalize")
    if cut != "end" and not engine.supports_tokens:
        raise _bad("this model always cuts the end of long texts; leave this out", "truncate")
    prompt = None if prompt_name is None else named_prompt(engine, prompt_name)
    try:
        task = read_task(instruction, engine.prompts)
    except UserError as error:
        message = f"the instruction is neither a sentence nor a known task, {error.expected}"
        raise _bad(message, "instruction", code="bad_instruction") from None
    if side is None:
        side = "document" if task is None else "query"
    return Wish(side, task, prompt, cut, normalize)


async def read_inputs(service: Service, content: Inputs, wish: Wish, *, param: str) -> list[Item]:
    """Check and tokenise what a body holds.

    Raises:
        RequestError: as ``Service.prepare`` and ``prepare_ids``, or ids with an instruction.
    """
    if isinstance(content, str):
        return await service.prepare([content], wish, param=param)
    if not content or isinstance(content[0], str):
        texts = [text for text in content if isinstance(text, str)]
        return await service.prepare(texts, wish, param=param)
    if wish.task is not None or wish.prompt or wish.side == "query":
        raise _bad(
            "token ids are embedded as documents, bare; send texts with an instruction",
            "instruction",
            code="ids_with_instruction",
        )
    single = [value for value in content if isinstance(value, int)]
    rows = [single] if single else [row for row in content if isinstance(row, list)]
    return await service.prepare_ids(rows, wish, param=param)


def named_prompt(engine: Engine, name: str) -> str:
    """Return a prompt of the model, or that of an MTEB task.

    Raises:
        RequestError: there is none of that name (400).
    """
    if name in engine.prompts:
        return engine.prompts[name] or ""
    if find_instruction(name) is None:
        known = ", ".join(sorted(engine.prompts)[:10]) or "none"
        raise _bad(
            f"the model has no prompt of that name; known are {known}, and the tasks of MTEB",
            "prompt_name",
            code="unknown_prompt",
        )
    return resolve_prompt(name) or ""


def _bad(message: str, param: str, *, code: str = "bad_input") -> RequestError:
    return RequestError(400, message, code=code, param=param)
