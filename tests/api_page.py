"""The page of the Python API: ``python tests/api_page.py`` writes docs/api.md anew."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import nvembed

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
GROUPS = {
    "A model": ["NVEmbed", "LongTexts", "load_encoder", "export", "doctor", "DoctorOptions"],
    "Files of texts": ["encode_file", "OutputFormat", "search_file"],
    "Training": ["train", "TrainConfig", "load_config", "build_data"],
    "Hard negatives": ["mine", "mine_negatives", "MiningConfig"],
    "Evaluation": ["evaluate", "load_tasks", "compare"],
    "Databases": ["build_index", "IndexOptions", "search_index", "SearchOptions"],
    "The server": ["serve"],
}
HEAD = """# Python API

Everything here is imported from `nvembed`; a name loads its module when it is first used. Each
function is what the command of the same task calls. Written by `python tests/api_page.py` from the
code, and compared with it by a test.
"""


def shown(annotation: object) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def signature(name: str, function: object) -> str:
    found = inspect.signature(function)
    parts: list[str] = []
    last = None
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and last not in (
            parameter.KEYWORD_ONLY,
            parameter.VAR_POSITIONAL,
        ):
            parts.append("*")
        last = parameter.kind
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(last, "")
        text = stars + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {shown(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            default = re.sub(r"<factory>|<.*>", "...", repr(parameter.default))
            text += f" = {default}"
        parts.append(text)
    parts = [part for part in parts if part.split(":")[0] not in ("self", "cls")]
    result = ""
    if found.return_annotation not in (found.empty, None, "None"):
        result = f" -> {shown(found.return_annotation)}"
    line = f"{name}({', '.join(parts)}){result}"
    if len(line) <= 110:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}"


def fields(cls: type) -> str:
    """The keys of a configuration, each with its type as the source has it."""
    known = {}
    for base in reversed(cls.__mro__):
        known |= inspect.get_annotations(base)
    return "".join(f"    {name}: {shown(known[name])}\n" for name in cls.model_fields)


def described(thing: object) -> str:
    """The docstring, with its sections as lists."""
    lines = (inspect.getdoc(thing) or "").split("\n")
    text, section = [], None
    for line in lines:
        heading = re.fullmatch(r"(Args|Attributes|Returns|Raises):", line)
        entry = re.fullmatch(r"    ([*\w]+): (.*)", line)
        if heading:
            section = heading[1]
            text.append(f"*{section}*\n")
        elif entry and section != "Returns":
            text.append(f"- `{entry[1]}`: {entry[2]}")
        else:
            text.append(f"  {line.strip()}" if section not in (None, "Returns") else line.strip())
    return re.sub(r"``(.+?)``", r"`\1`", "\n".join(line.rstrip() for line in text)).strip()


def entry(name: str) -> str:
    thing = getattr(nvembed, name)
    if not isinstance(thing, type):
        code = signature(name, thing)
    elif hasattr(thing, "model_fields"):
        code = f"class {name}:\n{fields(thing)}".rstrip()
    else:
        code = f"class {signature(name, thing)}"
    page = f"### {name}\n\n```python\n{code}\n```\n\n{described(thing)}\n"
    if name == "NVEmbed":
        for method, function in sorted(inspect.getmembers(thing, inspect.isroutine)):
            owner = getattr(function, "__module__", "") or ""
            if method.startswith("_") or not owner.startswith("nvembed."):
                continue
            code = signature(f"{name}.{method}", function)
            page += f"\n```python\n{code}\n```\n\n{described(function)}\n"
    return page


def api_page() -> str:
    parts = [HEAD]
    for group, names in GROUPS.items():
        parts += [f"## {group}\n", *(entry(name) for name in names)]
    parts.append("## Errors\n")
    for name in sorted(set(nvembed.__all__) - {n for names in GROUPS.values() for n in names}):
        if name != "__version__":
            parts.append(f"- `{name}`: {described(getattr(nvembed, name)).splitlines()[0]}")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(api_page(), encoding="utf-8")
