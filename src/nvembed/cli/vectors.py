"""``nvembed encode``, ``index`` and ``search``: from texts to vectors, kept and searched."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import typer

from nvembed.cli import options as opt
from nvembed.core.errors import ConfigError


@dataclass(frozen=True)
class _Vectors:
    """What comes out of a text."""

    truncate_dim: int | None = None
    precision: Literal["float32", "int8", "uint8", "binary"] = "float32"
    long: Literal["cut", "windows", "late"] = "cut"
    overlap: int = 64
    chunk_tokens: int = 256


@dataclass(frozen=True, kw_only=True)
class _Computing(opt.Weights):
    """Who embeds, and in which type."""

    processes: int = 1
    engine: Literal["local", "ray"] = "local"


@opt.described(
    model="Folder or hub id of any sentence-transformers model.",
    input="JSONL, CSV, TSV, JSON (also .gz), Parquet, .txt (a text per line), a folder, or "
    "- for stdin; may be repeated.",
    output="A .npy file, one row per text, or a .parquet file or .lance table with ids.",
    task="Instruction, or the name of an MTEB task (FiQA2018) or of a prompt of the model: "
    "the texts are queries. Without: documents.",
    truncate_dim=typer.Option(
        min=1, help="Keep the first dimensions only, at length 1, such as 256."
    ),
    precision="Of the numbers, as in sentence-transformers; binary keeps the sign.",
    long="Texts beyond the model's limit: keep the beginning; or the mean of overlapping "
    "windows; or late chunking, a vector per chunk of every text, read in one piece.",
    overlap=typer.Option(min=0, help="Tokens that windows share."),
    chunk_tokens=typer.Option(min=1, help="Longest chunk of --long late."),
    processes=typer.Option(
        min=1, help="Share out the texts, with a GPU each where there are some."
    ),
)
def encode(
    model: str,
    *,
    input: list[Path],
    output: Path,
    task: str | None = None,
    columns: list[str] | None = None,
    keep_going: bool = False,
    vectors: _Vectors,
    computing: _Computing,
) -> None:
    """Turn a file of texts into a file of vectors.

    Examples:

    \b
      nvembed encode runs/demo/model --input docs.jsonl --output docs.npy
      nvembed encode runs/demo/model --input questions.jsonl --output q.npy \\
        --task "Given a question, retrieve the answer" --column text=question
      nvembed encode MODEL --input asked.jsonl --output q.npy --task FiQA2018
      nvembed encode runs/demo/model --input docs.jsonl --output docs.npy \\
        --truncate-dim 128 --precision int8
      nvembed encode MODEL --input books --output chunks.lance --long late
    """
    from nvembed.encoding.files import encode_file
    from nvembed.encoding.outputs import OutputFormat
    from nvembed.model.settings import LongTexts

    done = encode_file(
        model,
        input,
        output,
        task=task,
        columns=opt.read_columns(columns),
        form=OutputFormat(vectors.truncate_dim, vectors.precision),
        keep_going=keep_going,
        long=LongTexts(vectors.long, vectors.overlap, vectors.chunk_tokens),
        dtype=computing.precision,
        processes=computing.processes,
        engine=computing.engine,
    )
    if done.skipped is not None and done.skipped.count:
        opt.echo_error(*(f"left out: {line}" for line in opt.bad_lines(done.skipped.first)))
        opt.echo_error(f"{done.skipped.count} bad lines were left out")
    typer.echo(f"{done.rows} vectors of width {done.dimension}: {done.output}")
    if done.ids is not None:
        typer.echo(f"their ids: {done.ids}")
    if done.ranges is not None:
        typer.echo(f"the ranges of their {vectors.precision} numbers: {done.ranges}")


# Enough of a hit to judge it by, on one or two lines of a terminal.
SHOWN_CHARS = 160


@dataclass(frozen=True)
class _Reading:
    """How documents are read and kept; see ``IndexOptions``."""

    columns: list[str] | None = None
    fields: str | None = None
    keep_going: bool = False
    ann_above: int = 50_000
    passages: str = "auto"
    long: Literal["cut", "late"] | None = None


@dataclass(frozen=True)
class _Deletion:
    """What goes."""

    delete: list[str] | None = None
    delete_file: Path | None = None


@opt.described(
    documents="Files (tables, text, HTML, PDF, code; .gz), folders, or - for stdin.",
    to="Folder of the database.",
    model="Folder or hub id; needed once, the database remembers it.",
    task="Instruction, or name of a task, of queries without one; of a new database.",
    fields="Keys to keep for --where: year,lang. Default: all.",
    delete="Id of a document to remove; may be given often.",
    delete_file="File of ids to remove, one per line.",
    truncate_dim=typer.Option(min=1, help="First dimensions only; of a new database."),
    ann_above=typer.Option(min=0, help="Documents from which on search is approximate."),
    passages=typer.Option(
        metavar="TOKENS|none",
        help="Longest passage that files of text, HTML, PDF and code are cut into, and rows where "
        "it is given; none leaves files whole. Default of a new database: 256, or what the model "
        "reads.",
    ),
    long="late reads documents as a whole and pools each passage from its states; of a new one.",
)
def index(
    documents: list[str] | None = None,
    *,
    to: Path,
    model: str | None = None,
    task: str | None = None,
    reading: _Reading,
    deletion: _Deletion,
    truncate_dim: int | None = None,
    weights: opt.Weights,
) -> None:
    """Write documents into an embedded vector database.

    Run again, it embeds what is new. Rows of tables have a vector each. Other files are cut into
    passages, by their headings or definitions, else by paragraphs and sentences; passages of files
    that have changed or are no longer in a folder go.

    Examples:

    \b
      nvembed index docs.jsonl --to docs.db --model runs/demo/model
      nvembed index manuals/ --to manuals.db --model MODEL --passages 200
      nvembed index docs.jsonl more.csv folder/ --to docs.db --keep-going
      nvembed index faq.csv --to faq.db --model MODEL --column text=answer
      nvembed index --to docs.db --delete old-1 --delete-file gone.txt
      nvembed search docs.db "sort a list" --where "year > 2000"
    """
    from nvembed.index.build import IndexOptions, index_documents, read_ids

    fields = reading.fields
    kept = None if fields is None else tuple(field.strip() for field in fields.split(","))
    options = IndexOptions(
        opt.read_columns(reading.columns),
        kept,
        reading.keep_going,
        reading.ann_above,
        _read_passages(reading.passages),
        reading.long,
    )
    gone = read_ids(deletion.delete_file) if deletion.delete_file else []
    done = index_documents(
        to,
        documents or [],
        model=model,
        task=task,
        truncate_dim=truncate_dim,
        dtype=weights.precision,
        delete=[*(deletion.delete or []), *gone],
        options=options,
    )
    _tell_indexed(to, done)


def _tell_indexed(to: Path, done: Any) -> None:
    """Print what was indexed, and on stderr what was left out."""
    typer.echo(
        f"{to}: {done.total} {done.unit}s; {done.added} new, "
        f"{done.updated} changed, {done.unchanged} as they were, {done.deleted} deleted; "
        f"{done.embedded} texts embedded"
    )
    if done.documents:
        cut = f"{done.documents} document{'s' if done.documents > 1 else ''}"
        typer.echo(f"{cut} in passages of at most {done.passages} tokens")
    if done.left_out.count:
        opt.echo_error(done.left_out)
    if done.absent_fields:
        opt.echo_error(f"no document has the field {', '.join(sorted(done.absent_fields))}")
    if done.skipped.count:
        opt.echo_error(f"{done.skipped.count} lines left out, the first:")
        opt.echo_error(*(f"  {line}" for line in opt.bad_lines(done.skipped.first)))


def _read_passages(given: str) -> int | Literal["auto"] | None:
    if given == "none":
        return None
    if given != "auto" and not (given.isascii() and given.isdecimal()):
        raise ConfigError(f"{given!r}", where="--passages", expected="a number of tokens, or none")
    return "auto" if given == "auto" else int(given)


@dataclass(frozen=True)
class _File:
    """Documents that are no database."""

    documents: Path | None = None
    columns: list[str] | None = None


@dataclass(frozen=True)
class _OfDatabase:
    """Options of a search in a database alone."""

    where: str | None = None
    hybrid: bool = False
    exact: bool = False
    model: str | None = None


@opt.described(
    place=typer.Argument(
        metavar="DB_OR_MODEL", help="Database of nvembed index; or a model, with --documents."
    ),
    query="What to look for.",
    documents="A file or folder as nvembed encode takes them.",
    task="Instruction for the query, or the name of an MTEB task (FiQA2018) or of a prompt.",
    top_k=typer.Option(min=1, help="Number of hits."),
    where="Filter of a database: \"year > 2000 AND lang = 'en'\".",
    hybrid="In a database: by words as well, ranks fused.",
    exact="Compare with every vector of a large database.",
    model="Where the model of the database lies now.",
    as_json=typer.Option("--json", help="Print a JSON object per hit, fields and all."),
)
def search(
    place: str,
    query: str,
    *,
    file: _File,
    task: str | None = None,
    top_k: int = 10,
    of_database: _OfDatabase,
    as_json: bool = False,
    weights: opt.Weights,
) -> None:
    """Find what is nearest to a query, in a database or a file.

    Examples:

    \b
      nvembed search docs.db "sort a list"
      nvembed search docs.db "sort a list" --hybrid --where "year > 2000"
      nvembed search runs/demo/model "sort a list" --documents docs.jsonl \\
        --task "Given a question about Python, retrieve its documentation"
    """
    dtype = weights.precision
    if file.documents is None:
        if file.columns:
            raise ConfigError("a database knows its columns", where="--column", hint="Leave it out")
        from nvembed.index.search import SearchOptions, search_index

        where, model = of_database.where, of_database.model
        options = SearchOptions(task, top_k, where, of_database.hybrid, of_database.exact)
        for hit in search_index(place, query, options, model=model, dtype=dtype):
            _show(hit, ("rank", "cosine", "fused", "id", "text", "fields"), as_json)
        return
    if of_database != _OfDatabase():
        raise ConfigError(
            "--where, --hybrid, --exact and --model are of databases",
            where="--documents",
            hint="nvembed index makes a database of the file",
        )
    from nvembed.encoding.file_search import search_file

    names = opt.read_columns(file.columns)
    for file_hit in search_file(
        place, file.documents, query, task=task or None, top_k=top_k, columns=names, dtype=dtype
    ):
        _show(file_hit, ("rank", "score", "id", "text"), as_json)


def _show(hit: Any, keys: tuple[str, ...], as_json: bool) -> None:
    """Print a hit of a database or of a file."""
    values = {key: getattr(hit, key) for key in keys}
    if as_json:
        if "fields" in values:
            from nvembed.index.fields import plain

            values["fields"] = plain(values["fields"])
        typer.echo(json.dumps(values, ensure_ascii=False, allow_nan=False))
        return
    scores = (values.get(key) for key in ("score", "cosine", "fused"))
    shown = [f"{score:.4f}" for score in scores if score is not None]
    shown += [f"[{hit.id}]"] if hit.id is not None else []
    if values.get("fields"):
        from nvembed.index.passages import place_of

        shown += filter(None, [place_of(hit.id, values["fields"])])
    line = " ".join(hit.text.split())
    line = line if len(line) <= SHOWN_CHARS else line[: SHOWN_CHARS - 1] + "…"
    typer.echo("  ".join([f"{hit.rank:>3}", *shown, line]))
