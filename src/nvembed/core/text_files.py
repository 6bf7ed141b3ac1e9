"""Opening and decoding what users give: gzip, byte order marks, lines, JSON, standard input.

Every reader of the package starts here, so all commands agree on what a file is. A name says by its
ending, in any case, what a file holds; text is UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, cast

from nvembed.core.errors import ConfigError, DataError, UserError, os_errors

STDIN = "-"  # as users write it
STDIN_NAME = "standard input"  # as errors and places call it
MAX_LINE = 64 * 2**20  # bytes

_GZIP = b"\x1f\x8b"
_OTHER_ENCODINGS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
_LOOKED_AT = 4  # bytes
_FILES = (
    *(".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md", ".npy", ".npz", ".yaml"),
    *(".onnx", ".safetensors", ".gguf", ".bin", ".pt", ".zip"),
)


def ending_of(name: str | Path) -> str:
    """The ending that says what a file holds: in lower case, ``.gz`` passed over."""
    path = Path(name)
    return Path(path.stem).suffix.lower() if is_gzip(path) else path.suffix.lower()


def is_gzip(name: str | Path) -> bool:
    """Whether a name says that the file is compressed."""
    return Path(name).suffix.lower() == ".gz"


def check_ending(output: str | Path, endings: Sequence[str], *, packed: bool = False) -> None:
    """Refuse a name of an output without one of the ``endings``; ``packed``: ``.gz`` may follow."""
    if ending_of(output) in endings and (packed or not is_gzip(output)):
        return
    also = " (also with .gz)" if packed else ""
    folder = Path(output).is_dir()
    raise ConfigError(
        "is a folder" if folder else f"unknown kind of output {Path(output).name!r}",
        where=str(output),
        expected=f"a name that ends in {' or '.join(endings)}{also}",
    )


def check_folder_name(output: str | Path) -> None:
    """Refuse the name of a file, of data or of a model, for a folder that is to be made."""
    if not Path(output).is_dir() and (ending_of(output) in _FILES or is_gzip(output)):
        raise ConfigError(
            f"{Path(output).name!r} is the name of a file", where=str(output), expected="a folder"
        )


@contextmanager
def open_bytes(opener: Callable[[], IO[bytes]], name: str) -> Iterator[io.BufferedReader]:
    """Open UTF-8 bytes, which ``opener`` opens as they are stored: without byte order mark or gzip.

    A ``name`` (path or address) that ends in ``.gz`` is decompressed; standard input is where its
    first bytes are those of gzip. What is not gzip or UTF-8, or cannot be read, is a DataError.
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
    """A stream with bytes in front that were taken from it to look at them.

    ``BufferedReader.peek`` reads once at most, and a pipe may give a byte at a time.
    """

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
    """Read one JSON value of UTF-8 bytes: the one place where broken JSON becomes an error.

    ``where`` is the place of a line, or, with ``is_file``, a path: the error adds the line to it.
    """
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
