"""Bodies that clients send compressed: unpacked piece by piece, so that memory stays bounded.

A few kilobytes of gzip can hold gigabytes. Nothing is unpacked ahead of who counts the pieces.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

from nvembed.serving.errors import RequestError

PIECE_BYTES = 64 * 1024

Unpack = Callable[[bytes], Iterator[bytes]]
"""Takes the next bytes of a body and gives pieces of its content; ``b""`` is the end."""


def body_unpacker(encoding: str) -> Unpack:
    """Return what reads bodies of a ``Content-Encoding``.

    Raises:
        RequestError: neither gzip nor none (415).
    """
    match encoding.strip().lower():
        case "" | "identity":
            return lambda part: iter([part] if part else [])
        case "gzip" | "x-gzip":
            return _Gzip()
    raise RequestError(
        415,
        "bodies may be sent as they are or with 'Content-Encoding: gzip', in no other encoding",
        code="content_encoding",
    )


class _Gzip:
    """One gzip file or several in a row, as the format allows."""

    def __init__(self) -> None:
        self._member = _new_member()
        self._whole = False

    def __call__(self, part: bytes) -> Iterator[bytes]:
        if not part and not self._whole:
            raise _damaged()
        while part or not self._whole:
            if self._whole:
                self._member, self._whole = _new_member(), False
            try:
                piece = self._member.decompress(part, PIECE_BYTES)
            except zlib.error:
                raise _damaged() from None
            if piece:
                yield piece
            self._whole = self._member.eof
            part = self._member.unused_data if self._whole else self._member.unconsumed_tail
            if not part and len(piece) < PIECE_BYTES:
                return


def _new_member() -> zlib._Decompress:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)


def _damaged() -> RequestError:
    return RequestError(
        400, "the body is damaged or no gzip, as Content-Encoding says", code="invalid_body"
    )
