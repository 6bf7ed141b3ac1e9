"""An encoder without a model: the vectors that a file holds, found by their texts.

Of a text 32 bytes are held, and of ``.npy`` no vector: the file is mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import ending_of
from nvembed.core.store import read_array
from nvembed.data.hashed import FirstPlaces, text_digest
from nvembed.data.instructions import Side
from nvembed.data.reading import read_documents
from nvembed.model.encoder import BaseEncoder, unit_rows

_HINT = "Encode the texts again: nvembed encode MODEL --input TEXTS --output VECTORS"


class VectorFile(BaseEncoder):
    """What ``nvembed encode`` wrote for a file of texts: ``.npy`` or Parquet, in float32.

    Of equal texts the first counts. Sides and instructions are those that it was encoded with.
    """

    def __init__(self, vectors: Path, texts: Path) -> None:
        self._vectors, names = _read_vectors(vectors)
        digests, wrong, count = bytearray(), "", 0
        for document in read_documents([texts], keep_going=None):
            digests += text_digest(document.text)
            if names is not None and document.id is not None and count < len(names) and not wrong:
                name = names[count].as_py()
                if name not in (document.id, document.place):
                    wrong = f"has a vector of {name!r} where {document.id!r} is the id of the text"
            count += 1
        expected = f"the order of {texts}"
        if len(self._vectors) != count:
            wrong = f"{len(self._vectors):,} vectors for {count:,} texts of {texts}"
            expected = "one vector per text, in their order"
        if wrong:
            raise DataError(wrong, where=str(vectors), expected=expected, hint=_HINT)
        self._rows = FirstPlaces(digests)
        self._name, self.dimension = str(texts), int(self._vectors.shape[1])

    def _encode(self, side: Side, texts: Sequence[str], task: str | None) -> NDArray[np.float32]:
        rows = [self._rows.find(text_digest(text)) for text in texts]
        missing = [text for text, row in zip(texts, rows, strict=True) if row is None]
        if missing:
            raise DataError(
                f"{len(missing):,} of {len(texts):,} texts have no vector, the first is "
                f"{missing[0][:60]!r}",
                where=self._name,
                expected="all texts that the stage draws",
                hint=_HINT,
            )
        taken = self._vectors[np.array(rows, dtype=np.int64)]
        return unit_rows(np.asarray(taken, dtype=np.float32))


def _read_vectors(path: Path) -> tuple[NDArray[Any], Any]:
    """Read the vectors and, of Parquet, the Arrow column of the names of their texts."""
    names = None
    if ending_of(path) == ".npy":
        found = read_array(path, mapped=True, hint=_HINT)
    elif ending_of(path) == ".parquet":
        import pyarrow
        from pyarrow import parquet

        try:
            table = parquet.read_table(path, columns=["id", "embedding"]).combine_chunks()
            names = table["id"]
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
