"""Texts that are told apart by 128 bits of BLAKE2b, for more of them than memory should hold."""

from __future__ import annotations

import hashlib

import numpy as np

_WIDTH = 16


def text_digest(text: str) -> bytes:
    """Name a text by its content, in 16 bytes."""
    data = text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=_WIDTH).digest()


class FirstPlaces:
    """Where each different text came first, of texts given by their joined digests.

    ``places`` ``(N,)`` has the numbers of the N different ones, rising. 32 bytes of each are held.
    """

    def __init__(self, digests: bytes | bytearray) -> None:
        # Sorted by digest, of equal ones the first to come in front.
        self._digests, self._firsts = np.unique(
            np.frombuffer(digests, dtype=f"S{_WIDTH}"), return_index=True
        )
        self.places = np.sort(self._firsts)

    def find(self, digest: bytes) -> int | None:
        """Return the number of the first text with this digest, ``None`` where there is none."""
        wanted = np.frombuffer(digest, dtype=self._digests.dtype)[0]
        at = int(np.searchsorted(self._digests, wanted))
        found = at < len(self._digests) and self._digests[at] == wanted
        return int(self._firsts[at]) if found else None
