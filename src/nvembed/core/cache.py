"""Folders for what can be made again, kept between runs, and digests that name what is in them.

``cache_folder`` is for data; ``open_private`` is for what is used without being looked at, such as
compiled code. Sums of large files are kept under inode, size, and both times of the last change.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from nvembed.core.errors import DataError, UserError
from nvembed.core.files import os_errors, write_text

_VARIABLE = "NVEMBED_CACHE"
# Smaller files are read each time.
_LARGE = 32 * 2**20
# Clocks of file systems tick: a file that was written just now may change without a trace.
_SETTLED_SECONDS = 3.0
_log = logging.getLogger(__name__)


def cache_folder(name: str) -> Path:
    """A folder of the cache; the folder itself is not made.

    That is ``$NVEMBED_CACHE/name``, else ``~/.cache/nvembed/name``, else, where there is no home
    folder or none that can be written to, a folder of this user in the system's temporary one.
    """
    given = os.environ.get(_VARIABLE)
    if given:
        return expanded(Path(given), where=_VARIABLE) / name
    try:
        kept = Path.home() / ".cache" / "nvembed"
    except RuntimeError:  # no $HOME, and the system does not know this user
        return _temporary() / name
    with suppress(OSError):
        kept.mkdir(parents=True, exist_ok=True)
        if os.access(kept, os.W_OK | os.X_OK):
            return kept / name
    return _temporary() / name


def expanded(path: Path, *, where: str) -> Path:
    """Replace a leading ``~``; ``where`` is the place of the path, for the error."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        message = f"no home folder is known for {path}"
        raise UserError(message, where=where, expected="a path without ~") from error


@contextmanager
def open_private(folder: Path) -> Iterator[int | None]:
    """Open a folder, made where there is none, in which nobody else can write; else yield None.

    The descriptor stays that of the folder that was checked, even if someone renames it.
    """
    handle: int | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        reason = _why_not_private(os.fstat(handle))
    except OSError as error:
        reason = error.strerror or str(error)
        planted = folder.is_symlink()
        _log_once(folder, "is a link" if planted else reason, loud=planted)
    else:
        if reason is not None:
            _log_once(folder, reason, loud=True)
    try:
        yield handle if reason is None else None
    finally:
        if handle is not None:
            os.close(handle)


def private_folders(name: str) -> Iterator[Path]:
    """Folders to be tried with ``open_private``: of the cache, then temporary ones.

    There is none on systems whose files have no owner in the way of POSIX.
    """
    if os.name != "posix":
        return
    with suppress(UserError):
        yield cache_folder(name)
    yield _temporary() / name
    yield _of_this_process() / name


def read_private(folder: int, name: str) -> bytes | None:
    """Content of a file of a folder of ``open_private``; None where others can write to it."""
    try:
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
        with open(handle, "rb") as file:
            status = os.fstat(handle)
            own = stat.S_ISREG(status.st_mode) and _why_not_private(status) is None
            return file.read() if own else None
    except OSError:
        return None


def _why_not_private(status: os.stat_result) -> str | None:
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written to by others (chmod go-w makes it usable)"
    return None


@cache
def _log_once(folder: Path, reason: str, *, loud: bool) -> None:
    level = logging.WARNING if loud else logging.INFO
    _log.log(level, "%s: %s; a temporary folder takes its place", folder, reason)


def _temporary() -> Path:
    """The folder of this user in the system's temporary one, or another if it is not to be had."""
    try:
        folder = Path(tempfile.gettempdir()) / f"nvembed-{os.geteuid()}"
    except OSError as error:
        message = "there is no folder for temporary files"
        raise UserError(message, where=_VARIABLE, expected="a folder") from error
    with open_private(folder) as handle:
        return folder if handle is not None else _of_this_process()


@cache
def _of_this_process() -> Path:
    try:
        folder = Path(tempfile.mkdtemp(prefix="nvembed-"))
    except OSError as error:
        message = f"no folder for temporary files can be made ({error.strerror or error})"
        raise UserError(message, where=_VARIABLE, expected="a folder") from error
    made_by = os.getpid()

    def delete() -> None:
        if os.getpid() == made_by:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(delete)
    return folder


# --- Digests --------------------------------------------------------------------------------------


def content_hash(*values: Any) -> str:
    """SHA-256 of plain data."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def digest_of(path: Path) -> str:
    """SHA-256 of the contents of a file, or of all files of a folder with their names."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    hashed = hashlib.sha256()
    with os_errors("cannot read", path, kind=DataError):
        try:
            for file in files:
                name = file.relative_to(path).as_posix()
                hashed.update(json.dumps([name, file_digest(file)]).encode())
        except FileNotFoundError as error:
            hint = "Check the path; it starts at the recipe's folder"
            raise DataError("no such file", where=str(path), hint=hint) from error
    return hashed.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of the contents of a file; raises OSError where it cannot be read."""
    status = path.stat()
    kept: Path | None = None
    if status.st_size >= _LARGE:
        times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
        state = f"{path.resolve()} {status.st_dev} {status.st_ino} {status.st_size} {times}"
        kept = cache_folder("sums") / hashlib.sha256(state.encode()).hexdigest()
        with suppress(OSError, UnicodeDecodeError):
            if len(known := kept.read_text("ascii")) == 64:
                return known
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if kept is not None and time.time() - status.st_ctime > _SETTLED_SECONDS:
        with suppress(UserError):  # then it is read again next time
            write_text(kept, found)
    return found
