"""Docstrings to plain text: one summary sentence and the rest.

Enters: a docstring in any of the usual styles (numpydoc, Google, Sphinx). Leaves: the summary and
the remaining description without markup, doctests, references and layout, ready to be embedded.
`harvest.py` calls this for every definition it finds.
"""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple

MAX_SUMMARY_CHARS = 300

_DROPPED_SECTIONS = {"example", "examples", "references", "reference", "see also"}
_CALL_LINE = re.compile(r"^[\w.]+\s*\(.*\)(\s*->.*)?$", re.DOTALL)
_UNDERLINE = re.compile(r"^\s*([=\-~^*+#\"'])\1{2,}\s*$")
_GOOGLE_HEADING = re.compile(r"^\s*([A-Za-z]+|See [Aa]lso)::?\s*$")
_VERSION_NOTE = re.compile(r"^\s*\.\. (version\w+|deprecated)::")
_CODE_BLOCK = re.compile(r"^\s*\.\. (code|sourcecode|testcode|testoutput|plot|ipython|doctest)\b")
_LITERAL_BLOCK = re.compile(r"^(?!\s*\.\. ).*\w\s*::\s*$")
_DIRECTIVE = re.compile(r"^\s*\.\. [\w:-]+::\s*")
_FOOTNOTE = re.compile(r"^\s*\.\. (\[|_)")
_FENCE = re.compile(r"^\s*(```|~~~)")
_TEMPLATE_LINE = re.compile(r"^\s*[%{][({]?\w+[)}]?[s}]\s*$")
_ADDRESS = re.compile(r"<?\bhttps?://\S+")
# ``name (type): ...``, ``name: ...``, ``:param ...``: documentation of an argument, no summary.
_ARGUMENT = re.compile(
    r"^(:\w+|[*\w.]+\s*(\([^)]*\)+)?\s*:\s|[*\w]+\s+\(.*(Tensor|optional|\bof\b|\bint\b|\bstr\b))"
)
# Openings of first paragraphs that describe nothing by themselves.
_NO_SUMMARY = re.compile(
    r"^([^A-Za-z]|(warning|note|deprecated|alias|see|same as|like|overrides?|parameters|args"
    r"|inherited|experimental|internal|see also|todo)\b)",
    re.IGNORECASE,
)
_LINK = re.compile(r"(?<!\w)!?\[([A-Za-z][^\]\[]{2,}?)\](\([^()]*\))?")
_ROLE = re.compile(r":[a-z][a-z:+-]*:`([^`]*)`")
_CODE = re.compile(r"`{1,2}([^`]+)`{1,2}_{0,2}")
_REFERENCE_MARK = re.compile(r"\s*\[\w+\]_")
_BOLD = re.compile(r"\*\*(\w[^*]*)\*\*")
# A full stop after one of these does not end a sentence.
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|cf|vs|resp|approx|fig|eq|no|al)|\b[A-Z])\.$", re.I
)
_SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z`\"'(]|\s*$)")


class Description(NamedTuple):
    """A docstring taken apart: its first sentence and everything else, both as plain text."""

    summary: str
    rest: str


def describe(docstring: str) -> Description | None:
    """Split a docstring into its summary sentence and the rest, both without markup.

    The summary is the first sentence of the first paragraph. A leading call line, as compiled
    functions carry (``dot(a, b, out=None)``), is skipped. Places of the rest that repeat the
    summary are removed, so that a search for the summary cannot be answered by copying.

    Returns:
        None when the docstring does not start with a sentence that could be a summary.
    """
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring).strip())
    if paragraphs and _CALL_LINE.match(paragraphs[0].strip()):
        paragraphs = paragraphs[1:]
    if not paragraphs or not paragraphs[0].strip():
        return None
    lines = paragraphs[0].split("\n")
    if len(lines) > 1 and _UNDERLINE.match(lines[1]):  # a title in place of a summary
        lines = [lines[0] + ".", *lines[2:]]
    first, remainder = split_first_sentence(" ".join(" ".join(lines).split()))
    summary = plain_inline(first)
    if not summary or len(summary) > MAX_SUMMARY_CHARS:
        return None
    if _NO_SUMMARY.match(summary) or _ARGUMENT.match(summary):
        return None
    rest = plain_text("\n\n".join([remainder, *paragraphs[1:]]))
    return Description(summary, without_sentence(rest, summary))


def split_first_sentence(text: str) -> tuple[str, str]:
    """Return the first sentence of one-line `text` and what follows it."""
    for end in _SENTENCE_END.finditer(text):
        if not _ABBREVIATION.search(text[: end.end()]):
            return text[: end.end()].strip(), text[end.end() :].strip()
    return text.strip(), ""


def plain_inline(text: str) -> str:
    """Return `text` without roles, code quotes, bold, links, footnote marks and web addresses."""
    text = _ROLE.sub(lambda role: _role_target(role.group(1)), text)
    text = _CODE.sub(lambda code: code.group(1).lstrip("~"), text)
    text = _ADDRESS.sub("", _LINK.sub(r"\1", _REFERENCE_MARK.sub("", text)))
    return _BOLD.sub(r"\1", text).strip()


def plain_text(text: str) -> str:
    """Return the body of a docstring as plain paragraphs, one a line.

    Doctests, code blocks, references, example sections, version notes, heading rules and
    directive markers go; wrapped lines are joined. The text of notes and warnings stays.
    """
    paragraphs: list[list[str]] = [[]]
    for line in _kept_lines(text.split("\n")):
        if line.strip():
            paragraphs[-1].append(line.strip())
        else:
            paragraphs.append([])
    joined = (plain_inline(" ".join(" ".join(lines).split())) for lines in paragraphs if lines)
    return "\n".join(paragraph for paragraph in joined if paragraph)


def without_sentence(text: str, sentence: str) -> str:
    """Return `text` without the places where the words of `sentence` occur in a row.

    Case, white space and punctuation between the words do not matter; a full stop that ended the
    sentence goes too.
    """
    words = re.findall(r"\w+", sentence)
    # Most texts do not repeat it, and compiling a pattern for each costs more than this look.
    if not words or " ".join(words).lower() not in " ".join(re.findall(r"\w+", text)).lower():
        return text
    pattern = r"\b" + r"\W+".join(map(re.escape, words)) + r"\b[.:!]?[ ]*"
    return re.sub(pattern, "", text, flags=re.IGNORECASE).strip()


def truncate(text: str, max_chars: int) -> str:
    """Return at most `max_chars` characters of `text`, cut at a paragraph, sentence or word end.

    A paragraph or sentence end is preferred where it keeps at least two thirds of the room.
    """
    if len(text) <= max_chars:
        return text
    head = text[:max_chars]
    for mark in ("\n", ". "):
        cut = head.rfind(mark)
        if cut >= max_chars * 2 // 3:
            return head[: cut + 1].strip()
    return head.rsplit(None, 1)[0]


def _role_target(content: str) -> str:
    """``~torch.Tensor`` → Tensor; ``title <target>`` → title."""
    title = content.split("<")[0].strip() if content.endswith(">") else content
    return title.rsplit(".", 1)[-1] if title.startswith("~") else title


def _kept_lines(lines: list[str]) -> list[str]:
    """Drop the lines that hold no prose; a blank line stands where a block ended."""
    kept: list[str] = []
    dropped_indent: int | None = None  # inside a dropped block that is indented deeper than this
    in_dropped_section = in_doctest = in_fence = False
    for number, line in enumerate(lines):
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if _FENCE.match(line):
            in_fence = not in_fence
            continue
        indent = len(line) - len(line.lstrip())
        if line.strip() and _UNDERLINE.match(following):
            in_dropped_section = line.strip().lower() in _DROPPED_SECTIONS
            dropped_indent = None
            kept += [] if in_dropped_section else ["", line]
            continue
        if in_fence or in_dropped_section or _UNDERLINE.match(line):
            continue
        if dropped_indent is not None and (not line.strip() or indent > dropped_indent):
            continue
        if dropped_indent is not None:
            kept.append("")
        dropped_indent = None
        heading = _GOOGLE_HEADING.match(line)
        if _CODE_BLOCK.match(line) or (
            heading and heading.group(1).strip().lower() in _DROPPED_SECTIONS
        ):
            dropped_indent = indent
            continue
        if _LITERAL_BLOCK.match(line) and not heading:
            dropped_indent = indent
        in_doctest = bool(line.strip()) and (in_doctest or line.lstrip().startswith(">>>"))
        if (
            in_doctest
            or _TEMPLATE_LINE.match(line)
            or _VERSION_NOTE.match(line)
            or _FOOTNOTE.match(line)
        ):
            continue
        kept.append(_DIRECTIVE.sub("", line))
    return kept
