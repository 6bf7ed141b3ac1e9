"""What weight-only quantisation of the backbone costs and saves.

    python benchmarks/quantization.py                    # assets/decoder-6m
    python benchmarks/quantization.py --model MODEL

For float32, bfloat16 and every kind of ``nvembed.model.quantization``: bytes of the backbone's
weights with and without the embedding table, the cosine to the float32 vectors, and how many of a
text's ten nearest texts stay the same. The texts are the lines of this repository's documents.
Prints a Markdown table; needs ``pip install 'nvembed[quantization]'``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nvembed.model.embedder import NVEmbed
from nvembed.model.memory import weight_bytes
from nvembed.model.quantization import quantize_backbone

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("float32", "bfloat16", "int8", "fp8", "nf4")
NEAREST = 10


def lines_of_documents(root: Path = ROOT) -> list[str]:
    """Every line of more than 40 characters in the documents of the repository, once."""
    files = [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))]
    found = [line.strip() for file in files for line in file.read_text("utf-8").splitlines()]
    return list(dict.fromkeys(line for line in found if len(line) > 40))


def load(model: str, kind: str) -> NVEmbed:
    """The model with its backbone as ``kind``."""
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    loaded = NVEmbed.from_pretrained(model, device="cpu", dtype=dtype, max_tokens=256)
    if kind in ("int8", "fp8", "nf4"):
        quantize_backbone(loaded, kind)
    return loaded


def nearest_kept(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Share of each text's nearest texts by ``first`` that ``second`` has too."""

    def nearest(vectors: NDArray[np.float32]) -> NDArray[np.intp]:
        cosine = vectors @ vectors.T - 2 * np.eye(len(vectors), dtype=np.float32)
        return np.argsort(-cosine, axis=1, kind="stable")[:, :NEAREST]

    pairs = zip(nearest(first), nearest(second), strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in pairs]))


def table(model: str, texts: list[str]) -> list[str]:
    """The rows of the Markdown table."""
    lines = [
        "| backbone | weights, MB | without embeddings, MB | cosine, least | mean "
        f"| {NEAREST} nearest kept |",
        "|---|---|---|---|---|---|",
    ]
    reference: NDArray[np.float32] | None = None
    for kind in KINDS:
        loaded = load(model, kind)
        backbone = loaded.backbone.model
        table_bytes = sum(weight_bytes(backbone.get_input_embeddings()).values())
        total = sum(weight_bytes(backbone).values())
        vectors = loaded.encode(texts)
        reference = vectors if reference is None else reference
        cosine = (vectors * reference).sum(1)
        lines.append(
            f"| {kind} | {total / 1e6:.2f} | {(total - table_bytes) / 1e6:.2f} | "
            f"{cosine.min():.5f} | {cosine.mean():.5f} | {nearest_kept(reference, vectors):.1%} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "assets" / "decoder-6m"))
    arguments = parser.parse_args()
    texts = lines_of_documents()
    print(f"{arguments.model}, {len(texts)} texts")
    print("\n".join(table(arguments.model, texts)))


if __name__ == "__main__":
    main()
