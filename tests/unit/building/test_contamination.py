"""Contamination: evaluation texts in training records."""

from __future__ import annotations

from nvembed.building.contamination import Contamination, EvaluationText
from nvembed.data.records import LabelRecord, PairRecord, StsRecord

ITEMS = [
    EvaluationText(("What is my  Balance?",), "banking", "text"),
    EvaluationText(("A man sleeps.", "A woman runs."), "sts", "pair"),
]


def test_records_are_compared_by_what_they_bring() -> None:
    check = Contamination(ITEMS).check_record
    match = check(LabelRecord("what is my balance?", "balance"))
    assert match is not None
    assert (match.rule, match.score, match.found) == ("exact", 1.0, ITEMS[0])
    assert match.texts == ("what is my balance?",)
    assert check(LabelRecord("what is my name?", "balance")) is None
    # Documents alone are shared by design, a query is not.
    assert check(PairRecord("q", ("What is my balance?",))) is None
    assert check(PairRecord("what is MY balance?", ("d",))) is not None
    # Pairs match in either order, and only as pairs.
    assert check(StsRecord("a woman runs.", "a man sleeps.", 0.0)) is not None
    assert check(StsRecord("a woman runs.", "a man walks.", 0.0)) is None
    assert check(PairRecord("a man sleeps.", ("no", "a woman runs."))) is not None
