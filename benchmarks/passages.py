"""What passages find that whole files do not: recall of files and of answers deep inside them.

    python benchmarks/passages.py TASK --model MODEL --queries 500 --late

TASK is a retrieval task (BEIR layout) whose document ids are ``article-number``, such as SQuAD's:
the paragraphs of an article are put together as one Markdown file under its title, with their own
as headings where they have one. Its questions are asked against one vector per file, cut where the
model ends, and against passages as ``nvembed index`` makes them, read with and without their
headings, and of models that can (``--late``) pooled from whole files, as ``--long late`` does. A
file is found at k if one of its passages is of the best k files; an answer is found at 10 if one of
the ten best passages lies at least half inside its paragraph, or holds half of it. "deep" are the
questions whose paragraph begins after what the vector of the whole file has read.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nvembed.core.files import read_jsonl
from nvembed.data.reading import Document
from nvembed.index.cutting import token_ends
from nvembed.index.passages import Cutter, late_vectors
from nvembed.model.bulk import encode_texts
from nvembed.model.encoder import load_encoder, reading_limit

Places = dict[str, tuple[str, int, int]]


def read_articles(task: Path, count: int | None) -> tuple[dict[str, str], Places]:
    """Some articles as Markdown, and of each paragraph its article and characters."""
    paragraphs = defaultdict(list)
    for _, row in read_jsonl(task / "corpus.jsonl"):
        article, _, number = row["_id"].rpartition("-")
        heading = f"## {row['title']}\n\n" if row.get("title") else ""
        paragraphs[article].append((int(number), row["_id"], heading + row["text"].strip()))
    texts, places = {}, {}
    for article, found in list(paragraphs.items())[:: max(len(paragraphs) // (count or 10**9), 1)]:
        text = f"# {article.replace('_', ' ')}\n"
        for _, id, paragraph in sorted(found):
            places[id] = (article, len(text) + 1, len(text) + 1 + len(paragraph))
            text += f"\n{paragraph}\n"
        texts[article] = text
    return texts, places


def read_questions(task: Path, places: Places, count: int) -> tuple[list[str], list[str]]:
    """Questions, evenly from all of some paragraphs, and the id of the paragraph of each."""
    lines = (task / "qrels" / "test.tsv").read_text("utf-8").splitlines()[1:]
    answer = {query: id for query, id, _ in (line.split("\t") for line in lines)}
    asked = ((row["text"], answer[row["_id"]]) for _, row in read_jsonl(task / "queries.jsonl"))
    rows = [row for row in asked if row[1] in places]
    chosen = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
    return [rows[n][0] for n in chosen], [rows[n][1] for n in chosen]


def ranks(scores_QF: NDArray[np.float32], right_Q: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rank of the right file, from 1."""
    own_Q1 = np.take_along_axis(scores_QF, right_Q[:, None], axis=1)
    return (scores_QF > own_Q1).sum(axis=1) + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("task", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--instruction")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--files", type=int, help="that many of the articles; default: all")
    parser.add_argument("--passages", type=int, nargs="+", help="tokens; default: as nvembed index")
    parser.add_argument("--late", action="store_true", help="pooled from whole files, too")
    chosen = parser.parse_args()

    texts, places = read_articles(chosen.task, chosen.files)
    questions, answers = read_questions(chosen.task, places, chosen.queries)
    encoder = load_encoder(chosen.model)
    tokenizer, limit = reading_limit(encoder)
    names = list(texts)
    right_Q = np.array([names.index(places[id][0]) for id in answers])
    read = {
        name: [0, *token_ends(tokenizer, text)][: (limit or 512) + 1][-1]
        for name, text in texts.items()
    }
    deep_Q = np.array([places[id][1] >= read[places[id][0]] for id in answers])
    query_QD = encode_texts(encoder, questions, side="query", task=chosen.instruction)
    print(
        f"{len(texts)} files, {len(questions)} questions, {deep_Q.mean():.0%} of them deep",
        flush=True,
    )

    def told(
        arm: str, scores_QF: NDArray[np.float32], vectors: int, seconds: float, **more: float
    ) -> None:
        rank_Q = ranks(scores_QF, right_Q)
        row = {"arm": arm, "vectors": vectors, "seconds": round(seconds, 1)}
        for name, group_Q in (("", rank_Q), ("deep ", rank_Q[deep_Q])):
            row |= {f"{name}file@{k}": round(float((group_Q <= k).mean()), 4) for k in (1, 10)}
        print(json.dumps(row | {name: round(value, 4) for name, value in more.items()}), flush=True)

    start = time.perf_counter()
    file_FD = encode_texts(encoder, list(texts.values()), side="document")
    told("whole files", query_QD @ file_FD.T, len(file_FD), time.perf_counter() - start)
    for tokens in chosen.passages or [min(256, limit or 256)]:
        for way in ("without headings", "with headings", "late")[: 3 if chosen.late else 2]:
            start = time.perf_counter()
            cutter = Cutter(tokens, tokenizer, late=way != "with headings")
            found = [
                cutter.cut(Document(name, text, {}, name), ".md") for name, text in texts.items()
            ]
            parts = [passage for one in found for passage in one]
            if way == "late":
                late = late_vectors(encoder, {part.key: part for part in parts})
                vector_PD = np.stack([late[part.key] for part in parts])
            else:
                vector_PD = encode_texts(encoder, [part.read for part in parts], side="document")
            scores_QP = query_QD @ vector_PD.T
            bounds = np.cumsum([0, *map(len, found)])[:-1]
            scores_QF = np.maximum.reduceat(scores_QP, bounds, axis=1)
            best_QK = np.argsort(-scores_QP, axis=1)[:, :10]
            hits = 0
            for answer, best in zip(answers, best_QK.tolist(), strict=True):
                article, first, last = places[answer]
                for part in (parts[place] for place in best):
                    start_, end = part.fields["start"], part.fields["end"]
                    inside = min(end, last) - max(start_, first)
                    if part.id.startswith(f"{article}#") and 2 * inside >= min(
                        end - start_, last - first
                    ):
                        hits += 1
                        break
            arm = f"passages of {tokens}, {way}"
            seconds = time.perf_counter() - start
            told(arm, scores_QF, len(parts), seconds, **{"answer@10": hits / len(answers)})


if __name__ == "__main__":
    main()
