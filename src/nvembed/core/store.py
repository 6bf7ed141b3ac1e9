"""A folder of artifacts, each named after all it depends on, that is shared by processes.

The one that makes an artifact holds a lock on it: one byte of one file, at an offset that the name
decides, which the system lets go when the process dies. ``filelock`` locks whole files: thousands
of artifacts would be as many lock files, and deleting those while others wait is a race.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import DataError, UserError
from nvembed.core.files import atomic_path, read_json_object, tidy, write_json

_LOCKS = "locks"
_AGAIN = "Delete it; it will be made again"
_POLL_SECONDS = 0.05
# What lies in a store.
STORED = re.compile(
    rf"{_LOCKS}|(dtype|begun)\.json|\w+-[0-9a-f]{{32}}(-\d+)?\.npy|[0-9a-f]{{32}}\.npz"
)


def key_of(*parts: object) -> str:
    """Name something after all it depends on: 32 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps([str(part) for part in parts]).encode())
    return digest.hexdigest()[:32]


def write_array(path: Path, values: NDArray[np.generic], made_by: str | None = None) -> None:
    """Write an array as ``.npy``, whole or not at all; ``made_by`` as in ``atomic_path``."""
    with atomic_path(path, made_by) as temporary, open(temporary, "wb") as file:
        np.save(file, values, allow_pickle=False)


def write_arrays(path: Path, arrays: dict[str, NDArray[np.generic]]) -> None:
    """Write named arrays as ``.npz``, whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **cast(Any, arrays))


def read_array(path: Path, *, mapped: bool = False, hint: str = _AGAIN) -> NDArray[Any]:
    """Read or map what ``write_array`` wrote; a DataError where it is missing or damaged."""
    # "c": torch takes only memory that could be written, and nothing here writes.
    with _readable(path, hint):
        return np.load(path, mmap_mode="c" if mapped else None, allow_pickle=False)


def read_arrays(path: Path, *names: str) -> list[NDArray[Any]]:
    """Read arrays that ``write_arrays`` wrote; a DataError where they are missing or damaged."""
    with _readable(path, _AGAIN), np.load(path, allow_pickle=False) as arrays:
        return [arrays[name] for name in names]


@contextmanager
def _readable(path: Path, hint: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot be read ({error})", where=str(path), hint=hint) from error


@contextmanager
def claims(paths: Sequence[Path]) -> Iterator[Iterator[int]]:
    """Yield the numbers of artifacts (of one folder) that this process is to make.

    Those in the hands of another process come last, where it died over them.
    """
    if all(path.is_file() for path in paths):
        yield iter(())
        return
    folder = paths[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCKS, "ab") as locks:
        yield _claimed(paths, locks)


def _claimed(paths: Sequence[Path], locks: IO[bytes]) -> Iterator[int]:
    left = list(range(len(paths)))
    while True:
        busy = []
        for number in left:
            path = paths[number]
            if path.is_file():
                continue
            if not _lock(locks, path):
                busy.append(number)
            elif not path.is_file():
                tidy(path.parent, glob.escape(path.name))
                yield number
        if not busy:
            return
        # Not a waiting lock: two processes that wait for each other's artifacts, which threads of
        # theirs are about to finish, look like a deadlock to the system.
        left = busy
        time.sleep(_POLL_SECONDS)


def make_missing(paths: Sequence[Path], make: Callable[[int], None]) -> None:
    """Make every artifact that is not there, together with other processes that do the same."""
    with claims(paths) as numbers:
        for number in numbers:
            make(number)


def remembered(folder: Path, name: str, decide: Callable[[], str | None]) -> str | None:
    """Return what the first process decided; later ones, and later runs, are bound by it."""
    path = folder / f"{name}.json"
    make_missing([path], lambda _: write_json(path, {"value": decide()}))
    values = read_json_object(path, "what a run decided", hint=_AGAIN)
    if not isinstance(values.get("value", 0), str | None):
        raise DataError("holds no decision", where=str(path), expected="a value", hint=_AGAIN)
    return cast(str | None, values["value"])


def _lock(locks: IO[bytes], path: Path) -> bool:
    """Lock the byte that stands for a file; False where another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows: one process at a time
        return True
    # Bytes beyond the end can be locked; two files that share one only wait for each other.
    place = int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:7], "big")
    try:
        fcntl.lockf(locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place, os.SEEK_SET)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"files cannot be locked here ({error.strerror})",
            where=str(path.parent),
            hint="Choose a folder on another file system with --work",
        ) from error
    return True
