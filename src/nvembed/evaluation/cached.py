"""An encoder that keeps its vectors on disk, so that no text is embedded twice.

In: texts; out: their vectors, from files where they are there, else from an encoder. Each text is
found by itself, whatever batch it came in: a corpus with one changed document costs one text.

Of the files only the keys are held in memory, 24 bytes per text; vectors are mapped when they are
taken. A pair of files (``vectors-X.npy``, then ``keys-X.npy``) holds what one call embedded. It is
never changed and named after its keys; other processes that need the very same wait for it, and
take over from one that died. So a task that was killed half way goes on where it was.

Letters: N texts of a call, M texts kept, D width.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import DataError
from nvembed.core.files import tidy
from nvembed.core.store import key_of, make_missing, read_array, write_array
from nvembed.encoding.embed import WINDOW_TEXTS, InputType, encode_window
from nvembed.encoding.encoder import Encoder

_KEY_BYTES = 16
_KEY = np.dtype(f"S{_KEY_BYTES}")


class CachedEncoder:
    """Vectors from files where they are there, else from an encoder.

    Args:
        encoder: asked for what is missing.
        folder: of the files of all models; made when the first is written.
        fingerprint: of the model and all its settings.
    """

    def __init__(self, encoder: Encoder, folder: Path, fingerprint: str) -> None:
        self._encoder = encoder
        self._folder = folder / key_of(fingerprint)
        self._known = _Known()
        self._files: list[Path] = []

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return self._encoder.dimension

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> NDArray[np.float32]:
        """Embed queries; see :class:`Encoder`."""
        return self._encode(texts, "query", task)

    def encode_document(
        self, texts: Sequence[str], *, task: str | None = None
    ) -> NDArray[np.float32]:
        """Embed documents; see :class:`Encoder`."""
        return self._encode(texts, "document", task)

    def _encode(
        self, texts: Sequence[str], input_type: InputType, task: str | None
    ) -> NDArray[np.float32]:
        keys_N = _keys(texts, input_type, task)
        places_N2 = self._known.find(keys_N)
        if (places_N2 < 0).any():
            self._look_again()  # another process may have written them
            new = np.flatnonzero(self._known.find(keys_N)[:, 0] < 0)
            new = new[np.sort(np.unique(keys_N[new], return_index=True)[1])]
            for start in range(0, len(new), WINDOW_TEXTS):
                rows = new[start : start + WINDOW_TEXTS]
                self._embed([texts[row] for row in rows.tolist()], keys_N[rows], input_type, task)
            self._look_again()
            places_N2 = self._known.find(keys_N)
        return self._take(places_N2)

    def _embed(
        self,
        texts: Sequence[str],
        keys_N: NDArray[np.bytes_],
        input_type: InputType,
        task: str | None,
    ) -> None:
        name = hashlib.blake2b(keys_N.tobytes(), digest_size=_KEY_BYTES).hexdigest()
        path = self._folder / f"keys-{name}.npy"

        def make(_: int) -> None:
            vectors = _vectors_file(path)
            tidy(vectors.parent, glob.escape(vectors.name))
            write_array(vectors, encode_window(self._encoder, texts, side=input_type, task=task))
            write_array(path, keys_N)

        make_missing([path], make)

    def _look_again(self) -> None:
        """Learn the keys of the files that are new."""
        for path in sorted(set(self._folder.glob("keys-*.npy")) - set(self._files)):
            self._known.add(_load(path, mapped=False), len(self._files))
            self._files.append(path)

    def _take(self, places_N2: NDArray[np.int32]) -> NDArray[np.float32]:
        vectors_ND = np.empty((len(places_N2), self.dimension), dtype=np.float32)
        for number in np.unique(places_N2[:, 0]).tolist():
            path = _vectors_file(self._files[number])
            part = _load(path, mapped=True)
            if part.ndim != 2 or part.shape[1] != self.dimension:
                raise DataError(
                    f"holds vectors of shape {part.shape}, the model's width is {self.dimension}",
                    where=str(path),
                    hint=f"The cache and the model disagree: delete {path.parent}",
                )
            mine = places_N2[:, 0] == number
            vectors_ND[mine] = part[places_N2[mine, 1]]
        return vectors_ND


class _Known:
    """Key → place: number of the file, row.

    In sorted runs that are merged when they come to similar sizes: adding M texts bit by bit costs
    M log M, and there are few runs to look through.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[NDArray[np.bytes_], NDArray[np.int32]]] = []

    def add(self, keys_N: NDArray[np.bytes_], file: int) -> None:
        """Add the keys of a file in their rows' order."""
        rows_N = np.arange(len(keys_N), dtype=np.int32)
        run = keys_N, np.stack([np.full_like(rows_N, file), rows_N], axis=1)
        while self._runs and len(self._runs[-1][0]) <= 2 * len(run[0]):
            earlier = self._runs.pop()
            run = np.concatenate([earlier[0], run[0]]), np.concatenate([earlier[1], run[1]])
        order = np.argsort(run[0], kind="stable")
        self._runs.append((run[0][order], run[1][order]))

    def find(self, keys_N: NDArray[np.bytes_]) -> NDArray[np.int32]:
        """Places, ``(N, 2)``; -1 where there is none."""
        places_N2 = np.full((len(keys_N), 2), -1, dtype=np.int32)
        for known_M, places_M2 in self._runs:
            at_N = np.minimum(np.searchsorted(known_M, keys_N), len(known_M) - 1)
            found_N = known_M[at_N] == keys_N
            places_N2[found_N] = places_M2[at_N[found_N]]
        return places_N2


def _keys(texts: Sequence[str], input_type: InputType, task: str | None) -> NDArray[np.bytes_]:
    start = hashlib.blake2b(repr((input_type, task)).encode(), digest_size=_KEY_BYTES)
    keys = []
    for text in texts:
        digest = start.copy()
        digest.update(text.encode("utf-8", "surrogatepass"))
        keys.append(digest.digest())
    return np.array(keys, dtype=_KEY)


def _vectors_file(keys: Path) -> Path:
    return keys.with_name(keys.name.replace("keys-", "vectors-", 1))


def _load(path: Path, *, mapped: bool) -> NDArray[Any]:
    hint = f"Delete {path.parent}; what it holds is embedded again"
    return read_array(path, mapped=mapped, hint=hint)
