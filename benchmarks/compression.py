"""A table as in the paper's appendix: what smaller models and smaller vectors keep, and how fast.

    python benchmarks/compression.py --out runs/compression --tasks ../shared/data/tasks \
        --model whole assets/nvembed-smollm2-135m bfloat16 \
        --model half runs/half-recovered/model bfloat16 --model int8 runs/half-recovered/model int8

A model is a name for the table, a folder, and the type it computes in (``auto`` where the folder
holds an ONNX graph); the first is what the others are compared with. Each task is scored with whole
vectors; retrieval also with the vectors rounded to int8 (by the ranges of the documents), to their
signs, and with the signs of documents alone, which queries in floats search. Speeds are of some of
the tasks' documents in one call, models in turns, medians of ``--rounds``: nothing else should run.
Scores and times lie in ``results.jsonl`` of ``--out`` as they come, and are not made again;
``results.md`` is the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nvembed.core.cache import content_hash
from nvembed.core.files import read_jsonl, write_text
from nvembed.data.instructions import Side
from nvembed.evaluation.local_scores import score_local
from nvembed.evaluation.tasks import LocalTask, load_tasks
from nvembed.interop.model_folder import contents_fingerprint
from nvembed.model.embedder import NVEmbed
from nvembed.model.encoder import GRAPH_FILE, BaseEncoder, Encoder, load_encoder
from nvembed.model.encoding import calibration, numbered
from nvembed.model.memory import weight_bytes

FLOAT, INT8, BINARY = "float", "int8", "binary"
BINARY_DOCUMENTS = "binary documents"
ROUNDINGS = (FLOAT, INT8, BINARY, BINARY_DOCUMENTS)
TIMED_TEXTS = 256


class Model(NamedTuple):
    """A row of the table."""

    name: str
    folder: str
    dtype: str
    contents: str  # a folder that was made anew is another model


class Rounded(BaseEncoder):
    """Another encoder's vectors, each computed once, as a database of smaller vectors has them."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self.dimension = encoder, encoder.dimension
        self._known: dict[tuple[Side, str | None, str], NDArray[np.float32]] = {}
        self.rounding = FLOAT

    def _encode(self, side: Side, texts: Sequence[str], task: str | None) -> NDArray[np.float32]:
        new = [text for text in dict.fromkeys(texts) if (side, task, text) not in self._known]
        if new:
            of_side = (
                self._encoder.encode_query if side == "query" else self._encoder.encode_document
            )
            rows = zip(new, of_side(new, task=task), strict=True)
            self._known |= {(side, task, text): vector for text, vector in rows}
        vectors_ND = np.stack([self._known[side, task, text] for text in texts])
        in_signs = self.rounding == BINARY_DOCUMENTS and side == "document"
        if in_signs or self.rounding == BINARY:
            return np.where(vectors_ND > 0, np.float32(1), np.float32(-1))
        if self.rounding == INT8:
            known = [vector for (of, _, _), vector in self._known.items() if of == "document"]
            least_D, step_D = calibration(torch.from_numpy(np.stack(known)))
            steps_ND = numbered(torch.from_numpy(vectors_ND), least_D, step_D)
            found: NDArray[np.float32] = (least_D + steps_ND * step_D).numpy()
            return found
        return vectors_ND


def scores(encoder: Encoder, task: LocalTask) -> dict[str, float]:
    """Main score × 100, of retrieval by each way to hold a vector."""
    held, found = Rounded(encoder), {}
    for held.rounding in ROUNDINGS if task.type == "Retrieval" else (FLOAT,):
        found[held.rounding] = 100 * score_local(task, held).scores[task.main_score]
    return found


def timed_texts(tasks: Sequence[LocalTask]) -> list[str]:
    """Documents of the retrieval tasks, evenly drawn, the same for all models."""
    texts: list[str] = []
    for task in tasks:
        corpus = task.folder / "corpus.jsonl"
        texts += [row["text"] for _, row in read_jsonl(corpus)] if corpus.is_file() else []
    return texts[:: max(1, len(texts) // TIMED_TEXTS)][:TIMED_TEXTS]


class Book:
    """Rows that lie in a file as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = [row for _, row in read_jsonl(path)] if path.exists() else []

    def add(self, **row: object) -> None:
        """Keep a row."""
        self.rows.append(row)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def of(self, model: Model, key: str) -> dict[str, dict[str, float]]:
        """What is known of a model: under ``key``, the rest of the row."""
        own = [r for r in self.rows if key in r and r["model"] == list(model)]
        return {str(row[key]): row["found"] for row in own}


def measure(models: Sequence[Model], tasks: Sequence[LocalTask], book: Book, rounds: int) -> None:
    """Score what has no row yet, then take the times that are missing."""
    for model in models:
        missing = [task for task in tasks if task.name not in book.of(model, "task")]
        encoder = load_encoder(model.folder, model.dtype) if missing else None
        for task in missing:
            assert encoder is not None
            found = scores(encoder, task)
            book.add(model=list(model), task=task.name, type=task.type, found=found)
            print(model.name, task.name, *(f"{k} {v:.2f}" for k, v in found.items()), flush=True)
    texts = timed_texts(tasks)
    of_texts = content_hash(texts)  # times of other texts do not compare
    todo = [
        (n, m)
        for n in range(rounds)
        for m in models
        if f"{n} {of_texts}" not in book.of(m, "round")
    ]
    encoders = {model: load_encoder(model.folder, model.dtype) for _, model in todo}
    for encoder in encoders.values():
        encoder.encode_document(texts[:16])
    for number, model in todo:
        started = time.perf_counter()
        encoders[model].encode_document(texts)
        seconds = time.perf_counter() - started
        found = {"seconds": seconds} | (sizes_of(model, encoders[model]) if number == 0 else {})
        book.add(model=list(model), round=f"{number} {of_texts}", found=found)


def sizes_of(model: Model, encoder: Encoder) -> dict[str, float]:
    """Parameters, and megabytes of the weights as they are computed with; of a graph, its files."""
    if not isinstance(encoder, NVEmbed):
        files = [one for one in Path(model.folder).iterdir() if one.name.startswith(GRAPH_FILE)]
        return {"megabytes": sum(file.stat().st_size for file in files) / 1e6}
    plain = NVEmbed.from_pretrained(model.folder, device="cpu", dtype="bfloat16")
    parameters = sum(weight.numel() for weight in plain.parameters())
    return {"parameters": parameters, "megabytes": sum(weight_bytes(encoder).values()) / 1e6}


def table(models: Sequence[Model], tasks: Sequence[LocalTask], book: Book) -> str:
    """The Markdown table, of the tasks that were asked for."""
    of_texts = content_hash(timed_texts(tasks))
    lines = [
        "| model | computes in | parameters, M | MB | seconds | times as fast | mean of tasks "
        "| lost | nDCG@10 | int8 vectors | binary vectors | keep | binary documents | keep |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    first_mean = first_seconds = 0.0
    for model in models:
        of_tasks = {task.name: book.of(model, "task")[task.name] for task in tasks}
        rounds = [f for key, f in book.of(model, "round").items() if key.endswith(of_texts)]
        mean = statistics.fmean(found[FLOAT] for found in of_tasks.values())
        seconds = statistics.median(found["seconds"] for found in rounds)
        if model is models[0]:
            first_mean, first_seconds = mean, seconds
        parameters, megabytes = rounds[0].get("parameters"), rounds[0]["megabytes"]
        retrieval = [found for found in of_tasks.values() if INT8 in found]
        of_vectors = _of_vectors(retrieval) if retrieval else ["–"] * 6
        cells = [model.name, model.dtype, f"{parameters / 1e6:.1f}" if parameters else "–"]
        cells += [f"{megabytes:.0f}", f"{seconds:.1f}"]
        cells += [f"{first_seconds / seconds:.2f}", f"{mean:.2f}", f"{first_mean - mean:+.2f}"]
        lines.append(f"| {' | '.join(cells + of_vectors)} |")
    return "\n".join(lines) + "\n"


def _of_vectors(retrieval: Sequence[Mapping[str, float]]) -> list[str]:
    """Cells of the ways to hold a vector; of signs also what they keep of the floats' score."""
    plain, *rounded = (statistics.fmean(found[kind] for found in retrieval) for kind in ROUNDINGS)
    eight, *signs = rounded
    return [f"{plain:.2f}", f"{eight:.2f}"] + [
        cell for score in signs for cell in (f"{score:.2f}", f"{score / plain:.1%}")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", nargs=3, action="append", required=True)
    parser.add_argument("--tasks", type=Path, nargs="+", required=True)
    parser.add_argument("--names", nargs="*", help="of the tasks; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    models = [Model(*given, contents_fingerprint(given[1])) for given in arguments.model]
    tasks = load_tasks(arguments.tasks, arguments.names)
    book = Book(arguments.out / "results.jsonl")
    measure(models, tasks, book, arguments.rounds)
    text = table(models, tasks, book)
    write_text(arguments.out / "results.md", text)
    print(text)


if __name__ == "__main__":
    main()
