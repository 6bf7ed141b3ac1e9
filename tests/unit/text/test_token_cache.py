from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvembed.core.errors import DataError
from nvembed.text import token_cache
from nvembed.text.token_cache import MAX_SHARDS, TokenCache, default_cache_folder
from nvembed.text.tokens import TextTokenizer, TokenizedText

PROMPT = "Instruct: find it\nQuery: "
TEXTS = [
    (PROMPT, "what is it"),
    ("", "an answer"),
    ("", ""),
    (PROMPT, "中文 🙂"),
    ("", "what is it"),
]


class CountingTokenizer(TextTokenizer):
    """Remembers what it was asked."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.calls: list[tuple[tuple[str, ...], str]] = []

    def __call__(self, texts: Sequence[str], prompt: str = "") -> list[TokenizedText]:
        self.calls.append((tuple(texts), prompt))
        return super().__call__(texts, prompt)


@pytest.fixture
def make(tiny_tokenizer: Any) -> Callable[..., CountingTokenizer]:
    return lambda **options: CountingTokenizer(tiny_tokenizer, **options)


def plain(tokenizer: TextTokenizer, texts: Sequence[tuple[str, str]]) -> list[TokenizedText]:
    return [TextTokenizer.__call__(tokenizer, [text], prompt)[0] for prompt, text in texts]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*"))


def test_one_call_per_prompt_and_each_text_once(make: Any) -> None:
    tokenizer = make()
    cache = TokenCache(None, tokenizer)
    assert cache([*TEXTS, TEXTS[1]]) == plain(tokenizer, [*TEXTS, TEXTS[1]])
    assert tokenizer.calls == [
        (("what is it", "中文 🙂"), PROMPT),
        (("an answer", "", "what is it"), ""),
    ]
    assert (cache.hits, cache.misses) == (1, 5)
    assert cache(TEXTS[::-1]) == plain(tokenizer, TEXTS)[::-1]
    assert len(tokenizer.calls) == 2
    assert (cache.hits, cache.misses) == (6, 5)
    assert cache([]) == []
    cache.flush()  # nowhere to write to


def test_a_second_run_reads_what_the_first_wrote(tmp_path: Path, make: Any) -> None:
    first = TokenCache(tmp_path, make())
    expected = first(TEXTS)
    assert not shards(tmp_path)
    first.flush()
    (shard,) = shards(tmp_path)
    first.flush()  # nothing is new
    assert shards(tmp_path) == [shard]
    assert first(TEXTS) == expected
    assert first.misses == 5

    tokenizer = make()
    second = TokenCache(tmp_path, tokenizer)
    assert second(TEXTS) == expected
    assert tokenizer.calls == []
    assert (second.hits, second.misses) == (5, 0)
    # Only what is new reaches the tokenizer and the disk.
    assert second([("", "new"), TEXTS[0]]) == [*plain(tokenizer, [("", "new")]), expected[0]]
    assert tokenizer.calls == [(("new",), "")]
    second.flush()
    assert len(shards(tmp_path)) == 2
    assert TokenCache(tmp_path, make())([*TEXTS, ("", "new")])[:5] == expected


def test_prompt_and_text_are_told_apart(make: Any) -> None:
    tokenizer = make()
    cache = TokenCache(None, tokenizer)
    texts = [("a", "bc"), ("ab", "c"), ("", "abc"), ("a\0b", "c"), ("a", "\0bc"), ("a", "b\0c")]
    assert cache(texts) == plain(tokenizer, texts)
    assert cache.misses == 6


@pytest.mark.parametrize(
    "changes",
    [{"max_tokens": 30}, {"style": "official"}, {"add_bos": False}, {"add_eos": False}],
)
def test_other_rules_read_nothing_of_these(
    tmp_path: Path, make: Any, changes: dict[str, Any]
) -> None:
    cache = TokenCache(tmp_path, make())
    cache(TEXTS)
    cache.flush()
    tokenizer = make(**changes)
    other = TokenCache(tmp_path, tokenizer)
    assert other(TEXTS) == plain(tokenizer, TEXTS)
    assert (other.hits, other.misses) == (0, 5)
    other.flush()
    assert len({shard.parent for shard in shards(tmp_path)}) == 2


def test_another_vocabulary_is_another_fingerprint(make: Any, tiny_tokenizer: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    def changed(old: str, new: str) -> TextTokenizer:
        text = tiny_tokenizer.backend_tokenizer.to_str()
        assert old in text
        backend = type(tiny_tokenizer.backend_tokenizer).from_str(text.replace(old, new))
        return TextTokenizer(
            PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
        )

    same = changed('"a"', '"a"').fingerprint
    assert same != changed('"add_prefix_space":false', '"add_prefix_space":true').fingerprint
    # What a call leaves behind in the tokenizer does not count.
    tokenizer = make(style="official")
    before = tokenizer.fingerprint
    tokenizer(["a long text"], "p")
    again = make(style="official")
    assert again.fingerprint == before


def test_a_limit_that_is_changed_on_the_way_counts_at_once(tmp_path: Path, make: Any) -> None:
    tokenizer = make()
    cache = TokenCache(tmp_path, tokenizer)
    cache(TEXTS)
    tokenizer.max_tokens = 30
    assert cache(TEXTS) == plain(tokenizer, TEXTS)
    assert max(map(len, cache(TEXTS))) == 30
    cache.flush()
    assert TokenCache(tmp_path, make(max_tokens=30))(TEXTS) == plain(tokenizer, TEXTS)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(["", "p ", "q: "]), st.text(max_size=20)), max_size=6),
        max_size=5,
    )
)
def test_equals_the_tokenizer_whatever_comes(
    tmp_path: Path, make: Any, calls: list[list[tuple[str, str]]]
) -> None:
    tokenizer = make(max_tokens=12)
    folder = tmp_path / "cache"
    cache = TokenCache(folder, tokenizer)
    for number, texts in enumerate(calls):
        assert cache(texts) == plain(tokenizer, texts)
        if number % 2:
            cache.flush()
    cache.flush()
    again = TokenCache(folder, tokenizer)
    for texts in calls:
        assert again(texts) == plain(tokenizer, texts)
    assert again.misses == 0
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(("num_bytes", "dtype"), [(2, "<u2"), (4, "<u4")])
def test_ids_take_the_bytes_they_need(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch, num_bytes: int, dtype: str
) -> None:
    tokenizer = make()
    largest = 2 ** (8 * num_bytes) - 1
    tokens = TokenizedText((largest, 1, 2), 1)
    monkeypatch.setattr(CountingTokenizer, "__call__", lambda self, texts, prompt: [tokens])
    cache = TokenCache(tmp_path, tokenizer)
    assert cache([("", "x")]) == [tokens]
    cache.flush()
    (shard,) = shards(tmp_path)
    assert np.load(shard)[8] == num_bytes
    assert cache._shards[0].ids_I.dtype == np.dtype(dtype)
    assert TokenCache(tmp_path, tokenizer)([("", "x")]) == [tokens]


def test_opening_maps_the_files(tmp_path: Path, make: Any) -> None:
    cache = TokenCache(tmp_path, make())
    cache(TEXTS)
    cache.flush()
    for array in cache._shards[0][1:]:
        while not isinstance(array.base, np.memmap):
            array = array.base


def test_many_shards_become_one(tmp_path: Path, make: Any) -> None:
    tokenizer = make()
    cache = TokenCache(tmp_path, tokenizer)
    texts = [("", f"text {number}") for number in range(MAX_SHARDS + 1)]
    for number, text in enumerate(texts):
        assert len(shards(tmp_path)) == number
        cache([text])
        cache.flush()
    assert len(shards(tmp_path)) == 1
    assert cache(texts) == plain(tokenizer, texts)
    assert cache.misses == len(texts)
    again = TokenCache(tmp_path, tokenizer)
    assert again(texts[::-1]) == plain(tokenizer, texts[::-1])
    assert again.misses == 0


def test_what_a_killed_process_left_is_cleared_up(tmp_path: Path, make: Any) -> None:
    cache = TokenCache(tmp_path, make())
    cache(TEXTS)
    cache.flush()
    (shard,) = shards(tmp_path)
    old, young = (shard.with_name(f".{name}") for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache([("", "new")])
    cache.flush()
    assert not old.exists()
    assert young.exists()  # another process may be at it


def test_hashes_that_agree_by_half_are_no_hit(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = {"a": b"1" * 16, "b": b"1" * 8 + b"2" * 8, "c": b"1" * 8 + b"3" * 8}
    monkeypatch.setattr(token_cache, "_hash", lambda prompt, text: halves[text])
    tokenizer = make()
    cache = TokenCache(tmp_path, tokenizer)
    texts = [("", "a"), ("", "b")]
    cache(texts)
    cache.flush()
    assert cache([*texts, ("", "c")]) == plain(tokenizer, [*texts, ("", "c")])


def damage_truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-3])


def damage_header(shard: Path) -> None:
    shard.write_bytes(b"not an array")


def damage_shortened(shard: Path) -> None:
    np.save(shard, np.load(shard)[:100])


def damage_empty(shard: Path) -> None:
    shard.write_bytes(b"")


def damage_bit(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))


def damage_places(shard: Path) -> None:
    content = np.load(shard)
    spans = content[16 + 16 * len(TEXTS) :][: 32 * len(TEXTS)].view("<i8").reshape(-1, 4)
    spans[:, 0] += 10**6
    np.save(shard, content)


def damage_kind(shard: Path) -> None:
    np.save(shard, np.zeros(3))


def damage_count(shard: Path) -> None:
    content = np.load(shard)
    content[:8].view("<i8")[0] = 2**40
    np.save(shard, content)


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_header,
        damage_shortened,
        damage_empty,
        damage_bit,
        damage_places,
        damage_kind,
        damage_count,
    ],
)
def test_a_damaged_shard_is_made_again(
    tmp_path: Path, make: Any, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TokenCache(tmp_path, make())
    expected = cache(TEXTS)
    cache.flush()
    (shard,) = shards(tmp_path)
    damage(shard)
    with caplog.at_level(logging.WARNING):
        again = TokenCache(tmp_path, make())
        assert again(TEXTS) == expected
    assert again.misses == 5
    assert f"{shard}: damaged" in caplog.text
    again.flush()
    assert shards(tmp_path) == [shard]
    caplog.clear()
    last = TokenCache(tmp_path, make())
    assert last(TEXTS) == expected
    assert last.misses == 0
    assert not caplog.records


def test_what_cannot_be_written_stays_in_memory(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TokenCache(tmp_path, make())
    expected = cache(TEXTS)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    cache.flush()
    assert "not written" in caplog.text
    assert "No space left on device" in caplog.text
    assert not shards(tmp_path)
    assert cache(TEXTS) == expected
    assert cache.misses == 5
    monkeypatch.undo()
    cache.flush()
    assert len(shards(tmp_path)) == 1


def test_a_folder_that_cannot_be_is_no_reason_to_stop(
    tmp_path: Path, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    tokenizer = make()
    cache = TokenCache(tmp_path / "file", tokenizer)
    assert cache(TEXTS) == plain(tokenizer, TEXTS)
    cache.flush()
    assert "cannot be read" in caplog.text
    assert "not written" in caplog.text


def write_many(folder: Path, tokenizer: Any, barrier: Any, own: int) -> None:
    cache = TokenCache(folder, TextTokenizer(tokenizer))
    for number in range(MAX_SHARDS + 4):  # merging included
        barrier.wait()
        cache([("", f"common {number}"), ("", f"{own} {number % 3}")])
        cache.flush()


def test_two_processes_write_at_once(tmp_path: Path, tiny_tokenizer: Any, make: Any) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2, timeout=60)
    processes = [
        context.Process(target=write_many, args=(tmp_path, tiny_tokenizer, barrier, own))
        for own in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    texts = [("", f"common {number}") for number in range(MAX_SHARDS + 4)]
    texts += [("", f"{own} {number}") for own in range(2) for number in range(3)]
    cache = TokenCache(tmp_path, make())
    assert cache(texts) == plain(make(), texts)
    assert cache.misses == 0


def test_errors_of_the_tokenizer_come_through(make: Any) -> None:
    cache = TokenCache(None, make(max_tokens=4))
    with pytest.raises(DataError, match="leaves no room"):
        cache([(PROMPT, "text")])
    assert cache.misses == 0


def test_the_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path))
    assert default_cache_folder() == tmp_path / "tokens"
    monkeypatch.delenv("NVEMBED_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / ".cache" / "nvembed" / "tokens"
