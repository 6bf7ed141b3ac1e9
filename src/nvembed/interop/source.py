"""Where a model's files are: a folder, or a repository on the hub.

Everything that can go wrong on the way to a file is a :class:`ModelError` of one line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nvembed.core.arguments import kind_of
from nvembed.core.errors import ModelError
from nvembed.core.text_files import parse_json


class _UnreachableError(ModelError):
    """A file is not in the cache, and the hub did not answer (or was not to be asked)."""


# Models for which the hub could not be reached in this process: each further file would cost half
# a minute of retries again.
_gave_no_answer: set[str] = set()

COPY_AGAIN = "Copy or download the folder again, completely"
_LFS = b"version https://git-lfs"


def read_json_file(path: Path) -> Any:
    """Content of a JSON file of a model."""
    check_present(path)
    return parse_json(
        path.read_bytes(),
        str(path),
        error=ModelError,
        expected=None,
        hint=COPY_AGAIN,
        is_file=True,
    )


def check_present(path: Path) -> None:
    """Refuse a file that cannot be read, is empty, or only points at the file itself."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_LFS))
    except OSError as error:
        raise ModelError(f"cannot be read ({error.strerror})", where=str(path)) from error
    if not start:
        raise ModelError("the file is empty", where=str(path), hint=COPY_AGAIN)
    if start == _LFS:
        raise ModelError(
            "a Git LFS pointer, not the file itself",
            where=str(path),
            hint="Run `git lfs pull` in the folder, or download the file",
        )


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model by folder or hub id.

    Attributes:
        name: the folder, or ``owner/name`` on the hub.
        revision: commit, tag or branch on the hub.
        token: of the hub, for gated models.
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

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of this machine."""
        return Path(self.name).is_dir()

    def options(self) -> dict[str, Any]:
        """Everything but the name, as the modules of sentence-transformers take it."""
        return {
            "revision": self.revision,
            "token": self.token,
            "cache_folder": self.cache_folder,
            "local_files_only": self.local_files_only,
        }

    def check(self) -> None:
        """Refuse a name that is a file or a path to nothing."""
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
        """Path of a file, downloaded where needed; ``None`` where the model has no such file.

        Raises:
            ModelError: the repository is gated, private or does not exist, or the revision does
                not.
        """
        if self.is_folder:
            path = Path(self.name) / self.inside / filename
            return path if path.is_file() else None
        try:
            return self._download(filename)
        except _UnreachableError:
            return None

    def require(self, filename: str, *, hint: str | None = None) -> Path:
        """Path of a file that must be there."""
        path = self.find(filename) if self.is_folder else self._download(filename)
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
            raise ModelError(
                f"holds {kind_of(value)}",
                where=str(path),
                expected="a JSON object",
                hint=COPY_AGAIN,
            )
        return value

    def pinned(self, file: Path) -> ModelSource:
        """The same source at the commit that ``file`` was found in, for all further files."""
        if self.is_folder or file.parent.parent.name != "snapshots":
            return self
        return replace(self, revision=file.parent.name)

    def _download(self, filename: str) -> Path | None:
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
        except LocalEntryNotFoundError as error:
            _gave_no_answer.add(self.name)
            raise _UnreachableError(
                f"{filename} is not in the local cache and the hub cannot be reached",
                where=self._place,
                expected="a network connection, an earlier download or a local folder",
            ) from error
        except EntryNotFoundError:
            return None
        except HFValidationError as error:
            raise ModelError(
                "neither a folder nor a hub id", where=self.name, hint="Check the path"
            ) from error
        except (HfHubHTTPError, OSError) as error:
            raise self._refused(error) from error

    @property
    def _place(self) -> str:
        return f"{self.name} (revision {self.revision})" if self.revision else self.name

    def _refused(self, error: Exception) -> ModelError:
        if isinstance(error, GatedRepoError):
            return ModelError(
                "the repository is gated and this machine has no access",
                where=self._place,
                expected="the token of an account that has accepted its licence",
                hint="Accept the licence on the model's hub page, then `hf auth login` or set "
                "HF_TOKEN",
            )
        if isinstance(error, RepositoryNotFoundError):
            return ModelError(
                "no such folder here and no such repository on the hub (or a private one)",
                where=self._place,
                hint="Check the name; a private repository needs a token",
            )
        if isinstance(error, RevisionNotFoundError):
            return ModelError("the repository has no such revision", where=self._place)
        reason = str(error).strip().splitlines()
        return ModelError(
            f"cannot be downloaded ({reason[0] if reason else type(error).__name__})",
            where=self._place,
        )
