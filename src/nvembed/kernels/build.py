"""This machine's CPU, and the C++ of ``kernels/native/`` that is compiled for it on first use.

Which code computes changes the last bits of vectors, so it follows from features of the CPU and
never from a clock. A library is named by all it depends on and loaded only from a folder in which
nobody else can write, with the checksum of when it was compiled: a damaged one would end the
process. Where anything goes wrong, callers take torch's own code.
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
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from nvembed.core.cache import open_private, private_folders, read_private
from nvembed.core.errors import UserError
from nvembed.core.files import atomic_path, write_text

COMPILERS = ("g++", "c++", "clang++")
"""Tried in this order, after ``$CXX``."""

# Not -ffast-math: not-a-number must stay what it is, and sums must keep their order.
OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=fast")
_THIS_CPU = ("-march=native", "-mcpu=native")  # the latter of compilers for ARM
_SOURCES = Path(__file__).parent / "native"
_SECONDS = 120
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}
_log = logging.getLogger(__name__)

# --- The CPU --------------------------------------------------------------------------------------


class CPU(NamedTuple):
    """What is known of a CPU."""

    model: str
    cores: int
    described: str  # all lines that tell CPUs with different instructions apart
    # Than MKL, torch's choice, or as fast. On CPUs of another maker MKL leaves out instructions: on
    # AMD oneDNN was 1.1 to 2.2 times as fast (docs/log.md). Intel and ARM stay with torch's.
    onednn_multiplies_float32_faster: bool
    has_wide_registers: bool  # AVX-512; with narrower ones our kernels gain nothing over torch's
    may_multiply_bfloat16: bool  # has instructions for it, or does not say; else it is emulated


@cache
def this_cpu() -> CPU:
    """Describe the CPU of this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return read_cpu(lines)


def read_cpu(lines: list[str]) -> CPU:
    """Read the lines of ``/proc/cpuinfo``; there are none on systems without one."""
    first: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        first.setdefault(name.strip(), value.strip())
    features = set(f"{first.get('flags', '')} {first.get('Features', '')}".split())
    described = {platform.machine(), platform.processor()}
    kinds = ("model name", "flags", "Features", "CPU part")
    return CPU(
        model=first.get("model name") or platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        described="\n".join(sorted(described | {line for line in lines if line.startswith(kinds)})),
        onednn_multiplies_float32_faster=first.get("vendor_id", "") not in ("", "GenuineIntel"),
        has_wide_registers="avx512f" in features,
        may_multiply_bfloat16=not features or bool(features & _BFLOAT16),
    )


# --- Compiled libraries ---------------------------------------------------------------------------


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
    """Load the library of a source file, compiling it where it is not in the cache."""
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
    import fcntl  # there are no such folders on systems without it

    if not _is_intact(handle, name):
        with suppress(OSError):  # not every file system can
            fcntl.flock(handle, fcntl.LOCK_EX)  # until the folder is closed: others wait
        if not _is_intact(handle, name):  # no other process has made it meanwhile
            with atomic_path(folder / name) as temporary:
                _compile(compiler, source, temporary)
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                    checksum = hashlib.file_digest(file, "sha256").hexdigest()
            write_text(folder / f"{name}.sha256", checksum + "\n")
            with suppress(OSError):
                os.fsync(handle)
        if not _is_intact(handle, name):
            raise NativeError(f"{folder / name} is not what was written there")
    # By the descriptor, so that it is the folder that was looked at, whatever has been renamed.
    by_handle = Path(f"/proc/self/fd/{handle}")
    try:
        return ctypes.CDLL(str((by_handle if by_handle.exists() else folder) / name))
    except OSError as error:
        raise NativeError(str(error)) from error


def _is_intact(folder: int, name: str) -> bool:
    """Whether a library is there as it was written, by this user and nobody else."""
    content, checksum = read_private(folder, name), read_private(folder, f"{name}.sha256")
    if content is None or checksum is None:
        return False
    return checksum.strip() == hashlib.sha256(content).hexdigest().encode()


def _compiler() -> str:
    names = (os.environ.get("CXX"), *COMPILERS)
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        raise NativeError("there is no C++ compiler")
    return found


def _key(source: Path, compiler: str) -> str:
    headers = (path.read_text("utf-8") for path in sorted(source.parent.glob("*.h")))
    version = _run(compiler, "--version")
    code = (source.read_text("utf-8"), *headers)
    parts = (*code, compiler, version, repr(OPTIONS), this_cpu().described)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _compile(compiler: str, source: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        compiled = str(Path(folder, "compiled.o"))
        for option in _THIS_CPU:
            try:
                _run(compiler, *OPTIONS, option, "-fopenmp", "-c", str(source), "-o", compiled)
                break
            except NativeError:
                if option == _THIS_CPU[-1]:
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
