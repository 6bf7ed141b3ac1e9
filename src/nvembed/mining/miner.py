"""Hard negatives for training records, mined with a teacher model.

In: records and a teacher; out: the same records with negatives, and a report. Documents are all
texts of the records (and a corpus, if given), each once; the nearest of them to a query, less
everything that is or may be a positive, are its negatives. Next file: ``run.py``.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from nvembed.core.dtypes import Precision, PrecisionChoice
from nvembed.core.errors import ConfigError
from nvembed.core.files import tidy, write_json, write_jsonl
from nvembed.core.ownership import check_outputs, remove_named
from nvembed.core.store import STORED
from nvembed.core.text_files import check_ending
from nvembed.data.mining_config import MiningConfig
from nvembed.data.records import Kind, PairRecord, StsRecord
from nvembed.data.sources import Column, file_dataset, load_records
from nvembed.encoding.encoder import Encoder
from nvembed.encoding.endpoint import is_endpoint
from nvembed.encoding.reading import read_documents
from nvembed.encoding.workers import Engine, Loader
from nvembed.mining.output_rows import output_rows
from nvembed.mining.pool import DocumentPool, Pool, StoredPool
from nvembed.mining.report import MiningReport
from nvembed.mining.run import (
    Plan,
    Run,
    pairs_of,
    plan_pairs,
    plan_records,
    plan_sts,
    pool_texts,
    queries_of,
)
from nvembed.mining.teachers import (
    BM25_NAME,
    Search,
    check_teacher,
    rank_by_bm25,
    rank_in_files,
    rank_in_memory,
    settled_dtype,
    take_device,
)

MINE = "mine"
# Columns that documents have; the others are of records.
_TEXTS = ("text", "title", "id")

__all__ = [
    "MiningConfig",
    "MiningReport",
    "help_mining",
    "mine_file",
    "mine_negatives",
    "mine_sts_negatives",
]


def mine_negatives(
    records: Sequence[PairRecord],
    documents: Iterable[str] | None,
    encoder: Encoder,
    config: MiningConfig,
    *,
    instruction: str | None = None,
    further: Iterable[PairRecord] = (),
) -> tuple[list[PairRecord], MiningReport]:
    """Give pair records (retrieval, NLI) hard negatives.

    A negative is never equal, but for case and white space, to the query or to a positive of any
    record with the same query. With several positives the lowest score counts as the positive's:
    the safest choice, since a negative is then worse than each of them. A record for which too few
    documents pass keeps fewer negatives, or none.

    Args:
        records: what to mine for; a record's own negatives are part of the pool.
        documents: further texts of the pool.
        encoder: the teacher.
        config: how to choose.
        instruction: of the queries whose records bring none; documents are encoded without one.
        further: records of the same set that nothing is mined for; what answers a query in one of
            them is no negative either.

    Returns:
        The records in order, with new ``negatives`` (and scores, if they are to be written), and
        the report.

    Raises:
        DataError: there are no records.
        ModelError: the teacher gives vectors that cannot be used.
    """
    plan = plan_pairs(records, further)
    run = _run_in_memory(plan, documents or (), encoder, config, instruction)
    return list(plan.finish(run.mined())), run.report()


def mine_sts_negatives(
    records: Sequence[StsRecord],
    documents: Iterable[str] | None,
    encoder: Encoder,
    config: MiningConfig,
    *,
    instruction: str | None = None,
) -> tuple[list[StsRecord], MiningReport]:
    """Give STS pairs hard negatives from the other sentences (paper v2).

    Only pairs that are trained on (scored 4 or more) get any; the others come back as they are. The
    negatives serve both sentences as queries, so a candidate counts with the higher of its two
    scores and must be no known positive of either. The instruction goes to both sides, as in
    training.

    Args, returns and errors are those of ``mine_negatives``.
    """
    plan = plan_sts(records)
    run = _run_in_memory(plan, documents or (), encoder, config, instruction)
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
    record (ids, sources) are carried over. Of a teacher that is named, vectors and what the search
    found lie in files of a work folder, and the documents in one beside them: memory does not grow
    with either, a run that was killed goes on where it was, and its output is the same to the bit.
    Processes that are given the same folder share the work (``torchrun``, or several commands).

    Args:
        input: records in any file that training reads (``data/sources/``), which are held in
            memory.
        output: JSONL, or JSONL.gz by its name; the report goes to ``<output>.report.json``.
        teacher: folder or hub id of an embedding model, address of an OpenAI-compatible endpoint,
            ``bm25``, or a loaded encoder, whose vectors are kept in memory.
        config: how to choose.
        kind: ``retrieval``, ``nli`` or ``sts``.
        layout: how rows become records, as in a recipe.
        columns: columns of the input that are called differently, as in a recipe; with
            ``documents``, ``text``, ``title`` and ``id`` are those of the documents.
        instruction: of the queries whose records bring none (``sts``: of both sides).
        documents: file or folder of further texts to mine from; see ``read_documents``.
        further: records of the same set that nothing is mined for; what answers a query in one of
            them is no negative either.
        dtype: of the teacher's weights, see ``load_encoder``.
        teacher_model: name of the model at an endpoint.
        work: folder for what is computed, kept afterwards: the next run with the same teacher and
            texts finds it. ``None`` is a hidden one beside the output, gone when that is written.
        engine: ``ray`` embeds on the workers of a ray cluster that see the work folder.

    Raises:
        ConfigError: the kind has no negatives to mine, options do not go together, or the output is
            an input or something that mining did not make.
        DataError: a line of an input cannot be used.
        ModelError: the teacher cannot be loaded or used.
        UserError: no space on the disk.
    """
    _check_request(output, kind, config)
    check_teacher(teacher, teacher_model, config, engine)
    report_file = output.with_name(output.name + ".report.json")
    named = teacher if isinstance(teacher, str) else None
    places = [_beside(output) if work is None else work]
    read = [input, documents, further, config.rerank, named]
    check_outputs([output, report_file], made_by=MINE, inputs=read, places=places)
    source = file_dataset(input, kind, layout=layout, columns=_of_records(columns, documents))
    plan = plan_records(load_records(source, base_dir=Path()), pairs_of(further))
    folder = work if work is not None or not isinstance(teacher, str) else _beside(output)
    if work is None:
        for path in (output, report_file):
            tidy(path.parent, glob.escape(path.name))
    with _temporary(folder if work is None else None):
        job = _Job(plan, config, instruction, _corpus(documents, columns), folder, engine)
        with job.run(teacher, teacher_model, dtype) as (run, settled):
            write_jsonl(output, output_rows(source, plan.finish(run.mined())), MINE)
        origin = {
            "input": str(input),
            "corpus": None if documents is None else str(documents),
            "teacher": teacher if isinstance(teacher, str) else type(teacher).__name__,
            "teacher_model": teacher_model,
            "dtype": settled,
            "computing": _computing(teacher, settled),
            "kind": kind,
            "instruction": instruction,
            "config": {**config.model_dump(mode="json"), "threshold": config.limit},
        }
        report = run.report()
        write_json(report_file, {**origin, **report.to_json()}, MINE)
    return report


def help_mining(
    input: Path,
    teacher: str,
    config: MiningConfig,
    *,
    work: Path,
    kind: Kind = "retrieval",
    layout: str = "records",
    columns: Mapping[str, Column] | None = None,
    instruction: str | None = None,
    documents: Path | None = None,
    dtype: PrecisionChoice | None = None,
    teacher_model: str | None = None,
) -> None:
    """Do a share of the work of ``mine_file``, which another process calls with the same arguments.

    Returns when everything is embedded and searched for. Nothing is written but in the work folder.

    Args and errors are those of ``mine_file``.
    """
    check_teacher(teacher, teacher_model, config, "local")
    if teacher == BM25_NAME:
        return
    source = file_dataset(input, kind, layout=layout, columns=_of_records(columns, documents))
    plan = plan_records(load_records(source, base_dir=Path()))
    job = _Job(plan, config, instruction, _corpus(documents, columns), work, "local")
    with job.run(teacher, teacher_model, dtype):
        return


def _run_in_memory(
    plan: Plan,
    documents: Iterable[str],
    encoder: Encoder,
    config: MiningConfig,
    instruction: str | None,
) -> Run:
    queries = queries_of(plan.cases)
    pool = DocumentPool(pool_texts(plan.cases, chain(plan.texts, documents)))
    search = Search(queries, pool, instruction, instruction if plan.symmetric else None)
    ranking = rank_in_memory(search, encoder, config)
    return Run(plan.cases, pool, ranking, config, further=plan.further)


@dataclass(frozen=True)
class _Job:
    """What a command is to mine; ``folder`` is ``None`` for an encoder that is loaded already."""

    plan: Plan
    config: MiningConfig
    instruction: str | None
    corpus: Iterable[str]
    folder: Path | None
    engine: Engine

    @contextmanager
    def run(
        self, teacher: str | Encoder, model: str | None, dtype: PrecisionChoice | None
    ) -> Iterator[tuple[Run, Precision | None]]:
        """Embed and search; give the run, and the type of the teacher's weights."""
        queries = queries_of(self.plan.cases)
        texts = pool_texts(self.plan.cases, chain(self.plan.texts, self.corpus))
        pool: Pool
        with ExitStack() as stack:
            if self.folder is None:
                pool = DocumentPool(texts)
            else:
                pool = stack.enter_context(StoredPool(texts, self.folder))
            task = self.instruction if self.plan.symmetric else None
            search = Search(queries, pool, self.instruction, task)
            settled = None
            if not isinstance(teacher, str):
                ranking = rank_in_memory(search, teacher, self.config)
            elif teacher == BM25_NAME:
                ranking = rank_by_bm25(search, self.config)
            else:
                assert self.folder is not None
                take_device()
                if not is_endpoint(teacher):
                    settled = settled_dtype(teacher, dtype, self.folder, self.engine)
                named = Loader(teacher, settled, model)
                ranking = rank_in_files(search, named, self.config, self.folder, self.engine)
            run = Run(self.plan.cases, pool, ranking, self.config, further=self.plan.further)
            yield run, settled


def _computing(teacher: str | Encoder, dtype: Precision | None) -> dict[str, Any] | None:
    """Describe how vectors were computed here; None where another computed them, or none are."""
    if isinstance(teacher, str) and (teacher == BM25_NAME or is_endpoint(teacher)):
        return None
    from nvembed.kernels.precision import computing_record

    return computing_record(dtype)


def _beside(output: Path) -> Path:
    return output.with_name(f".mining-{output.name}")


def _of_records(columns: Mapping[str, Column] | None, documents: Path | None) -> dict[str, Column]:
    given = dict(columns or {})
    return given if documents is None else {k: v for k, v in given.items() if k not in _TEXTS}


def _corpus(documents: Path | None, columns: Mapping[str, Column] | None) -> Iterable[str]:
    """The texts of the further documents, read when they are asked for."""
    if documents is None:
        return ()
    named = {name: column for name, column in (columns or {}).items() if name in _TEXTS}
    return (d.text for d in read_documents([documents], columns=named, keep_going=None))


@contextmanager
def _temporary(folder: Path | None) -> Iterator[None]:
    """Delete the folder when the block ends well, and on an error where it holds nothing yet."""
    try:
        yield
    except BaseException:
        if folder is not None and not any(folder.glob("*.npy")):
            remove_named(folder, STORED)
        raise
    if folder is not None:
        remove_named(folder, STORED)


def _check_request(output: Path, kind: Kind, config: MiningConfig) -> None:
    if kind in ("classification", "clustering"):
        raise ConfigError(
            f"kind {kind} has no negatives to mine",
            where="kind",
            expected="retrieval, nli or sts",
            hint="Sets of classes take their negatives from the other classes in training",
        )
    if kind == "sts" and config.write_scores:
        raise ConfigError(
            "records of kind sts carry no scores of a teacher",
            where="write_scores",
            expected="kind retrieval or nli",
        )
    check_ending(output, (".jsonl",), packed=True)
