"""An encoder without a model: the vectors that a file holds, found by their texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import ending_of
from nvembed.core.store import read_array
from nvembed.encoding.encoder import BaseEncoder, unit_rows
from nvembed.encoding.reading import read_documents
from nvembed.text.instructions import Side

_HINT = "Encode the texts again: nvembed encode MODEL --input TEXTS --output VECTORS"


class VectorFile(BaseEncoder):
    """What ``nvembed encode`` wrote for a file of texts: ``.npy`` or Parquet, in float32.

    Of equal texts the first counts. Sides and instructions are those that it was encoded with.
    """

    def __init__(self, vectors: Path, texts: Path) -> None:
        documents = list(read_documents([texts], keep_going=None))
        self._vectors, names = _read_vectors(vectors)
        if len(self._vectors) != len(documents):
            message = f"{len(self._vectors):,} vectors for {len(documents):,} texts of {texts}"
            expected = "one vector per text, in their order"
            raise DataError(message, where=str(vectors), expected=expected, hint=_HINT)
        for document, name in zip(documents, names or (), strict=False):
            if name not in (document.id, document.place) and document.id is not None:
                message = f"has a vector of {name!r} where {document.id!r} is the id of the text"
                expected = f"the order of {texts}"
                raise DataError(message, where=str(vectors), expected=expected, hint=_HINT)
        self._row_of: dict[str, int] = {}
        for row, document in enumerate(documents):
            self._row_of.setdefault(document.text, row)
        self._name, self.dimension = str(texts), int(self._vectors.shape[1])

    def _encode(self, side: Side, texts: Sequence[str], task: str | None) -> NDArray[np.float32]:
        if missing := [text for text in texts if text not in self._row_of]:
            raise DataError(
                f"{len(missing):,} of {len(texts):,} texts have no vector, the first is "
                f"{missing[0][:60]!r}",
                where=self._name,
                expected="all texts that the stage draws",
                hint=_HINT,
            )
        rows = [self._row_of[text] for text in texts]
        return unit_rows(np.asarray(self._vectors[rows], dtype=np.float32))


def _read_vectors(path: Path) -> tuple[NDArray[Any], list[str] | None]:
    """Read the vectors and, of Parquet, the names of their texts."""
    names: list[str] | None = None
    if ending_of(path) == ".npy":
        found = read_array(path, mapped=True, hint=_HINT)
    elif ending_of(path) == ".parquet":
        import pyarrow
        from pyarrow import parquet

        try:
            table = parquet.read_table(path, columns=["id", "embedding"]).combine_chunks()
            names = table["id"].to_pylist()
            flat = table["embedding"].combine_chunks().flatten().to_numpy()
            found = flat.reshape(len(names), -1)
        except (OSError, KeyError, ValueError, pyarrow.ArrowException) as error:
            told = f"cannot be read ({' '.join(str(error).split())[:120]})"
            raise DataError(told, where=str(path), hint=_HINT) from error
    else:
        raise ConfigError("no vectors", where=str(path), expected="a .npy or .parquet file")
    if found.ndim != 2 or found.dtype.kind != "f":
        message = f"holds {found.dtype} of shape {found.shape}"
        expected = "a matrix of floating point numbers"
        raise DataError(message, where=str(path), expected=expected, hint=_HINT)
    return found, names
