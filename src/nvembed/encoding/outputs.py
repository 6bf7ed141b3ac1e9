"""Files of vectors: ``.npy`` (also in 8 bits or 1 bit), Parquet and Lance, put together from parts.

The smaller formats are those of sentence-transformers (``quantize_embeddings``), applied to a file
of any size: the ranges of ``int8`` and ``uint8`` come from all of its vectors. Memory holds one
part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import ConfigError, UserError
from nvembed.core.files import atomic_folder, atomic_path
from nvembed.core.store import read_arrays
from nvembed.core.text_files import check_ending, ending_of
from nvembed.encoding.embed import Part, read_part
from nvembed.encoding.encoder import unit_rows

OutputPrecision = Literal["float32", "int8", "uint8", "binary"]

ENCODE = "encode"
TABLES = (".parquet", ".lance")
OUTPUTS = (".npy", *TABLES)
_IN_LANCE = "vectors"


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


def shorten(vectors: NDArray[np.float32], dimension: int) -> NDArray[np.float32]:
    """Keep the first dimensions of unit vectors ``(N, D)`` and bring them back to length 1."""
    return unit_rows(vectors[:, :dimension])


class Parts:
    """All parts of an output.

    Args:
        paths: in order, at least one.
        names: of the texts, in order.
        chunked: texts have several vectors, which are named ``name#0``, ``name#1`` …
    """

    def __init__(self, paths: Sequence[Path], names: Sequence[str], *, chunked: bool) -> None:
        self.chunked = chunked
        self._paths = paths
        self._names: list[list[str]] = []
        done = 0
        for path in paths:
            counts = read_arrays(path, "counts")[0].tolist()
            mine = list(names[done : done + len(counts)])
            done += len(counts)
            if chunked:
                pairs = zip(mine, counts, strict=True)
                mine = [f"{name}#{place}" for name, count in pairs for place in range(count)]
            self._names.append(mine)

    @property
    def names(self) -> list[str]:
        """Of all vectors."""
        return [name for mine in self._names for name in mine]

    @property
    def shape(self) -> tuple[int, int]:
        """Number and width of all vectors."""
        return sum(map(len, self._names)), read_part(self._paths[0]).vectors.shape[1]

    def __iter__(self) -> Iterator[tuple[list[str], Part]]:
        """Go through the parts, with the names of their vectors."""
        return zip(self._names, map(read_part, self._paths), strict=True)


def check_output(output: Path, precision: OutputPrecision) -> None:
    """Refuse an output that could not be written, before anything is computed.

    Raises:
        ConfigError: an ending that says no format, a table of numbers that are not float32, or
            something else in the place of a Lance table.
        UserError: the library of the format is not installed.
    """
    check_ending(output, OUTPUTS)
    kind = ending_of(output)
    if kind in TABLES and precision != "float32":
        name = "Parquet" if kind == ".parquet" else "Lance"
        raise ConfigError(
            f"{precision} in {name}", where=str(output), expected="float32, or a .npy file"
        )
    if kind == ".parquet":
        _import_pyarrow()
    elif kind == ".lance":
        _import_lancedb()


def write_vectors(parts: Parts, output: Path, precision: OutputPrecision) -> None:
    """Write an output whole or not at all.

    Raises:
        UserError: no space, no permission.
    """
    if ending_of(output) == ".lance":
        with atomic_folder(output, ENCODE) as folder:
            _write_lance(parts, folder)
        return
    with atomic_path(output, ENCODE) as temporary:
        if ending_of(output) == ".parquet":
            _write_parquet(parts, temporary)
        else:
            _write_npy(parts, temporary, precision)


def value_ranges(parts: Parts) -> NDArray[np.float32]:
    """Least and greatest value of each dimension, ``(2, D)``.

    Other vectors are only comparable with ``int8`` and ``uint8`` ones when they are quantised with
    the same ranges.
    """
    extremes = [(part.vectors.min(axis=0), part.vectors.max(axis=0)) for _, part in parts]
    least, greatest = zip(*extremes, strict=True)
    return np.stack([np.min(least, axis=0), np.max(greatest, axis=0)])


def _write_npy(parts: Parts, path: Path, precision: OutputPrecision) -> None:
    ranges = value_ranges(parts) if precision in ("int8", "uint8") else None
    rows, width = parts.shape
    kinds = {"float32": "<f4", "int8": "|i1", "uint8": "|u1", "binary": "|i1"}
    header = {
        "descr": kinds[precision],
        "fortran_order": False,
        "shape": (rows, -(-width // 8) if precision == "binary" else width),
    }
    # Written in sequence and not through a memory map, in which a full disk kills the process.
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _, part in parts:
            vectors: Any = part.vectors
            if precision != "float32":
                from sentence_transformers.util import quantize_embeddings

                vectors = np.asarray(quantize_embeddings(vectors, precision, ranges=ranges))
            file.write(vectors.astype(kinds[precision], order="C", copy=False).tobytes())


def _write_parquet(parts: Parts, path: Path) -> None:
    _import_pyarrow()
    import pyarrow.parquet

    schema = _schema(parts)
    with pyarrow.parquet.ParquetWriter(path, schema) as file:
        for batch in _batches(parts, schema):
            file.write_batch(batch)


def _write_lance(parts: Parts, folder: Path) -> None:
    """Write the table that LanceDB makes; it lies in a folder named after it, and is moved out."""
    pyarrow, lancedb = _import_pyarrow(), _import_lancedb()
    schema = _schema(parts)
    reader = pyarrow.RecordBatchReader.from_batches(schema, _batches(parts, schema))
    lancedb.connect(folder).create_table(_IN_LANCE, reader)
    made = folder / f"{_IN_LANCE}.lance"
    for child in made.iterdir():
        child.rename(folder / child.name)
    made.rmdir()


def _schema(parts: Parts) -> Any:
    pyarrow = _import_pyarrow()
    _, width = parts.shape
    vector = pyarrow.list_(pyarrow.float32(), width)
    columns = [("id", pyarrow.string()), ("embedding", vector)]
    if parts.chunked:
        columns += [("start", pyarrow.int64()), ("end", pyarrow.int64())]
    return pyarrow.schema(columns)


def _batches(parts: Parts, schema: Any) -> Iterator[Any]:
    pyarrow = _import_pyarrow()
    for names, part in parts:
        numbers = pyarrow.array(part.vectors.reshape(-1), pyarrow.float32())
        columns = [
            pyarrow.array(names, pyarrow.string()),
            pyarrow.FixedSizeListArray.from_arrays(numbers, part.vectors.shape[1]),
        ]
        if parts.chunked:
            columns += [pyarrow.array(part.spans[:, side]) for side in (0, 1)]
        yield pyarrow.record_batch(columns, schema=schema)


def _import_pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise UserError("pyarrow is not installed", hint="pip install 'nvembed[data]'") from error
    return pyarrow


def _import_lancedb() -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise UserError("lancedb is not installed", hint="pip install 'nvembed[index]'") from error
    return lancedb
