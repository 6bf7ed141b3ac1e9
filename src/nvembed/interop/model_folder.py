"""What a model is and what its files say, decided in one place before any model is built.

It is an exported ONNX graph, NVIDIA's layout, a saved embedding model or a bare language model, in
a folder or on the hub. What goes wrong on the way to a file is a ModelError. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import errors, hf_hub_download

from nvembed.core.arguments import check_settings, kind_of, shown_value
from nvembed.core.errors import ConfigError, ModelError
from nvembed.core.files import parse_json
from nvembed.interop.gguf_names import find_gguf

ONNX_FILE = "nvembed_onnx.json"
"""What ``nvembed export --format onnx`` writes beside a graph."""
OFFICIAL_TYPE = "nvembed"
"""``model_type`` of NVIDIA's layout."""
COPY_AGAIN = "Copy or download the folder again, completely"

_LFS = b"version https://git-lfs"

# Models for which the hub could not be reached in this process: each further file would cost half
# a minute of retries again.
_gave_no_answer: set[str] = set()

# --- Its files ------------------------------------------------------------------------------------


class _UnreachableError(ModelError):
    """A file is not in the cache, and the hub did not answer (or was not to be asked)."""


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
            "local_files_only": self.local_files_only,
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
        """Refuse a name that is a file of another kind than GGUF, or a path to nothing."""
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
        if is_file or (self.name.count("/") > 1 and not is_folder):
            raise ModelError("no such model folder", where=self.name, hint="Check the path")

    def find(self, filename: str) -> Path | None:
        """Path of a file, downloaded where needed; ``None`` where the model has no such file."""
        if self.is_folder:
            path = Path(self.name) / self.inside / filename
            return path if path.is_file() else None
        if self.gguf is not None:
            return None
        try:
            return self._download(filename)
        except _UnreachableError:
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

    def _download(self, filename: str) -> Path | None:
        where = f"{self.name} (revision {self.revision})" if self.revision else self.name
        try:
            return Path(
                hf_hub_download(
                    self.name,
                    f"{self.inside}/{filename}" if self.inside else filename,
                    revision=self.revision,
                    token=self.token,
                    cache_dir=self.cache_folder,
                    local_files_only=self.local_files_only or self.name in _gave_no_answer,
                    library_name="nvembed",
                )
            )
        except errors.LocalEntryNotFoundError as error:
            _gave_no_answer.add(self.name)
            raise _UnreachableError(
                f"{filename} is not in the local cache and the hub cannot be reached",
                where=where,
                expected="a network connection, an earlier download or a local folder",
            ) from error
        except errors.EntryNotFoundError:
            return None
        except errors.HFValidationError as error:
            raise ModelError(
                "neither a folder nor a hub id", where=self.name, hint="Check the path"
            ) from error
        except (errors.HfHubHTTPError, OSError) as error:
            raise _refused(error, where) from error


def _refused(error: Exception, where: str) -> ModelError:
    if isinstance(error, errors.GatedRepoError):
        return ModelError(
            "the repository is gated and this machine has no access",
            where=where,
            expected="the token of an account that has accepted its licence",
            hint="Accept the licence on the model's hub page, then `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelError(
            "no such folder here and no such repository on the hub (or a private one)",
            where=where,
            hint="Check the name; a private repository needs a token",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError("the repository has no such revision", where=where)
    reason = str(error).strip().splitlines()
    text = f"cannot be downloaded ({reason[0] if reason else type(error).__name__})"
    return ModelError(text, where=where)


# --- What it is -----------------------------------------------------------------------------------


def check_model_name(name: str) -> None:
    """Refuse a path to nothing and a folder without a model, before anything slow begins."""
    ModelSource(name).check()
    path = Path(name)
    # A hub id is "name" or "owner/name".
    if name.startswith((".", "/", "~")) and not path.exists():
        expected = "a folder, a GGUF file or a hub id"
        raise ModelError("no such model folder", where=name, expected=expected)
    listings = (ONNX_FILE, "modules.json", "config.json")
    if path.is_dir() and not any((path / file).is_file() for file in listings):
        raise ModelError(
            "no model in this folder", where=name, expected="modules.json or config.json in it"
        )


def holds_graph(name: str) -> bool:
    """Whether a folder holds an exported ONNX graph."""
    return (Path(name) / ONNX_FILE).is_file()


def is_foreign(source: ModelSource) -> bool:
    """Whether it is a sentence-transformers model that has none of our modules."""
    if model_kind(source) != "saved":
        return False
    return not any(entry.type.startswith("nvembed.") for entry in read_modules(source))


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


# --- What its settings say ------------------------------------------------------------------------


class ModuleEntry(NamedTuple):
    """One entry of ``modules.json``."""

    type: str  # dotted name of the class
    path: str  # folder of the module inside the model's; "" is the model's own


@dataclass(frozen=True, slots=True)
class SavedPrompts:
    """What ``config_sentence_transformers.json`` says that is used here."""

    prompts: dict[str, str] | None = None
    default_prompt_name: str | None = None
    similarity_fn_name: Literal["cosine", "dot", "euclidean", "manhattan"] | None = None


def read_modules(source: ModelSource) -> list[ModuleEntry]:
    """Read ``modules.json``, which must be there."""
    path = source.require("modules.json")
    entries = read_json_file(path)
    if not isinstance(entries, list) or not entries:
        expected = '[{"type": "...", "path": "..."}]'
        raise damaged(f"not a list of modules, but {kind_of(entries)}", path, expected)
    found = []
    for number, entry in enumerate(entries):
        given = entry if isinstance(entry, dict) else {}
        values = {key: given.get(key) for key in ModuleEntry._fields}
        where = f"{path}, entry {number}"
        found.append(ModuleEntry(**read_values(ModuleEntry, values, where=where)))
    return found


def read_prompts(source: ModelSource) -> SavedPrompts:
    """Read the prompts that were saved with a model; none where it has no such file."""
    name = "config_sentence_transformers.json"
    saved = source.read_json(name) or {}
    values = {key: saved.get(key) for key in SavedPrompts.__dataclass_fields__}
    return SavedPrompts(**read_values(SavedPrompts, values, where=f"{source.name}/{name}"))


def read_values(of: Callable[..., Any], values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Settings of a file that are the arguments of a constructor, every one of them checked."""
    try:
        check_settings(of, values, where=where)
    except ConfigError as error:
        raise damaged(error.message, where) from error
    return dict(values)


def read_limit(source: ModelSource, filename: str, key: str) -> int | None:
    """A number of tokens or positions that a settings file gives; ``None`` where it does not."""
    limit = (source.read_json(filename) or {}).get(key)
    # Where there is no limit, tokenizers say 1e30, some of them as a float.
    if limit is None or (isinstance(limit, int | float) and limit >= 1 and limit is not True):
        return None if limit is None else int(limit)
    where = f"{source.name}/{filename}"
    raise damaged(f"{key} is {shown_value(limit)}", where, "a number of tokens")
