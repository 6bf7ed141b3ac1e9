"""The C++ of ``model/native/``, compiled on first use and kept in the cache folder.

    <cache>/native/varlen_attention-<key>.so

The key is a hash of the sources, the options, the compiler's name and version and the instructions
of this CPU, so that a folder shared by several machines holds one library for each kind. Without a
compiler (or where anything else goes wrong) there is no library, and callers take torch's own code.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from nvembed.core.errors import UserError
from nvembed.core.files import atomic_path, cache_folder

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
def attention_library() -> ctypes.CDLL | None:
    """The attention kernel, or None where it cannot be had; compiled or loaded once."""
    try:
        return load(_SOURCES / "varlen_attention.cpp")
    except NativeError as error:
        _log.info("attention is torch's own: %s", error)
        return None


@cache
def elementwise_library() -> ctypes.CDLL | None:
    """Norms and gates, or None where they cannot be had; compiled or loaded once."""
    try:
        return load(_SOURCES / "elementwise.cpp")
    except NativeError as error:
        _log.info("norms and gates are torch's own: %s", error)
        return None


def load_named(name: str) -> ctypes.CDLL:
    """Load the library of a source file of this package; see ``load``."""
    return load(_SOURCES / name)


def load(source: Path) -> ctypes.CDLL:
    """Load the library of a source file, compiling it where it is not in the cache.

    Raises:
        NativeError: no compiler, it fails, or the library cannot be written or loaded.
    """
    compiler = _compiler()
    target = cache_folder("native") / f"{source.stem}-{_key(source, compiler)}.so"
    if target.exists():
        try:
            return ctypes.CDLL(str(target))
        except OSError as error:  # of a damaged file
            _log.info("compiling again: %s", error)
    try:
        with atomic_path(target) as temporary:
            _compile(compiler, source, temporary)
    except UserError as error:
        raise NativeError(str(error)) from error
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise NativeError(str(error)) from error


def _compiler() -> str:
    names = (os.environ.get("CXX"), *COMPILERS)
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        raise NativeError("there is no C++ compiler")
    return found


def _key(source: Path, compiler: str) -> str:
    headers = (path.read_text() for path in sorted(source.parent.glob("*.h")))
    parts = (
        source.read_text(),
        *headers,
        compiler,
        _run(compiler, "--version"),
        repr(OPTIONS),
        _cpu(),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _cpu() -> str:
    """What tells CPUs with different instructions apart."""
    described = {platform.machine(), platform.processor()}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted(described | {line for line in lines if line.startswith(kinds)}))


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
