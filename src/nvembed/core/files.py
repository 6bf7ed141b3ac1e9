"""Files: atomic writes. Reading is in ``core/text_files.py``.

Everything that is written goes to a temporary name beside its target and is moved into place, so a
killed process or a full disk never leaves half a file under the real name.
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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nvembed.core.errors import UserError
from nvembed.core.text_files import is_gzip

# Of the folder that is being replaced, where two names cannot be exchanged in one step.
_OLD = ".old"
# RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS: both are 2.
_EXCHANGE = 2
_AT_FDCWD = -100


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and move it into place when the block ends well."""
    target = Path(path)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(
            f"cannot write: {error.strerror or error}",
            where=str(target),
            hint="Free space on the disk or choose another place; the previous file is untouched",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside ``path``; when the block ends well it replaces ``path``.

    Where the system can exchange two names in one step, one of the two folders is there at any
    moment. Elsewhere a process may die between two renames, and ``tidy`` brings the old one back.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield temporary
        os.chmod(temporary, 0o755)
        if not target.exists():
            os.replace(temporary, target)
        elif not _exchange(temporary, target):
            old = target.with_name(f".{target.name}{_OLD}")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
            os.replace(temporary, target)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write: {error.strerror or error}",
            where=str(target),
            hint="Free space on the disk or choose another place; the previous folder is untouched",
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Hold a folder, which is made, for this process while the block runs.

    Yields False where another process holds it. One that was killed holds nothing.

    Raises:
        UserError: the folder cannot be made or locked.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror or error}", where=str(folder)) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
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
    where that is empty.

    Args:
        folder: in which ``atomic_path`` and ``atomic_folder`` wrote.
        names: of their targets, as a pattern such as ``model*``.
    """
    for path in folder.glob(f".{names}.*"):
        target = path.with_name(path.name[1:].rpartition(".")[0])
        if path.name.endswith(_OLD) and not target.exists():
            os.replace(path, target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


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


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object per line (gzip when the name ends in ``.gz``); return the count."""
    count = 0
    with (
        atomic_path(path) as temporary,
        open(temporary, "wb") as raw,
        _text_writer(raw, gzipped=is_gzip(path)) as out,
    ):
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


@contextmanager
def _text_writer(raw: io.BufferedWriter, *, gzipped: bool) -> Iterator[io.TextIOWrapper]:
    # No time and no (temporary) name in the header: two writes of the same rows are byte-identical.
    binary: Any = gzip.GzipFile("", fileobj=raw, mode="wb", mtime=0) if gzipped else raw
    out = io.TextIOWrapper(binary, encoding="utf-8", newline="\n")
    try:
        yield out
    finally:
        out.close()
