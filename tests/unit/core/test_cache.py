"""Where the cache lies, also where there is no home folder."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from nvembed.core import cache
from nvembed.core.cache import cache_folder, expanded, open_private
from nvembed.core.errors import UserError


@pytest.fixture(autouse=True)
def _nothing_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVEMBED_CACHE")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache._of_this_process.cache_clear()


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def _is_own(folder: Path) -> bool:
    status = folder.stat()
    return status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o700


def test_without_a_home_it_lies_in_a_temporary_folder_of_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", _no_home)
    assert cache_folder("tokens") == tmp_path / f"nvembed-{os.geteuid()}" / "tokens"
    assert _is_own(cache_folder("tokens").parent)


@pytest.mark.parametrize("home", ["/dev/null", "/dev/null/home", "/proc/home"])
def test_a_home_that_cannot_be_written_to_is_none(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", home)
    assert cache_folder("sums").is_relative_to(tmp_path)
    cache_folder("sums").mkdir()


def test_a_home_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("sums") == tmp_path / "home" / ".cache" / "nvembed" / "sums"


def test_a_temporary_folder_that_someone_else_has_made_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", _no_home)
    squatted = tmp_path / f"nvembed-{os.geteuid()}"
    squatted.mkdir()
    squatted.chmod(0o777)
    other = cache_folder("native").parent
    assert other.parent == tmp_path
    assert other != squatted
    assert _is_own(other)
    assert cache_folder("native").parent == other  # for the whole process


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVEMBED_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(UserError, match=r"NVEMBED_CACHE: no home folder.*nobody-of-this-name"):
        cache_folder("tokens")
    with pytest.raises(UserError, match="--cache: no home folder"):
        expanded(Path("~nobody-of-this-name"), where="--cache")


def test_no_temporary_folder_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", _no_home)

    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(UserError, match="NVEMBED_CACHE: there is no folder for temporary files"):
        cache_folder("tokens")


def test_a_private_folder_is_made_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with open_private(tmp_path / "a" / "b") as handle:
            assert handle is not None
            assert os.fstat(handle).st_ino == (tmp_path / "a" / "b").stat().st_ino
    finally:
        os.umask(before)
    assert _is_own(tmp_path / "a" / "b")
