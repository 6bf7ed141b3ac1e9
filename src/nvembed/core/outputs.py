"""What an output may be called, and where a new folder may lie."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from nvembed.core.errors import ConfigError
from nvembed.core.files import ending_of, is_gzip
from nvembed.core.ownership import MARK, check_overlaps

_FILES = (
    *(".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md", ".npy", ".npz", ".yaml"),
    *(".onnx", ".safetensors", ".gguf", ".bin", ".pt", ".zip"),
)


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


def check_new_folder(to: Path, inputs: Iterable[Path | str | None]) -> None:
    """Refuse a place for a new folder that holds something, lies in an input or is like a file."""
    check_folder_name(to)
    check_overlaps([to / MARK], inputs)
    if os.path.lexists(to) and (to.is_symlink() or not to.is_dir() or any(to.iterdir())):
        raise ConfigError(
            "something is there already",
            where=f"--to {to}",
            expected="a new folder, or an empty one",
        )
