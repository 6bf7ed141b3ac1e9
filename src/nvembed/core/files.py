"""Files: opening and decoding what users give, and atomic writes.

Every reader starts here, so all commands agree on what a file is: its name says by its ending, in
any case, what it holds; text is UTF-8, with or without a byte order mark. What is written goes to a
temporary name beside its target and is moved into place, so a killed process or a full disk leaves
no half file. What a command makes for its user is written with its name (``made_by``), and only
what it made before is replaced (``core/ownership.py``); without it, the place is ours.
"""

from __future__ import annotations

import codecs
import ctypes
import errno
import gzip
import io
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, cast

from nvembed.core import ownership
from nvembed.core.errors import DataError, UserError

STDIN = "-"  # as users write it
STDIN_NAME = "standard input"  # as errors and places call it
MAX_LINE = 64 * 2**20  # bytes

_GZIP = b"\x1f\x8b"
_OTHER_ENCODINGS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
_LOOKED_AT = 4  # bytes


def ending_of(name: str | Path) -> str:
    """The ending that says what a file holds: in lower case, ``.gz`` passed over."""
    path = Path(name)
    return Path(path.stem).suffix.lower() if is_gzip(path) else path.suffix.lower()


def is_gzip(name: str | Path) -> bool:
    """Whether a name says that the file is compressed."""
    return Path(name).suffix.lower() == ".gz"


@contextmanager
def open_bytes(opener: Callable[[], IO[bytes]], name: str) -> Iterator[io.BufferedReader]:
    """Open UTF-8 bytes, which ``opener`` opens as they are stored: without byte order mark or gzip.

    Gzip is known by the ending of the ``name``, of standard input by its first bytes.
    """
    unreadable = os_errors("cannot be read", name, kind=DataError)
    with unreadable, _gzip_errors(name), ExitStack() as opened:
        beginning, stream = peeked(opened.enter_context(opener()), _LOOKED_AT)
        if is_gzip(name) or (name == STDIN_NAME and beginning.startswith(_GZIP)):
            unpacked = opened.enter_context(gzip.GzipFile(fileobj=stream))
            beginning, stream = peeked(unpacked, _LOOKED_AT)
        if beginning.startswith(_OTHER_ENCODINGS) or b"\0" in beginning:
            raise DataError(
                "the text is UTF-16 or UTF-32",
                where=name,
                expected="UTF-8",
                hint="Convert it: iconv -f UTF-16 -t UTF-8 FILE",
            )
        if beginning.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
        yield stream


@contextmanager
def _gzip_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        hint = "Copy or download it again"
        raise DataError(f"broken gzip file ({error})", where=name, hint=hint) from error


def open_text_file(path: str | Path) -> AbstractContextManager[io.BufferedReader]:
    """Open a file of UTF-8 text: ``open_bytes`` of a path, or of standard input for ``-``."""
    if str(path) == STDIN:
        return open_bytes(stdin_bytes, STDIN_NAME)
    if not Path(path).is_file():
        hint = "Check the path; relative paths start here"
        raise DataError("no such file", where=str(path), hint=hint)
    return open_bytes(lambda: open(path, "rb"), str(path))


def stdin_bytes() -> IO[bytes]:
    """The bytes of standard input, which stays open when they are closed."""
    return peeked(sys.stdin.buffer, 0)[1]


class _Rejoined(io.RawIOBase):
    """A stream with bytes in front that were taken from it; ``peek`` reads once at most."""

    def __init__(self, beginning: bytes, rest: io.BufferedReader) -> None:
        super().__init__()
        self._beginning, self._rest = beginning, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        taken = self._beginning[: len(buffer)]
        if not taken:
            return self._rest.readinto1(buffer)
        buffer[: len(taken)] = taken
        self._beginning = self._beginning[len(taken) :]
        return len(taken)


def peeked(file: Any, size: int = 4096) -> tuple[bytes, io.BufferedReader]:
    """Look at the first bytes of a stream; return them and the whole stream, to be read instead."""
    rest = file if isinstance(file, io.BufferedIOBase) else io.BufferedReader(file)
    beginning = rest.read(size)
    whole = _Rejoined(beginning, cast(io.BufferedReader, rest))
    return beginning, io.BufferedReader(whole, buffer_size=1 << 16)


def numbered_lines(
    file: IO[bytes], max_bytes: int = MAX_LINE
) -> Iterator[tuple[int, bytes | None]]:
    """Yield (number from 1, line with its end), None for a line that is too long to be kept.

    Lines end at ``\\n`` only: texts may hold U+2028, on which ``str.splitlines`` splits too.
    """
    number = 0
    while line := file.readline(max_bytes):
        number += 1
        if len(line) < max_bytes or line.endswith(b"\n"):
            yield number, line
            continue
        while len(line) == max_bytes and not line.endswith(b"\n"):
            line = file.readline(max_bytes)
        yield number, None


def too_long(max_bytes: int = MAX_LINE) -> str:
    """What is wrong with a line that ``numbered_lines`` did not keep."""
    return f"the line is longer than {max_bytes // 2**20} MB"


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield ``(line number from 1, object)`` from JSONL or JSONL.gz, skipping blank lines."""
    with open_text_file(path) as file:
        name = STDIN_NAME if str(path) == STDIN else str(path)
        for number, line in numbered_lines(file):
            place = f"{name}:{number}"
            if line is None:
                raise DataError(too_long(), where=place)
            if not line.strip():
                continue
            value = parse_json(line, place)
            if not isinstance(value, dict):
                message = f"a line holds {type(value).__name__}"
                raise DataError(message, where=place, expected="one JSON object per line")
            yield number, value


def parse_json(
    data: bytes,
    where: str,
    *,
    error: type[UserError] = DataError,
    expected: str | None = "one JSON object per line",
    hint: str | None = None,
    is_file: bool = False,
) -> Any:
    """Read one JSON value; ``where`` is the place of a line, or a path with ``is_file``."""
    cause: Exception
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as broken:
        message, cause = "not UTF-8 text", broken
    except json.JSONDecodeError as broken:
        message, cause = f"not valid JSON ({broken.msg} at column {broken.colno})", broken
        where = f"{where}:{broken.lineno}" if is_file else where
    except (ValueError, RecursionError) as broken:  # integers of thousands of digits, deep nesting
        message, cause = "numbers too long or nesting too deep", broken
    raise error(message, where=where, expected=expected, hint=hint) from cause


def read_json_object(path: Path, expected: str, *, hint: str | None = None) -> dict[str, Any]:
    """Read a JSON file that holds an object; ``expected`` and ``hint`` are for the DataError."""
    try:
        with open_bytes(lambda: open(path, "rb"), str(path)) as file:
            content = file.read()
    except DataError as error:
        raise DataError(error.message, where=str(path), expected=expected, hint=hint) from error
    values = parse_json(content, str(path), expected=expected, hint=hint, is_file=True)
    if not isinstance(values, dict):
        message = f"the file holds {type(values).__name__}"
        raise DataError(message, where=str(path), expected=expected, hint=hint)
    return values


# --- Writing --------------------------------------------------------------------------------------


@contextmanager
def os_errors(
    what: str, where: object, *, kind: type[UserError] = UserError, hint: str | None = None
) -> Iterator[None]:
    """Turn an OSError of the block into one line of ``kind``: ``where: what: the reason. hint``."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {error.strerror or error}", where=str(where), hint=hint) from error


# RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS: both are 2.
_EXCHANGE = 2
_AT_FDCWD = -100


@contextmanager
def atomic_path(path: str | Path, made_by: str | None = None) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and move it into place when the block ends well.

    With ``made_by``, the command whose output it is, only its own file is replaced (ConfigError).
    """
    with _atomic(Path(path), made_by, folder=False) as temporary:
        yield temporary


@contextmanager
def atomic_folder(path: str | Path, made_by: str | None = None) -> Iterator[Path]:
    """Give a temporary folder beside ``path``; when the block ends well it replaces ``path``.

    Where two names cannot be exchanged in one step, a process may die between two renames, and
    ``tidy`` brings the old folder back. ``made_by`` as in ``atomic_path``, for all of its files.
    """
    with _atomic(Path(path), made_by, folder=True) as temporary:
        yield temporary


@contextmanager
def _atomic(target: Path, made_by: str | None, *, folder: bool) -> Iterator[Path]:
    untouched = f"the previous {'folder' if folder else 'file'} is untouched"
    hint = f"Free space on the disk or choose another place; {untouched}"
    with os_errors("cannot write", target, hint=hint), ExitStack() as cleanup:
        if made_by is not None:
            ownership.refuse_foreign(target, made_by)
        target.parent.mkdir(parents=True, exist_ok=True)
        name = (ownership.NEW, f".{target.name}.", target.parent)
        if folder:
            temporary = Path(tempfile.mkdtemp(*name))
        else:
            handle, made = tempfile.mkstemp(*name)
            os.close(handle)
            temporary = Path(made)
        cleanup.callback(ownership.remove_any, temporary)
        yield temporary
        os.chmod(temporary, 0o755 if folder else 0o644)
        if folder:
            _show(temporary)
        if made_by is not None:
            if folder:
                ownership.mark_folder(temporary, made_by)
            # The work may have taken hours.
            ownership.refuse_foreign(target, made_by, contents=False)
            if not folder:
                ownership.mark_file(target, temporary, made_by)
        if not folder or not target.exists():
            os.replace(temporary, target)
        elif not _exchange(temporary, target):
            old = target.with_name(f".{target.name}{ownership.OLD}")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
            os.replace(temporary, target)
            shutil.rmtree(old, ignore_errors=True)


def _show(folder: Path) -> None:
    """Let everybody read what is in a folder; safetensors writes files for their owner alone."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))


@contextmanager
def alone_in(folder: Path, *, needed: bool = True) -> Iterator[bool]:
    """Make and hold a folder during the block; yields False where another process holds it.

    Where the file system has no locks that is an error, or True if a lock is not ``needed``.
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
            if needed:
                raise UserError(
                    f"folders cannot be locked here ({error.strerror})",
                    where=str(folder),
                    hint="Choose one on another file system",
                ) from error
        yield alone
    finally:
        os.close(handle)


def tidy(folder: Path, names: str) -> None:
    """Clear up after a process that was killed while it wrote to targets of the pattern ``names``.

    A folder that was to be replaced goes back to its place where that is empty.
    """
    for path in folder.glob(".*"):
        found = ownership.LEFTOVER.fullmatch(path.name)
        if found is None or not fnmatchcase(found["target"], names):
            continue
        target = path.with_name(found["target"])
        if path.name.endswith(ownership.OLD) and not os.path.lexists(target):
            os.replace(path, target)
        else:
            ownership.remove_any(path)


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


def write_json_values(path: Path, values: Iterable[object]) -> None:
    """Write what ``write_json`` writes of a list, value by value, to a path of ``atomic_path``."""
    with open(path, "w", encoding="utf-8") as out:
        start = "["
        for value in values:
            out.write(f"{start}\n  {json.dumps(value, ensure_ascii=False)}")
            start = ","
        out.write("[]\n" if start == "[" else "\n]\n")


def write_jsonl(
    path: str | Path, rows: Iterable[dict[str, Any]], made_by: str | None = None
) -> int:
    """Write one JSON object per line (gzip by the name); return the count."""
    count = 0
    with atomic_path(path, made_by) as temporary, open(temporary, "wb") as raw:
        # No time and no (temporary) name in the header: equal rows make equal bytes.
        binary: Any = gzip.GzipFile("", fileobj=raw, mode="wb", mtime=0) if is_gzip(path) else raw
        with io.TextIOWrapper(binary, encoding="utf-8", newline="\n") as out:
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
    return count
