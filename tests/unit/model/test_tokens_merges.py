"""The rules of tokens where the vocabulary has merges: a token may hold prompt and text at once."""

from __future__ import annotations

import random
from typing import Any

import pytest

from nvembed.core.errors import DataError
from nvembed.data.instructions import query_prompt
from nvembed.model import tokens as module
from nvembed.model.tokens import TextTokenizer, TokenizedText, WholeText

TOKENIZERS = ("byte_level_tokenizer", "metaspace_tokenizer")
PROMPT = query_prompt("find the words")
WORDS = ["the", "answer", "question", "zyx", "words", "in", "?", "and,"]
BLANKS = [" ", " ", "  ", "\n", " \n"]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def some_texts(count: int, seed: int = 0) -> list[str]:
    """With and without white space at both ends, the empty text among them."""
    rng = random.Random(seed)
    texts = [""]
    for _ in range(count - 1):
        parts = [
            x for _ in range(rng.randrange(1, 7)) for x in (*pick(rng, BLANKS), *pick(rng, WORDS))
        ]
        texts.append("".join(parts) + rng.choice(["", " ", "\n"]))
    return texts


def pick(rng: random.Random, choices: list[str]) -> list[str]:
    return [rng.choice(choices)] if rng.random() < 0.8 else []


def characters(tokenizer: Any, ids: tuple[int, ...], text: str) -> list[int]:
    """How many characters of an ASCII text each of its tokens holds."""
    counts = [len(piece) for piece in tokenizer.convert_ids_to_tokens(list(ids))]
    if sum(counts) > len(text):
        counts[0] -= 1  # the ``▁`` that is put in front
    assert sum(counts) == len(text)
    return counts


def first_of_text(counts: list[int], prompt_length: int) -> int:
    """By adding up: the first token that reaches beyond the prompt."""
    return next(
        (n for n in range(len(counts)) if sum(counts[: n + 1]) > prompt_length), len(counts)
    )


def plain_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("prompt", [PROMPT, "ask:", "the answer to the", " "])
def test_pooling_starts_at_the_first_token_that_holds_the_text(tokenizer: Any, prompt: str) -> None:
    texts = some_texts(60)
    shared = 0  # tokens that hold characters of both
    for text, found in zip(texts, TextTokenizer(tokenizer)(texts, prompt), strict=True):
        ids = plain_ids(tokenizer, prompt + text)
        counts = characters(tokenizer, ids, prompt + text)
        start = first_of_text(counts, len(prompt))
        assert found == TokenizedText((1, *ids, 2), 1 + start)
        shared += sum(counts[:start]) < len(prompt)
    assert shared >= 5 or not prompt.endswith(" ")


def test_without_a_prompt_everything_is_pooled(tokenizer: Any) -> None:
    texts = some_texts(20)
    for text, found in zip(texts, TextTokenizer(tokenizer)(texts), strict=True):
        assert found == TokenizedText((1, *plain_ids(tokenizer, text), 2), 0)


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (True, False)])
def test_the_text_is_cut_to_the_room_and_prompt_and_eos_stay(
    tokenizer: Any, bos: bool, eos: bool
) -> None:
    text = "the answer to the question is in the other words"
    ids = plain_ids(tokenizer, PROMPT + text)
    start = first_of_text(characters(tokenizer, ids, PROMPT + text), len(PROMPT))
    head, tail = (1,) * bos, (2,) * eos
    frame = len(head) + len(tail)
    for room in range(start + 1, len(ids) + 2):
        tokenize = TextTokenizer(tokenizer, max_tokens=room + frame, add_bos=bos, add_eos=eos)
        (found,) = tokenize([text], PROMPT)
        assert found == TokenizedText((*head, *ids[:room], *tail), len(head) + start)
        (found,) = tokenize([text])
        bare = plain_ids(tokenizer, text)
        assert found == TokenizedText((*head, *bare[:room], *tail), 0)
    for room in (start - 1, start):
        tokenize = TextTokenizer(tokenizer, max_tokens=room + frame, add_bos=bos, add_eos=eos)
        with pytest.raises(DataError) as refused:
            tokenize([text], PROMPT)
        assert str(refused.value) == (
            f"max_tokens={room + frame}: the instruction takes {start} tokens and leaves no room "
            "for the text. Shorten the instruction or raise max_tokens"
        )


def test_a_prompt_that_fills_the_room_is_no_error_where_nothing_is_cut(tokenizer: Any) -> None:
    ids = plain_ids(tokenizer, PROMPT)
    (found,) = TextTokenizer(tokenizer, max_tokens=len(ids) + 2)([""], PROMPT)
    assert found == TokenizedText((1, *ids, 2), 1 + len(ids))


def official(tokenizer: Any, text: str, prompt: str, limit: int) -> TokenizedText:
    """As the released code, with the BOS of the tokenizer's template."""
    ids = (1, *plain_ids(tokenizer, prompt + text + "</s>"))
    return TokenizedText(ids[:limit], len(plain_ids(tokenizer, prompt)))


@pytest.mark.parametrize("prompt", ["", PROMPT, "ask:"])
def test_official_style_counts_the_pieces_of_the_prompt_and_cuts_the_eos(
    tokenizer: Any, prompt: str
) -> None:
    texts = some_texts(30)
    for limit in (512, 16, 12, 5):
        found = TextTokenizer(tokenizer, max_tokens=limit, style="official")(texts, prompt)
        assert found == [official(tokenizer, text, prompt, limit) for text in texts]


@pytest.mark.parametrize("style", ["nvembed", "official"])
def test_texts_come_back_in_order_whatever_the_chunks(
    tokenizer: Any, style: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = some_texts(11)
    tokenize = TextTokenizer(tokenizer, style=style)
    alone = [tokens for text in texts for tokens in tokenize([text], PROMPT)]
    assert len(set(alone)) > 5
    for size in (1, 3, 11, 512):
        monkeypatch.setattr(module, "CHUNK_TEXTS", size)
        assert tokenize(texts, PROMPT) == alone


@pytest.mark.parametrize("prompt", ["", PROMPT, "ask:", "the answer to the"])
@pytest.mark.parametrize("bos", [True, False])
def test_a_whole_text_is_the_sequence_in_parts(tokenizer: Any, prompt: str, bos: bool) -> None:
    tokenize = TextTokenizer(tokenizer, add_bos=bos)
    texts = some_texts(40)
    for text, whole in zip(texts, tokenize.whole(texts, prompt), strict=True):
        ids = plain_ids(tokenizer, prompt + text)
        counts = characters(tokenizer, ids, prompt + text)
        if not prompt and counts[:1] == [0]:
            continue  # a ``▁`` in front of the text is said to lie on its first character
        start = first_of_text(counts, len(prompt)) if prompt else 0
        head = ((1,) if bos else ()) + ids[:start]
        ends = [sum(counts[: n + 1]) - len(prompt) for n in range(start, len(ids))]
        starts = [max(sum(counts[:n]) - len(prompt), 0) for n in range(start, len(ids))]
        spans = tuple(zip(starts, ends, strict=True))
        pool_start = len(head) if prompt else 0
        assert whole == WholeText(head, ids[start:], (2,), pool_start, spans)
        assert whole.part(0, len(whole.body)) == tokenize([text], prompt)[0]


def test_whole_texts_have_no_prompt_unless_one_is_given(tokenizer: Any) -> None:
    for style in ("nvembed", "official"):
        tokenize = TextTokenizer(tokenizer, style=style)
        assert tokenize.whole(some_texts(5)) == tokenize.whole(some_texts(5), "")
        assert tokenize(some_texts(5)) == tokenize(some_texts(5), "")


def test_the_tokens_of_a_beginning_are_those_of_the_text_alone(tokenizer: Any) -> None:
    beginning = TextTokenizer(tokenizer, max_tokens=10)._beginning
    enough = "z" * (19 - len(plain_ids(tokenizer, "z")) + 1)
    few = enough[:-1]
    assert [len(plain_ids(tokenizer, text)) for text in (few, enough)] == [18, 19]
    rest = " " + "b" * 400
    assert beginning(enough + rest) == enough
    assert beginning(few + rest) == few + rest


@pytest.mark.parametrize("prompt", ["", PROMPT, "ask:", "the answer to the"])
def test_a_whole_text_in_official_style(tokenizer: Any, prompt: str) -> None:
    tokenize = TextTokenizer(tokenizer, style="official")
    texts = some_texts(40)
    pieces = len(plain_ids(tokenizer, prompt))
    for text, whole in zip(texts, tokenize.whole(texts, prompt), strict=True):
        ids = (1, *plain_ids(tokenizer, prompt + text + "</s>"))
        # The BOS belongs to the head, and as many positions as the prompt has pieces.
        start = min(max(pieces, 1), len(ids) - 1)
        assert (whole.head, whole.body, whole.tail) == (ids[:start], ids[start:-1], ids[-1:])
        assert whole.tail == (2,)
        assert whole.pool_start == pieces
        assert whole.part(0, len(whole.body)) == tokenize([text], prompt)[0]
        counts = [0, *characters(tokenizer, ids[1:-1], prompt + text)]
        if not prompt and counts[1:2] == [0]:
            continue  # as above
        edges = [max(sum(counts[:n]) - len(prompt), 0) for n in range(start, len(ids))]
        ends = [sum(counts[: n + 1]) - len(prompt) for n in range(start, len(ids) - 1)]
        assert whole.spans == tuple(zip(edges, ends, strict=False))


def test_ids_from_elsewhere_become_what_the_text_becomes(tokenizer: Any) -> None:
    texts = [text for text in some_texts(20) if text]
    rows = [plain_ids(tokenizer, text) for text in texts]
    size = len(tokenizer)
    for limit in (512, 8, 4):
        tokenize = TextTokenizer(tokenizer, max_tokens=limit)
        assert tokenize.from_ids(rows, size) == tokenize(texts)
        tokenize = TextTokenizer(tokenizer, max_tokens=limit, style="official")
        wanted = [TokenizedText((1, *row, 2)[:limit], 0) for row in rows]
        assert tokenize.from_ids(rows, size) == wanted
