"""Reads a retrieval task: a folder in BEIR's layout, through ``data/sources/beir.py``.

What published sets get wrong (judgements of what is not there, documents without a text, pairs
judged twice) is read as mteb and trec_eval read it, and counted in ``Problems.remarks``.
"""

from __future__ import annotations

from itertools import chain

from nvembed.core.errors import DataError
from nvembed.data.records import RowError
from nvembed.data.sources import beir
from nvembed.data.sources.beir import Judgements
from nvembed.data.sources.rows import Columns, Keyed, read_id
from nvembed.evaluation.task_files import Problems, RetrievalData

_COLUMNS = Columns({})
_MAX_GRADE = 2**31 - 1
_Texts = dict[str, tuple[str, str]]  # text and place by id


def read_retrieval(problems: Problems, split: str | None = None) -> RetrievalData:
    """Read ``corpus``, ``queries`` and ``qrels/<split>``; ``None`` is ``first_split``."""
    documents, queries = _read_texts("corpus", problems), _read_texts("queries", problems)
    judgements, where = _read_judgements(problems, split)
    if not problems:
        _check_ids(judgements, documents, queries, where, problems)
    kept = {query: judgements[query] for query in queries if query in judgements}
    for query in judgements:
        if query in kept and not queries[query][0].strip():
            problems.add("a judged query is empty", queries[query][1], "a text")
    if not problems:
        _remark_on(documents, judgements, kept, problems)
    return RetrievalData(
        document_ids=tuple(documents),
        documents=tuple(text for text, _ in documents.values()),
        query_ids=tuple(kept),
        queries=tuple(queries[query][0] for query in kept),
        judgements={
            query: {document: max(int(one.grade), 0) for document, one in of_query.items()}
            for query, of_query in judgements.items()
            if query in kept
        },
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
    for where, row in problems.rows(table):
        key, text = None, ""  # an id whose text is bad is known: judgements are not blamed too
        try:
            key = keyed.id_of(row)
            text = keyed.text_of(row) if name == "corpus" else _query_text(row)
        except RowError as bad:
            problems.add(str(bad), where)
        if key is None:
            continue
        first_text, first_where = found.setdefault(key, (text, where))
        if first_where != where and first_text == text:
            problems.remarks.add(where, f"{name}: an id is given again with the same text")
        elif first_where != where:
            problems.add(f"id {key!r} is given twice, first at {first_where}", where)
    return found


def _query_text(row: dict[str, object]) -> str:
    text = _COLUMNS.need(row, "text")
    if text is not None and not isinstance(text, str):
        raise RowError('"text" is no text')
    return text or ""  # not stripped: mteb asks queries as they are


def _read_judgements(problems: Problems, split: str | None) -> tuple[Judgements, str]:
    """Read the judgements of a split, and say where they are from."""
    folder = problems.folder
    taken = split or beir.first_split(folder) or "test"
    path = beir.find_judgements(folder, taken)
    where = str(path or folder / "qrels" / f"{taken}.tsv")
    if path is None:
        there = ", ".join(beir.judged_splits(folder))
        expected = f"one of the splits there: {there}" if there else "judgements"
        problems.add("no such file", where, expected)
        return {}, where
    if split is None and taken != "test":
        problems.remarks.add(where, f"the split is {taken}, since there is no test")
    try:
        table = beir.open_judgements(path)
        _COLUMNS.check(table, ("query-id", "corpus-id"))
        rows = beir.read_judgements(table.rows, _COLUMNS)
        while True:
            bad = next(rows)
            problems.add(bad.problem, bad.place)
    except StopIteration as stop:
        judgements: Judgements = stop.value
    except DataError as error:
        problems.add_error(error)
        return {}, where
    for one in chain.from_iterable(of_query.values() for of_query in judgements.values()):
        if not one.grade.is_integer() or abs(one.grade) > _MAX_GRADE:
            problems.add(f"score {f'{one.grade:g}'!r}", one.place, "a whole number of 32 bits")
        if one.grade < 0:
            problems.remarks.add(one.place, "a grade below 0, which is not relevant")
        if one.again:
            same = "otherwise, and the last judgement counts" if one.differs else "alike"
            problems.remarks.add(one.place, f"a pair is judged again, {same}")
    return judgements, where


def _check_ids(
    judgements: Judgements, documents: _Texts, queries: _Texts, where: str, problems: Problems
) -> None:
    """Refuse judgements of another corpus or of other queries: every score would be 0."""
    known = [of_query for query, of_query in judgements.items() if query in queries]
    if not judgements:
        problems.add("the file is empty", where, "judgements")
    elif not known:
        message = f"no judged query is known, such as {next(iter(judgements))!r}"
        problems.add(message, where, "ids of the file of queries")
    elif not any(document in documents for of_query in known for document in of_query):
        message = f"no judged document is known, such as {next(iter(known[0]))!r}"
        problems.add(message, where, "ids of the corpus")
    elif not any(one.grade > 0 for of_query in known for one in of_query.values()):
        expected = "a score above 0 for at least one query"
        problems.add("no query has a relevant document", where, expected)


def _remark_on(
    documents: _Texts, judgements: Judgements, kept: Judgements, problems: Problems
) -> None:
    remark = problems.remarks.add
    for text, where in documents.values():
        if not text:
            remark(where, "a document is empty, and is ranked like any other")
    for query, of_query in judgements.items():
        place = next(iter(of_query.values())).place
        if query not in kept:
            remark(place, f"query {query!r} is judged and not there, so it is left out")
        elif not any(one.grade > 0 for one in of_query.values()):
            remark(place, f"query {query!r} has no relevant document, so it scores 0")
        for name in of_query if query in kept else ():
            if name not in documents:
                told = f"document {name!r} is judged and not there, so a relevant one is missed"
                remark(of_query[name].place, told)
