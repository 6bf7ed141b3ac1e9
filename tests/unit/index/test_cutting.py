"""Passages against plain counting, plain scans of lines and what a cut must not lose."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.index import cutting as passages
from nvembed.index.cutting import cut_passages, token_ends
from nvembed.model.tokens import plain_backend


def cut(text: str, ending: str, limit: int = 20) -> list[tuple[str, str]]:
    """Headings and text of passages, tokens counted by words."""
    ends = token_ends(None, text)
    found = cut_passages(text, ending, ends, lambda path: limit)
    return [(" > ".join(p.path), text[p.start : p.end]) for p in found]


WORD = st.sampled_from(["a", "moon.", "is", "# x", "- item", "far", "é", "", "def f():", "```"])
LINES = st.lists(st.lists(WORD, max_size=9).map(" ".join), max_size=40).map("\n".join)


@settings(max_examples=60, deadline=None)
@given(
    text=LINES, ending=st.sampled_from([".md", ".rst", ".py", ".js", ""]), limit=st.integers(1, 30)
)
def test_nothing_is_lost_and_nothing_too_long(text: str, ending: str, limit: int) -> None:
    ends = token_ends(None, text)
    found = cut_passages(text, ending, ends, lambda path: limit)
    at = 0
    for start, end, *_ in found:
        assert at <= start < end
        assert not any(map(str.isalnum, text[at:start]))
        assert sum(start < place <= end for place in ends) <= limit  # by plain counting
        assert text[start:end].rstrip() == text[start:end]
        at = end
    assert not any(map(str.isalnum, text[at:]))


def test_a_short_text_is_one_passage_under_its_title() -> None:
    text = "# Title\n\n## One\n\nfirst\n\n## Two\n\nsecond\n"
    assert cut(text, ".md") == [("Title", text.strip())]
    assert cut("no heading\n\nat all", ".md") == [("", "no heading\n\nat all")]
    # The only section below stands for the one above it.
    assert cut("# A\n\n## B\n\ntext\n", ".md") == [("A > B", "# A\n\n## B\n\ntext")]
    assert cut("", ".md") == cut("\n \n", ".md") == cut("---\n***\n", ".md") == []


def test_headings_of_markdown() -> None:
    text = (
        "---\ntitle: matter\n---\nbefore the first heading of all\n\n"
        "# The *one* `code`\n\n## Only a heading\n\n### Deep [link](to)\n\n"
        + "deep words "
        * 8
        + "\n\n"
        "```sh\n# no heading\n```\n\nUnder\n-----\n\n" + "under words " * 8 + "\n\n"
        "> # quoted\n\n# Last\n\nend\n"
    )
    assert [(path, part.split("\n")[0]) for path, part in cut(text, ".md", 55)] == [
        ("", "---"),
        ("The one code > Only a heading > Deep link", "# The *one* `code`"),
        ("The one code > Under", "Under"),
        ("Last", "# Last"),
    ]
    assert "# no heading" in cut(text, ".md", 55)[1][1]


def test_paths_are_those_of_a_plain_stack() -> None:
    choose = random.Random(0)
    lines, expected, stack = [], [], {}
    for number in range(60):
        level = choose.randint(1, 4)
        stack = {n: t for n, t in stack.items() if n < level} | {level: f"t{number}"}
        lines += ["#" * level + f" t{number}", "", f"body{number} " * 15, ""]
        expected.append((" > ".join(stack[n] for n in sorted(stack)), f"body{number}"))
    found = cut("\n".join(lines), ".md", 36)
    assert [(path, part.split()[2]) for path, part in found] == expected


RST = """\
=====
Title
=====

intro words of some length that fill more than the limit of it all

Part
====

 indented *quote*

Sub
---

text of the sub that is long enough to be on its own here, surely

=====  =====
a      table
=====  =====

Other sub
---------

more text of the other sub that is long enough to be on its own

Next
====

end
"""


def test_headings_of_restructured_text() -> None:
    # A style of underlining has its level from where it comes up first.
    paths = [" > ".join(p.path) for p in passages._under_headings(passages._underlined(RST))]
    assert paths == [
        "Title",
        "Title > Part",
        "Title > Part > Sub",
        "Title > Part > Other sub",
        "Title > Next",
    ]
    found = cut(RST, ".rst", 28)
    assert list(dict.fromkeys(path for path, _ in found)) == paths
    assert found[0][1].startswith("=====\nTitle")
    assert found[3][1].startswith("=====  =====\na      table")


PYTHON = '''\
"""What it is."""
import os

CONSTANT = 1


# about f
@decorated
def f(x):
    return "\\d"


class A:
    @property
    def one(self):
        return sum(range(100)) + sum(range(200)) + sum(range(300))

    two = 2

    async def three(self):
        return sum(range(100)) + sum(range(200)) + sum(range(300))


class Small:
    x = 1
    def g(self): pass

after = 3
'''


def test_python_by_definitions() -> None:
    found = cut(PYTHON, ".py", 36)
    assert [(path, part.split("\n")[0]) for path, part in found] == [
        ("", '"""What it is."""'),
        ("f", "# about f"),
        ("A > one", "class A:"),
        ("A", "    two = 2"),
        ("A > three", "    async def three(self):"),
        ("Small", "class Small:"),
        ("", "after = 3"),
    ]
    assert found[4][1].endswith("sum(range(300))")
    broken = PYTHON + "def (:\n"
    assert {path for path, _ in cut(broken, ".py", 36)} == {""}
    assert "".join("".join(part.split()) for _, part in cut(broken, ".py", 36)) == "".join(
        broken.split()
    )


def test_breaks_from_the_strongest_to_the_weakest() -> None:
    four = "one two six ten"
    assert cut(f"{four}\n\n{four}\n\n{four}", "", 9) == [("", f"{four}\n\n{four}"), ("", four)]
    # Of about equal length, not full ones and a rest.
    assert [len(part.split()) for _, part in cut("\n\n".join(["a b"] * 6), "", 8)] == [6, 6]
    sentences = "It is so. Is it so? It\nis so! And so on"
    assert cut(sentences, "", 4) == [
        ("", "It is so."), ("", "Is it so?"), ("", "It\nis so!"), ("", "And so on"),
    ]  # fmt: skip
    assert cut("- a b c\n- d e f", "", 4) == [("", "- a b c"), ("", "- d e f")]
    # Code has no sentences.
    assert cut("x.y = 1. + z\nlong(name, b)", ".js", 9) == [
        ("", "x.y = 1. + z"), ("", "long(name, b)"),
    ]  # fmt: skip
    assert cut("abcdefghijklmnopqrstuvwxyz", "", 2) == [
        ("", "abcdefghijkl"), ("", "mnopqrstuvwx"), ("", "yz"),
    ]  # fmt: skip


def test_tokens_are_the_models_own(tiny_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = plain_backend(tiny_tokenizer)
    text = "what is very a text 🌙 that\nnobody has seen é " * 30
    whole = [end for _, end in backend.encode(text, add_special_tokens=False).offsets]
    assert list(token_ends(backend, text)) == whole
    monkeypatch.setattr(passages, "_TOKENISED", 200)
    blocks = token_ends(backend, text)
    assert blocks[-1] == len(text.rstrip()) or blocks[-1] == len(text)
    assert list(blocks) == sorted(blocks)
    for start, end, *_ in cut_passages(text, "", blocks, lambda path: 40):
        alone = backend.encode(text[start:end], add_special_tokens=False).ids
        assert 10 <= len(alone) <= 40  # here tokens are bytes and do not come apart
