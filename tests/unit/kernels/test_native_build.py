"""Compiled libraries: what is damaged or may be someone else's is never loaded."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvembed.core import cache
from nvembed.kernels import build as native_build
from nvembed.kernels.build import NativeError, load

try:
    native_build._compiler()
except NativeError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache and a temporary folder of this test."""
    for name in ("cache", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    cache._of_this_process.cache_clear()
    cache._log_once.cache_clear()


@pytest.fixture
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A source that answers 42; no other test has the same, since the linker knows names again."""
    file = tmp_path / "answer.cpp"
    name = hashlib.sha256(request.node.name.encode()).hexdigest()
    file.write_text(f'// {name}\nextern "C" int answer() {{ return 42; }}')
    return file


def compiled(source: Path) -> Path:
    """Compile a source in another process, so that its library is not loaded here."""
    code = (
        "import sys; from pathlib import Path; from nvembed.kernels.build import load;"
        "print(load(Path(sys.argv[1])).answer())"
    )
    done = subprocess.run([sys.executable, "-c", code, source], capture_output=True, check=True)
    assert done.stdout.strip() == b"42"
    (library,) = (Path(os.environ["NVEMBED_CACHE"]) / "native").glob("answer-*.so")
    return library


def checksum_file(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def plant(library: Path, tmp_path: Path) -> None:
    """Put another library, and its checksum, in the place of one."""
    code, other = tmp_path / "other.cpp", tmp_path / "other.so"
    code.write_text('extern "C" int answer() { return 666; }')
    native_build._compile(native_build._compiler(), code, other)
    library.unlink(missing_ok=True)
    library.write_bytes(other.read_bytes())
    checksum_file(library).write_text(hashlib.sha256(other.read_bytes()).hexdigest())


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        half,
        flipped,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(bytes(4096)),
        lambda path: checksum_file(path).unlink(),
        lambda path: checksum_file(path).write_bytes(b"\xff"),
        lambda path: checksum_file(path).write_text("0" * 64),
        lambda path: (checksum_file(path).unlink(), checksum_file(path).mkdir()),
    ],
    ids=["half", "bit", "empty", "zeros", "no-sum", "no-text", "other-sum", "folder"],
)
def test_a_damaged_library_is_compiled_again(
    damage: Callable[[Path], Any], source: Path, request: pytest.FixtureRequest
) -> None:
    library = compiled(source)
    intact = library.read_bytes()
    damage(library)
    assert load(source).answer() == 42
    if "folder" in request.node.name:  # it cannot be replaced: compiled elsewhere
        return
    assert library.read_bytes() == intact
    wanted = hashlib.sha256(intact).hexdigest()
    assert checksum_file(library).read_text().strip() == wanted


def test_an_intact_library_is_not_compiled_again(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = compiled(source)
    assert library.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(native_build, "_compile", None)
    assert load(source).answer() == 42


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_code_in_a_folder_that_others_can_write_to_is_not_run(
    mode: int, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = compiled(source)
    plant(library, tmp_path)
    library.parent.chmod(mode)
    with caplog.at_level(logging.WARNING, logger="nvembed"):
        assert load(source).answer() == 42
        assert load(source).answer() == 42
    assert caplog.text.count("can be written to by others") == 1
    assert str(library.parent) in caplog.text
    (own,) = (tmp_path / "temporary").glob("nvembed-*/native/answer-*.so")
    assert own.parent.stat().st_mode & 0o777 == 0o700
    assert hashlib.sha256(library.read_bytes()).hexdigest() == checksum_file(library).read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("given", ["folder", "library", "checksum"])
def test_code_of_another_user_is_not_run(given: str, source: Path, tmp_path: Path) -> None:
    library = compiled(source)
    plant(library, tmp_path)
    paths = {"folder": library.parent, "library": library, "checksum": checksum_file(library)}
    os.chown(paths[given], 12345, -1)
    assert load(source).answer() == 42


def test_without_a_folder_of_this_user_nothing_is_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(compiled(source), tmp_path)
    somebody = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: somebody)
    with pytest.raises(NativeError, match="there is no folder for it"):
        load(source)


def test_a_library_that_others_can_write_to_is_not_run(source: Path, tmp_path: Path) -> None:
    library = compiled(source)
    plant(library, tmp_path)
    library.chmod(0o666)
    assert load(source).answer() == 42


@pytest.mark.parametrize("linked", ["folder", "library", "checksum"])
def test_links_are_not_followed(linked: str, source: Path, tmp_path: Path) -> None:
    library = compiled(source)
    plant(library, tmp_path)
    paths = {"folder": library.parent, "library": library, "checksum": checksum_file(library)}
    path = paths[linked]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert load(source).answer() == 42


def test_processes_that_start_together_compile_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, calls = tmp_path / "compiler", tmp_path / "calls"
    real = native_build._compiler()
    counted = f'case "$*" in *-shared*) echo x >> {calls}; sleep 0.5;; esac'
    script.write_text(f'#!/bin/sh\n{counted}\nexec {real} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    code = (
        "import sys; from pathlib import Path; from nvembed.kernels.build import load;"
        "print(load(Path(sys.argv[1])).answer())"
    )
    command = [sys.executable, "-c", code, str(source)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=60)[0].strip() for process in running] == ["42"] * 3
    assert calls.read_text().split() == ["x"]
    kept = {path.name.partition(".")[2] for path in (tmp_path / "cache" / "native").iterdir()}
    assert kept == {"so", "so.sha256"}


def test_the_library_is_on_the_disk_before_its_name_is(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("sync"), fsync(handle))[1])
    monkeypatch.setattr(
        os, "replace", lambda old, new: (done.append(Path(new).suffix), replace(old, new))[1]
    )
    assert load(source).answer() == 42
    assert done == ["sync", ".so", ".sha256", "sync"]


def test_a_model_loads_where_there_is_no_home(
    tiny_decoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels are compiled when the family is tried at load; that must not be an error."""
    from nvembed.kernels import attention
    from nvembed.model.embedder import NVEmbed

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("NVEMBED_CACHE")
    monkeypatch.setattr(Path, "home", no_home)
    libraries = (
        native_build.library,
        attention._float32_kernel,
        attention._bfloat16_kernel,
    )
    for function in libraries:
        function.cache_clear()
    try:
        model = NVEmbed.from_pretrained(tiny_decoder_dir, pooling="mean", device="cpu")
        assert model.encode(["a text"]).shape == (1, 32)
    finally:
        for function in libraries:
            function.cache_clear()
    assert list((tmp_path / "temporary").glob("nvembed-*/native/*.so"))
