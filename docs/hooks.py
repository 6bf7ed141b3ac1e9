"""How the documents, which are read on a code host too, become a site (``make docs``).

The README is the first page, ``docs/index.md`` the guide to databases, and CONTRIBUTING.md a page.
What a document links to outside of docs/ is the repository's: its name alone stays.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Class, Extension, Function, Parameter, ParameterKind, Parameters
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PLACES = {"README.md": "index.html", "index.md": "databases.html"}


def on_files(files: Files, config: Any) -> Files:
    """Add the documents of the root, and give the first page its place."""
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        text = re.sub(r"\]\(docs/", "](", text)
        files.append(File.generated(config, name, content=text))
    for name, place in PLACES.items():
        file = files.get_file_from_path(name)
        assert file is not None
        file.dest_uri = place
        file.name = Path(place).stem  # by which mkdocs knows the first page
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Unlink what is no page of the site."""
    markdown = re.sub(r"\]\(\.\./(README|CONTRIBUTING)\.md", r"](\1.md", markdown)
    outside = r"(?<!!)\[([^\]]+)\]\((?:\.\./|assets/|examples/|recipes/)[^)]*\)"
    return re.sub(outside, r"\1", markdown)


class Keys(Extension):
    """Shows the keys of a configuration, with types and limits, as the arguments of its class."""

    def on_class(self, *, cls: Class, **_: Any) -> None:
        """Give a strict model the constructor that pydantic makes for it."""
        if "StrictModel" not in map(str, cls.bases):
            return
        keys = [
            Parameter(
                attribute.name,
                annotation=attribute.annotation,
                default=attribute.value,
                kind=ParameterKind.keyword_only,
            )
            for attribute in cls.attributes.values()
            if attribute.annotation is not None and not attribute.name.startswith("_")
        ]
        cls["__init__"] = Function("__init__", parameters=Parameters(*keys))
