"""Vectors that are kept on disk by text, each found by itself whatever batch it came in.

Only keys are held in memory, 24 bytes per text; vectors are mapped. A pair of files
(``vectors-X.npy``, ``keys-X.npy``) holds what one call made, named after its keys; other processes
that need the very same wait for it. Letters: N texts of a call, M texts kept, D width.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import DataError
from nvembed.core.files import tidy
from nvembed.core.store import make_missing, read_array, write_array
from nvembed.data.instructions import Side

Keys = NDArray[np.bytes_]
_KEY_BYTES = 16


def text_keys(texts: Iterable[tuple[Side, str | None, str]]) -> Keys:
    """Name texts by side, task and text: 128 bits each."""

    @cache
    def start(side: Side, task: str | None) -> Any:
        return hashlib.blake2b(repr((side, task)).encode(), digest_size=_KEY_BYTES)

    keys = []
    for side, task, text in texts:
        digest = start(side, task).copy()
        digest.update(text.encode("utf-8", "surrogatepass"))
        keys.append(digest.digest())
    return np.array(keys, dtype=f"S{_KEY_BYTES}")


class KeptVectors:
    """The vectors of one model in the files of a folder, in float32 or float16.

    ``dimension`` is their width, which the first file says where it is not given.
    """

    def __init__(
        self,
        folder: Path,
        dimension: int | None = None,
        dtype: type[np.float32 | np.float16] = np.float32,
    ) -> None:
        self.folder, self.dimension, self._dtype = folder, dimension, dtype
        self._files: list[Path] = []
        # Keys with their places (number of the file, row), in sorted runs that are merged when they
        # come to similar sizes: to learn M keys bit by bit costs M log M, and runs are few.
        self._runs: list[tuple[Keys, NDArray[np.int32]]] = []

    def missing(self, keys_N: Keys) -> NDArray[np.int64]:
        """Rows of the keys that no file has, each key once; other processes may have written."""
        new = np.flatnonzero(self._find(keys_N)[:, 0] < 0)
        if len(new):
            self._look_again()
            new = np.flatnonzero(self._find(keys_N)[:, 0] < 0)
        return new[np.sort(np.unique(keys_N[new], return_index=True)[1])]

    def keep(self, keys_N: Keys, make: Callable[[], NDArray[np.float32]]) -> None:
        """Write what ``make`` gives for different keys, unless another process does so."""
        name = hashlib.blake2b(keys_N.tobytes(), digest_size=_KEY_BYTES).hexdigest()
        path = self.folder / f"keys-{name}.npy"

        def write(_: int) -> None:
            tidy(self.folder, glob.escape(_vectors_file(path).name))
            write_array(_vectors_file(path), make().astype(self._dtype, copy=False))
            write_array(path, keys_N)

        make_missing([path], write)

    def take(self, keys_N: Keys) -> NDArray[Any]:
        """Copy the vectors of keys that all have been kept, ``(N, D)``."""
        places_N2 = self._find(keys_N)
        if (places_N2 < 0).any():
            self._look_again()
            places_N2 = self._find(keys_N)
            assert (places_N2 >= 0).all()
        vectors_ND = np.empty((len(keys_N), self.dimension or 0), dtype=self._dtype)
        for number in np.unique(places_N2[:, 0]).tolist():
            mine = places_N2[:, 0] == number
            vectors_ND[mine] = self._vectors(number)[places_N2[mine, 1]]
        return vectors_ND

    def _look_again(self) -> None:
        """Learn the keys of the files that are new."""
        for path in sorted(set(self.folder.glob("keys-*.npy")) - set(self._files)):
            keys_N = self._read(path, mapped=False)
            places_N2 = np.empty((len(keys_N), 2), dtype=np.int32)
            places_N2[:, 0], places_N2[:, 1] = len(self._files), np.arange(len(keys_N))
            while self._runs and len(self._runs[-1][0]) <= 2 * len(keys_N):
                keys_M, places_M2 = self._runs.pop()
                keys_N = np.concatenate([keys_M, keys_N])
                places_N2 = np.concatenate([places_M2, places_N2])
            order = np.argsort(keys_N, kind="stable")
            self._runs.append((keys_N[order], places_N2[order]))
            self._files.append(path)
        if self.dimension is None and self._files:
            self.dimension = int(self._vectors(0).shape[-1])

    def _find(self, keys_N: Keys) -> NDArray[np.int32]:
        """Places, ``(N, 2)``; -1 where there is none."""
        places_N2 = np.full((len(keys_N), 2), -1, dtype=np.int32)
        for keys_M, places_M2 in self._runs:
            at_N = np.minimum(np.searchsorted(keys_M, keys_N), len(keys_M) - 1)
            found_N = keys_M[at_N] == keys_N
            places_N2[found_N] = places_M2[at_N[found_N]]
        return places_N2

    def _vectors(self, number: int) -> NDArray[Any]:
        path = _vectors_file(self._files[number])
        vectors = self._read(path, mapped=True)
        if vectors.ndim != 2 or self.dimension not in (None, vectors.shape[1]):
            raise DataError(
                f"holds vectors of shape {vectors.shape}, the model's width is {self.dimension}",
                where=str(path),
                hint=f"The cache and the model disagree: delete {self.folder}",
            )
        return vectors

    def _read(self, path: Path, *, mapped: bool) -> NDArray[Any]:
        hint = f"Delete {self.folder}; what it holds is embedded again"
        return read_array(path, mapped=mapped, hint=hint)


def _vectors_file(keys: Path) -> Path:
    return keys.with_name(keys.name.replace("keys-", "vectors-", 1))
