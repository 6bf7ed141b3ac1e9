"""Reads the files of a retrieval task: a folder in BEIR's layout (``data/sources/beir.py``).

In: the folder. Out: ``RetrievalData``; what published sets get wrong (judgements of what is not
there, documents without a text, pairs judged twice) is read as mteb and trec_eval read it, and
counted in ``Problems.remarks``.
"""

from __future__ import annotations

from collections.abc import Generator

from nvembed.core.errors import DataError
from nvembed.data.records import BadRow, RowError
from nvembed.data.sources.beir import (
    Judgements,
    find_judgements,
    first_split,
    judged_splits,
    open_judgements,
    read_judgements,
)
from nvembed.data.sources.rows import Columns, Keyed, Table, read_id
from nvembed.evaluation.task_files import Problems, RetrievalData

_COLUMNS = Columns({})
_MAX_GRADE = 2**31 - 1
_Texts = dict[str, tuple[str, str]]  # text and place by id


def read_retrieval(problems: Problems, split: str | None = None) -> RetrievalData:
    """Read ``corpus``, ``queries`` and ``qrels/<split>``; ``None`` is ``first_split``."""
    documents = _read_texts("corpus", problems)
    queries = _read_texts("queries", problems)
    judgements, where = _read_grades(problems, split)
    if not problems:
        _check_ids(judgements, documents, queries, where, problems)
    grades: dict[str, dict[str, int]] = {}
    for query, of_query in judgements.items():
        if query not in queries:
            continue
        if not queries[query][0].strip():
            problems.add("a judged query is empty", queries[query][1], "a text")
        grades[query] = {name: max(int(one.grade), 0) for name, one in of_query.items()}
    kept = [query for query in queries if query in grades]
    if not problems:
        _remark_on(documents, judgements, {query: grades[query] for query in kept}, problems)
    return RetrievalData(
        document_ids=tuple(documents),
        documents=tuple(text for text, _ in documents.values()),
        query_ids=tuple(kept),
        queries=tuple(queries[query][0] for query in kept),
        judgements=grades,
    )


def _read_texts(name: str, problems: Problems) -> _Texts:
    """Read id → text. An id may come again with the same text, and not with another."""
    found: _Texts = {}
    table = problems.open(name)
    if table is None:
        return found
    texts = ("title", "text") if name == "corpus" else ("text",)
    keyed = Keyed(table, _COLUMNS, texts=texts, spell=read_id)
    try:
        keyed.check()
    except DataError as error:
        problems.add_error(error)
        return found
    for where, row in problems.rows_of(table):
        try:
            key = keyed.id_of(row)
        except RowError as bad:
            problems.add(str(bad), where)
            continue
        try:
            text = keyed.text_of(row) if name == "corpus" else _query_text(row)
        except RowError as bad:
            problems.add(str(bad), where)
            text = ""  # the id counts as known, so that the judgements are not blamed too
        first = found.setdefault(key, (text, where))
        if first[1] == where:
            continue
        if first[0] == text:
            problems.remarks.add(where, f"{name}: an id is given again with the same text")
        else:
            problems.add(f"id {key!r} is given twice, first at {first[1]}", where)
    return found


def _query_text(row: dict[str, object]) -> str:
    text = _COLUMNS.need(row, "text")
    if text is not None and not isinstance(text, str):
        raise RowError('"text" is no text')
    return text or ""  # not stripped: mteb asks queries as they are


def _read_grades(problems: Problems, split: str | None) -> tuple[Judgements, str]:
    """Read the judgements of a split, and say where they are from."""
    folder = problems.folder
    taken = split or first_split(folder) or "test"
    path = find_judgements(folder, taken)
    where = str(path or folder / "qrels" / f"{taken}.tsv")
    if path is None:
        there = judged_splits(folder)
        expected = f"one of the splits there: {', '.join(there)}" if there else "judgements"
        problems.add("no such file", where, expected)
        return {}, where
    if split is None and taken != "test":
        problems.remarks.add(where, f"the split is {taken}, since there is no test")
    try:
        table = open_judgements(path)
        _COLUMNS.check(table, ("query-id", "corpus-id"))
        return _whole_grades(table, problems), where
    except DataError as error:
        problems.add_error(error)
        return {}, where


def _whole_grades(table: Table, problems: Problems) -> Judgements:
    judgements = _noted(read_judgements(table.rows, _COLUMNS), problems)
    for of_query in judgements.values():
        for judgement in of_query.values():
            if not judgement.grade.is_integer() or abs(judgement.grade) > _MAX_GRADE:
                shown = f"{judgement.grade:g}"
                problems.add(f"score {shown!r}", judgement.place, "a whole number of 32 bits")
            if judgement.grade < 0:
                problems.remarks.add(judgement.place, "a grade below 0, which is not relevant")
            if judgement.again:
                same = "otherwise, and the last judgement counts" if judgement.differs else "alike"
                problems.remarks.add(judgement.place, f"a pair is judged again, {same}")
    return judgements


def _noted(rows: Generator[BadRow, None, Judgements], problems: Problems) -> Judgements:
    """Note what is yielded, and give what is returned."""
    while True:
        try:
            bad = next(rows)
        except StopIteration as stop:
            found: Judgements = stop.value
            return found
        problems.add(bad.problem, bad.place)


def _check_ids(
    judgements: Judgements, documents: _Texts, queries: _Texts, where: str, problems: Problems
) -> None:
    """Refuse judgements of another corpus or of other queries: every score would be 0."""
    if not judgements:
        problems.add("the file is empty", where, "judgements")
        return
    known = [of_query for query, of_query in judgements.items() if query in queries]
    if not known:
        query = next(iter(judgements))
        problems.add(
            f"no judged query is known, such as {query!r}", where, "ids of the file of queries"
        )
    elif not any(document in documents for of_query in known for document in of_query):
        document = next(iter(known[0]))
        problems.add(
            f"no judged document is known, such as {document!r}", where, "ids of the corpus"
        )
    elif not any(one.grade > 0 for of_query in known for one in of_query.values()):
        problems.add(
            "no query has a relevant document", where, "a score above 0 for at least one query"
        )


def _remark_on(
    documents: _Texts,
    judgements: Judgements,
    kept: dict[str, dict[str, int]],
    problems: Problems,
) -> None:
    remarks = problems.remarks
    for text, where in documents.values():
        if not text:
            remarks.add(where, "a document is empty, and is ranked like any other")
    for query, of_query in judgements.items():
        place = next(iter(of_query.values())).place
        if query not in kept:
            remarks.add(place, f"query {query!r} is judged and not there, so it is left out")
            continue
        if not any(kept[query].values()):
            remarks.add(place, f"query {query!r} has no relevant document, so it scores 0")
        for document, judgement in of_query.items():
            if document not in documents:
                remarks.add(
                    judgement.place,
                    f"document {document!r} is judged and not there, so a relevant one is missed",
                )
