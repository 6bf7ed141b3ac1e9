"""One's own Python code as a searchable file.

    PYTHONPATH=examples python -m pydocs.own FOLDER docs.jsonl
    nvembed search MODEL "read the settings from a file" --documents docs.jsonl

Enters: a folder of Python source, which is parsed and never run. Leaves: JSONL with one document
for each documented public function, method and class, in the layout that ``nvembed search`` reads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nvembed.core.errors import DataError, UserError
from nvembed.core.files import write_jsonl
from nvembed.core.outputs import check_ending
from nvembed.core.ownership import check_outputs
from pydocs.dataset import DEMO, search_text
from pydocs.harvest import harvest_roots


def write_documents(source: Path, output: Path) -> int:
    """Write what the Python files below `source` document to `output`; return how many documents.

    Args:
        source: a folder that is on the import path, so that names come out as they are imported:
            ``src`` or the checkout of a project.
        output: JSONL file with "_id" (the qualified name) and "text".

    Raises:
        DataError: there is no such folder, or nothing in it is documented.
    """
    check_outputs([output], made_by=DEMO)  # in the folder it is not read
    if not source.is_dir():
        raise DataError("no such folder", where=str(source), expected="a folder of Python files")
    entries = harvest_roots([source], processes=2)
    if not entries:
        raise DataError(
            "no documented function or class here",
            where=str(source),
            expected="Python files with docstrings",
        )
    return write_jsonl(output, ({"_id": e.name, "text": search_text(e)} for e in entries), DEMO)


def main(arguments: Sequence[str]) -> int:
    """Run ``python -m pydocs.own``; return the exit code."""
    if len(arguments) != 2:
        print("usage: python -m pydocs.own FOLDER OUTPUT.jsonl", file=sys.stderr)
        return 2
    source, output = map(Path, arguments)
    try:
        check_ending(output, (".jsonl",), packed=True)
        count = write_documents(source, output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{count:,} documents written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
