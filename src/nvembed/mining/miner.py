"""Hard negatives for training records, mined with a teacher model.

In: records and a teacher; out: the same records with negatives, and a report. Documents are all
texts of the records (and further ones, if given), each once; the nearest of them to a query, less
everything that is or may be a positive, are its negatives. Next file: ``run.py``.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from nvembed.core.arguments import Precision, PrecisionChoice
from nvembed.core.errors import ConfigError
from nvembed.core.files import ending_of, read_jsonl, tidy, write_json, write_jsonl
from nvembed.core.outputs import check_ending
from nvembed.core.ownership import check_outputs, remove_named
from nvembed.core.store import STORED
from nvembed.data.built_sets import MINED_KINDS
from nvembed.data.config import Column, DatasetConfig, MiningConfig, file_dataset
from nvembed.data.loading import load_records, open_table
from nvembed.data.reading import read_documents
from nvembed.data.records import REQUIRED, Kind, PairRecord, StsRecord, record_of
from nvembed.data.sources.rows import Row
from nvembed.mining.corpus import Corpus, MemoryCorpus, StoredCorpus
from nvembed.mining.ranking import BM25_NAME, check_teacher, rank, settled_teacher
from nvembed.mining.run import Plan, Run, plan_records
from nvembed.mining.selection import MiningReport
from nvembed.model.encoder import Encoder, is_endpoint
from nvembed.model.workers import Engine, Loader

MINE = "mine"
RecordT = TypeVar("RecordT", PairRecord, StsRecord)
# Columns that documents have; the others are of records.
_TEXTS = ("text", "title", "id")


def mine_negatives(
    records: Sequence[RecordT],
    documents: Iterable[str] | None,
    encoder: Encoder,
    config: MiningConfig,
    *,
    instruction: str | None = None,
    further: Iterable[PairRecord] = (),
) -> tuple[list[RecordT], MiningReport]:
    """Give pair records (retrieval, NLI), or STS pairs that are trained on, hard negatives.

    A negative is never equal, but for case and white space, to the query or to a positive of any
    record with the same query. With several positives the lowest score counts as the positive's:
    the safest choice, since a negative is then worse than each of them. A record for which too few
    documents pass keeps fewer negatives, or none.

    Of STS pairs (paper v2) both sentences are queries: a candidate counts with the higher of its
    two scores and must be no known positive of either. The instruction goes to both sides then, as
    in training.

    Args:
        records: what to mine for, of one kind; a record's own negatives are searched too.
        documents: further texts to search.
        encoder: the teacher.
        config: how to choose.
        instruction: given to queries whose records bring none; documents of pairs get none.
        further: records of the same set that nothing is mined for; what answers a query in one of
            them is no negative either.

    Returns:
        The records in order, with new ``negatives`` (and scores, if they are to be written), and
        the report.

    Raises:
        DataError: there are no records.
        ModelError: the teacher gives vectors that cannot be used.
    """
    plan = plan_records(records, further)
    with Mining(encoder, config, instruction).run(plan, documents or ()) as (run, _):
        return list(plan.finish(run.mined())), run.report()


def mine_file(
    input: Path,
    output: Path,
    teacher: str | Encoder,
    config: MiningConfig,
    *,
    kind: Kind = "retrieval",
    layout: str = "records",
    columns: Mapping[str, Column] | None = None,
    instruction: str | None = None,
    documents: Path | None = None,
    further: Path | None = None,
    dtype: PrecisionChoice | None = None,
    teacher_model: str | None = None,
    work: Path | None = None,
    engine: Engine = "local",
) -> MiningReport:
    """Mine negatives for a file of records.

    All inputs are checked before the teacher is loaded. Keys of the input that are no part of a
    record (ids, sources) are carried over. What a named teacher computes lies in files of a work
    folder, and the documents in one beside them: memory does not grow with either, a run that was
    killed goes on where it was, to the same bits, and processes that are given the same folder
    share the work (``torchrun``, or several commands).

    Args:
        input: records in any file that training reads (``data/sources/``), held in memory.
        output: JSONL, or JSONL.gz by its name; the report goes to ``<output>.report.json``.
        teacher: folder or hub id of an embedding model, address of an OpenAI-compatible endpoint,
            ``bm25``, or a loaded encoder, whose vectors are kept in memory.
        config: how to choose.
        kind: ``retrieval``, ``nli`` or ``sts``.
        layout: how rows become records, as in a recipe.
        columns: columns of other names, as in a recipe; ``text``, ``title`` and ``id`` are those
            of the ``documents``, if given.
        instruction: given to queries whose records bring none (``sts``: to both sides).
        documents: file or folder of further texts to mine from; see ``read_documents``.
        further: records of the same set, not mined for, whose positives are no negatives.
        dtype: type of the teacher's weights, see ``load_encoder``.
        teacher_model: name of the model at an endpoint.
        work: folder for what is computed, kept for the next run. ``None`` is a hidden one beside
            the output, gone when that is written.
        engine: ``ray`` embeds on the workers of a ray cluster that see the work folder.

    Raises:
        UserError: options do not go together, the output is an input or something that mining did
            not make, a line or the teacher cannot be used, or the disk is full.
    """
    files = PairFiles(input, kind, layout, columns or {}, documents, further)
    mining = Mining(teacher, config, instruction, engine, teacher_model, dtype)
    return mine_pairs(files, mining, output, work)


def mine_pairs(
    files: PairFiles, mining: Mining, output: Path, work: Path | None = None
) -> MiningReport:
    """``mine_file`` of what was put together."""
    config, teacher = mining.config, mining.teacher
    _check_request(output, files.kind, config)
    check_teacher(teacher, mining.teacher_model, config, mining.engine)
    named = teacher if isinstance(teacher, str) else None
    report_file = output.with_name(f"{output.name}.report.json")
    hidden = output.with_name(f".mining-{output.name}")
    read = [files.input, files.documents, files.further, config.rerank, named]
    check_outputs(
        [output, report_file], made_by=MINE, inputs=read, places=[hidden if work is None else work]
    )
    source, plan = files.plan()
    temporary = hidden if work is None and named is not None else None
    if work is None:
        for path in (output, report_file):
            tidy(path.parent, glob.escape(path.name))
    with _deleted(temporary):
        with mining.run(plan, files.texts(), work or temporary) as (run, settled):
            write_jsonl(output, _output_rows(source, plan.finish(run.mined())), MINE)
        origin = {
            "input": str(files.input),
            "corpus": None if files.documents is None else str(files.documents),
            "teacher": named or type(teacher).__name__,
            "teacher_model": mining.teacher_model,
            "dtype": settled,
            "computing": _computing(teacher, settled),
            "kind": files.kind,
            "instruction": mining.instruction,
            "config": {**config.model_dump(mode="json"), "threshold": config.limit},
        }
        report = run.report()
        write_json(report_file, {**origin, **report.to_json()}, MINE)
    return report


def help_mining(files: PairFiles, mining: Mining, work: Path) -> None:
    """Do a share of the work of ``mine_pairs``, which another process calls with the same.

    Returns when everything is embedded and searched for. Nothing is written but in the work folder.
    """
    check_teacher(mining.teacher, mining.teacher_model, mining.config, mining.engine)
    if mining.teacher != BM25_NAME:
        with mining.run(files.plan()[1], files.texts(), work):
            return


@dataclass(frozen=True)
class Mining:
    """How negatives are mined; see ``mine_file``."""

    teacher: str | Encoder
    config: MiningConfig
    instruction: str | None
    engine: Engine = "local"
    teacher_model: str | None = None
    dtype: PrecisionChoice | None = None

    @contextmanager
    def run(
        self, plan: Plan, documents: Iterable[str], folder: Path | None = None
    ) -> Iterator[tuple[Run, Precision | None]]:
        """Embed and search, in memory or in a folder; give the run, and the type of weights."""
        queries, texts = plan.queries, plan.corpus_texts(documents)
        tasks = (self.instruction, self.instruction if plan.symmetric else None)
        opened: AbstractContextManager[Corpus] = (
            nullcontext(MemoryCorpus(texts)) if folder is None else StoredCorpus(texts, folder)
        )
        with opened as corpus:
            teacher = settled_teacher(
                self.teacher, self.teacher_model, self.dtype, folder, self.engine
            )
            ranking = rank(queries, corpus.texts, tasks, teacher, self.config, folder, self.engine)
            dtype = teacher.dtype if isinstance(teacher, Loader) else None
            yield Run(plan, corpus, ranking, self.config), dtype


@dataclass(frozen=True)
class PairFiles:
    """Where records and documents are read from; see ``mine_file``."""

    input: Path
    kind: Kind
    layout: str
    columns: Mapping[str, Column]
    documents: Path | None = None
    further: Path | None = None

    def plan(self) -> tuple[DatasetConfig, Plan]:
        """Read the records; what is mined for them."""
        columns = dict(self.columns)
        if self.documents is not None:
            columns = {name: column for name, column in columns.items() if name not in _TEXTS}
        source = file_dataset(self.input, self.kind, layout=self.layout, columns=columns)
        rows = read_jsonl(self.further) if self.further is not None else ()
        # As ``building`` wrote them, one at a time.
        further = (cast(PairRecord, record_of(row, "retrieval")) for _, row in rows)
        return source, plan_records(load_records(source, base_dir=Path()), further)

    def texts(self) -> Iterator[str]:
        """The texts of the further documents, read when they are asked for."""
        if self.documents is not None:
            columns = {name: column for name, column in self.columns.items() if name in _TEXTS}
            for document in read_documents([self.documents], columns=columns, keep_going=None):
                yield document.text


@contextmanager
def _deleted(folder: Path | None) -> Iterator[None]:
    """Delete the folder when the block ends well, and on an error where it holds nothing yet."""
    try:
        yield
    except BaseException:
        if folder is not None and not any(folder.glob("*.npy")):
            remove_named(folder, STORED)
        raise
    if folder is not None:
        remove_named(folder, STORED)


def _computing(teacher: str | Encoder, dtype: Precision | None) -> dict[str, Any] | None:
    """Describe how vectors were computed here; None where another computed them, or none are."""
    if isinstance(teacher, str) and (teacher == BM25_NAME or is_endpoint(teacher)):
        return None
    from nvembed.kernels.machine import computing_record

    return computing_record(dtype)


def _output_rows(
    source: DatasetConfig, mined: Iterable[PairRecord | StsRecord]
) -> Iterator[dict[str, Any]]:
    """The records with negatives and, of text files of a record a row, the rest of the row."""
    path = Path(source.path or "")
    if source.layout != "records" or path.is_dir() or ending_of(path) == ".parquet":
        yield from (record.to_json() for record in mined)
        return
    table = open_table(source.table, base_dir=Path())
    as_they_are = not (table.textual or source.columns)
    own = {"negative", "positive_scores", "negative_scores"}
    if not as_they_are:
        own |= {*REQUIRED[source.kind], "instruction"}
        own |= {name for name in source.columns.values() if isinstance(name, str)}
    for row, record in zip(table.rows, mined, strict=True):
        assert isinstance(row, Row), "files with bad rows were refused"
        new = record.to_json()
        if as_they_are and "positive_scores" not in new:
            new = {key: new[key] for key in ("negative",) if key in new}
        yield {key: value for key, value in row.values.items() if key not in own} | new


def _check_request(output: Path, kind: Kind, config: MiningConfig) -> None:
    if kind not in MINED_KINDS:
        raise ConfigError(
            f"kind {kind} has no negatives to mine",
            where="kind",
            expected="retrieval, nli or sts",
            hint="Sets of classes take theirs from the other classes in training, texts have none",
        )
    if kind == "sts" and config.write_scores:
        raise ConfigError(
            "records of kind sts carry no scores of a teacher",
            where="write_scores",
            expected="kind retrieval or nli",
        )
    check_ending(output, (".jsonl",), packed=True)
