"""The token cache: texts that were tokenised once are read back from memory-mapped files.

    <folder>/<key>/<shard>/    high.npy     N   uint64   first halves of the hashes, sorted
                               entries.npy  N   second halves; place, length, pool start and check
                               ids.npy      I   token ids of all texts, end to end

The key is the fingerprint of the tokenizer with its limits, so nothing is ever read that another
tokenizer, style or limit has written; the hash of an entry is that of (prompt, text). Shards never
change. Each is written beside its place and moved there whole, under a name made of the hashes it
holds, so processes that write at once do no harm.

It is only a cache: what cannot be read is tokenised again, what cannot be written stays in memory,
and both are logged as warnings. Next file: ``text/packing.py``.

Letters: N texts of a shard, M texts looked up, I token ids.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed.core.cache import cache_folder
from nvembed.core.errors import UserError
from nvembed.core.files import atomic_folder
from nvembed.text.instructions import PromptedText
from nvembed.text.tokens import TextTokenizer, TokenizedText

FORMAT = 1
MAX_SHARDS = 16
ABANDONED_SECONDS = 24 * 3600  # no shard takes a day to write

_ENTRY = np.dtype(
    [("low", "<u8"), ("start", "<i8"), ("length", "<u4"), ("pool_start", "<u4"), ("check", "<u4")]
)
_log = logging.getLogger(__name__)


def default_cache_folder() -> Path:
    """Where tokens are kept: ``$NVEMBED_CACHE/tokens``, else ``~/.cache/nvembed/tokens``."""
    return cache_folder("tokens")


class TokenCache:
    """Tokenises prompted texts, each only once.

    Args:
        folder: where shards lie, for all tokenizers together; None keeps everything in memory.
        tokenizer: tokenises what is missing.

    Attributes:
        hits: texts that were found.
        misses: texts that had to be tokenised.
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
        """Return the tokens of (prompt, text) pairs in their order.

        Raises:
            DataError: a text that is new cannot be tokenised; see ``TextTokenizer``.
        """
        self._follow_tokenizer()
        hashes = [_hash(prompt, text) for prompt, text in texts]
        found = self._find(dict.fromkeys(hashes))
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

    def flush(self) -> None:
        """Write what is new as a shard; with more than ``MAX_SHARDS`` of them, make them one."""
        if self._folder is None or not self._pending:
            return
        parts = [_Content.of_pending(self._pending)]
        merged = self._shards if len(self._shards) >= MAX_SHARDS else []
        parts += [shard.content for shard in merged]
        place = self._folder / self._key
        try:
            written = _write(_Content.joined(parts), place)
        except (UserError, OSError) as error:
            _log.warning("the token cache was not written: %s", error)
            return
        for shard in merged:
            if shard.path != written:
                shutil.rmtree(shard.path, ignore_errors=True)
        self._pending.clear()
        self._shards = list(_open_shards(place))

    def _follow_tokenizer(self) -> None:
        """Turn to the shards of the tokenizer as it is now: its limit may have been changed."""
        key = f"{self._tokenizer.fingerprint}-{FORMAT}"
        if key != self._key:
            self._pending.clear()
            self._key = key
            self._shards = [] if self._folder is None else list(_open_shards(self._folder / key))

    def _find(self, wanted: dict[bytes, None]) -> dict[bytes, TokenizedText]:
        found: dict[bytes, TokenizedText] = {}
        missing: list[bytes] = []
        for value in wanted:
            if (entry := self._pending.get(value)) is not None:
                found[value] = TokenizedText(tuple(entry[0]), entry[1])
            else:
                missing.append(value)
        for shard in list(self._shards):
            if not missing:
                break
            try:
                found.update(shard.find(missing))
            except _DamagedError as damage:
                self._shards.remove(shard)
                _discard(shard.path, damage)
            missing = [value for value in missing if value not in found]
        return found


# --- Shards ---------------------------------------------------------------------------------------


class _DamagedError(Exception):
    """A shard does not hold what was written."""


@dataclass(frozen=True, slots=True)
class _Content:
    """What the files of a shard hold; see the module docstring."""

    high_N: NDArray[np.uint64]
    entries_N: NDArray[Any]
    ids_I: NDArray[Any]

    @classmethod
    def of_pending(cls, pending: dict[bytes, tuple[array[int], int]]) -> _Content:
        hash_N2 = np.frombuffer(b"".join(pending), dtype="<u8").reshape(-1, 2)
        entries_N = np.empty(len(pending), dtype=_ENTRY)
        lengths_N = np.array([len(ids) for ids, _ in pending.values()])
        entries_N["low"] = hash_N2[:, 1]
        entries_N["start"] = np.cumsum(lengths_N) - lengths_N
        entries_N["length"] = lengths_N
        entries_N["pool_start"] = [pool_start for _, pool_start in pending.values()]
        ids_I = np.concatenate([np.asarray(ids, dtype="<u4") for ids, _ in pending.values()])
        if ids_I.size == 0 or ids_I.max() < 2**16:
            ids_I = ids_I.astype("<u2")
        for row, (start, length, pool_start) in enumerate(_spans(entries_N)):
            entries_N["check"][row] = _check(ids_I[start : start + length], pool_start)
        return cls(hash_N2[:, 0], entries_N, ids_I)

    @classmethod
    def joined(cls, parts: Sequence[_Content]) -> _Content:
        """Sort the entries of all parts by hash, each once; the ids stay as they lie."""
        entries = [part.entries_N.copy() for part in parts]
        offset = 0
        for part, entries_N in zip(parts, entries, strict=True):
            entries_N["start"] += offset
            offset += len(part.ids_I)
        # Of two texts whose first halves agree one is kept: the other is a miss each time.
        high_N, rows_N = np.unique(
            np.concatenate([part.high_N for part in parts]), return_index=True
        )
        ids_I = np.concatenate([part.ids_I for part in parts])
        return cls(high_N, np.concatenate(entries)[rows_N], ids_I)


class _Shard:
    """An open shard. Opening reads the headers, a look-up the pages it touches."""

    def __init__(self, path: Path) -> None:
        self.path = path
        high_N, entries_N, ids_I = (
            # A plain view: slicing a memmap costs several times as much.
            np.load(path / name, mmap_mode="r", allow_pickle=False).view(np.ndarray)
            for name in ("high.npy", "entries.npy", "ids.npy")
        )
        if (
            (high_N.dtype, entries_N.dtype) != (np.dtype("<u8"), _ENTRY)
            or ids_I.dtype not in (np.dtype("<u2"), np.dtype("<u4"))
            or not 0 < high_N.size == entries_N.size
            or (high_N.ndim, entries_N.ndim, ids_I.ndim) != (1, 1, 1)
        ):
            raise _DamagedError("arrays of another kind")
        self.content = _Content(high_N, entries_N, ids_I)

    def find(self, hashes: Sequence[bytes]) -> dict[bytes, TokenizedText]:
        """Return those of the hashes that the shard holds."""
        content = self.content
        hash_M2 = np.frombuffer(b"".join(hashes), dtype="<u8").reshape(-1, 2)
        places_M = np.searchsorted(content.high_N, np.ascontiguousarray(hash_M2[:, 0]))
        places_M = np.minimum(places_M, len(content.high_N) - 1)
        entries_M = content.entries_N[places_M]
        held_M = (content.high_N[places_M] == hash_M2[:, 0]) & (entries_M["low"] == hash_M2[:, 1])
        found: dict[bytes, TokenizedText] = {}
        rows = np.flatnonzero(held_M)
        for row, (start, length, pool_start) in zip(
            rows.tolist(), _spans(entries_M[rows]), strict=True
        ):
            ids = content.ids_I[start : start + length]
            if len(ids) != length or _check(ids, pool_start) != entries_M["check"][row]:
                raise _DamagedError("an entry differs from its checksum")
            found[hashes[row]] = TokenizedText(tuple(ids.tolist()), pool_start)
        return found


def _spans(entries_M: NDArray[Any]) -> Iterator[tuple[int, int, int]]:
    """(start, length, pool start) of entries."""
    columns = [entries_M[name].tolist() for name in ("start", "length", "pool_start")]
    return zip(*columns, strict=True)


def _hash(prompt: str, text: str) -> bytes:
    # The length of the prompt tells ("a", "bc") from ("ab", "c").
    whole = f"{len(prompt)}\0{prompt}{text}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(whole, digest_size=16).digest()


def _check(ids: NDArray[Any], pool_start: int) -> int:
    # The same for both widths of ids, since merging may widen them.
    return zlib.crc32(ids.astype("<u4").tobytes(), pool_start)


def _open_shards(folder: Path) -> Iterator[_Shard]:
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return
    except OSError as error:
        _log.warning("the token cache cannot be read: %s", error)
        return
    for path in paths:
        try:
            yield _Shard(path)
        except (OSError, ValueError, EOFError, _DamagedError) as error:
            if path.exists():  # else another process has merged it away
                _discard(path, error)


def _discard(path: Path, reason: Exception) -> None:
    _log.warning("%s: damaged (%s); its texts are tokenised again", path, reason)
    shutil.rmtree(path, ignore_errors=True)


def _write(content: _Content, place: Path) -> Path:
    """Write a shard unless another process has written the same one."""
    hashes = np.stack([content.high_N, content.entries_N["low"]]).tobytes()
    target = place / hashlib.blake2b(hashes, digest_size=16).hexdigest()
    if target.exists():
        return target
    _remove_abandoned(place)
    try:
        with atomic_folder(target) as temporary:
            np.save(temporary / "high.npy", content.high_N)
            np.save(temporary / "entries.npy", content.entries_N)
            np.save(temporary / "ids.npy", content.ids_I)
    except UserError:
        if not target.exists():  # else the other process was quicker by a moment
            raise
    return target


def _remove_abandoned(place: Path) -> None:
    """Delete what killed processes wrote half; other processes may be writing, so only if old."""
    for path in place.glob(".*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
