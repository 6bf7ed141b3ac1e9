"""Files that are made once, by whichever process comes to them first.

A work folder holds what mining has computed so far: a file per piece of work, named after
everything that its contents depend on, and written whole or not at all. So a run that was killed
goes on with what is missing, and processes that share the folder share the work: a piece is locked
by the one that makes it, and the system lets go of the lock when that process dies.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import DataError, UserError
from nvembed.core.files import atomic_path, tidy, write_json
from nvembed.core.text_files import read_json_object

_LOCKS = "locks"
_AGAIN = "Delete it; it will be made again"
# What lies in a work folder.
WORK_FILES = re.compile(rf"{_LOCKS}|dtype\.json|\w+-[0-9a-f]{{32}}(-\d+)?\.npy")


def key_of(*parts: object) -> str:
    """Name something after all it depends on: 32 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps([str(part) for part in parts]).encode())
    return digest.hexdigest()[:32]


def write_array(path: Path, values: NDArray[np.generic]) -> None:
    """Write an array as ``.npy``, whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, values, allow_pickle=False)


def make_missing(paths: Sequence[Path], make: Callable[[int], None]) -> None:
    """Make every file that is not there, together with other processes that do the same.

    First goes everything that nobody else is making; then this process waits for what others have
    in hand, and makes it where they died over it.

    Args:
        paths: of one folder, named by ``key_of``.
        make: makes the file of a number; called for missing ones alone.
    """
    left = [number for number, path in enumerate(paths) if not path.is_file()]
    if not left:
        return
    folder = paths[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCKS, "ab") as locks:
        for wait in (False, True):
            busy = []
            for number in left:
                with _locked(locks, paths[number], wait=wait) as mine:
                    if not mine:
                        busy.append(number)
                    elif not paths[number].is_file():
                        tidy(folder, glob.escape(paths[number].name))
                        make(number)
            left = busy


def remembered(folder: Path, name: str, decide: Callable[[], str | None]) -> str | None:
    """Return what the first process decided; later ones, and later runs, are bound by it."""
    path = folder / f"{name}.json"

    def write(_: int) -> None:
        write_json(path, {"value": decide()})

    make_missing([path], write)
    values = read_json_object(path, "what a run decided", hint=_AGAIN)
    if not isinstance(values.get("value", 0), str | None):
        raise DataError("holds no decision", where=str(path), expected="a value", hint=_AGAIN)
    return cast(str | None, values["value"])


@contextmanager
def _locked(locks: IO[bytes], path: Path, *, wait: bool) -> Iterator[bool]:
    """Lock the byte that stands for a file; False where another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows: one process at a time
        yield True
        return
    # Bytes beyond the end can be locked; two files that share one only wait for each other.
    place = int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:7], "big")
    try:
        fcntl.lockf(locks, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place, os.SEEK_SET)
    except BlockingIOError:
        yield False
        return
    except OSError as error:
        raise UserError(
            f"files cannot be locked here ({error.strerror})",
            where=str(path.parent),
            hint="Choose a folder on another file system with --work",
        ) from error
    try:
        yield True
    finally:
        fcntl.lockf(locks, fcntl.LOCK_UN, 1, place, os.SEEK_SET)
