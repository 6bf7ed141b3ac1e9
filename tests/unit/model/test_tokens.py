from __future__ import annotations

from collections.abc import Callable

import pytest

from nvembed.core.errors import DataError, ModelError, UserError
from nvembed.data.instructions import query_prompt
from nvembed.model.tokens import TextTokenizer

PROMPT = query_prompt("find it")


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_prompt_is_rendered_as_in_the_paper() -> None:
    assert PROMPT == "Instruct: find it\nQuery: "
    assert query_prompt(None) == query_prompt("  ") == ""
    assert query_prompt("with {braces}") == "Instruct: with {braces}\nQuery: "
    assert query_prompt(" \tfind it \n") == PROMPT


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


def test_a_whole_text_is_pooled_with_its_prompt(tiny_tokenizer) -> None:
    limit = len(PROMPT) + 5
    own = TextTokenizer(tiny_tokenizer, max_tokens=limit)
    whole = TextTokenizer(tiny_tokenizer, max_tokens=limit, style="whole")
    for prompt in ("", PROMPT):
        (mine,), (theirs,) = whole(["a long text"], prompt), own(["a long text"], prompt)
        assert mine.ids == theirs.ids
        assert mine.pool_start == 0
        uncut = whole.whole(["a long text"], prompt)[0]
        assert uncut.pool_start == 0
        assert uncut.head == own.whole(["a long text"], prompt)[0].head
    assert whole.fingerprint != own.fingerprint
    with pytest.raises(DataError, match="leaves no room for the text"):
        TextTokenizer(tiny_tokenizer, max_tokens=len(PROMPT), style="whole")(["text"], PROMPT)


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


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as found:
        call()
    return str(found.value)


def test_ids_outside_the_vocabulary_are_refused(tiny_tokenizer) -> None:
    from_ids = TextTokenizer(tiny_tokenizer).from_ids
    assert from_ids([[0, 9]], 10)[0].ids == (1, 0, 9, 2)  # the first and the last of it
    for bad in (10, 11, -1):
        assert refusal(lambda bad=bad: from_ids([[3], [4, bad, 99]], 10)) == (
            f"text 1: token id {bad} is not in the vocabulary; expected 0 to 9. "
            "Send the ids of the model's own tokenizer, or the text"
        )
    assert refusal(lambda: from_ids([[3], []], 10)) == (
        "text 1: no token ids; expected at least one"
    )


def test_what_no_tokenizer_can_do_without_is_named() -> None:
    assert refusal(lambda: TextTokenizer(object())) == (
        "object is a slow tokenizer; expected a fast tokenizer (tokenizer.json), which knows "
        "character offsets. Save the tokenizer of the model again with a current transformers"
    )


def with_special(tokenizer, **names: str | None):
    """The tokenizer with these special tokens and no others."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **names)


@pytest.mark.parametrize(
    ("names", "head", "tail"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, (1,), (2,)),
        ({"cls_token": "<s>", "sep_token": "</s>"}, (1,), (2,)),
        ({"bos_token": "<s>", "cls_token": "</s>", "sep_token": "<unk>"}, (1,), (0,)),
        ({"bos_token": "<unk>", "cls_token": "<s>", "eos_token": "</s>"}, (0,), (2,)),
        ({"eos_token": "<unk>", "sep_token": "</s>"}, (), (0,)),
    ],
)
def test_bos_and_eos_go_before_cls_and_sep_and_an_id_may_be_zero(
    tiny_tokenizer, names, head, tail
) -> None:
    tokenizer = with_special(tiny_tokenizer, **names)
    (found,) = TextTokenizer(tokenizer)(["a"])
    (middle,) = TextTokenizer(tokenizer, add_bos=False, add_eos=False)(["a"])
    assert found.ids == (*head, *middle.ids, *tail)
    assert TextTokenizer(tokenizer, add_bos=False)(["a"])[0].ids == (*middle.ids, *tail)
    assert TextTokenizer(tokenizer, add_eos=False)(["a"])[0].ids == (*head, *middle.ids)


def test_a_missing_eos_is_an_error_where_one_is_wanted(tiny_tokenizer) -> None:
    tokenizer = with_special(tiny_tokenizer, bos_token="<s>")
    assert refusal(lambda: TextTokenizer(tokenizer)) == (
        "the tokenizer has no EOS token. Set add_eos=false or give it an eos_token"
    )
    (found,) = TextTokenizer(tokenizer, add_eos=False)(["a"])
    assert found.ids == (1, *tiny_tokenizer("a")["input_ids"])


def test_without_options_a_text_has_at_most_512_tokens_of_our_style(tiny_tokenizer) -> None:
    tokenize = TextTokenizer(tiny_tokenizer)
    assert (tokenize.max_tokens, tokenize.style) == (512, "nvembed")
    (found,) = tokenize(["a" * 600])
    assert len(found) == 512
    assert (found.ids[0], found.ids[-1]) == (1, 2)


@pytest.mark.parametrize("style", ["nvembed", "official"])
def test_every_method_refuses_what_is_no_text(tiny_tokenizer, style) -> None:
    tokenize = TextTokenizer(tiny_tokenizer, style=style)
    for method in (tokenize, tokenize.whole):
        assert refusal(lambda method=method: method(["a", None, 3])) == (
            "text 1: got NoneType; expected a string"
        )


def test_no_text_is_cut_that_is_not_twice_as_long_as_what_is_tried(tiny_tokenizer) -> None:
    beginning = TextTokenizer(tiny_tokenizer, max_tokens=10)._beginning  # tries 80 characters
    short = "ab " * 53 + "a"
    assert len(short) == 160
    assert beginning(short) == short
    assert beginning(short + "b") == short[:77]  # before the last of the blanks within 80


@pytest.mark.parametrize("blank", [" ", "\n", "\t"])
def test_a_beginning_ends_before_the_last_white_space(tiny_tokenizer, blank: str) -> None:
    beginning = TextTokenizer(tiny_tokenizer, max_tokens=10)._beginning
    text = "a" * 30 + blank + "X" * 30 + blank + "X" * 500
    assert beginning(text) == "a" * 30 + blank + "X" * 30
    mixed = "a" * 30 + " " + "b" * 20 + "\n" + "c" * 10 + "\t" + "d" * 500
    assert beginning(mixed) == mixed[:62]


def test_a_beginning_has_more_tokens_than_are_kept_or_is_longer(tiny_tokenizer) -> None:
    beginning = TextTokenizer(tiny_tokenizer, max_tokens=10)._beginning
    # Of 80 characters as many tokens as the limit and eight more do not do, one more does.
    assert beginning("a" * 19 + " " + "b" * 400) == "a" * 19
    # Next it tries 640, for texts that are more than twice as long; before that the whole.
    few = "a" * 18 + " " + "b" * 400
    assert beginning(few) == few
    few = "a" * 18 + " " + "b" * 300 + " " + "c" * 3000
    assert beginning(few) == few[:319]
    # White space beyond 640 counts in the third try alone.
    few = "a" * 18 + " " + "b" * 700 + " " + "c" * 20000
    assert beginning(few) == few[:719]
    assert beginning(few[:10000]) == few[:10000]
    # A text that begins with its only white space has no such end.
    blank = " " + "b" * 400
    assert beginning(blank) == blank


def test_a_fingerprint_is_32_digits_of_all_that_decides_the_ids(tiny_tokenizer) -> None:
    changes = [{}, {"max_tokens": 8}, {"style": "official"}, {"add_bos": False}, {"add_eos": False}]
    found = [TextTokenizer(tiny_tokenizer, **change).fingerprint for change in changes]
    assert len(set(found)) == len(changes)
    assert all(len(one) == 32 and int(one, 16) >= 0 for one in found)
    assert TextTokenizer(tiny_tokenizer).fingerprint == found[0]
