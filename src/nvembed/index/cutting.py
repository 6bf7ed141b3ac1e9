"""Passages: a text cut by its own structure into parts of at most so many tokens.

Sections are what a kind of text has: headings of Markdown and reStructuredText, definitions of
Python. A section that is short enough with all below it is one passage; one that is too long is cut
at blank lines, else between items of lists, sentences, lines, words, in parts of about equal
length. Tokens are counted in one tokenisation of the whole text.
"""

from __future__ import annotations

import ast
import re
import warnings
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import tokenizers

from nvembed.model.tokens import Span

MARKDOWN = (".md", ".markdown")
UNDERLINED = (".rst", ".txt")  # headings are lines with a line of signs below them
PYTHON = (".py", ".pyi")
HEADINGS = " > "  # between the headings of a path

_BLOCKS = re.compile(r"\n(?:[ \t]*\n)+(?=\S)")  # blank lines, and no indentation after them
_PARAGRAPHS = re.compile(r"\n(?:[ \t]*\n)+")
_SENTENCES = re.compile(r"[.!?…][\"')\]»”’]*\s+|[。！？]\s*")
_ITEMS = re.compile(r"\n(?=[ \t]*(?:[-*+•]|\d+[.)])[ \t])")  # of lists
_PROSE = (_BLOCKS, _PARAGRAPHS, _ITEMS, _SENTENCES, re.compile("\n"), re.compile(r"\s+"))
_CODE = (_BLOCKS, _PARAGRAPHS, re.compile("\n"), re.compile(r"\s+"))
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---[ \t]*\n", re.DOTALL)
_UNDERLINE = re.compile(
    r"^(?P<over>(?P<sign>[!-/:-@\[-`{-~])(?P=sign){2,}[ \t]*\n)?(?P<title>[ ]?\S.*)\n"
    r"(?P<under>(?P<line>[!-/:-@\[-`{-~])(?P=line){2,})[ \t]*$",
    re.MULTILINE,
)
_WORDS = re.compile(r"\w{1,6}|[^\w\s]")
_TOKENISED = 2**20  # characters at once: every token is described by some hundred bytes


class Section(NamedTuple):
    """Where a section begins; it ends where the next one does."""

    start: int  # its first character, of the heading
    level: int  # 1 is the outermost
    path: tuple[str, ...]  # headings, from the outermost to its own
    body: int  # first character after the heading


class Passage(NamedTuple):
    """A part of a text: ``text[start:end]``."""

    start: int
    end: int
    path: tuple[str, ...]  # headings above it
    body: int  # where its text begins behind those of its headings that it begins with


def token_ends(tokenizer: tokenizers.Tokenizer | None, text: str) -> Sequence[int]:
    """Where each token of a text ends, in characters, rising.

    Without a tokenizer a token is up to six letters or one other sign.
    """
    if tokenizer is None:
        return [found.end() for found in _WORDS.finditer(text)]
    ends, start = array("q"), 0
    while start < len(text):
        end = start + _TOKENISED
        end = len(text) if end >= len(text) else text.rfind("\n", start, end) + 1 or end
        encoded = tokenizer.encode(text[start:end], add_special_tokens=False)
        ends.extend(start + last for _, last in encoded.offsets)
        start = end
    return ends


def cut_passages(
    text: str, ending: str, ends: Sequence[int], room: Callable[[tuple[str, ...]], int]
) -> list[Passage]:
    """Cut a text into passages, in order; they hold all of it but blanks between them.

    Args:
        text: the text, whose lines end with ``\\n``.
        ending: the ending of its file, which says the structure: ``.md``, ``.rst``, ``.txt``,
            ``.py``; any other has none and is code, "" is prose.
        ends: where its tokens end, see ``token_ends``.
        room: tokens of a passage under these headings, at least 1.
    """
    sections = [Section(0, 0, (), 0), *_outline(text, ending)]
    bounds = [*(section.start for section in sections[1:]), len(text)]
    breaks = _PROSE if ending in (*MARKDOWN, *UNDERLINED, "") else _CODE
    found: list[Passage] = []
    at, start = 0, 0
    while at < len(sections):
        section, own_end = sections[at], bounds[at]
        after = next(
            (n for n in range(at + 1, len(sections)) if sections[n].level <= section.level),
            len(sections),
        )
        # A heading alone goes with what comes after it.
        alone = at + 1 < len(sections) and not text[section.body : own_end].strip()
        one_below = all(s.level > sections[at + 1].level for s in sections[at + 2 : after])
        fits = _count(ends, start, bounds[after - 1]) <= room(section.path)
        if alone and (one_below or not fits):
            at += 1
            continue
        if fits:
            spans = [(start, bounds[after - 1])]
            at = after
        else:
            spans = _pieces(text, (start, own_end), breaks, ends, room(section.path))
            at += 1
        found += [
            Passage(start, end, section.path, min(max(start, section.body), end))
            for start, end in _trimmed(text, spans)
        ]
        start = spans[-1][1]
    return found


def _count(ends: Sequence[int], start: int, end: int) -> int:
    return bisect_right(ends, end) - bisect_right(ends, start)


def _pieces(
    text: str, span: Span, breaks: Sequence[re.Pattern[str]], ends: Sequence[int], limit: int
) -> list[Span]:
    """Cut a span into parts of at most ``limit`` tokens, at the first kind of break it has."""
    start, end = span
    total = _count(ends, start, end)
    if total <= limit:
        return [span]
    if not breaks:
        first = bisect_right(ends, start)
        cuts = sorted({ends[at - 1] for at in range(first + limit, first + total, limit)})
        return _between(start, cuts, end)
    cuts = [at for one in breaks[0].finditer(text, start, end) if start < (at := one.end()) < end]
    parts = [
        part
        for between in _between(start, cuts, end)
        for part in _pieces(text, between, breaks[1:], ends, limit)
    ]
    aim = total / -(-total // limit)
    joined: list[Span] = []
    filled = limit  # tokens of the last one
    for part in parts:
        tokens = _count(ends, *part)
        if filled < aim and filled + tokens <= limit:
            joined[-1] = (joined[-1][0], part[1])
            filled += tokens
        else:
            joined.append(part)
            filled = tokens
    return joined


def _between(start: int, cuts: Iterable[int], end: int) -> list[Span]:
    bounds = [start, *cuts, end]
    return list(pairwise(bounds))


def _trimmed(text: str, spans: Iterable[Span]) -> Iterator[Span]:
    """Take blank lines off both sides; without a letter or digit nothing is left."""
    for start, end in spans:
        part = text[start:end]
        if any(map(str.isalnum, part)):
            first = start + len(part) - len(part.lstrip())
            line = text.rfind("\n", 0, first) + 1
            yield line if line >= start else first, start + len(part.rstrip())


# --- Structure ------------------------------------------------------------------------------------


def _outline(text: str, ending: str) -> list[Section]:
    if ending in MARKDOWN:
        return _under_headings(_markdown(text))
    if ending in UNDERLINED:
        return _under_headings(_underlined(text))
    if ending in PYTHON:
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
                tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return []
        return list(_definitions(tree.body, _line_starts(text), 1, ()))
    return []


def _under_headings(headings: Iterable[tuple[int, int, int, str]]) -> list[Section]:
    """Sections of (start, body, level, title)."""
    above: list[tuple[int, str]] = []
    found = []
    for start, body, level, title in headings:
        above = [one for one in above if one[0] < level] + [(level, title)]
        found.append(Section(start, level, tuple(title for _, title in above), body))
    return found


def _markdown(text: str) -> Iterator[tuple[int, int, int, str]]:
    from markdown_it import MarkdownIt

    if matter := _FRONT_MATTER.match(text):
        text = re.sub(r"[^\n]", " ", matter[0]) + text[matter.end() :]
    starts = _line_starts(text)
    tokens = MarkdownIt("commonmark").parse(text)
    for token, inner in pairwise(tokens):
        if token.type == "heading_open" and token.level == 0 and token.map:
            title = "".join(part.content for part in inner.children or ())
            yield starts[token.map[0]], starts[token.map[1]], int(token.tag[1]), title


def _underlined(text: str) -> Iterator[tuple[int, int, int, str]]:
    """As docutils: a style of lines gets its level where it comes up first."""
    styles: list[tuple[str, bool]] = []
    for found in _UNDERLINE.finditer(text):
        title, style = found["title"].strip(), (found["line"], bool(found["over"]))
        if len(found["under"]) < len(title) or not any(map(str.isalnum, title)):
            continue
        if style not in styles:
            styles.append(style)
        yield found.start(), min(found.end() + 1, len(text)), styles.index(style) + 1, title


def _definitions(
    body: Sequence[ast.stmt], starts: Sequence[int], level: int, path: tuple[str, ...]
) -> Iterator[Section]:
    """Functions and classes with the comments above them, and what stands between them."""
    before: ast.stmt | None = None
    defined = False
    for node in body:
        start = _first_line(node) - 1 if before is None else (before.end_lineno or before.lineno)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own = (*path, node.name)
            first = max(_first_line(node.body[0]) - 1, node.lineno - 1)
            yield Section(starts[start], level, own, starts[first])
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node.body, starts, level + 1, own)
            defined = True
        elif defined:
            yield Section(starts[start], level, path, starts[start])
            defined = False
        before = node


def _first_line(node: ast.stmt) -> int:
    decorators = getattr(node, "decorator_list", ())
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _line_starts(text: str) -> list[int]:
    """Where each line begins, and the end of the text."""
    return [0, *(found.end() for found in re.finditer("\n", text)), len(text)]
