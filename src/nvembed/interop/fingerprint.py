"""What tells two states of a model apart: vectors kept on disk must never be another model's.

A fingerprint is 64 hexadecimal digits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from nvembed.core import __version__
from nvembed.core.cache import file_digest

# What a model folder holds besides the model.
_NOT_THE_MODEL = {".md", ".log", ".png", ".svg"}


def model_fingerprint(model: str, *settings: object) -> str:
    """Name a model folder by what it holds, or a hub id by itself, with whatever else matters.

    Weights are told apart by name, size and time of change, since reading gigabytes would cost more
    than encoding a small file.
    """
    digest = hashlib.sha256(" ".join([__version__, *map(str, settings)]).encode())
    folder = Path(model)
    digest.update(str(folder.resolve() if folder.is_dir() else model).encode())
    for path, name in _files(folder):
        status = path.stat()
        digest.update(f"\n{name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def contents_fingerprint(model: str) -> str:
    """Name a model by the contents of its files, wherever they lie; a hub id by its commit.

    Unlike ``model_fingerprint`` it stays the same when the folder is copied or touched. Large files
    are read once, see ``core/cache.py``.
    """
    folder = Path(model)
    if not folder.is_dir():
        from nvembed.interop.model_folder import ModelSource

        config = ModelSource(model).require("config.json")
        return hashlib.sha256(f"{model} {config.parent.name}".encode()).hexdigest()
    digest = hashlib.sha256()
    for path, name in _files(folder):
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and path.suffix not in _NOT_THE_MODEL:
            digest.update(f"{name.as_posix()} {file_digest(path)}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the files below a folder and their names in it; none where there is no folder."""
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if path.is_file():
            yield path, path.relative_to(folder)
