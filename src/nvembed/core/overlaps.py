"""Outputs and inputs told apart by what they are, whatever links and names lead to them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from nvembed.core.errors import ConfigError

MARK = ".nvembed.jsonl"
"""The file that lists what nvembed made in a folder, see ``ownership.py``."""


def check_overlaps(outputs: Iterable[Path], inputs: Iterable[Path | str | None]) -> None:
    """Refuse an output that is an input, holds one or lies inside one, by whatever names.

    Args:
        outputs: files and folders; they need not be there.
        inputs: files and folders that are read. Names that are no path here (of the hub, of an
            endpoint, ``-``) and None are passed over.

    Raises:
        ConfigError: names both.
    """
    read = [path for given in inputs if given is not None and (path := Path(given)).exists()]
    for output in outputs:
        for path in read:
            if (problem := _overlap(output, path)) is not None:
                shown = output.parent if output.name == MARK else output
                raise ConfigError(problem, where=str(shown), hint="Choose another output")


def _overlap(output: Path, source: Path) -> str | None:
    """What is wrong between an output and something that is read; None where nothing is."""
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
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


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
                if stat.S_ISLNK(found.st_mode) or (
                    stat.S_ISREG(found.st_mode) and found.st_nlink > 1
                ):
                    yield path
