from __future__ import annotations

from nvembed.core.reporting import ProblemCounts


def test_a_kind_is_told_once_with_its_lines() -> None:
    found = ProblemCounts()
    for line in (3, 4, 5, 9, 11, 12):
        found.add(f"a.jsonl:{line}", f'"positive[{line}]" is an object')
    found.add("a.jsonl:7", "'x' is no number")
    found.add("b.jsonl:8", "'it\\'s' is no number")
    assert found.count == 8
    assert [str(kind) for kind in found.kinds] == [
        'a.jsonl:3: "positive[3]" is an object (5 more like it: lines 4-5, 9, 11-12)',
        "a.jsonl:7: 'x' is no number (1 more like it)",
    ]
    assert found.summary(5) == (
        '"positive[3]" is an object (5 more like it: lines 4-5, 9, 11-12); '
        "line 7: 'x' is no number (1 more like it)"
    )
    assert found.summary(1).endswith("; and 2 more problems")


def test_one_other_line_is_no_plural() -> None:
    found = ProblemCounts([("a:1", "empty"), ("a:2", "empty")])
    assert found.kinds[0].message == "empty (1 more like it: line 2)"
    found.add("a:3", "empty")
    assert found.kinds[0].message == "empty (2 more like it: lines 2-3)"
    assert ProblemCounts([("a:1", "x"), ("a:2", "y")]).summary(1) == "x; and 1 more problem"


def test_places_of_another_form_are_counted() -> None:
    found = ProblemCounts([("org/set train row 1", "empty"), ("org/set train row 2", "empty")])
    assert found.summary(3) == "empty (1 more like it)"
    found.add("a.tsv:4", "full")
    assert found.summary(3) == "empty (1 more like it); a.tsv:4: full"


def test_values_tell_kinds_apart_where_they_should() -> None:
    problems = [("a:1", "label '0' of 2 texts"), ("a:2", "label '1' of 3 texts")]
    assert len(ProblemCounts(problems).kinds) == 1
    exact = ProblemCounts(problems, by_value=True)
    exact.add("a:5", "label '0' of 9 texts")
    assert [kind.count for kind in exact.kinds] == [2, 1]
    mixed = ProblemCounts()
    for place, text in problems:
        mixed.add(place, text, by_value=True)
    assert len(mixed.kinds) == 2


def test_memory_does_not_grow_with_the_number_of_rows() -> None:
    found = ProblemCounts()
    for number in range(1, 10_000, 2):
        found.add(f"a:{number}", "empty")
        found.add(f"a:{number + 1}", f"kind {'x' * number} of its own")
    assert len(found.kinds) == 1001
    assert found.count == 10_000
    assert sum(kind.count for kind in found.kinds) == 10_000
    assert len(found.kinds[0].ranges) == 11
    assert found.kinds[0].message.endswith("lines 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, …)")
    assert found.kinds[-1].text == "other problems"
