"""Training texts that a recipe cannot name by a path: WordNet's definitions and sentences.

    python examples/smollm2/texts.py --wordnet /usr/share/wordnet --to runs/smollm2-135m/texts

WordNet 3.0 (Debian: ``wordnet-base``; Princeton's licence, free for any use with its notice) gives
``wordnet.jsonl``, a word or phrase with its definitions, and ``usage.jsonl``, the sentences that
show its use. ``--sections`` adds ``sentences.jsonl``, the sentences of files of sections
(``{"title", "text"}`` a line, also ``.gz``), such as textbooks. Both last ones are bare texts, for
a teacher (``kind: text``).
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def synsets(folder: Path) -> Iterator[tuple[list[str], str, list[str]]]:
    """The words, the definition and the example sentences of each entry."""
    for part in PARTS_OF_SPEECH:
        for line in (folder / f"data.{part}").read_text("utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            entry, _, gloss = line.partition(" | ")
            fields = entry.split()
            count = int(fields[3], 16)
            words = [re.sub(r"\(\w+\)$", "", word) for word in fields[4 : 4 + 2 * count : 2]]
            examples = re.findall(r'"([^"]+)"', gloss)
            definition = re.sub(r'[;:]?\s*"[^"]*"[^";]*', "", gloss).strip(" ;:")
            yield [word.replace("_", " ") for word in words], definition, examples


def definitions(folder: Path) -> Iterator[dict[str, object]]:
    """Each word with all of its definitions, in the order of their senses' entries."""
    found: dict[str, dict[str, None]] = {}
    for words, definition, _ in synsets(folder):
        for word in words if len(definition) > 10 else []:
            found.setdefault(word, {})[definition] = None
    for word, senses in found.items():
        if len(word) > 2 and len(senses) <= 6:  # of words with more, no query could tell which
            yield {"query": word, "positive": list(senses)}


def usage(folder: Path) -> Iterator[dict[str, object]]:
    """Example sentences of at least four words."""
    sentences = (text for *_, examples in synsets(folder) for text in examples)
    yield from ({"text": text} for text in dict.fromkeys(sentences) if len(text.split()) >= 4)


def sentences(files: Iterable[Path]) -> Iterator[dict[str, object]]:
    """Sentences of 40 to 250 characters, once each, without lists of references."""
    seen: dict[str, None] = {}
    for file in files:
        text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        for line in filter(None, text.decode("utf-8").split("\n")):
            body = json.loads(line)["text"].split("\nReferences\n")[0]
            for paragraph in body.split("\n"):
                for sentence in SENTENCE.split(paragraph):
                    if 40 <= len(sentence) <= 250 and sentence[0].isupper():
                        seen[sentence.strip()] = None
    yield from ({"text": sentence} for sentence in seen)


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--sections", type=Path, nargs="*", default=[])
    parser.add_argument("--to", type=Path, required=True)
    given = parser.parse_args()
    given.to.mkdir(parents=True, exist_ok=True)
    made = {"wordnet": definitions(given.wordnet), "usage": usage(given.wordnet)}
    if given.sections:
        made["sentences"] = sentences(given.sections)
    for name, rows in made.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (given.to / f"{name}.jsonl").write_text("".join(lines), "utf-8")
        print(f"{len(lines):,} lines: {given.to / name}.jsonl")


if __name__ == "__main__":
    main()
