"""Tokenise: (prompt, text) to token ids and the place where pooling starts.

Tokens of the prompt take part in attention but are not pooled. Next file: ``model/packing.py``.

``nvembed``
    prompt + text is one string; a token is pooled when it holds a character of the text.
    Truncation cuts the text only: the prompt and the EOS always survive.
``official``
    the rules of NVIDIA's code: as many positions are left out as the prompt has pieces alone; the
    EOS is part of the text when it is truncated, so over-long texts lose it.

Texts beyond the limit can be cut into windows (a forward each), or read whole and pooled by chunks.
All texts are tokenised by a copy of the tokenizer whose state never changes, in any thread.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import tokenizers

from nvembed.core.errors import ConfigError, DataError, ModelError

TextStyle = Literal["nvembed", "official", "whole"]
Span = tuple[int, int]
"""First and last-plus-one character of a token or chunk in its text."""

# The tokenizer describes every token of a call (offsets, masks, strings) before it is cut: 20,000
# texts at once took 0.7 GB.
CHUNK_TEXTS = 512
# So many are tried first where a long text is cut; English has four or five.
CHARACTERS_PER_TOKEN = 8
# Some two million tokens, of which each takes about a hundred bytes while it is described.
BATCH_CHARACTERS = 8 * 2**20


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """Token ids of one text; positions from ``pool_start`` on are pooled."""

    ids: tuple[int, ...]
    pool_start: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class WholeText:
    """A text of any length, not cut."""

    head: tuple[int, ...]  # BOS and prompt
    body: tuple[int, ...]  # the tokens of the text
    tail: tuple[int, ...]  # EOS
    pool_start: int  # where pooling starts, counted from BOS
    spans: tuple[Span, ...]  # of each token of the body

    def part(self, start: int, end: int) -> TokenizedText:
        """Some tokens of the body as a text of their own, between head and tail."""
        return TokenizedText((*self.head, *self.body[start:end], *self.tail), self.pool_start)

    def room(self, max_tokens: int) -> int:
        """Tokens of the body that a sequence can have, at least one."""
        room = max_tokens - len(self.head) - len(self.tail)
        if room < 1:
            raise _no_room(len(self.head), max_tokens)
        return room


@dataclass(frozen=True, slots=True)
class Context:
    """A text, or as many chunks of it as the model can read at once."""

    text: TokenizedText
    # Lengths in tokens, in order; BOS and prompt belong to the first, EOS to the last.
    chunks: tuple[int, ...]
    spans: tuple[Span, ...]


class TextTokenizer:
    """Turns texts into ids and pool starts with a Hugging Face fast tokenizer.

    ``max_tokens`` counts BOS (or CLS), prompt and EOS (or SEP), which stand around a text where the
    tokenizer has them and they are wanted.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_tokens: int = 512,
        style: TextStyle = "nvembed",
        add_bos: bool = True,
        add_eos: bool = True,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{type(tokenizer).__name__} is a slow tokenizer",
                expected="a fast tokenizer (tokenizer.json), which knows character offsets",
                hint="Save the tokenizer of the model again with a current transformers",
            )
        self.tokenizer = tokenizer
        self.style: TextStyle = style
        ids = [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "cls", "eos", "sep")]
        bos, eos = (one if one is not None else other for one, other in (ids[:2], ids[2:]))
        if add_eos and eos is None:
            raise ModelError(
                "the tokenizer has no EOS token", hint="Set add_eos=false or give it an eos_token"
            )
        self._head = (bos,) if add_bos and bos is not None else ()
        self._tail = (eos,) if add_eos and eos is not None else ()
        self._backend = plain_backend(tokenizer)
        self.max_tokens = max_tokens

    @property
    def max_tokens(self) -> int:
        """Upper limit of a sequence, with BOS, prompt and EOS."""
        return self._max_tokens

    @max_tokens.setter
    def max_tokens(self, value: int) -> None:
        least = len(self._head) + len(self._tail) + 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(
                f"{value!r} given",
                where="max_tokens",
                expected=f"a number of at least {least}, which leaves room for a token of the text",
            )
        self._max_tokens = value

    def __call__(self, texts: Sequence[str], prompt: str = "") -> list[TokenizedText]:
        """Tokenise texts that share a prompt, which is "" for documents."""
        check_strings(texts)
        encode = self._official if self.style == "official" else self._own
        chunks = (texts[at : at + CHUNK_TEXTS] for at in range(0, len(texts), CHUNK_TEXTS))
        return [tokens for chunk in chunks for tokens in encode(chunk, prompt)]

    def _own(self, texts: Sequence[str], prompt: str) -> list[TokenizedText]:
        whole = [prompt + self._beginning(text) for text in texts]
        if not prompt:
            return [self._finish(ids, None) for ids in self._pieces(whole)]
        encoded = self._backend.encode_batch(whole, add_special_tokens=False)
        return [self._finish(e.ids, _text_start(e.offsets, len(prompt))) for e in encoded]

    def _finish(self, ids: Sequence[int], text_start: int | None) -> TokenizedText:
        """Add BOS and EOS, cut the text, and place the start of pooling (None: at 0)."""
        room = self.max_tokens - len(self._head) - len(self._tail)
        if len(ids) > room and (text_start or 0) >= room:
            raise _no_room(text_start or 0, self.max_tokens)
        pool_start = 0
        if text_start is not None and self.style != "whole":
            pool_start = text_start + len(self._head)
        return TokenizedText((*self._head, *ids[:room], *self._tail), pool_start)

    def _official(self, texts: Sequence[str], prompt: str) -> list[TokenizedText]:
        # As the released code: the EOS string is part of the text before truncation, BOS comes from
        # the tokenizer's own settings, and the masked length is counted on the prompt alone.
        masked = self._pieces_of(prompt)
        rows = self._pieces([prompt + text + self.tokenizer.eos_token for text in texts])
        return [self._official_text(ids, masked) for ids in rows]

    def _official_text(self, ids: Sequence[int], masked: int) -> TokenizedText:
        return TokenizedText((*self._official_head, *ids)[: self.max_tokens], masked)

    def _pieces(self, texts: list[str]) -> list[list[int]]:
        """Ids alone, without special tokens; places in the text are not worked out."""
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [one.ids for one in encoded]

    def _pieces_of(self, prompt: str) -> int:
        return len(self._pieces([prompt])[0]) if prompt else 0

    @cached_property
    def _official_head(self) -> tuple[int, ...]:
        """What the tokenizer's own template puts in front of a text: the BOS of Mistral."""
        encoded = self._backend.encode("x")
        return tuple(encoded.ids[: encoded.special_tokens_mask.index(0)])

    def whole(self, texts: Sequence[str], prompt: str = "") -> list[WholeText]:
        """Tokenise texts that share a prompt, cutting none."""
        check_strings(texts)
        # One by one: of long texts a few fill the memory with what describes their tokens.
        return [self._whole(text, prompt) for text in texts]

    def _whole(self, text: str, prompt: str) -> WholeText:
        official = self.style == "official"
        encoded = self._backend.encode(
            prompt + text + (self.tokenizer.eos_token if official else ""), add_special_tokens=False
        )
        ids, offsets = tuple(encoded.ids), encoded.offsets
        if official:
            pool_start, front = self._pieces_of(prompt), self._official_head
            end = len(ids) - 1
            start = min(max(pool_start - len(front), 0), end)
            head, tail = (*front, *ids[:start]), ids[end:]
        else:
            start, end = _text_start(offsets, len(prompt)) if prompt else 0, len(ids)
            head, tail = (*self._head, *ids[:start]), self._tail
            pool_start = len(head) if prompt and self.style != "whole" else 0
        spans = ((max(a - len(prompt), 0), b - len(prompt)) for a, b in offsets[start:end])
        return WholeText(head, ids[start:end], tail, pool_start, tuple(spans))

    def from_ids(self, rows: Sequence[Sequence[int]], vocabulary_size: int) -> list[TokenizedText]:
        """Make of the ids of bare texts, without special tokens, what the texts would give."""
        for number, ids in enumerate(rows):
            if not ids:
                raise DataError("no token ids", where=f"text {number}", expected="at least one")
            bad = next((value for value in ids if not 0 <= value < vocabulary_size), None)
            if bad is not None:
                raise DataError(
                    f"token id {bad} is not in the vocabulary",
                    where=f"text {number}",
                    expected=f"0 to {vocabulary_size - 1}",
                    hint="Send the ids of the model's own tokenizer, or the text",
                )
        if self.style == "official":
            return [self._official_text((*ids, self.tokenizer.eos_token_id), 0) for ids in rows]
        return [self._finish(ids, None) for ids in rows]

    def _beginning(self, text: str) -> str:
        """Cut a text of many more characters than tokens are wanted of it.

        The beginning must give more tokens than are kept, or the whole text is tokenised.
        """
        characters = CHARACTERS_PER_TOKEN * self.max_tokens
        while len(text) > 2 * characters:
            end = max(text.rfind(blank, 0, characters) for blank in " \n\t")
            if end > 0 and len(self._pieces([text[:end]])[0]) > self.max_tokens + 8:
                return text[:end]
            characters *= 8
        return text

    @property
    def fingerprint(self) -> str:
        """32 hex digits of all that decides the ids: vocabulary, rules, special tokens, limits."""
        return _digest([self._backend_digest, self.style, self.max_tokens, self._head, self._tail])

    @cached_property
    def _backend_digest(self) -> str:
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # What the last call happened to set; every call of ours sets its own.
        backend.pop("truncation", None)
        backend.pop("padding", None)
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        split = bool(getattr(self.tokenizer, "split_special_tokens", False))
        return _digest([backend, special, split, tokenizers.__version__])


def text_ends(
    tokenizer: TextTokenizer, texts: Sequence[str], prompt: str, *, cut: bool
) -> list[TokenizedText]:
    """Keep the end of texts that are too long, with BOS, prompt and EOS; all without ``cut``."""
    ends = []
    for whole in tokenizer.whole(texts, prompt):
        room = whole.room(tokenizer.max_tokens)
        start = max(len(whole.body) - room, 0) if cut else 0
        ends.append(whole.part(start, len(whole.body)))
    return ends


def text_windows(
    tokenizer: TextTokenizer, texts: Sequence[str], prompt: str, overlap: int
) -> list[list[TokenizedText]]:
    """Cut texts into windows of at most ``max_tokens`` that share ``overlap`` tokens."""
    found = []
    for whole in tokenizer.whole(texts, prompt):
        room = whole.room(tokenizer.max_tokens)
        if not 0 <= overlap < room:
            raise ConfigError(
                f"windows that share {overlap} tokens",
                expected=f"0 to {room - 1}: a window has room for {room} tokens of text",
            )
        starts = range(0, max(len(whole.body) - overlap, 1), room - overlap)
        found.append([whole.part(start, start + room) for start in starts])
    return found


def text_contexts(
    tokenizer: TextTokenizer,
    texts: Sequence[str],
    prompt: str,
    *,
    chunk_tokens: int,
    max_tokens: int,
    cuts: Sequence[Sequence[int]] | None = None,
) -> list[list[Context]]:
    """Cut texts into chunks of about equal length, and gather these into contexts.

    A chunk has at most ``chunk_tokens`` without BOS, prompt and EOS, a context ``max_tokens`` with
    them. Contexts do not see each other. ``cuts`` are the characters, of each text, at which chunks
    begin, whatever their length; the first begins with the text.
    """
    if chunk_tokens < 1:
        raise ConfigError(f"{chunk_tokens} tokens in a chunk", expected="at least 1")
    found = []
    for row, whole in enumerate(tokenizer.whole(texts, prompt)):
        room = whole.room(max_tokens)
        if cuts is None:
            count = max(-(-len(whole.body) // min(chunk_tokens, room)), 1)
            bounds = _evenly(len(whole.body), count)
            longest = max(end - start for start, end in bounds)
            groups = _evenly(count, -(-count // (room // max(longest, 1))))
        else:
            bounds = _given_chunks(whole, cuts[row], room)
            groups = _gathered(bounds, room)
        found.append(_contexts(whole, bounds, groups))
    return found


def _given_chunks(whole: WholeText, starts: Sequence[int], room: int) -> list[Span]:
    ends = [end for _, end in whole.spans]
    firsts = [0, *(bisect_right(ends, start) for start in starts[1:]), len(ends)]
    return [(first, min(last, first + room)) for first, last in pairwise(firsts)]


def _gathered(bounds: Sequence[Span], room: int) -> list[Span]:
    """Runs of chunks that have room together."""
    firsts = [0]
    for number, (_, end) in enumerate(bounds):
        if end - bounds[firsts[-1]][0] > room:
            firsts.append(number)
    return list(pairwise([*firsts, len(bounds)]))


def _contexts(whole: WholeText, bounds: Sequence[Span], groups: Iterable[Span]) -> list[Context]:
    found = []
    for first, last in groups:
        mine = bounds[first:last]
        chunks = [end - start for start, end in mine]
        chunks[0] += len(whole.head)
        chunks[-1] += len(whole.tail)
        spans = tuple(
            (whole.spans[start][0], whole.spans[end - 1][1]) if end > start else (0, 0)
            for start, end in mine
        )
        found.append(Context(whole.part(mine[0][0], mine[-1][1]), tuple(chunks), spans))
    return found


def _evenly(total: int, count: int) -> list[tuple[int, int]]:
    """Cut ``range(total)`` into runs whose lengths differ by one at most."""
    return [(total * n // count, total * (n + 1) // count) for n in range(count)]


def plain_backend(tokenizer: Any) -> tokenizers.Tokenizer:
    """Copy what tokenises, without truncation and padding."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    return backend


def batches(texts: Iterable[str], count: int) -> Iterator[list[str]]:
    """Cut texts into runs of at most ``count``, and of at most eight million characters."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        if batch and (len(batch) == count or characters + len(text) > BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    if batch:
        yield batch


def check_strings(texts: Sequence[object]) -> None:
    """Refuse what is no text; a DataError names the first such row."""
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"got {type(text).__name__}", where=f"text {row}", expected="a string")


def _no_room(head_tokens: int, max_tokens: int) -> DataError:
    return DataError(
        f"the instruction takes {head_tokens} tokens and leaves no room for the text",
        where=f"max_tokens={max_tokens}",
        hint="Shorten the instruction or raise max_tokens",
    )


def _digest(values: object) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()


def _text_start(offsets: Sequence[Span], prompt_length: int) -> int:
    """First token that holds a character of the text; the number of tokens when none does."""
    for position, (_, end) in enumerate(offsets):
        if end > prompt_length:
            return position
    return len(offsets)
