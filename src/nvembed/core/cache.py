"""Folders for what can be made again, kept between runs.

``cache_folder`` is for data. ``open_private`` is for what is used without being looked at, such as
compiled code: it opens folders in which nobody but this user can have put anything.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from nvembed.core.errors import UserError

_VARIABLE = "NVEMBED_CACHE"
_log = logging.getLogger(__name__)


def cache_folder(name: str) -> Path:
    """A folder of the cache; the folder itself is not made.

    That is ``$NVEMBED_CACHE/name``, else ``~/.cache/nvembed/name``, else, where there is no home
    folder or none that can be written to, a folder of this user in the system's temporary one.

    Raises:
        UserError: ``$NVEMBED_CACHE`` names a user without a home folder, or there is no temporary
            folder.
    """
    given = os.environ.get(_VARIABLE)
    if given:
        return expanded(Path(given), where=_VARIABLE) / name
    try:
        kept = Path.home() / ".cache" / "nvembed"
    except RuntimeError:  # no $HOME, and the system does not know this user
        return _temporary() / name
    return (kept if _can_write(kept) else _temporary()) / name


def expanded(path: Path, *, where: str) -> Path:
    """Replace a leading ``~``.

    Args:
        path: as the user wrote it.
        where: its place, for the error.

    Raises:
        UserError: there is no home folder of that user.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UserError(
            f"no home folder is known for {path}", where=where, expected="a path without ~"
        ) from error


@contextmanager
def open_private(folder: Path) -> Iterator[int | None]:
    """Open a folder, made where there is none, in which nobody else can write.

    Args:
        folder: to be opened. It must be a folder and no link, belong to this user, and be writable
            for no one else.

    Yields:
        Its file descriptor, which stays that of the folder that was checked even if someone renames
        it; None where it is not such a folder or cannot be made, which is logged once.
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
    """Folders to be tried with ``open_private``, in this order: of the cache, then temporary ones.

    The last one is made for this process alone, and deleted at its end. There is none on systems
    whose files have no owner in the way of POSIX.
    """
    if os.name != "posix":
        return
    with suppress(UserError):
        yield cache_folder(name)
    yield _temporary() / name
    yield _of_this_process() / name


def is_own_file(status: os.stat_result) -> bool:
    """Whether this is an ordinary file that belongs to this user, and only the user writes to."""
    return stat.S_ISREG(status.st_mode) and _why_not_private(status) is None


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


def _can_write(folder: Path) -> bool:
    """Whether a folder, which is made, can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _temporary() -> Path:
    """The folder of this user in the system's temporary one, or another if it is not to be had."""
    try:
        folder = Path(tempfile.gettempdir()) / f"nvembed-{os.geteuid()}"
    except OSError as error:
        raise UserError(
            "there is no folder for temporary files", where=_VARIABLE, expected="a folder"
        ) from error
    with open_private(folder) as handle:
        return folder if handle is not None else _of_this_process()


@cache
def _of_this_process() -> Path:
    try:
        folder = Path(tempfile.mkdtemp(prefix="nvembed-"))
    except OSError as error:
        raise UserError(
            f"no folder for temporary files can be made ({error.strerror or error})",
            where=_VARIABLE,
            expected="a folder",
        ) from error
    made_by = os.getpid()

    def delete() -> None:
        if os.getpid() == made_by:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(delete)
    return folder
