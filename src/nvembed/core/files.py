"""Files: atomic writes. Reading is in ``core/text_files.py``.

Everything that is written goes to a temporary name beside its target and is moved into place, so a
killed process or a full disk never leaves half a file under the real name. What a command makes for
its user is written with its name (``made_by``): only what it made before is replaced
(``core/ownership.py``). Without it something is written that is ours by its place: in a cache, in a
working folder, or in a folder that is being made.
"""

from __future__ import annotations

import ctypes
import errno
import gzip
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nvembed.core.errors import UserError, os_errors
from nvembed.core.ownership import (
    LEFTOVER,
    NEW,
    OLD,
    mark_file,
    mark_folder,
    refuse_foreign,
    remove_any,
)
from nvembed.core.text_files import is_gzip

# RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS: both are 2.
_EXCHANGE = 2
_AT_FDCWD = -100


@contextmanager
def atomic_path(path: str | Path, made_by: str | None = None) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and move it into place when the block ends well.

    ``made_by`` is the command whose output it is: it is marked, and only its own file is replaced.

    Raises:
        ConfigError: the file that is there is not the command's; it is untouched.
        UserError: no space, no permission; the file that is there is untouched.
    """
    with _atomic(Path(path), made_by, folder=False) as temporary:
        yield temporary


@contextmanager
def atomic_folder(path: str | Path, made_by: str | None = None) -> Iterator[Path]:
    """Give a temporary folder beside ``path``; when the block ends well it replaces ``path``.

    Where the system can exchange two names in one step, one of the two folders is there at any
    moment. Elsewhere a process may die between two renames, and ``tidy`` brings the old one back.
    With ``made_by`` the files are listed in the folder, and only a folder that the command made,
    with nothing changed or added since, is replaced. Errors are those of ``atomic_path``.
    """
    with _atomic(Path(path), made_by, folder=True) as temporary:
        yield temporary


@contextmanager
def _atomic(target: Path, made_by: str | None, *, folder: bool) -> Iterator[Path]:
    untouched = f"the previous {'folder' if folder else 'file'} is untouched"
    hint = f"Free space on the disk or choose another place; {untouched}"
    with os_errors("cannot write", target, hint=hint), ExitStack() as cleanup:
        if made_by is not None:
            refuse_foreign(target, made_by)
        target.parent.mkdir(parents=True, exist_ok=True)
        name = (NEW, f".{target.name}.", target.parent)
        if folder:
            temporary = Path(tempfile.mkdtemp(*name))
        else:
            handle, made = tempfile.mkstemp(*name)
            os.close(handle)
            temporary = Path(made)
        cleanup.callback(remove_any, temporary)
        yield temporary
        os.chmod(temporary, 0o755 if folder else 0o644)
        if made_by is not None:
            if folder:
                mark_folder(temporary, made_by)
            refuse_foreign(target, made_by, contents=False)  # the work may have taken hours
            if not folder:
                mark_file(target, temporary, made_by)
        if not folder or not target.exists():
            os.replace(temporary, target)
        elif not _exchange(temporary, target):
            old = target.with_name(f".{target.name}{OLD}")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
            os.replace(temporary, target)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Hold a folder, which is made, for this process while the block runs.

    Yields False where another process holds it. The lock dies with its process and is no file.
    """
    import fcntl

    with os_errors("cannot write", folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        alone = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = False
        except OSError as error:
            raise UserError(
                f"folders cannot be locked here ({error.strerror})",
                where=str(folder),
                hint="Choose one on another file system",
            ) from error
        yield alone
    finally:
        os.close(handle)


def tidy(folder: Path, names: str) -> None:
    """Clear up after a process that was killed while it wrote; nothing else may be writing there.

    What was written half is deleted, and a folder that was to be replaced goes back to its place
    where that is empty. ``names`` is a pattern of the targets, such as ``model*``.
    """
    for path in folder.glob(".*"):
        found = LEFTOVER.fullmatch(path.name)
        if found is None or not fnmatchcase(found["target"], names):
            continue
        target = path.with_name(found["target"])
        if path.name.endswith(OLD) and not os.path.lexists(target):
            os.replace(path, target)
        else:
            remove_any(path)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where system or file system cannot."""
    name = {"linux": "renameat2", "darwin": "renamex_np"}.get(sys.platform)
    call: Any = getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
    if call is None:
        return False
    here = [ctypes.c_int(_AT_FDCWD)] if name == "renameat2" else []
    one, other = os.fsencode(first), os.fsencode(second)
    if call(*here, one, *here, other, ctypes.c_uint(_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), os.fspath(second))


def write_text(path: str | Path, text: str, made_by: str | None = None) -> None:
    """Write UTF-8 text atomically; ``made_by`` as in ``atomic_path``."""
    with atomic_path(path, made_by) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any, made_by: str | None = None) -> None:
    """Write indented JSON atomically; ``made_by`` as in ``atomic_path``."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", made_by)


def write_jsonl(
    path: str | Path, rows: Iterable[dict[str, Any]], made_by: str | None = None
) -> int:
    """Write one JSON object per line (gzip when the name ends in ``.gz``); return the count.

    ``made_by`` as in ``atomic_path``.
    """
    count = 0
    with atomic_path(path, made_by) as temporary, open(temporary, "wb") as raw:
        # No time and no (temporary) name in the header: equal rows make equal bytes.
        binary: Any = gzip.GzipFile("", fileobj=raw, mode="wb", mtime=0) if is_gzip(path) else raw
        with io.TextIOWrapper(binary, encoding="utf-8", newline="\n") as out:
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
    return count
