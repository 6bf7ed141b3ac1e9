"""The C++ of ``kernels/native/``, compiled on first use and kept in the cache folder.

    <cache>/native/varlen_attention-<key>.so
    <cache>/native/varlen_attention-<key>.so.sha256

The key is a hash of the sources, the options, the compiler's name and version and the instructions
of this CPU, so that a folder shared by several machines holds one library for each kind. A library
is loaded only from a folder in which nobody else can write, and only if its checksum is that of
when it was compiled: a damaged one would end the process. Otherwise it is compiled again, in a
temporary folder where the cache cannot be used (``core/cache.py``). Without a compiler (or where
anything else goes wrong) there is no library, and callers take torch's own code.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from nvembed.core.cache import is_own_file, open_private, private_folders
from nvembed.core.errors import UserError
from nvembed.core.files import atomic_path, write_text
from nvembed.kernels.cpu import this_cpu

COMPILERS = ("g++", "c++", "clang++")
"""Tried in this order, after ``$CXX``."""

# Not -ffast-math: not-a-number must stay what it is, and sums must keep their order.
OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=fast")
_THIS_CPU = ("-march=native", "-mcpu=native")  # the latter of compilers for ARM
_SOURCES = Path(__file__).parent / "native"
_SECONDS = 120
_log = logging.getLogger(__name__)


class NativeError(Exception):
    """No library, and why."""


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The library of a source file of this package, compiled or loaded once; None without one."""
    try:
        return load(_SOURCES / name)
    except NativeError as error:
        _log.info("torch computes in place of %s: %s", name, error)
        return None


def load(source: Path) -> ctypes.CDLL:
    """Load the library of a source file, compiling it where it is not in the cache.

    Raises:
        NativeError: no compiler, it fails, or the library cannot be written or loaded.
    """
    compiler = _compiler()
    name = f"{source.stem}-{_key(source, compiler)}.so"
    reason = "there is no folder for it"
    try:
        for folder in private_folders("native"):
            with open_private(folder) as handle:
                if handle is None:
                    continue
                try:
                    return _load_or_compile(folder, handle, name, compiler, source)
                except UserError as error:  # it cannot be written there
                    reason = str(error)
                    _log.info("%s", reason)
    except (UserError, OSError) as error:
        raise NativeError(str(error)) from error
    raise NativeError(reason)


def _load_or_compile(
    folder: Path, handle: int, name: str, compiler: str, source: Path
) -> ctypes.CDLL:
    """Load a library from a folder that was opened, after compiling it there if need be."""
    if _is_intact(handle, name):
        return _opened(folder, handle, name)
    with _alone(handle):
        if not _is_intact(handle, name):  # no other process has made it meanwhile
            with atomic_path(folder / name) as temporary:
                _compile(compiler, source, temporary)
                checksum = _checksum_and_sync(temporary)
            write_text(folder / _checksum_name(name), checksum + "\n")
            with suppress(OSError):  # not every file system can
                os.fsync(handle)
    if not _is_intact(handle, name):
        raise NativeError(f"{folder / name} is not what was written there")
    return _opened(folder, handle, name)


def _opened(folder: Path, handle: int, name: str) -> ctypes.CDLL:
    # By the descriptor, so that it is the folder that was looked at, whatever has been renamed.
    by_handle = Path(f"/proc/self/fd/{handle}")
    try:
        return ctypes.CDLL(str((by_handle if by_handle.exists() else folder) / name))
    except OSError as error:
        raise NativeError(str(error)) from error


def _is_intact(folder: int, name: str) -> bool:
    """Whether a library is there as it was written, by this user and nobody else."""
    digests = []
    try:
        for file_name in (name, _checksum_name(name)):
            handle = os.open(file_name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
            with open(handle, "rb") as file:
                if not is_own_file(os.fstat(handle)):
                    return False
                content = file.read()
            digests.append(hashlib.sha256(content).hexdigest().encode())
    except OSError:
        return False
    return content.strip() == digests[0]


def _checksum_name(library: str) -> str:
    return f"{library}.sha256"


def _checksum_and_sync(path: Path) -> str:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _alone(folder: int) -> Iterator[None]:
    """Let other processes that want to compile wait; where files cannot be locked, they do not."""
    import fcntl

    with suppress(OSError):
        fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_UN)


def _compiler() -> str:
    names = (os.environ.get("CXX"), *COMPILERS)
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        raise NativeError("there is no C++ compiler")
    return found


def _key(source: Path, compiler: str) -> str:
    headers = (path.read_text("utf-8") for path in sorted(source.parent.glob("*.h")))
    parts = (
        source.read_text("utf-8"),
        *headers,
        compiler,
        _run(compiler, "--version"),
        repr(OPTIONS),
        this_cpu().described,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _compile(compiler: str, source: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        compiled = str(Path(folder, "compiled.o"))
        for this_cpu in _THIS_CPU:
            try:
                _run(compiler, *OPTIONS, this_cpu, "-fopenmp", "-c", str(source), "-o", compiled)
                break
            except NativeError:
                if this_cpu == _THIS_CPU[-1]:
                    raise
        # Linked without -fopenmp: the symbols are those of the OpenMP that torch has loaded. A
        # second one would have threads of its own.
        _run(compiler, "-shared", compiled, "-o", str(target))


def _run(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise NativeError(f"{command[0]} failed: {done.stderr.strip()[-400:]}")
    return done.stdout
