"""What tells two states of a model apart: 64 hexadecimal digits, of its files or their contents.

An adapter's folder stands for what it makes of its base, so the base that it finds counts too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from nvembed.core import __version__
from nvembed.core.cache import file_digest
from nvembed.core.errors import ModelError
from nvembed.interop.adapter_folder import find_base, read_bases
from nvembed.interop.gguf_names import find_gguf
from nvembed.interop.model_folder import ModelSource

# What a model folder holds besides the model.
_NOT_THE_MODEL = {".md", ".log", ".png", ".svg"}


def model_fingerprint(model: str, *settings: object) -> str:
    """Name a model folder by what it holds, or a hub id by itself, with whatever else matters.

    Files are told apart by name, size and time of change: reading gigabytes would cost too much.
    """
    digest = hashlib.sha256(" ".join([__version__, *map(str, settings)]).encode())
    folder = find_gguf(model) or Path(model)
    digest.update(str(folder.resolve() if folder.exists() else model).encode())
    for path, name in _model_files(folder):
        status = path.stat()
        digest.update(f"\n{name} {status.st_size} {status.st_mtime_ns}".encode())
    if (base := _base(folder)) is not None:
        digest.update(model_fingerprint(base).encode())
    return digest.hexdigest()


def contents_fingerprint(model: str) -> str:
    """Name a model by the contents of its files, wherever they lie; a hub id by its commit."""
    folder = Path(model)
    if (file := find_gguf(model)) is not None:
        return hashlib.sha256(f"gguf {file_digest(file)}".encode()).hexdigest()
    if not folder.is_dir():
        config = ModelSource(model).require("config.json")
        return hashlib.sha256(f"{model} {config.parent.name}".encode()).hexdigest()
    digest = hashlib.sha256()
    for path, name in _model_files(folder):
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and path.suffix not in _NOT_THE_MODEL:
            digest.update(f"{name.as_posix()} {file_digest(path)}\n".encode())
    if (base := _base(folder)) is not None:
        digest.update(contents_fingerprint(base).encode())
    return digest.hexdigest()


def _base(folder: Path) -> str | None:
    """The base that an adapter's folder finds on this machine."""
    source = ModelSource(str(folder), local_files_only=True)
    if not folder.is_dir() or not read_bases(source):
        return None
    with suppress(ModelError):
        return find_base(source).name
    return None


def _model_files(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the files below a folder (or a file itself) and their names in it."""
    for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
        if path.is_file():
            yield path, path.relative_to(folder)
