from __future__ import annotations

import os
from pathlib import Path

import pytest

from nvembed.core import cache
from nvembed.core.cache import content_hash, digest_of, file_digest
from nvembed.core.errors import DataError


@pytest.fixture(autouse=True)
def every_file_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "_LARGE", 1)
    monkeypatch.setattr(cache, "_SETTLED_SECONDS", -1.0)
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sums"


def test_a_large_file_is_read_once_and_a_changed_one_again(
    tmp_path: Path, every_file_is_large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    found = file_digest(file)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
        assert file_digest(file) == found
    # The same name, size and time of the last write, which a program can set.
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    while True:
        file.write_bytes(b"two")
        os.utime(file, ns=times)
        if file.stat().st_ctime_ns != times[1]:
            break
    assert file.stat().st_mtime_ns == times[1]
    other = file_digest(file)
    assert other != found
    for kept in every_file_is_large.iterdir():
        kept.write_bytes(b"\xff torn")
    assert file_digest(file) == other


def test_a_file_that_was_written_just_now_is_not_remembered(
    tmp_path: Path, every_file_is_large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_SETTLED_SECONDS", 3.0)
    (tmp_path / "weights").write_bytes(b"one")
    file_digest(tmp_path / "weights")
    assert not every_file_is_large.exists()


def test_a_folder_is_its_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "in").mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "in" / "b").write_text("2")
    found = digest_of(folder)
    os.utime(folder / "a", (0, 0))
    assert digest_of(folder) == found
    (folder / "a").rename(folder / "c")
    assert digest_of(folder) != found
    with pytest.raises(DataError, match="no such file"):
        digest_of(folder / "nothing")


def test_plain_data_do_not_depend_on_the_order_of_keys() -> None:
    assert content_hash({"a": 1, "b": [None, "ü"]}) == content_hash({"b": [None, "ü"], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": "1"})
