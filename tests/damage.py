"""Damage done to the files of a folder, as disks, downloads and hurried hands do it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
OTHER_VALUES = [None, [], {}, "", "x", -1, 0, 1.5, True, 10**9, [1, "a"], {"a": None}, "512", "\n"]


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one file or folder below a folder, and say what was done.

    Args:
        folder: something in it is changed in place.
        rng: decides everything.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path = rng.choice(files)
    done = rng.choice(KINDS)
    if done is _changed_value and path.suffix not in (".json", ".jsonl", ".yaml"):
        done = rng.choice([_truncated, _garbage])
    name = done.__name__.strip("_")
    return f"{path.relative_to(folder)} {name} {done(path, rng) or ''}".strip()


def _truncated(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    length = rng.randrange(max(len(data), 1))
    path.write_bytes(data[:length])
    return f"to {length} of {len(data)}"


def _emptied(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def _deleted(path: Path, rng: random.Random) -> None:
    path.unlink()


def _deleted_with_its_folder(path: Path, rng: random.Random) -> str:
    others = sorted(p for p in path.parent.iterdir() if p.is_dir())
    if others:
        shutil.rmtree(other := rng.choice(others))
        return other.name
    path.unlink()
    return path.name


def _swapped(path: Path, rng: random.Random) -> str:
    other = rng.choice(sorted(p for p in path.parent.iterdir() if p.is_file()))
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)
    return f"with {other.name}"


def _garbage(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    start, length = rng.randrange(len(data) + 1), rng.choice([1, 8, 200])
    data[start : start + length] = rng.randbytes(length)
    path.write_bytes(data)
    return f"{length} bytes at {start}"


def _lfs_pointer(path: Path, rng: random.Random) -> None:
    path.write_bytes(LFS_POINTER)


def _byte_order_mark(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def _utf_16(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes().decode("utf-8", "replace").encode("utf-16"))


def _a_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _changed_value(path: Path, rng: random.Random) -> str | None:
    if path.suffix == ".yaml":
        lines = path.read_text().splitlines()
        number = rng.randrange(len(lines))
        key, colon, _ = lines[number].partition(":")
        lines[number] = f"{key}{colon} {json.dumps(rng.choice(OTHER_VALUES))}"
        path.write_text("\n".join(lines) + "\n")
        return lines[number].strip()
    if path.suffix == ".jsonl":
        lines = path.read_text().splitlines()
        if not lines:
            return None
        number = rng.randrange(len(lines))
        value, said = _with_another_value(json.loads(lines[number]), rng)
        lines[number] = json.dumps(value)
        path.write_text("\n".join(lines) + "\n")
        return f"line {number + 1} {said}"
    try:
        value = json.loads(path.read_text())
    except ValueError:
        return None
    value, said = _with_another_value(value, rng)
    path.write_text(json.dumps(value))
    return said


def _with_another_value(value: Any, rng: random.Random) -> tuple[Any, str]:
    """Replace, rename or drop something at any depth; often at the top."""
    places: list[tuple[Any, Any]] = []

    def walk(here: Any) -> None:
        items = here.items() if isinstance(here, dict) else enumerate(here)
        for key, inner in list(items)[:50]:
            places.append((here, key))
            if isinstance(inner, dict | list):
                walk(inner)

    if isinstance(value, dict | list):
        walk(value)
    if not places or rng.random() < 0.1:
        new = rng.choice(OTHER_VALUES)
        return new, f"whole: {new!r}"
    here, key = rng.choice(places)
    if rng.random() < 0.2:
        del here[key]
        return value, f"without {key}"
    here[key] = rng.choice(OTHER_VALUES)
    return value, f"{key}={here[key]!r}"


KINDS: list[Callable[[Path, random.Random], str | None]] = [
    _truncated,
    _emptied,
    _deleted,
    _deleted_with_its_folder,
    _swapped,
    _garbage,
    _lfs_pointer,
    _byte_order_mark,
    _utf_16,
    _a_folder,
    # What is nearest to right is the hardest to see.
    *[_changed_value] * 5,
]
