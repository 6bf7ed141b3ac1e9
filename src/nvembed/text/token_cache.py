"""The token cache: texts that were tokenised once are read back from memory-mapped files.

    <folder>/<key>/<shard>.npy    head       number of texts N, bytes of an id
                                  hash_N     of (prompt, text), sorted
                                  span_N4    place, length, pool start and checksum of the ids
                                  ids_I      token ids of all texts, end to end

The key is the fingerprint of the tokenizer with its limits, so nothing is ever read that another
tokenizer, style or limit has written. A shard is written whole (``core/store.py``), under a name
made of its hashes, and never changes, so processes that write at once do no harm. What cannot be
read is tokenised again, what cannot be written stays in memory, and both are logged as warnings.
Next file: ``text/packing.py``.

Letters: N texts of a shard, M texts looked up, I token ids.
"""

from __future__ import annotations

import hashlib
import logging
import time
import zlib
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvembed.core.cache import cache_folder
from nvembed.core.errors import DataError, UserError
from nvembed.core.store import read_array, write_array
from nvembed.text.instructions import PromptedText
from nvembed.text.tokens import TextTokenizer, TokenizedText

FORMAT = 2
MAX_SHARDS = 16
ABANDONED_SECONDS = 24 * 3600  # no shard takes a day to write

_HASH = np.dtype("S16")
_log = logging.getLogger(__name__)


def default_cache_folder() -> Path:
    """Where tokens are kept: ``$NVEMBED_CACHE/tokens``, else ``~/.cache/nvembed/tokens``."""
    return cache_folder("tokens")


class TokenCache:
    """Tokenises prompted texts, each only once, and counts ``hits`` and ``misses``.

    Shards of all tokenizers lie in one folder; None keeps everything in memory.
    """

    def __init__(self, folder: Path | None, tokenizer: TextTokenizer) -> None:
        self.hits = 0
        self.misses = 0
        self._folder = folder
        self._tokenizer = tokenizer
        self._key = ""
        self._shards: list[_Shard] = []
        self._pending: dict[bytes, tuple[array[int], int]] = {}  # ids and pool start by hash

    def __call__(self, texts: Sequence[PromptedText]) -> list[TokenizedText]:
        """Return the tokens of (prompt, text) pairs in their order."""
        key = f"{self._tokenizer.fingerprint}-{FORMAT}"
        if key != self._key:  # the tokenizer's limit may have been changed
            self._pending.clear()
            self._key = key
            self._shards = self._open_shards()
        hashes = [_hash(prompt, text) for prompt, text in texts]
        found = self._find(list(dict.fromkeys(hashes)))
        rows_by_prompt: dict[str, dict[bytes, int]] = {}  # of each new text one row
        for row, (value, (prompt, _)) in enumerate(zip(hashes, texts, strict=True)):
            if value not in found:
                rows_by_prompt.setdefault(prompt, {})[value] = row
        for prompt, rows in rows_by_prompt.items():
            encoded = self._tokenizer([texts[row][1] for row in rows.values()], prompt)
            for value, tokens in zip(rows, encoded, strict=True):
                found[value] = tokens
                self._pending[value] = array("I", tokens.ids), tokens.pool_start
            self.misses += len(rows)
            self.hits -= len(rows)
        self.hits += len(texts)
        return [found[value] for value in hashes]

    def _find(self, hashes: list[bytes]) -> dict[bytes, TokenizedText]:
        found = {
            value: TokenizedText(tuple(entry[0]), entry[1])
            for value in hashes
            if (entry := self._pending.get(value)) is not None
        }
        for shard in list(self._shards):
            if missing := [value for value in hashes if value not in found]:
                try:
                    found |= shard.find(missing)
                except DataError as damage:
                    self._shards.remove(shard)
                    _discard(shard.path, damage)
        return found

    def flush(self) -> None:
        """Write what is new as a shard; with more than ``MAX_SHARDS`` of them, make them one."""
        if self._folder is None or not self._pending:
            return
        merged = self._shards if len(self._shards) >= MAX_SHARDS else []
        shard = _joined(self._folder / self._key, [_of_pending(self._pending), *merged])
        try:
            if not shard.path.exists():
                self._remove_abandoned(shard.path.parent)
                _write(shard)
        except (UserError, OSError) as error:
            _log.warning("the token cache was not written: %s", error)
            return
        for old in merged:
            if old.path != shard.path:
                old.path.unlink(missing_ok=True)
        self._pending.clear()
        self._shards = self._open_shards()

    def _open_shards(self) -> list[_Shard]:
        shards = []
        try:
            folder = self._folder and self._folder / self._key
            paths = sorted(folder.iterdir()) if folder else []
        except FileNotFoundError:
            return []
        except OSError as error:
            _log.warning("the token cache cannot be read: %s", error)
            return []
        for path in paths:
            try:
                if not path.name.startswith("."):
                    shards.append(_opened(path))
            except DataError as error:
                if path.exists():  # else another process has merged it away
                    _discard(path, error)
        return shards

    def _remove_abandoned(self, folder: Path) -> None:
        """Delete what killed processes wrote half; others may be writing, so only if old."""
        for path in folder.glob(".*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()


class _Shard(NamedTuple):
    """A shard in memory, or mapped: a look-up reads the pages it touches."""

    path: Path
    hash_N: NDArray[np.bytes_]
    span_N4: NDArray[np.int64]
    ids_I: NDArray[np.unsignedinteger[Any]]

    def find(self, hashes: Sequence[bytes]) -> dict[bytes, TokenizedText]:
        """Return those of the hashes that the shard holds."""
        hash_M = np.frombuffer(b"".join(hashes), dtype=_HASH)
        place_M = np.searchsorted(self.hash_N, hash_M).clip(max=len(self.hash_N) - 1)
        rows = np.flatnonzero(self.hash_N[place_M] == hash_M).tolist()
        found: dict[bytes, TokenizedText] = {}
        for row, span in zip(rows, self.span_N4[place_M[rows]].tolist(), strict=True):
            start, length, pool_start, check = span
            ids = self.ids_I[start : start + length]
            if len(ids) != length or _check(ids, pool_start) != check:
                raise DataError("an entry differs from its checksum")
            found[hashes[row]] = TokenizedText(tuple(ids.tolist()), pool_start)
        return found


def _of_pending(pending: dict[bytes, tuple[array[int], int]]) -> _Shard:
    texts = [(np.asarray(ids, dtype="<u4"), start) for ids, start in pending.values()]
    length_N = np.array([len(ids) for ids, _ in texts])
    rest = [(start, _check(ids, start)) for ids, start in texts]
    span_N4 = np.column_stack([length_N.cumsum() - length_N, length_N, np.array(rest)])
    ids_I = np.concatenate([ids for ids, _ in texts])
    if ids_I.size == 0 or ids_I.max() < 2**16:
        ids_I = ids_I.astype("<u2")
    return _Shard(Path(), np.frombuffer(b"".join(pending), dtype=_HASH), span_N4, ids_I)


def _joined(folder: Path, parts: Sequence[_Shard]) -> _Shard:
    """Sort the entries of all parts by hash, each once; the ids stay as they lie."""
    offsets = np.cumsum([0, *(len(part.ids_I) for part in parts)]).tolist()
    spans = [
        part.span_N4 + np.array([offset, 0, 0, 0])
        for part, offset in zip(parts, offsets, strict=False)
    ]
    hash_N, row_N = np.unique(np.concatenate([part.hash_N for part in parts]), return_index=True)
    name = hashlib.blake2b(hash_N.tobytes(), digest_size=16).hexdigest()
    ids_I = np.concatenate([part.ids_I for part in parts])
    return _Shard(folder / f"{name}.npy", hash_N, np.concatenate(spans)[row_N], ids_I)


def _write(shard: _Shard) -> None:
    head = np.array([len(shard.hash_N), shard.ids_I.itemsize], dtype="<i8")
    parts = [part.view(np.uint8).ravel() for part in (head, *shard[1:])]
    write_array(shard.path, np.concatenate(parts))


def _opened(path: Path) -> _Shard:
    # A plain view: slicing a memmap costs several times as much.
    raw = read_array(path, mapped=True).view(np.ndarray)
    try:
        count, width = raw[:16].view("<i8").tolist()
        hashes, spans, ids = np.split(raw[16:], [16 * count, 48 * count])
        span_N4 = spans.view("<i8").reshape(count, 4)
        shard = _Shard(path, hashes.view(_HASH), span_N4, ids.view(f"<u{width}"))
    except (ValueError, TypeError) as error:
        raise DataError("an array of another kind") from error
    if count < 1 or len(shard.hash_N) != count:
        raise DataError("an array of another length")
    return shard


def _hash(prompt: str, text: str) -> bytes:
    # The length of the prompt tells ("a", "bc") from ("ab", "c").
    whole = f"{len(prompt)}\0{prompt}{text}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(whole, digest_size=16).digest()


def _check(ids: NDArray[Any], pool_start: int) -> int:
    # The same for both widths of ids, since merging may widen them.
    return zlib.crc32(ids.astype("<u4").tobytes(), pool_start)


def _discard(path: Path, reason: Exception) -> None:
    _log.warning("%s: damaged (%s); its texts are tokenised again", path, reason)
    with suppress(OSError):
        path.unlink()
