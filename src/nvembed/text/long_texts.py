"""Texts beyond the model's limit: cut into windows, or read whole and pooled chunk by chunk.

    windows     [BOS prompt | body 0…r | EOS] [BOS prompt | body r-o…2r-o | EOS] …   a forward each
    contexts    [BOS prompt | chunk 0 | chunk 1 | … | EOS]                           one forward

The text is tokenised once, whole; windows and chunks are slices of its tokens. A text that fits is
what ``text/tokens.py`` makes of it. Next file: ``model/encoding.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nvembed.core.errors import ConfigError, DataError
from nvembed.text.tokens import TextTokenizer, TokenizedText, WholeText


@dataclass(frozen=True, slots=True)
class Context:
    """A text, or as many chunks of it as the model can read at once."""

    text: TokenizedText
    # Lengths in tokens, in order; BOS and prompt belong to the first, EOS to the last.
    chunks: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]  # first and last-plus-one character of each in the text


def text_ends(
    tokenizer: TextTokenizer, texts: Sequence[str], prompt: str, *, cut: bool
) -> list[TokenizedText]:
    """Keep the end of texts that are too long, with BOS, prompt and EOS around it.

    Without ``cut`` all of a text is kept, also where it has more than ``tokenizer.max_tokens``.
    """
    ends = []
    for whole in tokenizer.whole(texts, prompt):
        room = _room(whole, tokenizer.max_tokens)
        start = max(len(whole.body) - room, 0) if cut else 0
        ends.append(whole.part(start, len(whole.body)))
    return ends


def text_windows(
    tokenizer: TextTokenizer, texts: Sequence[str], prompt: str, overlap: int
) -> list[list[TokenizedText]]:
    """Cut texts into windows of at most ``tokenizer.max_tokens``, each with BOS, prompt and EOS.

    A window shares ``overlap`` tokens with the one before.
    """
    limit = tokenizer.max_tokens
    return [_windows(whole, limit, overlap) for whole in tokenizer.whole(texts, prompt)]


def text_contexts(
    tokenizer: TextTokenizer,
    texts: Sequence[str],
    prompt: str,
    *,
    chunk_tokens: int,
    max_tokens: int,
) -> list[list[Context]]:
    """Cut texts into chunks of about equal length, and gather these into contexts.

    Args:
        tokenizer: of the model; its own limit does not count.
        texts: of any length.
        prompt: what stands in front of each context.
        chunk_tokens: limit of a chunk, without BOS, prompt and EOS.
        max_tokens: limit of a context; a longer text gets several, which do not see each other.
    """
    if chunk_tokens < 1:
        raise ConfigError(f"{chunk_tokens} tokens in a chunk", expected="at least 1")
    return [_contexts(whole, chunk_tokens, max_tokens) for whole in tokenizer.whole(texts, prompt)]


def _windows(whole: WholeText, max_tokens: int, overlap: int) -> list[TokenizedText]:
    room = _room(whole, max_tokens)
    if not 0 <= overlap < room:
        raise ConfigError(
            f"windows that share {overlap} tokens",
            expected=f"0 to {room - 1}: a window has room for {room} tokens of text",
        )
    starts = range(0, max(len(whole.body) - overlap, 1), room - overlap)
    return [whole.part(start, start + room) for start in starts]


def _contexts(whole: WholeText, chunk_tokens: int, max_tokens: int) -> list[Context]:
    room = _room(whole, max_tokens)
    count = max(-(-len(whole.body) // min(chunk_tokens, room)), 1)
    bounds = _evenly(len(whole.body), count)
    longest = max(end - start for start, end in bounds)
    found = []
    for first, last in _evenly(count, -(-count // (room // max(longest, 1)))):
        mine = bounds[first:last]
        chunks = [end - start for start, end in mine]
        chunks[0] += len(whole.head)
        chunks[-1] += len(whole.tail)
        spans = [
            (whole.spans[start][0], whole.spans[end - 1][1]) if end > start else (0, 0)
            for start, end in mine
        ]
        text = whole.part(mine[0][0], mine[-1][1])
        found.append(Context(text, tuple(chunks), tuple(spans)))
    return found


def _room(whole: WholeText, max_tokens: int) -> int:
    room = max_tokens - len(whole.head) - len(whole.tail)
    if room < 1:
        raise DataError(
            f"the instruction takes {len(whole.head)} tokens and leaves no room for the text",
            where=f"max_tokens={max_tokens}",
            hint="Shorten the instruction or raise max_tokens",
        )
    return room


def _evenly(total: int, count: int) -> list[tuple[int, int]]:
    """Cut ``range(total)`` into runs whose lengths differ by one at most."""
    return [(total * n // count, total * (n + 1) // count) for n in range(count)]
