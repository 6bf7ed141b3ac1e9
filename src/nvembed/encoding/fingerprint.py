"""What tells two states of a model apart: vectors kept on disk must never be another model's."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nvembed.core import __version__
from nvembed.core.cache import file_digest


def model_fingerprint(model: str, *settings: object) -> str:
    """Name a model folder by what it holds, or a hub id by itself.

    Weights are told apart by name, size and time of change, since reading gigabytes would cost more
    than encoding a small file.

    Args:
        model: folder or hub id.
        settings: whatever else its vectors depend on.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(" ".join([__version__, *map(str, settings)]).encode())
    folder = Path(model)
    digest.update(str(folder.resolve() if folder.is_dir() else model).encode())
    files = sorted(folder.rglob("*")) if folder.is_dir() else []
    for path in files:
        if path.is_file():
            status = path.stat()
            name = path.relative_to(folder)
            digest.update(f"\n{name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def computed_fingerprint(model: str, dtype: str | None, *settings: object) -> str:
    """Name the vectors of a model as this machine computes them, to the last bit.

    Args:
        model: folder or hub id.
        dtype: of its weights, settled; ``None`` is what was saved.
        settings: whatever else its vectors depend on.

    Returns:
        64 hexadecimal digits.
    """
    from nvembed.kernels.precision import kernels

    return model_fingerprint(model, dtype, *settings, *kernels())


# What a model folder holds besides the model.
_NOT_THE_MODEL = {".md", ".log", ".png", ".svg"}


def contents_fingerprint(model: str) -> str:
    """Name a model by the contents of its files, wherever they lie; a hub id by its commit.

    Unlike ``model_fingerprint`` it stays the same when the folder is copied or touched. Large files
    are read once, see ``core/cache.py``.

    Args:
        model: folder or hub id.

    Returns:
        64 hexadecimal digits.
    """
    folder = Path(model)
    if not folder.is_dir():
        from nvembed.interop.model_folder import ModelSource

        config = ModelSource(model).require("config.json")
        return hashlib.sha256(f"{model} {config.parent.name}".encode()).hexdigest()
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and path.suffix not in _NOT_THE_MODEL:
            digest.update(f"{name.as_posix()} {file_digest(path)}\n".encode())
    return digest.hexdigest()
