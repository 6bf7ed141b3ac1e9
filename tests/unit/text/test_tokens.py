from __future__ import annotations

import pytest

from nvembed.core.errors import DataError, ModelError
from nvembed.text.template import query_prompt
from nvembed.text.tokens import TextTokenizer

PROMPT = query_prompt("find it")


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_prompt_is_rendered_as_in_the_paper() -> None:
    assert PROMPT == "Instruct: find it\nQuery: "
    assert query_prompt(None) == query_prompt("  ") == ""
    assert query_prompt("with {braces}") == "Instruct: with {braces}\nQuery: "


@pytest.mark.parametrize("text", ["hello", " leading", "", "中文", "a\nb", "🙂"])
def test_exactly_the_text_and_eos_are_pooled_after_a_prompt(tiny_tokenizer, text: str) -> None:
    (tokens,) = TextTokenizer(tiny_tokenizer)([text], PROMPT)
    assert tokens.ids[0] == 1
    assert tokens.ids[-1] == 2
    assert decode(tiny_tokenizer, tokens.ids[tokens.pool_start :]) == text
    assert decode(tiny_tokenizer, tokens.ids[: tokens.pool_start]) == PROMPT


def test_documents_pool_everything(tiny_tokenizer) -> None:
    (tokens,) = TextTokenizer(tiny_tokenizer)(["hello"])
    assert tokens.pool_start == 0
    assert len(tokens) == 1 + len("hello") + 1


def test_truncation_keeps_prompt_and_eos(tiny_tokenizer) -> None:
    limit = len(PROMPT) + 5
    (tokens,) = TextTokenizer(tiny_tokenizer, max_tokens=limit)(["a long text"], PROMPT)
    assert len(tokens) == limit
    assert tokens.ids[-1] == 2
    assert decode(tiny_tokenizer, tokens.ids) == PROMPT + "a l"
    assert decode(tiny_tokenizer, tokens.ids[tokens.pool_start :]) == "a l"


def test_prompt_that_leaves_no_room_is_an_error(tiny_tokenizer) -> None:
    tokenizer = TextTokenizer(tiny_tokenizer, max_tokens=len(PROMPT))
    with pytest.raises(DataError, match="leaves no room for the text"):
        tokenizer(["a long text"], PROMPT)


def test_official_style_loses_the_eos_and_counts_pieces(tiny_tokenizer) -> None:
    official = TextTokenizer(tiny_tokenizer, max_tokens=12, style="official")
    (tokens,) = official(["hello world, this is long"], "abc ")
    assert len(tokens) == 12
    assert tokens.ids[-1] != 2
    assert tokens.pool_start == 4  # pieces of the prompt alone


def test_options_leave_special_tokens_out(tiny_tokenizer) -> None:
    (tokens,) = TextTokenizer(tiny_tokenizer, add_bos=False, add_eos=False)(["ab"])
    assert len(tokens) == 2


def test_other_types_and_slow_tokenizers_are_refused(tiny_tokenizer) -> None:
    with pytest.raises(DataError, match="text 1: got int; expected a string"):
        TextTokenizer(tiny_tokenizer)(["a", 3])

    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="Slow is a slow tokenizer"):
        TextTokenizer(Slow())


def test_no_texts_give_no_tokens(tiny_tokenizer) -> None:
    assert TextTokenizer(tiny_tokenizer)([], PROMPT) == []


@pytest.mark.parametrize(
    "text",
    ["ab " * 50_000, "x" * 5_000, " " * 4_000 + "y" * 90_000 + " z", "é\n" * 2_000, "a b" * 100],
)
def test_long_texts_are_cut_before_they_are_tokenised_and_nothing_changes(
    tiny_tokenizer, text: str, monkeypatch
) -> None:
    tokenize = TextTokenizer(tiny_tokenizer, max_tokens=40)
    found = tokenize([text], query_prompt("t")), tokenize([text])
    monkeypatch.setattr(TextTokenizer, "_beginning", lambda self, text: text)
    assert found == (tokenize([text], query_prompt("t")), tokenize([text]))


def test_of_a_long_text_only_the_beginning_is_tokenised(tiny_tokenizer) -> None:
    beginning = TextTokenizer(tiny_tokenizer, max_tokens=40)._beginning("word " * 100_000)
    assert 40 < len(beginning) <= 8 * 40
