"""The example searches: what each way finds, and how it is shown."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from hash_encoder import HashEncoder
from nvembed.core.files import write_jsonl
from pydocs.dataset import RETRIEVAL_INSTRUCTION
from pydocs.searches import Documents, shortened, show_searches

TEXTS = {"a.turn": "turn a picture", "b.read": "read a file", "c.sort": "sort a list of names"}


@pytest.fixture
def documents(tmp_path: Path) -> Documents:
    file = tmp_path / "search.jsonl"
    write_jsonl(file, ({"_id": name, "text": text} for name, text in TEXTS.items()))
    return Documents(file)


def test_words_find_the_documents_that_hold_them(documents: Documents) -> None:
    found = documents.by_words(["a list of names", "picture"], 2)
    assert [names[0] for names in found] == ["c.sort", "a.turn"]
    assert [len(names) for names in found] == [2, 2]


def test_a_model_may_read_documents_cut_and_words_are_sought_in_all_of_them(
    documents: Documents, tmp_path: Path
) -> None:
    assert documents.read == list(TEXTS.values())
    cut = Documents(tmp_path / "search.jsonl", 11)
    assert cut.read == ["turn a", "read a file", "sort a"]
    assert cut.by_words(["names"], 1) == [["c.sort"]]
    assert cut.by_model(HashEncoder(), ["list of names"]) != documents.by_model(
        HashEncoder(), ["list of names"]
    )


def test_the_time_of_a_search_is_known_from_a_few_documents(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "many.jsonl", ({"_id": str(n), "text": f"t {n}"} for n in range(640)))

    class Slow(HashEncoder):
        asked = 0

        def encode_document(self, texts: list[str], task: str | None = None) -> object:
            self.asked += len(texts)
            time.sleep(0.001 * len(texts))
            return super().encode_document(texts, task=task)

    encoder = Slow()
    assert 0.6 < Documents(tmp_path / "many.jsonl").seconds(encoder) < 6
    assert encoder.asked == 64


def test_a_model_finds_what_is_nearest_with_the_instruction(documents: Documents) -> None:
    encoder = HashEncoder()
    queries = ["sort a list of names", "anything"]
    query_QD = encoder.encode_query(queries, task=RETRIEVAL_INSTRUCTION)
    score_QN = query_QD @ encoder.encode_document(list(TEXTS.values())).T
    wanted = [[list(TEXTS)[n] for n in np.argsort(-row, kind="stable")] for row in score_QN]
    assert documents.by_model(encoder, queries, 3) == wanted
    bare_QN = encoder.encode_query(queries) @ encoder.encode_document(list(TEXTS.values())).T
    assert not np.allclose(score_QN, bare_QN)  # the instruction does matter to this encoder


def test_ways_stand_side_by_side() -> None:
    out = io.StringIO()
    found = {"BM25": [["x.[first]", "y.second"]], "after": [["y.second", "long." * 20 + "end"]]}
    show_searches(Console(file=out, width=80), ["which [one]?"], found)
    lines = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    assert lines[:3] == [["which", "[one]?"], ["BM25", "after"], ["x.[first]", "y.second"]]
    assert lines[3][0] == "y.second"
    assert lines[3][1].startswith("…")
    assert lines[3][1].endswith("long.end")
    assert max(map(len, out.getvalue().splitlines())) <= 80


def test_names_lose_their_beginning() -> None:
    assert shortened("scipy.signal.butter", 19) == "scipy.signal.butter"
    assert shortened("scipy.signal.butter", 12) == "…gnal.butter"
