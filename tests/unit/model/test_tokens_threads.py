"""Threads and callers outside share a tokenizer; neither may change what a text becomes."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nvembed.data.instructions import query_prompt
from nvembed.model.tokens import TextTokenizer

PROMPT = query_prompt("find it")
TEXTS = ["word " * 60, "short", "", "中文 " * 30]


@pytest.mark.parametrize("style", ["nvembed", "official"])
def test_state_of_the_shared_tokenizer_is_neither_read_nor_changed(
    tiny_tokenizer, style: str
) -> None:
    shared = copy.deepcopy(tiny_tokenizer)
    tokenize = TextTokenizer(shared, max_tokens=40, style=style)
    calls = (
        lambda: tokenize(TEXTS, PROMPT),
        lambda: tokenize(TEXTS),
        lambda: tokenize.whole(TEXTS, PROMPT),
        lambda: tokenize.from_ids([[5, 6, 7]], 200),
    )
    expected = [call() for call in calls]
    shared.backend_tokenizer.enable_truncation(3)
    shared.backend_tokenizer.enable_padding(length=50)
    before = shared.backend_tokenizer.truncation, shared.backend_tokenizer.padding
    assert [call() for call in calls] == expected
    assert (shared.backend_tokenizer.truncation, shared.backend_tokenizer.padding) == before


@pytest.mark.parametrize("style", ["nvembed", "official"])
def test_threads_get_what_one_thread_gets(tiny_tokenizer, style: str) -> None:
    shared = copy.deepcopy(tiny_tokenizer)
    tokenize = TextTokenizer(shared, max_tokens=40, style=style)
    expected = tokenize(TEXTS, PROMPT)
    over = threading.Event()

    def disturb() -> None:
        while not over.is_set():
            shared(["a text of somebody else"], truncation=True, max_length=5)
            shared.tokenize(PROMPT)

    with ThreadPoolExecutor(5) as pool:
        pool.submit(disturb)
        try:
            found = list(pool.map(lambda _: tokenize(TEXTS, PROMPT), range(300)))
        finally:
            over.set()
    assert all(one == expected for one in found)


def test_special_tokens_in_texts_are_split_where_the_tokenizer_splits_them(tiny_tokenizer) -> None:
    splitting = copy.deepcopy(tiny_tokenizer)
    splitting.split_special_tokens = True
    assert TextTokenizer(tiny_tokenizer)(["</s>"])[0].ids == (1, 2, 2)
    assert len(TextTokenizer(splitting)(["</s>"])[0]) == 2 + len("</s>")


def test_a_template_that_adds_an_eos_changes_nothing_in_the_official_style(tiny_tokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    closing = copy.deepcopy(tiny_tokenizer)
    closing.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    (tokens,) = TextTokenizer(closing, style="official")(["ab"])
    assert tokens.ids == (1, *tiny_tokenizer("ab")["input_ids"], 2)
    (cut,) = TextTokenizer(closing, style="official", max_tokens=3)(["abcd"])
    assert cut.ids == (1, *tiny_tokenizer("ab")["input_ids"])
