"""Which module of Python's standard library do I need? A search with an embedding model.

    python examples/which_module.py assets/nvembed-smollm2-135m "send an e-mail" "unpack an archive"

The first paragraph of what each module says about itself is a document; nothing is imported.
"""

from __future__ import annotations

import argparse
import ast
import sys
import sysconfig
import time
import warnings
from pathlib import Path

from nvembed import NVEmbed, UserError

QUESTIONS = (
    "how do I send an e-mail",
    "unpack a compressed archive",
    "find out how long my code takes",
    "the difference between two dates",
    "talk to a web server",
)
TASK = "Given a question about Python, retrieve the documentation that answers it"
MOST_CHARACTERS = 400


def descriptions() -> dict[str, str]:
    """The first paragraph of the docstring of every module that has one."""
    found = {}
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in sorted(sys.stdlib_module_names):
        files = (library / f"{name}.py", library / name / "__init__.py")
        path = next((file for file in files if file.is_file()), None)
        if path is None or name.startswith("_") or name in ("antigravity", "this"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = ast.get_docstring(ast.parse(path.read_bytes())) or ""
        paragraph = " ".join(text.split("\n\n")[0].split())
        if paragraph:
            found[name] = f"{name}: {paragraph.removeprefix(name).lstrip(' -:')}"[:MOST_CHARACTERS]
    return found


def main() -> int:
    """Print the three nearest modules of each question."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    given = parser.parse_args()
    started = time.perf_counter()
    try:
        model = NVEmbed.from_pretrained(given.model)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    loaded = time.perf_counter()
    texts = list(descriptions().values())
    documents = model.encode_document(texts)
    queries = model.encode_query(list(given.questions), task=TASK)
    took = time.perf_counter() - loaded
    for question, row in zip(given.questions, model.similarity(queries, documents), strict=True):
        print(f"\n{question}")
        for score, index in zip(*(found.tolist() for found in row.topk(3)), strict=True):
            print(f"  {score:.2f}  {texts[index][:90]}")
    print(f"\nloaded in {loaded - started:.1f} s; {len(texts)} texts and these in {took:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
