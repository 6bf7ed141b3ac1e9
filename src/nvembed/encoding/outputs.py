"""Files of vectors: ``.npy`` (also in 8 bits or 1 bit), Parquet and Lance, put together from parts.

The ranges of ``int8`` and ``uint8`` come from all vectors of a file. Memory holds one part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import ConfigError, DataError, UserError
from nvembed.core.files import atomic_folder, atomic_path, ending_of
from nvembed.core.outputs import check_ending
from nvembed.core.store import read_arrays
from nvembed.model.bulk import Part, read_part

OutputPrecision = Literal["float32", "int8", "uint8", "binary"]

ENCODE = "encode"
# Tables by ending: their name, and the library and extra that they need.
TABLES = {".parquet": ("Parquet", "pyarrow", "data"), ".lance": ("Lance", "lancedb", "index")}
_NUMBERS = {"float32": "<f4", "int8": "|i1", "uint8": "|u1", "binary": "|i1"}


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How vectors are written.

    Attributes:
        truncate_dim: keep the first dimensions and normalise again; ``None`` keeps all.
        precision: ``int8`` and ``uint8`` divide each dimension's range into 256 steps; ``binary``
            keeps the sign, eight to a byte.
    """

    truncate_dim: int | None = None
    precision: OutputPrecision = "float32"


class Parts:
    """All parts of an output, at least one, in order; ``names`` reads those of their texts anew.

    Texts that are ``chunked`` have several vectors, which are named ``name#0``, ``name#1`` …
    """

    def __init__(
        self, paths: Sequence[Path], names: Callable[[], Iterator[str]], *, chunked: bool
    ) -> None:
        self.chunked = chunked
        self._paths, self._names = paths, names
        self.rows = sum(map(sum, self._counts()))
        self.dimension: int = read_part(paths[0]).vectors.shape[1]

    def __iter__(self) -> Iterator[Part]:
        return map(read_part, self._paths)

    def names(self) -> Iterator[list[str]]:
        """Go through the names of the vectors of each part."""
        rest = self._names()
        for counts in self._counts():
            texts = list(islice(rest, len(counts)))
            if len(texts) < len(counts):
                raise DataError("the input changed while it was read")
            if self.chunked:
                each = zip(texts, counts, strict=True)
                texts = [f"{name}#{number}" for name, count in each for number in range(count)]
            yield texts

    def _counts(self) -> Iterator[list[int]]:
        return (read_arrays(path, "counts")[0].tolist() for path in self._paths)


def check_output(output: Path, precision: OutputPrecision) -> None:
    """Refuse an output that could not be written, before anything is computed."""
    check_ending(output, (".npy", *TABLES))
    if ending_of(output) not in TABLES:
        return
    name, library, extra = TABLES[ending_of(output)]
    if precision != "float32":
        raise ConfigError(
            f"{precision} in {name}", where=str(output), expected="float32, or a .npy file"
        )
    try:
        import_module(library)
    except ImportError as error:
        raise UserError(
            f"{library} is not installed", hint=f"pip install 'nvembed[{extra}]'"
        ) from error


def write_vectors(parts: Parts, output: Path, precision: OutputPrecision) -> None:
    """Write an output whole or not at all."""
    kind = ending_of(output)
    place = atomic_folder if kind == ".lance" else atomic_path
    with place(output, ENCODE) as temporary:
        if kind == ".npy":
            _write_npy(parts, temporary, precision)
        elif kind == ".parquet":
            import pyarrow.parquet

            batches = _batches(parts)
            with pyarrow.parquet.ParquetWriter(temporary, batches.schema) as file:
                for batch in batches:
                    file.write_batch(batch)
        else:
            import lancedb

            lancedb.connect(temporary).create_table("vectors", _batches(parts))
            made = temporary / "vectors.lance"  # LanceDB names a folder after the table
            for child in made.iterdir():
                child.rename(temporary / child.name)
            made.rmdir()


def value_ranges(parts: Parts) -> NDArray[np.float32]:
    """Least and greatest value of each dimension, ``(2, D)``; vectors to compare need the same."""
    extremes = [(part.vectors.min(axis=0), part.vectors.max(axis=0)) for part in parts]
    least, greatest = zip(*extremes, strict=True)
    return np.stack([np.min(least, axis=0), np.max(greatest, axis=0)])


def _write_npy(parts: Parts, path: Path, precision: OutputPrecision) -> None:
    ranges = value_ranges(parts) if precision in ("int8", "uint8") else None
    width = -(-parts.dimension // 8) if precision == "binary" else parts.dimension
    shape, kind = (parts.rows, width), _NUMBERS[precision]
    # Written in sequence and not through a memory map, in which a full disk kills the process.
    with open(path, "wb") as file:
        header = {"descr": kind, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            vectors: Any = part.vectors
            if precision != "float32":
                from sentence_transformers.util import quantize_embeddings

                vectors = np.asarray(quantize_embeddings(vectors, precision, ranges=ranges))
            file.write(vectors.astype(kind, order="C", copy=False).tobytes())


def _batches(parts: Parts) -> Any:
    """A reader of Arrow batches, one of each part."""
    import pyarrow

    columns = [
        ("id", pyarrow.string()),
        ("embedding", pyarrow.list_(pyarrow.float32(), parts.dimension)),
    ]
    if parts.chunked:
        columns += [("start", pyarrow.int64()), ("end", pyarrow.int64())]
    schema = pyarrow.schema(columns)

    def batch(names: list[str], part: Part) -> Any:
        numbers = pyarrow.array(part.vectors.reshape(-1), pyarrow.float32())
        vectors = pyarrow.FixedSizeListArray.from_arrays(numbers, parts.dimension)
        spans = [pyarrow.array(side) for side in part.spans.T] if parts.chunked else []
        return pyarrow.record_batch([pyarrow.array(names), vectors, *spans], schema=schema)

    return pyarrow.RecordBatchReader.from_batches(schema, map(batch, parts.names(), parts))
