"""Hard negatives for training records, mined with a teacher model.

In: records and an encoder; out: the same records with negatives, and a report. Documents are all
texts of the records (and a corpus, if given), each once; the nearest of them to a query, less
everything that is or may be a positive, are its negatives. The choice itself is in
``selection.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import read_jsonl, write_json, write_jsonl
from nvembed.core.progress import progress
from nvembed.data.convert import POSITIVE_SCORE
from nvembed.data.records import Kind, PairRecord, StsRecord, read_records
from nvembed.inference.encoding import encode_texts
from nvembed.inference.files import read_texts
from nvembed.inference.load import load_encoder
from nvembed.inference.protocol import Encoder
from nvembed.mining.config import MiningConfig
from nvembed.mining.pool import DocumentPool, text_key
from nvembed.mining.report import MiningReport
from nvembed.mining.search import top_k
from nvembed.mining.selection import Case, Neighbours, Selector
from nvembed.model.settings import PrecisionChoice

__all__ = ["MiningConfig", "MiningReport", "mine_file", "mine_negatives", "mine_sts_negatives"]

# Records per search: one tile of ``top_k``.
BLOCK_RECORDS = 128


def mine_negatives(
    records: Sequence[PairRecord],
    documents: Sequence[str] | None,
    encoder: Encoder,
    config: MiningConfig,
    *,
    instruction: str | None = None,
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
        instruction: of the queries; documents are encoded without one.

    Returns:
        The records in order, with new ``negatives`` (and scores, if they are to be written), and
        the report.

    Raises:
        DataError: there are no records.
        ModelError: the teacher gives vectors that cannot be used.
    """
    cases = [
        Case(sides=((record.query, record.positives),), given=record.negatives)
        for record in records
    ]
    chosen, report = _mine(cases, documents or (), encoder, config, query_task=instruction)
    with_negatives = [
        replace(
            record,
            negatives=mined.negatives,
            positive_scores=mined.positive_scores,
            negative_scores=mined.negative_scores,
        )
        for record, mined in zip(records, chosen, strict=True)
    ]
    return with_negatives, report


def mine_sts_negatives(
    records: Sequence[StsRecord],
    documents: Sequence[str] | None,
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
    mined_rows = [
        row
        for row, record in enumerate(records)
        if record.score >= POSITIVE_SCORE
        and text_key(record.sentence1) != text_key(record.sentence2)
    ]
    cases = []
    for row in mined_rows:
        first, second = records[row].sentence1, records[row].sentence2
        sides = ((first, (second,)), (second, (first,)))
        cases.append(Case(sides=sides, given=records[row].negatives))
    sentences = [text for record in records for text in (record.sentence1, record.sentence2)]
    chosen, report = _mine(
        cases,
        [*sentences, *(documents or ())],
        encoder,
        config,
        query_task=instruction,
        document_task=instruction,
    )
    with_negatives = list(records)
    for row, mined in zip(mined_rows, chosen, strict=True):
        with_negatives[row] = replace(records[row], negatives=mined.negatives)
    return with_negatives, report


def mine_file(
    input: Path,
    output: Path,
    teacher: str | Encoder,
    config: MiningConfig,
    *,
    kind: Kind = "retrieval",
    instruction: str | None = None,
    documents: Path | None = None,
    dtype: PrecisionChoice | None = None,
) -> MiningReport:
    """Mine negatives for a file of records.

    All inputs are checked before the teacher is loaded. Keys of the input that are no part of a
    record (ids, sources) are carried over.

    Args:
        input: records; see ``nvembed.data.records``.
        output: JSONL, or JSONL.gz by its name; the report goes to ``<output>.report.json``.
        teacher: folder or hub id of an embedding model, or a loaded encoder.
        config: how to choose.
        kind: ``retrieval``, ``nli`` or ``sts``.
        instruction: of the queries (``sts``: of both sides).
        documents: JSONL of further texts to mine from; see ``nvembed.inference.files.read_texts``.
        dtype: of the teacher's weights, see ``load_encoder``.

    Raises:
        ConfigError: the kind has no negatives to mine, or the output is an input.
        DataError: a line of an input cannot be used.
        ModelError: the teacher cannot be loaded or used.
    """
    _check_request(input, output, kind, documents, config)
    records = read_records(input, kind)
    corpus = None if documents is None else [row.text for row in read_texts(documents)]
    from nvembed.model.precision import settle_precision  # torch, after the inputs are checked

    settled = settle_precision(dtype)
    encoder = load_encoder(teacher, settled) if isinstance(teacher, str) else teacher
    mined: Sequence[PairRecord | StsRecord]
    if kind == "sts":
        pairs = [record for record in records if isinstance(record, StsRecord)]
        mined, report = mine_sts_negatives(pairs, corpus, encoder, config, instruction=instruction)
    else:
        queries = [record for record in records if isinstance(record, PairRecord)]
        mined, report = mine_negatives(queries, corpus, encoder, config, instruction=instruction)
    write_jsonl(output, _output_rows(input, mined))
    origin = {
        "input": str(input),
        "corpus": None if documents is None else str(documents),
        "teacher": teacher if isinstance(teacher, str) else type(teacher).__name__,
        "dtype": settled,
        "kind": kind,
        "instruction": instruction,
        "config": {**config.model_dump(mode="json"), "threshold": config.limit},
    }
    write_json(output.with_name(output.name + ".report.json"), {**origin, **report.to_json()})
    return report


def _check_request(
    input: Path, output: Path, kind: Kind, documents: Path | None, config: MiningConfig
) -> None:
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
    sources = [path.resolve() for path in (input, documents) if path is not None]
    if output.resolve() in sources:
        raise ConfigError("output and input are the same file", where=str(output))
    if output.suffix == ".parquet":
        raise ConfigError("output is written as JSONL", where=str(output), expected=".jsonl[.gz]")


def _output_rows(input: Path, mined: Sequence[PairRecord | StsRecord]) -> Iterator[dict[str, Any]]:
    if input.suffix == ".parquet":
        yield from (record.to_json() for record in mined)
        return
    for (_, row), record in zip(read_jsonl(input), mined, strict=True):
        for key in ("negative", "positive_scores", "negative_scores"):
            row.pop(key, None)
        new = record.to_json()
        if "positive_scores" not in new:
            new = {key: new[key] for key in ("negative",) if key in new}
        yield row | new


@dataclass(frozen=True, slots=True)
class _Mined:
    """The negatives of a case and, where they are wanted, the teacher's cosines."""

    negatives: tuple[str, ...]
    positive_scores: tuple[float, ...] = ()
    negative_scores: tuple[float, ...] = ()


def _with_scores(
    mined: _Mined,
    case: Case,
    query_SD: NDArray[np.float32],
    document_ND: NDArray[np.float32],
    pool: DocumentPool,
) -> _Mined:
    """Add the scores for the first side, the only one of a pair record."""
    _, positives = case.sides[0]
    rows = [pool.add(text) for text in (*positives, *mined.negatives)]  # all are there already
    scores = (document_ND[rows] @ query_SD[0]).tolist()
    split = len(positives)
    return _Mined(mined.negatives, tuple(scores[:split]), tuple(scores[split:]))


def _mine(
    cases: Sequence[Case],
    documents: Sequence[str],
    encoder: Encoder,
    config: MiningConfig,
    *,
    query_task: str | None,
    document_task: str | None = None,
) -> tuple[list[_Mined], MiningReport]:
    """Choose the negatives of every case; given ones first."""
    if not cases:
        raise DataError(
            "no records to mine for",
            expected=f"queries with positives, or pairs scored {POSITIVE_SCORE:g} or more",
        )
    pool = DocumentPool()
    for case in cases:
        for _, positives in case.sides:
            for text in positives:
                pool.add(text)
        for text in case.given:
            pool.add(text)
    for text in documents:
        pool.add(text)
    # Equal queries of several records are embedded once.
    query_rows: dict[str, int] = {}
    for case in cases:
        for query, _ in case.sides:
            query_rows.setdefault(query, len(query_rows))
    query_QD = encode_texts(
        encoder, list(query_rows), side="query", task=query_task, description="queries"
    )
    document_ND = encode_texts(
        encoder, pool.texts, side="document", task=document_task, description="documents"
    )
    selector = Selector(config, pool, _known_positives(cases, pool), len(cases))
    chosen: list[_Mined] = []
    with progress(len(cases), "mine") as bar:
        for start in range(0, len(cases), BLOCK_RECORDS):
            block = cases[start : start + BLOCK_RECORDS]
            query_CSD = query_QD[[[query_rows[q] for q, _ in case.sides] for case in block]]
            near_C = _neighbours(block, query_CSD, document_ND, pool, config.search_depth)
            for case, near, query_SD in zip(block, near_C, query_CSD, strict=True):
                mined = _Mined(selector.choose(case, near))
                if config.write_scores:
                    mined = _with_scores(mined, case, query_SD, document_ND, pool)
                chosen.append(mined)
            bar.advance(len(block))
    return chosen, selector.report()


def _known_positives(cases: Sequence[Case], pool: DocumentPool) -> dict[str, frozenset[int]]:
    """Collect, for every query, the rows of its positives in all records and its own row."""
    known: dict[str, set[int]] = {}
    for case in cases:
        for query, positives in case.sides:
            rows = known.setdefault(text_key(query), set())
            rows.update(pool.add(text) for text in positives)
            if (own := pool.find(query)) is not None:
                rows.add(own)
    return {key: frozenset(rows) for key, rows in known.items()}


def _neighbours(
    block: Sequence[Case],
    query_CSD: NDArray[np.float32],
    document_ND: NDArray[np.float32],
    pool: DocumentPool,
    depth: int,
) -> Iterator[Neighbours]:
    """Search for all cases of a block (C cases of S sides each) in one go."""
    num_cases, num_sides, width = query_CSD.shape
    scores_RK, rows_RK = top_k(query_CSD.reshape(-1, width), document_ND, depth)
    scores_CSK = scores_RK.reshape(num_cases, num_sides, -1)
    rows_CSK = rows_RK.reshape(num_cases, num_sides, -1)
    for case, query_SD, scores_SK, rows_SK in zip(
        block, query_CSD, scores_CSK, rows_CSK, strict=True
    ):
        if num_sides == 1:
            rows_N, scores_N = rows_SK[0], scores_SK[0]
        else:
            # A document found for one side counts with the higher of its scores for both.
            rows_N = np.unique(rows_SK)
            scores_N = (document_ND[rows_N] @ query_SD.T).max(axis=1)
            order_N = np.argsort(-scores_N, kind="stable")
            rows_N, scores_N = rows_N[order_N], scores_N[order_N]
        positives = [
            (float(document_ND[row] @ query_D), row)
            for (_, texts), query_D in zip(case.sides, query_SD, strict=True)
            for row in map(pool.add, texts)
        ]
        positive_score, positive_row = min(positives)
        yield Neighbours(rows_N, scores_N, positive_row, positive_score)
