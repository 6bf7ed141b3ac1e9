from __future__ import annotations

import pytest

from nvembed.core.errors import ConfigError, DataError
from nvembed.model.tokens import TextTokenizer, text_contexts, text_windows

LONG = "abcdefghijklmnopqrstuvwxyz"  # 26 tokens of a byte-level tokenizer
STYLES = ["nvembed", "official"]


def ids_of(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("prompt", ["", "do: "])
@pytest.mark.parametrize("text", ["", "hello", " 中文 "])
def test_texts_that_fit_are_what_they_always_are(tiny_tokenizer, style, prompt, text) -> None:
    tokenizer = TextTokenizer(tiny_tokenizer, max_tokens=64, style=style)
    wanted = tokenizer([text], prompt)
    assert text_windows(tokenizer, [text], prompt, 3) == [wanted]
    ((context,),) = text_contexts(tokenizer, [text], prompt, chunk_tokens=40, max_tokens=64)
    assert ([context.text], context.chunks) == (wanted, (len(wanted[0]),))
    assert context.spans == ((0, len(text)),)


@pytest.mark.parametrize("style", STYLES)
def test_windows_share_tokens_and_cover_the_text(tiny_tokenizer, style) -> None:
    # The tokenizer itself adds no BOS, which is what counts in the official style.
    bos = (1,) if style == "nvembed" else ()
    tokenizer = TextTokenizer(tiny_tokenizer, max_tokens=len(bos) + 11, style=style)
    ids = ids_of(tiny_tokenizer, LONG)
    (windows,) = text_windows(tokenizer, [LONG], "", 2)
    # Room for ten, of which two come from the window before.
    slices = [ids[0:10], ids[8:18], ids[16:26]]
    assert [window.ids for window in windows] == [(*bos, *part, 2) for part in slices]
    assert [window.pool_start for window in windows] == [0, 0, 0]
    (windows,) = text_windows(tokenizer, [LONG[:25]], "", 0)
    parts = [ids[0:10], ids[10:20], ids[20:25]]
    assert [window.ids for window in windows] == [(*bos, *part, 2) for part in parts]


def test_every_window_has_the_prompt(tiny_tokenizer) -> None:
    prompt = "do: "
    tokenizer = TextTokenizer(tiny_tokenizer, max_tokens=16)
    head = (1, *ids_of(tiny_tokenizer, prompt))
    ids = ids_of(tiny_tokenizer, LONG)
    (windows,) = text_windows(tokenizer, [LONG], prompt, 4)
    assert [w.ids for w in windows] == [(*head, *ids[a : a + 10], 2) for a in (0, 6, 12, 18)]
    assert {window.pool_start for window in windows} == {len(head)}
    for overlap in (10, -1):
        with pytest.raises(ConfigError, match="expected 0 to 9"):
            text_windows(tokenizer, [LONG], prompt, overlap)
    with pytest.raises(DataError, match="leaves no room"):
        text_windows(TextTokenizer(tiny_tokenizer, max_tokens=6), [LONG], prompt, 0)


@pytest.mark.parametrize("style", STYLES)
def test_chunks_are_even_and_contexts_hold_as_many_as_fit(tiny_tokenizer, style) -> None:
    bos = (1,) if style == "nvembed" else ()
    tokenizer = TextTokenizer(tiny_tokenizer, max_tokens=5, style=style)
    ids = ids_of(tiny_tokenizer, LONG)
    (contexts,) = text_contexts(tokenizer, [LONG], "", chunk_tokens=8, max_tokens=100)
    assert [context.text.ids for context in contexts] == [(*bos, *ids, 2)]
    assert contexts[0].chunks == (
        len(bos) + 6,
        7,
        6,
        7 + 1,
    )  # BOS with the first, EOS with the last
    spans = contexts[0].spans
    assert "".join(LONG[start:end] for start, end in spans) == LONG
    assert [end - start for start, end in spans] == [6, 7, 6, 7]
    # Room for 16 tokens of text: two chunks to a context.
    (contexts,) = text_contexts(tokenizer, [LONG], "", chunk_tokens=8, max_tokens=17 + len(bos))
    assert [context.text.ids for context in contexts] == [
        (*bos, *ids[:13], 2),
        (*bos, *ids[13:], 2),
    ]
    assert [context.chunks for context in contexts] == [(6 + len(bos), 8)] * 2
    assert [span for context in contexts for span in context.spans] == list(spans)
    with pytest.raises(ConfigError, match="0 tokens in a chunk"):
        text_contexts(tokenizer, [LONG], "", chunk_tokens=0, max_tokens=18)


def test_chunks_begin_where_they_are_told_to(tiny_tokenizer) -> None:
    tokenizer = TextTokenizer(tiny_tokenizer, max_tokens=5)
    ids = ids_of(tiny_tokenizer, LONG)

    def cut(cuts: list[int], room: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        (contexts,) = text_contexts(
            tokenizer, [LONG], "", chunk_tokens=1, max_tokens=room + 2, cuts=[cuts]
        )
        return [(context.text.ids[1:-1], context.chunks) for context in contexts]

    assert cut([0, 3, 20], 26) == [(ids, (1 + 3, 17, 6 + 1))]
    # As many together as there is room for; one that has none by itself loses its end.
    assert cut([0, 3, 9, 12], 10) == [
        (ids[:9], (1 + 3, 6 + 1)),
        (ids[9:12], (1 + 3 + 1,)),
        (ids[12:22], (1 + 10 + 1,)),
    ]
    # A first chunk begins with the text, and a token belongs to the chunk in which it ends.
    text = "中" + LONG
    (contexts,) = text_contexts(tokenizer, [text], "", chunk_tokens=1, max_tokens=40, cuts=[[5, 1]])
    assert contexts[0].chunks == (1 + 3, 26 + 1)


def test_spans_are_characters_of_the_text_without_the_prompt(tiny_tokenizer) -> None:
    tokenizer = TextTokenizer(tiny_tokenizer)
    text = "aé中🙂b" * 3  # one to four tokens each
    ((context,),) = text_contexts(tokenizer, [text], "do: ", chunk_tokens=9, max_tokens=400)
    starts, ends = zip(*context.spans, strict=True)
    assert (starts[0], ends[-1], len(context.spans)) == (0, len(text), 4)
    assert all(0 <= b - a <= 1 for a, b in zip(starts[1:], ends[:-1], strict=True))
