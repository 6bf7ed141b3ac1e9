"""The documentation of the installed Python packages, read from their source files.

Enters: folders of ``.py`` files (the standard library, site-packages, or one's own project).
Leaves: one `DocEntry` per documented public function, method and class. Files are parsed with
`ast`, never imported, so nothing of them runs. The result is cached per set of installed versions.
`dataset.py` turns the entries into training data and tasks.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import multiprocessing
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from nvembed.core.errors import DataError
from nvembed.core.files import read_jsonl, write_jsonl
from pydocs.docstrings import describe
from pydocs.split import module_name

HARVEST_VERSION = 1
"""Part of the cache key: raise it when the harvest changes, so that old caches are not used."""

MIN_SUMMARY_WORDS = 3
MAX_FILE_BYTES = 2_000_000
MAX_SIGNATURE_CHARS = 200
MAX_DEFAULT_CHARS = 25
MIN_DOCUMENTED_SHARE = 0.5
"""A private module (``_x.py``) is read if at least this share of its definitions is documented.

numpy, scipy and scikit-learn define nearly all public functions in such modules."""

CHUNK_FILES = 100
POOL_FROM_FILES = 600
"""Below this many files one process is faster than starting others."""

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "_testing", "__pycache__", "site-packages", "dist-packages"}
    | {"vendor", "vendored", "_vendor", "_vendored", "externals", "extern", "third_party"}
    | {"idlelib", "lib2to3", "distutils", "ensurepip", "node_modules", ".git", ".venv", "nvembed"}
)
_SKIPPED_FILES = ("test_", "conftest.py", "setup.py")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class DocEntry:
    """The documentation of one public definition, as plain text.

    `name` is what a user would type (``scipy.stats.norm.fit``: private modules on the way are left
    out), `module` is where it is defined, which decides the split. `summary` is the first sentence,
    `rest` all else, without the summary; it may be empty.
    """

    name: str
    module: str
    package: str
    kind: Literal["function", "method", "class"]
    signature: str
    summary: str
    rest: str


def harvest(*, cache: Path | None = None, processes: int = 2) -> list[DocEntry]:
    """Return the documentation of everything installed beside the running interpreter.

    Looks at the standard library and site-packages. About 14,000 files take 35 seconds on two
    free cores; with `cache` the next call on the same set of packages reads one file instead.

    Args:
        cache: Folder for the result, one JSONL file per set of installed versions; None for none.
        processes: How many processes parse files.
    """
    roots = installed_roots()
    if cache is None:
        return harvest_roots(roots, processes=processes)
    path = cache / f"docs-{fingerprint(roots)}.jsonl"
    if path.is_file():
        try:
            return read_entries(path)
        except DataError:
            path.unlink()  # a damaged cache is made again
    entries = harvest_roots(roots, processes=processes)
    write_jsonl(path, (asdict(entry) for entry in entries))
    return entries


def harvest_roots(roots: Iterable[Path], *, processes: int = 1) -> list[DocEntry]:
    """Return the documentation found below `roots`, sorted by name, each name once.

    Args:
        roots: Folders that would be on the import path, such as the ``src`` of one's own project.
        processes: How many processes parse files, when there are enough files to share.
    """
    # Large files first: the processes then end at the same time.
    files = sorted((item for root in roots for item in _python_files(root)), reverse=True)
    jobs = [(str(path), str(root)) for _, path, root in files]
    chunks = [jobs[start : start + CHUNK_FILES] for start in range(0, len(jobs), CHUNK_FILES)]
    if processes > 1 and len(jobs) >= POOL_FROM_FILES:
        # spawn: forking a process in which torch has started threads can hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            found = [entry for part in pool.map(_harvest_files, chunks) for entry in part]
    else:
        found = [entry for chunk in chunks for entry in _harvest_files(chunk)]
    unique: dict[str, DocEntry] = {}
    for entry in sorted(found, key=lambda e: (e.name, e.module, e.rest)):
        unique.setdefault(entry.name, entry)
    return list(unique.values())


def harvest_source(source: str, module: str) -> list[DocEntry]:
    """Return the documented public definitions of one module.

    Raises:
        SyntaxError: the source is not valid for the running Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(source)
    package, *inner = module.split(".")
    public_name = ".".join([package, *(part for part in inner if not part.startswith("_"))])
    found: list[DocEntry] = []
    num_public = num_documented = 0
    for node, owner in _definitions(tree.body, None):
        num_public += 1
        docstring = ast.get_docstring(node, clean=False)
        if not docstring:
            continue
        num_documented += 1
        entry = _entry(node, owner, docstring, module, public_name)
        if entry is not None:
            found.append(entry)
    is_private = any(part.startswith("_") for part in inner)
    if is_private and num_documented < MIN_DOCUMENTED_SHARE * num_public:
        return []
    return found


def installed_roots() -> list[Path]:
    """Return the folders of the standard library and of the installed packages."""
    paths = sysconfig.get_paths()
    roots = [Path(paths[key]) for key in ("stdlib", "purelib", "platlib")]
    return list(dict.fromkeys(root.resolve() for root in roots if root.is_dir()))


def fingerprint(roots: Sequence[Path]) -> str:
    """Return a short key that changes with the versions of Python and every installed package."""
    parts = [str(HARVEST_VERSION), sys.version]
    for root in roots:
        parts.append(str(root))
        parts += sorted(p.name for p in root.iterdir() if p.suffix in (".dist-info", ".egg-info"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def read_entries(path: Path) -> list[DocEntry]:
    """Read entries that were written as JSONL.

    Raises:
        DataError: a line is not an entry.
    """
    names = {field.name for field in fields(DocEntry)}
    entries = []
    for number, row in read_jsonl(path):
        if set(row) != names:
            raise DataError(
                "not a documentation entry",
                where=f"{path}:{number}",
                expected=f"the keys {', '.join(sorted(names))}",
            )
        entries.append(DocEntry(**row))
    return entries


def _python_files(root: Path) -> Iterator[tuple[int, Path, Path]]:
    """Yield (bytes, file, root) of every module below `root` that is worth parsing."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        for name in names:
            if not name.endswith(".py") or name.startswith(_SKIPPED_FILES):
                continue
            path = Path(folder, name)
            try:
                size = path.stat().st_size
            except OSError:  # a dangling link
                continue
            if 0 < size <= MAX_FILE_BYTES:
                yield size, path, root


def _harvest_files(jobs: list[tuple[str, str]]) -> list[DocEntry]:
    """Parse files, skipping those that this Python cannot read (templates, other versions)."""
    found = []
    was_enabled = gc.isenabled()
    gc.disable()  # syntax trees hold no cycles; collecting while they are built doubles the time
    try:
        for path, root in jobs:
            try:
                source = Path(path).read_text(encoding="utf-8")
                if '"""' in source or "'''" in source:
                    found += harvest_source(source, module_name(Path(path), Path(root)))
            except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    finally:
        if was_enabled:
            gc.enable()
    return found


def _definitions(
    body: Sequence[ast.stmt], owner: ast.ClassDef | None
) -> Iterator[tuple[Definition, ast.ClassDef | None]]:
    """Yield the public functions, classes and methods of a module with their class."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            handlers = node.handlers if isinstance(node, ast.Try) else []
            blocks = [node.body, node.orelse, *(handler.body for handler in handlers)]
            for block in blocks:
                yield from _definitions(block, owner)
        elif isinstance(node, Definition) and not node.name.startswith("_"):
            yield node, owner
            if isinstance(node, ast.ClassDef) and owner is None:
                yield from _definitions(node.body, node)


def _entry(
    node: Definition, owner: ast.ClassDef | None, docstring: str, module: str, public_name: str
) -> DocEntry | None:
    """Make an entry of one definition, or None where nothing says what it does."""
    description = describe(docstring)
    if description is None or len(description.summary.split()) < MIN_SUMMARY_WORDS:
        return None
    local = f"{owner.name}.{node.name}" if owner else node.name
    kind: Literal["function", "method", "class"] = "method" if owner else "function"
    return DocEntry(
        name=f"{public_name}.{local}",
        module=module,
        package=module.split(".")[0],
        kind="class" if isinstance(node, ast.ClassDef) else kind,
        signature=f"{local}{_arguments(node)}",
        summary=description.summary,
        rest=description.rest,
    )


def _arguments(node: Definition) -> str:
    """Return ``(x, axis=None)``, the arguments a caller writes; nothing for a property."""
    if isinstance(node, ast.ClassDef):
        inits = (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
        init = next(inits, None)
        return _arguments(init) if init else "()"
    if any(
        getattr(d, "id", getattr(d, "attr", "")).endswith("property") for d in node.decorator_list
    ):
        return ""
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    for argument in (*every, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    positional = arguments.posonlyargs or arguments.args
    if positional and positional[0].arg in ("self", "cls"):
        del positional[0]
        excess = len(arguments.defaults) - len(arguments.posonlyargs) - len(arguments.args)
        del arguments.defaults[: max(0, excess)]
    ellipsis = ast.Constant(...)
    arguments.defaults = [_short(default, ellipsis) for default in arguments.defaults]
    arguments.kw_defaults = [d and _short(d, ellipsis) for d in arguments.kw_defaults]
    text = ast.unparse(arguments)
    if len(text) > MAX_SIGNATURE_CHARS:
        text = text[:MAX_SIGNATURE_CHARS].rsplit(",", 1)[0] + ", ..."
    return f"({text})"


def _short(default: ast.expr, ellipsis: ast.expr) -> ast.expr:
    """Replace a default value that would fill the line."""
    if isinstance(default, ast.Constant) and not isinstance(default.value, str):
        return default
    return default if len(ast.unparse(default)) <= MAX_DEFAULT_CHARS else ellipsis
