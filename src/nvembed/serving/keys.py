"""API keys: who may call, compared in constant time, held as digests only."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from nvembed.core.errors import ConfigError

MIN_KEY_CHARS = 16


class ApiKeys:
    """The keys of a server, each under a name that logs may show.

    Args:
        keys: key by name.
    """

    def __init__(self, keys: dict[str, str]) -> None:
        self._digests = {name: _digest(key.encode()) for name, key in keys.items()}

    def owner(self, header: str | None) -> str | None:
        """Return the name of the key in an ``Authorization`` header; ``None`` is no valid key.

        All keys are compared, whichever fits, so time tells nothing about them.
        """
        scheme, _, given = (header or "").partition(" ")
        digest = _digest(given.strip().encode("latin-1", "replace"))
        found = None
        for name, known in self._digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found if scheme.lower() == "bearer" else None


def read_keys(path: Path) -> ApiKeys:
    """Read a file of keys: one per line, ``name:key`` or the key alone; ``#`` begins a comment.

    Raises:
        ConfigError: no such file, no key in it, a key that is too short or a name twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("cannot be read", where=str(path), expected="a file of keys") from error
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, key = line.strip().partition(":")
        if not colon:
            name, key = f"key-{number}", name
        if len(key) < MIN_KEY_CHARS or not key.isascii() or name in keys:
            raise ConfigError(
                "not a key, too short, or its name stands twice",
                where=f"{path}:{number}",
                expected=f"name:key, the key of at least {MIN_KEY_CHARS} ASCII characters",
                hint="Make one with: openssl rand -hex 24",
            )
        keys[name] = key
    if not keys:
        raise ConfigError("no keys in it", where=str(path), expected="one key per line")
    return ApiKeys(keys)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
