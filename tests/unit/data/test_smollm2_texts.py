"""The texts that the SmolLM2 recipe makes of WordNet and of sections."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from smollm2.texts import main

NOUNS = """\
  1 This software and database is being provided to you, the LICENSEE
00217593 04 n 02 kill 1 shoot_down 0 002 @ 00217014 n 0000 | the destruction of an enemy plane; \
"the pilot reported two kills"; "a kill"
00217499 04 n 01 kill 1 001 @ 00217014 n 0000 | an act that has disastrous consequences
"""
ADJECTIVES = (
    '00001740 00 a 01 able(p) 0 001 = 05200169 n 0000 | having the means; "able to swim far"\n'
)


def test_words_and_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, text in {"noun": NOUNS, "verb": "", "adj": ADJECTIVES, "adv": ""}.items():
        (tmp_path / f"data.{part}").write_text(text, "utf-8")
    section = {
        "title": "x",
        "text": "Bees are insects that live in large colonies. Short one. They collect nectar "
        "from flowers and make honey of it.\nReferences\nA book that is no sentence of the text.",
    }
    sections = tmp_path / "s.jsonl.gz"
    sections.write_bytes(gzip.compress((json.dumps(section) + "\n").encode()))
    arguments = ["--wordnet", tmp_path, "--to", tmp_path / "to", "--sections", sections]
    monkeypatch.setattr(sys, "argv", ["texts.py", *map(str, arguments)])
    main()

    def rows(name: str) -> list[dict[str, object]]:
        lines = (tmp_path / "to" / f"{name}.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]

    destruction = "the destruction of an enemy plane"
    assert rows("wordnet") == [
        {"query": "kill", "positive": [destruction, "an act that has disastrous consequences"]},
        {"query": "shoot down", "positive": [destruction]},
        {"query": "able", "positive": ["having the means"]},
    ]
    assert [row["text"] for row in rows("usage")] == [
        "the pilot reported two kills",
        "able to swim far",
    ]
    assert [row["text"] for row in rows("sentences")] == [
        "Bees are insects that live in large colonies.",
        "They collect nectar from flowers and make honey of it.",
    ]
