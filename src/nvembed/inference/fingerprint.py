"""What tells two states of a model apart: vectors kept on disk must never be another model's."""

from __future__ import annotations

import hashlib
from pathlib import Path

import nvembed


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
    digest = hashlib.sha256(" ".join([nvembed.__version__, *map(str, settings)]).encode())
    folder = Path(model)
    digest.update(str(folder.resolve() if folder.is_dir() else model).encode())
    files = sorted(folder.rglob("*")) if folder.is_dir() else []
    for path in files:
        if path.is_file():
            status = path.stat()
            name = path.relative_to(folder)
            digest.update(f"\n{name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()
