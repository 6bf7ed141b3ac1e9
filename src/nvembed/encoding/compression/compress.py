"""``nvembed compress``: a smaller model of a model, what each step changed, and how to recover.

The folder is an ordinary model. ``compression.json`` has what was left out and, after each step,
the size, the time and the cosine to the whole model on texts that chose nothing. ``recover.yaml``
is a recipe that teaches the small model the vectors of the whole one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from sentence_transformers.base.modules import Normalize
from torch import Tensor

from nvembed.core.arguments import checked
from nvembed.core.errors import ConfigError, DataError, ModelError
from nvembed.core.files import atomic_folder, write_json, write_text
from nvembed.core.outputs import check_new_folder
from nvembed.core.reporting import progress
from nvembed.data.instructions import query_prompt
from nvembed.data.reading import read_documents
from nvembed.encoding.compression.depth import layers_to_leave_out
from nvembed.encoding.compression.fitting import fit_layers
from nvembed.encoding.compression.pruning import (
    Packs,
    channel_lengths,
    cut_mlps,
    decoder_layers,
    gated_mlps,
    leave_out_layers,
    longest,
)
from nvembed.encoding.compression.recovery import RECIPE, instructions_of, recovery_recipe
from nvembed.encoding.compression.steps import Measured, Step
from nvembed.encoding.compression.vocabulary import (
    Vocabulary,
    cut_tokenizer,
    cut_vocabulary,
    token_counts,
    tokens_to_keep,
)
from nvembed.encoding.export.folders import load_own
from nvembed.interop.model_folder import check_model_name
from nvembed.model.backbone import Backbone
from nvembed.model.bulk import encode_window
from nvembed.model.card import CARD, model_card
from nvembed.model.embedder import NVEmbed
from nvembed.model.packing import plan_packs
from nvembed.model.packs import CPU_PACK_TOKENS
from nvembed.model.pooling import MeanPooling
from nvembed.model.tokens import TokenizedText

COMPRESS = "compress"
RECORD = "compression.json"
_ANY_OF = "layers, mlp, vocabulary or head_free"
_FEWER_PACKS = 3  # to compare layers a part of what they are fitted by will do
_HELD_OUT = 256  # texts; of a small file a quarter
_Count = Annotated[int, Field(ge=1)]


@dataclass(slots=True)
class Compressed:
    """What became of a model; ``compression.json`` has the same.

    Attributes:
        model: what it was made of.
        texts: the file of texts.
        held_out: texts that chose nothing.
        steps: in order, the first is the whole model.
        left_out: what each step left out, by its name.
        fitted: what each step fitted, by its name: layers and their errors (``fitting.py``).
    """

    model: str
    texts: str
    held_out: int
    steps: list[Step] = field(default_factory=list)
    left_out: dict[str, Any] = field(default_factory=dict)
    fitted: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


@checked
def compress(
    name: str,
    texts: str | Path,
    to: str | Path,
    *,
    layers: _Count | None = None,
    mlp: _Count | None = None,
    vocabulary: _Count | None = None,
    head_free: bool = False,
    sample: _Count = 64,
    fit: _Count = 512,
) -> Compressed:
    """Write a smaller model: fewer tokens, fewer layers, narrower MLPs (both fitted), no head.

    Args:
        name: folder or hub id of a model that was saved here or has the official layout.
        texts: a file of documents, as ``nvembed encode`` reads it. A quarter of them, at most 256,
            is held out to measure with.
        to: the new folder; it appears when it is complete.
        layers: how many stay; ``None`` is all. See ``encoding/compression/depth.py`` for which.
        mlp: channels that stay in the MLP of each layer; ``None`` is all.
        vocabulary: most tokens that stay, chosen by the texts; ``None`` is all.
        head_free: the mean of all tokens, those of the prompt among them, in place of the pooling.
            Until it has recovered such a model is another one, in queries above all.
        sample: texts that layers and channels are chosen by.
        fit: texts that what stays is fitted by, every other one as a query.

    Raises:
        ConfigError: nothing to do, a number not below the model's, or ``to`` holds something.
        DataError: the texts cannot be read, or are fewer than eight different ones.
        ModelError: the model cannot be loaded, or its family or tokenizer cannot be cut.
    """
    to = Path(to)
    check_new_folder(to, [name, texts])
    sizes = {"layers": layers, "mlp": mlp, "vocabulary": vocabulary}
    if not (any(sizes.values()) or head_free):
        raise ConfigError("nothing is to be made smaller", expected=_ANY_OF)
    check_model_name(name)
    held_out, corpus = _split(Path(texts))
    model = load_own(name, "auto")
    tokens = None if vocabulary is None else Vocabulary.of(model.backbone.tokenizer)
    _check_sizes(model, sizes, tokens)
    found = Compressed(name, str(texts), len(held_out))
    measured = Measured(model, held_out)
    found.steps.append(measured.whole)
    if tokens is not None and vocabulary is not None:
        found.left_out["vocabulary"] = _cut_vocabulary(model, tokens, corpus, vocabulary)
        found.steps.append(measured.after("vocabulary", model))
    if layers is not None or mlp is not None:
        packs, fitting = _packs(model, corpus[:sample]), _fitting_packs(model, corpus[:fit])
    for step, cut in (("layers", _leave_out_layers), ("mlp", _cut_mlps)):
        if (size := sizes[step]) is not None:
            cut(model, packs, fitting, size, found)
            found.steps.append(measured.after(step, model))
    if head_free:
        found.left_out["head"] = type(model.pooling).__name__
        model = without_head(model)
        found.steps.append(measured.after("head", model))
    _write(model, found, to, held_out[:8], len(corpus))
    return found


def _write(model: NVEmbed, found: Compressed, to: Path, proof: Sequence[str], learned: int) -> None:
    """The folder, with a recipe that learns from ``learned`` of the texts."""
    recipe = recovery_recipe(model, found.model, Path(found.texts), to, learned)
    with atomic_folder(to, COMPRESS) as temporary:
        model.save_pretrained(str(temporary), create_model_card=False)
        _prove(model, temporary, proof, found.model)
        card = model_card(model, origin=found.model, place=str(to), made=_account(found))
        write_text(temporary / CARD, card)
        record = asdict(found) | {"steps": [step._asdict() for step in found.steps]}
        write_json(temporary / RECORD, record)
        write_text(temporary / RECIPE, recipe)


def _account(found: Compressed) -> str:
    """What the steps changed, as a table for the card."""
    rows = [
        f"| {s.step} | {s.parameters:,} | {s.bytes / 1e6:.0f} | {s.cosine:.3f} | {s.queries:.3f} |"
        for s in found.steps
    ]
    return "\n".join(
        (
            f"Cosines to the whole model's vectors are means of {found.held_out} texts that chose",
            "nothing, as documents, and of half of them as queries.",
            "Scores of that model are not those of this one.\n",
            "| after | parameters | MB | documents | queries |\n|---|---|---|---|---|",
            *rows,
        )
    )


def without_head(model: NVEmbed) -> NVEmbed:
    """The same backbone, whose tokens are all pooled by their mean, and the same prompts."""
    old = model.backbone
    backbone = Backbone(
        old.model,
        old.tokenizer,
        attention=old.attention,
        max_tokens=old.max_tokens,
        text_style="whole",
        add_bos=old.add_bos,
        add_eos=old.add_eos,
    )
    free = NVEmbed(modules=[backbone, MeanPooling(backbone.width), Normalize()], device="cpu")
    free.prompts = model.prompts
    free.default_prompt_name = model.default_prompt_name
    free.similarity_fn_name = model.similarity_fn_name
    return free


def _split(file: Path) -> tuple[list[str], list[str]]:
    """Different texts in an order of their own: those held out, and the others."""
    texts = list(dict.fromkeys(row.text for row in read_documents([file], keep_going=None)))
    if len(texts) < 8:
        raise DataError(f"{len(texts)} different texts", where=str(file), expected="at least 8")
    mixed = [texts[row] for row in np.random.default_rng(0).permutation(len(texts))]
    held_out = min(_HELD_OUT, len(texts) // 4)
    return mixed[:held_out], mixed[held_out:]


def _check_sizes(model: NVEmbed, wanted: dict[str, int | None], tokens: Vocabulary | None) -> None:
    """Refuse what is not smaller, all of it at once."""
    sizes = {}
    if wanted["layers"] is not None:
        sizes["layers"] = len(decoder_layers(model))
    if wanted["mlp"] is not None:
        sizes["mlp"] = gated_mlps(model)[0].down_proj.in_features
    if tokens is not None:
        sizes["vocabulary"] = len(tokens.ids)
    wrong = [
        f"{key}: {value} given, expected 1 to {sizes[key] - 1}"
        for key, value in wanted.items()
        if value is not None and value >= sizes[key]
    ]
    if wrong:
        raise ConfigError("; ".join(wrong), where=COMPRESS)


def _packs(model: NVEmbed, texts: Sequence[str]) -> Packs:
    return _planned(model.backbone.tokenize_texts(texts))


def _fitting_packs(model: NVEmbed, texts: Sequence[str]) -> Packs:
    """Documents, and as many queries with the model's instructions in turn."""
    tokenize, instructions = model.backbone.tokenize_texts, instructions_of(model)
    read = list(tokenize(texts[::2]))
    for number, instruction in enumerate(instructions):
        own = texts[1 + 2 * number :: 2 * len(instructions)]
        read += tokenize(own, query_prompt(instruction)) if own else []
    return _planned(read)


def _planned(tokenized: Sequence[TokenizedText]) -> Packs:
    plan = plan_packs(list(map(len, tokenized)), CPU_PACK_TOKENS)
    return [[tokenized[row] for row in pack] for pack in plan]


def _cut_vocabulary(
    model: NVEmbed, tokens: Vocabulary, corpus: Sequence[str], size: int
) -> dict[str, Any]:
    tokenizer = model.backbone.tokenizer
    template = query_prompt("Find it")  # behind which the first word of a text has a space
    first_words = (template + text.split(maxsplit=1)[0] for text in corpus if text.strip())
    counts = token_counts(tokenizer, corpus) + token_counts(tokenizer, first_words)
    prompts = token_counts(tokenizer, [template, *filter(None, model.prompts.values())])
    names = {number: token for token, number in tokens.ids.items()}
    always = [names[number] for number in np.flatnonzero(prompts).tolist()]
    kept = tokens_to_keep(tokens, counts, size, always)
    cut, old_ids = cut_tokenizer(tokenizer, tokens, kept)
    cut_vocabulary(model.backbone, cut, old_ids)
    share = counts[old_ids].sum() / max(1, counts.sum())
    return {"tokens": len(tokens.ids) - len(kept), "of_the_texts": float(1 - share)}


def _leave_out_layers(
    model: NVEmbed, packs: Packs, fitting: Packs, keep: int, found: Compressed
) -> None:
    with progress(len(decoder_layers(model)), "layers") as bar:
        few = fitting[::_FEWER_PACKS]
        runs = layers_to_leave_out(model, packs, few, keep, lambda: bar.advance(1))
    numbers = [layer for run in runs for layer in run.layers]
    _fit(model, fitting, found, "layers", numbers)
    leave_out_layers(model, numbers)
    found.left_out["layers"] = [run._asdict() for run in runs]


def _cut_mlps(model: NVEmbed, packs: Packs, fitting: Packs, keep: int, found: Compressed) -> None:
    before: int = gated_mlps(model)[0].down_proj.in_features
    lengths = channel_lengths(model, packs)
    _fit(model, fitting, found, "mlp", (), longest(lengths, keep))
    cut_mlps(model, lengths, keep)
    found.left_out["mlp"] = {"channels": before - keep}


def _fit(
    model: NVEmbed,
    packs: Packs,
    found: Compressed,
    step: str,
    dropped: Sequence[int],
    kept: Sequence[Tensor] | None = None,
) -> None:
    with progress(len(decoder_layers(model)) - len(dropped), "fit") as bar:
        rows = fit_layers(model, packs, dropped, kept, lambda: bar.advance(1))
    found.fitted[step] = [row._asdict() for row in rows]


def _prove(model: NVEmbed, folder: Path, texts: Sequence[str], name: str) -> None:
    """Compare what was written with what is in memory: tokenizers are rebuilt when they load."""
    written = encode_window(load_own(str(folder), "auto"), texts, side="document")
    difference = float(np.abs(written - encode_window(model, texts, side="document")).max())
    if not difference <= 1e-5:
        raise ModelError(
            f"the written model gives other vectors (by up to {difference:.1e})",
            where=name,
            hint="Leave vocabulary out, or report the model's family",
        )
