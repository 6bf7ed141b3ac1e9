"""Whose a file is: only what nvembed made, and nobody has changed since, is ever replaced.

Every folder with outputs holds ``.nvembed.jsonl``: a line for each file that was written there,
with command, size and digest, written before the file is moved into place. A folder that is an
output as a whole lists all its files. Commands ask ``check_outputs`` before they begin.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from nvembed.core.errors import ConfigError, UserError

MARK = ".nvembed.jsonl"
# Ends of names that no user gives to a file: of what is being written, and of the folder that is
# being replaced, where two names cannot be exchanged in one step.
NEW = ".nvembed-new"
OLD = ".nvembed-old"
LEFTOVER = re.compile(rf"\.(?P<target>.+?)(?:\.\w{{8}}{re.escape(NEW)}|{re.escape(OLD)})")
# Files beyond this size are known by their size and their ends.
_LARGE_BYTES = 64_000_000
_END_BYTES = 1_000_000
_GROWS = "grows"  # stands for the digest of a log or table that is added to


class _Line(NamedTuple):
    """One line of a mark; ``name`` is relative to its folder."""

    name: str
    by: str
    size: int
    digest: str

    def to_json(self) -> str:
        values = {"name": self.name, "by": self.by, "bytes": self.size, "sha256": self.digest}
        return json.dumps(values, ensure_ascii=False) + "\n"


# --- Reading marks --------------------------------------------------------------------------------


def problem_of(path: Path, made_by: str | None = None, *, contents: bool = True) -> str | None:
    """Why a file or folder must not be replaced; None where it is ours, empty or nothing is there.

    ``made_by`` None is any command of ours. Without ``contents`` no digests are compared.
    """
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"cannot be looked at ({error.strerror})"
    lines = _lines_of(path)
    if any(line.digest == _GROWS and made_by in (None, line.by) for line in lines):
        return None
    if stat.S_ISDIR(mode):
        for file, known in _files_below(path):
            if (problem := _problem(file, known, made_by, contents)) is not None:
                return f"{problem}: {file.relative_to(path)}"
        return None
    if not stat.S_ISREG(mode):
        return "is a symbolic link" if stat.S_ISLNK(mode) else "is no ordinary file"
    return _problem(path, lines, made_by, contents) if path.stat().st_size else None


def _problem(path: Path, lines: list[_Line], made_by: str | None, contents: bool) -> str | None:
    if not lines:
        return "is there already, and nvembed did not make it"
    wanted = [line for line in lines if made_by in (None, line.by)]
    if not wanted:
        return f"is there already, made by another command ({lines[-1].by})"
    if path.is_symlink():
        return "is a symbolic link"
    try:
        size = path.stat().st_size
        if any(line.digest == _GROWS for line in wanted):
            return None
        wanted = [line for line in wanted if line.size == size]
        if wanted and not contents:
            return None
        digest = _digest(path) if wanted else ""
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if any(line.digest == digest for line in wanted):
        return None
    return "was changed since nvembed made it"


def _digest(path: Path) -> str:
    """SHA-256 of a file's contents; of a file beyond 64 MB, of its size and both ends."""
    with open(path, "rb") as content:
        size = os.fstat(content.fileno()).st_size
        if size <= _LARGE_BYTES:
            return hashlib.file_digest(content, "sha256").hexdigest()
        first = content.read(_END_BYTES)
        content.seek(-_END_BYTES, 2)
        return hashlib.sha256(str(size).encode() + first + content.read()).hexdigest()


def _lines_of(path: Path) -> list[_Line]:
    return [line for line in _read_mark(path.parent) if line.name == path.name]


def _files_below(folder: Path) -> Iterator[tuple[Path, list[_Line]]]:
    """All files below a folder but marks and leftovers, inner ones first, with their lines."""
    whole: dict[str, list[_Line]] = {}
    for line in _read_mark(folder):
        whole.setdefault(line.name, []).append(line)
    for place, folders, names in os.walk(folder, topdown=False):
        inner = Path(place)
        if any(map(LEFTOVER.fullmatch, inner.relative_to(folder).parts)):
            continue
        beside = _read_mark(inner) if inner != folder else []
        links = [name for name in folders if (inner / name).is_symlink()]
        for name in sorted(names + links):
            if name == MARK or LEFTOVER.fullmatch(name):
                continue
            path = inner / name
            known = whole.get(path.relative_to(folder).as_posix(), [])
            yield path, [*known, *(line for line in beside if line.name == name)]


def _read_mark(folder: Path) -> list[_Line]:
    """The lines of a mark; what cannot be read says nothing."""
    found = []
    try:
        text = (folder / MARK).read_bytes().decode("utf-8", "replace")
    except OSError:
        return []
    for row in text.split("\n"):
        with suppress(ValueError, KeyError, TypeError):
            value = json.loads(row)
            size, digest = int(value["bytes"]), str(value["sha256"])
            found.append(_Line(str(value["name"]), str(value["by"]), size, digest))
    return found


# --- Writing marks --------------------------------------------------------------------------------


def mark_file(path: Path, content: Path, made_by: str) -> None:
    """Say beside ``path`` that a command makes it of the file ``content``, before that is moved."""
    if any(line.digest == _GROWS and line.by == made_by for line in _lines_of(path)):
        return
    _append(path.parent, _Line(path.name, made_by, content.stat().st_size, _digest(content)))


def mark_growing(path: Path, made_by: str) -> None:
    """Say beside ``path``, a log or a table that is not there yet, that a command adds to it."""
    _append(path.parent, _Line(path.name, made_by, 0, _GROWS))


def mark_folder(folder: Path, made_by: str) -> None:
    """List all files of a folder in it, before it is moved to its place."""
    lines = sorted(
        _Line(path.relative_to(folder).as_posix(), made_by, path.stat().st_size, _digest(path))
        for path, _ in _files_below(folder)
    )
    with open(folder / MARK, "w", encoding="utf-8", newline="\n") as out:
        out.writelines(line.to_json() for line in lines)
        out.flush()
        os.fsync(out.fileno())


def _append(folder: Path, line: _Line) -> None:
    known = _read_mark(folder)
    if line in known:
        return
    mark = folder / MARK
    if not known and mark.exists() and mark.stat().st_size:
        raise UserError(
            "is not what nvembed writes there",
            where=str(mark),
            hint="Move or delete it: it is to list what nvembed made in this folder",
        )
    with open(mark, "ab+") as out:
        # What a killed process left of a line ends here.
        out.seek(-1 if out.tell() else 0, os.SEEK_END)
        torn = out.read() not in (b"", b"\n")
        out.write((b"\n" if torn else b"") + line.to_json().encode())


# --- Asking before work begins --------------------------------------------------------------------


def check_outputs(
    outputs: Iterable[Path],
    *,
    made_by: str,
    inputs: Iterable[Path | str | None] = (),
    places: Iterable[Path] = (),
) -> None:
    """Refuse to begin where something would be lost.

    ``made_by`` is the command, whose earlier outputs may be replaced; ``inputs`` are as in
    ``check_overlaps``; ``places`` (a cache, a database) are written into and never replaced.
    """
    outputs = list(outputs)
    check_overlaps([*outputs, *(place / MARK for place in places)], inputs)
    for output in outputs:
        refuse_foreign(output, made_by)


def refuse_foreign(path: Path, made_by: str, *, contents: bool = True) -> None:
    """Refuse to replace what a command did not make, or what was changed since."""
    if (problem := problem_of(path, made_by, contents=contents)) is not None:
        raise foreign_error(problem, path)


def foreign_error(problem: str, path: Path) -> ConfigError:
    """Say that something is in the way of an output."""
    hint = "Move or delete it, or choose another output"
    return ConfigError(problem, where=str(path), hint=hint)


def check_overlaps(outputs: Iterable[Path], inputs: Iterable[Path | str | None]) -> None:
    """Refuse an output that is an input, holds one or lies inside one."""
    read = [path for given in inputs if given is not None and (path := Path(given)).exists()]
    for output in outputs:
        for path in read:
            if (problem := _overlap(output, path)) is not None:
                shown = output.parent if output.name == MARK else output
                raise ConfigError(problem, where=str(shown), hint="Choose another output")


def _overlap(output: Path, source: Path) -> str | None:
    own, other = _identity(output), _identity(source)
    if own is not None and own == other:
        return f"output and input are the same {'folder' if source.is_dir() else 'file'}"
    if other is not None and other in _above(output):
        return f"the output lies inside an input, {source}"
    if own is None:
        return None
    if own in _above(source):
        return f"the output would replace a folder that holds an input, {source}"
    for path in _linked(source):
        if _identity(path) == own or own in _above(path):
            return f"the output is read as well: {path} leads to it"
    return None


def _identity(path: Path) -> tuple[int, int] | None:
    """The same for all names of a file or folder; None where nothing is there."""
    with suppress(OSError):
        found = path.stat()
        return found.st_dev, found.st_ino
    return None


def _above(path: Path) -> set[tuple[int, int]]:
    """The folders that a path lies in, by the path as given and as it is with links followed."""
    written = Path(os.path.normpath(path.absolute()))
    parents = {*written.parents, *Path(os.path.realpath(path)).parents}
    return {identity for place in parents if (identity := _identity(place)) is not None}


def _linked(folder: Path) -> Iterator[Path]:
    """Files of a folder that other names may lead to: links, and files with several names."""
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place) / name
            with suppress(OSError):
                found = path.lstat()
                shared = stat.S_ISREG(found.st_mode) and found.st_nlink > 1
                if shared or stat.S_ISLNK(found.st_mode):
                    yield path


# --- Deleting -------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    """Delete what nvembed made of a file or folder, marks last; whatever else is in it stays."""
    if not path.is_dir() or path.is_symlink():
        if problem_of(path) is None:
            path.unlink(missing_ok=True)
        return
    _remove_leftovers(path)
    for file, lines in list(_files_below(path)):
        if _problem(file, lines, None, True) is None:
            file.unlink(missing_ok=True)
    _remove_empty(path)


def remove_named(folder: Path, names: re.Pattern[str]) -> None:
    """Delete the files of a working folder by their paths in it; whatever else is in it stays."""
    _remove_leftovers(folder)
    for path, _ in list(_files_below(folder)):
        if _named(path, folder, names):
            path.unlink(missing_ok=True)
    _remove_empty(folder)


def unnamed(folder: Path, names: re.Pattern[str]) -> list[Path]:
    """What else lies in a working folder than the files that ``names`` describes."""
    return [path for path, _ in _files_below(folder) if not _named(path, folder, names)]


def _named(path: Path, folder: Path, names: re.Pattern[str]) -> bool:
    inside = path.relative_to(folder).as_posix()
    return names.fullmatch(inside) is not None and not path.is_symlink()


def _remove_leftovers(folder: Path) -> None:
    for path in list(folder.rglob(".*")):
        if LEFTOVER.fullmatch(path.name):
            remove_any(path)


def remove_any(path: Path) -> None:
    """Delete a file or a folder, whatever it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    """Delete folders without files, with their marks."""
    for place, _, names in os.walk(folder, topdown=False):
        if set(names) <= {MARK}:
            with suppress(OSError):
                if set(os.listdir(place)) <= {MARK}:
                    (Path(place) / MARK).unlink(missing_ok=True)
                os.rmdir(place)
