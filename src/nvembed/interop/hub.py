"""Files of a model on the hub: every failure of name, licence or network is one line."""

from __future__ import annotations

import difflib
from contextlib import suppress
from pathlib import Path

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

from nvembed.core.errors import ModelError

# Models for which the hub could not be reached in this process: each further file would cost half
# a minute of retries again.
_gave_no_answer: set[str] = set()


def did_you_mean(name: str) -> str | None:
    """A hint at the folder beside a path to nothing that is called nearly the same.

    ``runs/modle`` reads as owner and name of the hub; it may be one, so the hub is asked first.
    """
    path, beside = Path(name), list[str]()
    with suppress(OSError):  # no such parent, or one that may not be read
        beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    if path.name in beside:
        return None
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.7)
    return f"Did you mean {path.with_name(near[0])}?" if near else None


class UnreachableError(ModelError):
    """A file is not in the cache, and the hub did not answer (or was not to be asked)."""


def download(
    name: str,
    file: str,
    *,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_folder: str | None = None,
    local_files_only: bool = False,
) -> Path | None:
    """Path of a file of a repository, from cache or hub; ``None`` where it has no such file.

    Raises:
        UnreachableError: it is not in the cache, and the hub cannot be reached.
        ModelError: no such repository or revision, no access, or a download that failed.
    """
    where = f"{name} (revision {revision})" if revision else name
    try:
        return Path(
            hf_hub_download(
                name,
                file,
                revision=revision,
                token=token,
                cache_dir=cache_folder,
                local_files_only=local_files_only or name in _gave_no_answer,
                library_name="nvembed",
            )
        )
    except LocalEntryNotFoundError as error:
        _gave_no_answer.add(name)
        raise UnreachableError(
            f"{file.rpartition('/')[2]} is not in the local cache and the hub cannot be reached",
            where=where,
            expected="a network connection, an earlier download or a local folder",
            hint=did_you_mean(name),
        ) from error
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ModelError(
            "neither a folder nor a hub id", where=name, hint="Check the path"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise _refused(error, where, did_you_mean(name)) from error


def _refused(error: Exception, where: str, near: str | None) -> ModelError:
    if isinstance(error, GatedRepoError):
        return ModelError(
            "the repository is gated and this machine has no access",
            where=where,
            expected="the token of an account that has accepted its licence",
            hint="Accept the licence on the model's hub page, then `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, RepositoryNotFoundError):
        return ModelError(
            "no such folder here and no such repository on the hub (or a private one)",
            where=where,
            hint=near or "Check the name; a private repository needs a token",
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelError("the repository has no such revision", where=where)
    reason = str(error).strip().splitlines()
    text = f"cannot be downloaded ({reason[0] if reason else type(error).__name__})"
    return ModelError(text, where=where)
