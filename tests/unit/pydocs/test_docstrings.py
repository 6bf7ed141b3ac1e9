"""Docstrings: what becomes the summary, what stays, and what goes."""

from __future__ import annotations

import pytest

from pydocs.docstrings import describe, plain_inline, plain_text, truncate, without_sentence

NUMPYDOC = """
    Compute the mean along an axis. Returns the average of the elements,
    over the flattened array by default.

    Parameters
    ----------
    a : array_like
        Array containing numbers, see :func:`~numpy.asarray`.

        .. versionadded:: 1.7

    Returns
    -------
    m : ndarray
        A new array. Not ``None`` [1]_.

    See Also
    --------
    average : Weighted average

    Notes
    -----
    Compute the mean
    along an axis. The mean is the sum divided by the count.

    Examples
    --------
    >>> np.mean([1, 2])
    1.5

    References
    ----------
    .. [1] A book.
    """

GOOGLE = """Split a tensor into chunks.

    .. note::
        The last chunk may be smaller.

    Args:
        sections (int): how many.

    Example::

        >>> split(x, 2)
        (1, 2)

        more of the example

    Raises:
        ValueError: `sections` is not positive.
    """


def test_numpydoc() -> None:
    description = describe(NUMPYDOC)
    assert description is not None
    assert description.summary == "Compute the mean along an axis."
    assert description.rest.split("\n") == [
        "Returns the average of the elements, over the flattened array by default.",
        "Parameters a : array_like Array containing numbers, see asarray.",
        "Returns m : ndarray A new array. Not None.",
        "Notes The mean is the sum divided by the count.",
    ]


def test_google_sections_end_where_the_indent_does() -> None:
    description = describe(GOOGLE)
    assert description is not None
    assert description.summary == "Split a tensor into chunks."
    assert description.rest.split("\n") == [
        "The last chunk may be smaller.",
        "Args: sections (int): how many.",
        "Raises: ValueError: sections is not positive.",
    ]


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        (
            "dot(a, b, out=None)\n\nDot product of two arrays.\n\nMore.",
            "Dot product of two arrays.",
        ),
        ("Like e.g. a list. Not a set.\n\nMore.", None),  # "like" describes nothing by itself
        ("Sort by key, e.g. A name. Stable.\n\nMore.", "Sort by key, e.g. A name."),
        ("Summary over\ntwo lines\n\nMore.", "Summary over two lines"),
        ("Title\n=====\nText of it.\n\nMore.", "Title."),
        ("x (torch.Tensor of shape (2,)): the input.\n\nMore.", None),
        (":param x: the input\n\nMore.", None),
        ("...\n\nMore.", None),
        ("Deprecated: use other.\n\nMore.", None),
        ("word " * 100 + "\n\nMore.", None),
        ("", None),
    ],
)
def test_summary(docstring: str, summary: str | None) -> None:
    description = describe(docstring)
    assert (description.summary if description else None) == summary


def test_code_blocks_go_and_the_text_around_them_stays() -> None:
    parts = [
        "Before.",
        "```python\nx = 1\n```",
        "Use it so::\n\n    y = 2",
        "After.",
        ".. code-block:: c\n\n   z",
        "End.",
    ]
    kept = plain_text("\n\n".join(parts)).split("\n")
    assert kept == ["Before.", "Use it so::", "After.", "End."]


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        (":class:`~torch.nn.Module` and ``code``", "Module and code"),
        (":ref:`the guide <user_guide>`", "the guide"),
        (":math:`0 < x < 1`", "0 < x < 1"),
        ("see [PreTrainedModel.save](../main) now", "see PreTrainedModel.save now"),
        ("x[index] and [1, 2]", "x[index] and [1, 2]"),
        ("**bold** and **kwargs", "bold and **kwargs"),
        ("as in https://example.org/a?b=c here", "as in  here"),
    ],
)
def test_inline_markup(markup: str, plain: str) -> None:
    assert plain_inline(markup) == plain


def test_repeated_summary_is_found_across_case_breaks_and_punctuation() -> None:
    text = "First.\nreturn the\n (minimum) value. It is small. Return the minimum values."
    assert without_sentence(text, "Return the minimum value.") == (
        "First.\nIt is small. Return the minimum values."
    )
    assert without_sentence("nothing of it", "Return the minimum value.") == "nothing of it"


@pytest.mark.parametrize(
    ("max_chars", "expected"),
    [
        (100, "One two. Three four. Five six seven"),
        (28, "One two. Three four."),
        (34, "One two. Three four. Five six"),
        (10, "One two."),
        (5, "One"),
    ],
)
def test_truncate(max_chars: int, expected: str) -> None:
    assert truncate("One two. Three four. Five six seven", max_chars) == expected
