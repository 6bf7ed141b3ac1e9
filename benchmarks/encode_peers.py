"""Encoding against sentence-transformers, onnxruntime, OpenVINO and vLLM, same weights.

    python benchmarks/encode_peers.py
    python benchmarks/encode_peers.py --model smollm2-135m
    python benchmarks/encode_peers.py --parts questions --scale 0.01 --runs 1   # a rehearsal

Parts are three distributions of length: questions and paragraphs of SQuAD, and both mixed with long
texts. Every run is a process of its own, the sides take turns, and tokens are those of the texts,
without padding. onnxruntime has no bfloat16 on a CPU; sentence-transformers joins texts without
padding only with flash attention, which needs a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from peers.bench import DTYPES, Bench, Case, Options, Side, of_all, option_parser
from peers.models import length_parts, open_models

from nvembed.core.files import write_json

PARTS = ("questions", "paragraphs", "mixed")
OWN_BATCHES = ("nvembed", "vllm")
OF_GRAPH = ("onnxruntime", "openvino")
BATCHES = {False: (2, 8, 32, 128), True: (1, 4, 16)}  # by whether the model is large


def sides(batches: Sequence[int]) -> list[Side]:
    """All, by type; the first is ours."""

    def tried(_: str) -> list[Options]:
        return [{"batch_size": size} for size in batches]

    names = ("nvembed", "sentence-transformers", *OF_GRAPH, "vllm")
    return [
        Side(name, dtype) if name in OWN_BATCHES else Side(name, dtype, tried)
        for dtype in DTYPES
        for name in names
        if (name, dtype) != ("onnxruntime", "bfloat16")
    ]


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scale", type=float, help="of the number of texts; 0.2, or 0.02 if large")
    given = parser.parse_args()
    models = open_models(given.model, given.output)
    scale = given.scale or (0.02 if models.large else 0.2)
    bench = Bench("encode", given, models, {"scale": scale})
    every = sides(BATCHES[models.large])
    chosen = bench.installed(every)
    graphs = any(side.name in OF_GRAPH for side in chosen)
    models.need("ours", "stock", *["onnx"] * graphs)
    folder, checks = models.folder, models.checks()[0]
    texts = length_parts(given.data, scale)
    file = bench.out / "texts.json"
    write_json(file, texts)
    tokens = {part: models.count_tokens(of_part) for part, of_part in texts.items()}

    def measure(side: Side, cases: Sequence[Case]) -> Iterator[tuple[Case, dict[str, Any]]]:
        job = {"side": side.name, "dtype": side.dtype, "threads": given.threads, "checks": checks}
        job |= {"models": str(folder), "texts": str(file.absolute())}
        job["cases"] = [(case.part, case.options) for case in cases]
        found = bench.run("peers.encoders", job, side.name)
        cosine = models.cosine(found.pop("checks"))
        for case, seconds in zip(cases, found.pop("seconds"), strict=True):
            part = case.part
            values = {"rate": tokens[part] / seconds, "texts": len(texts[part]) / seconds}
            yield case, {**values, "cosine": cosine, **found}

    bench.turns(given.parts, chosen, measure)
    columns = {
        "texts/s": of_all("texts", ",.1f"),
        "peak, MB": of_all("peak_mb", ",.0f", max),
        "least cosine to our float32": of_all("cosine", ".6f", min),
    }
    bench.report(PARTS, every, columns)


if __name__ == "__main__":
    main()
