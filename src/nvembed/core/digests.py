"""Contents told apart: a digest of a file, a folder or plain data is the same as long as they are.

Large files are read once. Their sums are kept in the cache folder under everything that changes
with a write: inode, size, time of the last write, and time of the last change, which no program can
set back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from nvembed.core.cache import cache_folder
from nvembed.core.errors import DataError, UserError
from nvembed.core.files import write_text

# Smaller files are read each time.
_LARGE = 32 * 2**20
# Clocks of file systems tick: a file that was written just now may change without a trace.
_SETTLED_SECONDS = 3.0


def content_hash(*values: Any) -> str:
    """SHA-256 of plain data."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def digest_of(path: Path) -> str:
    """SHA-256 of the contents of a file, or of all files of a folder with their names.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    hashed = hashlib.sha256()
    try:
        for file in files:
            name = file.relative_to(path).as_posix()
            hashed.update(json.dumps([name, file_digest(file)]).encode())
    except FileNotFoundError as error:
        raise DataError(
            "no such file", where=str(path), hint="Check the path; it starts at the recipe's folder"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", where=str(path)) from error
    return hashed.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of the contents of a file.

    Raises:
        OSError: it cannot be read.
    """
    status = path.stat()
    kept: Path | None = None
    if status.st_size >= _LARGE:
        times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
        state = f"{path.resolve()} {status.st_dev} {status.st_ino} {status.st_size} {times}"
        kept = cache_folder("sums") / hashlib.sha256(state.encode()).hexdigest()
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if len(known := kept.read_text("ascii")) == 64:
                return known
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if kept is not None and time.time() - status.st_ctime > _SETTLED_SECONDS:
        with contextlib.suppress(UserError):  # then it is read again next time
            write_text(kept, found)
    return found
