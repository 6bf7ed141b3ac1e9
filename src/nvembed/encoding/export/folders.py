"""Write a trained model for others: NVIDIA's layout, our folder, or stock sentence-transformers.

nv-embed                config.json and tensor names that the official code reads
nvembed                 our own folder in another dtype, or an official checkpoint as one
sentence-transformers   stock modules, no code of ours (``encoding/export/stock.py``)
onnx                    one graph over padded rows (``encoding/export/onnx.py``)

Each with a model card (``model/card.py``). A GGUF file, ``encoding/export/gguf.py``, has none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from nvembed.core.arguments import checked
from nvembed.core.errors import ModelError
from nvembed.core.files import atomic_folder, write_json, write_text
from nvembed.core.outputs import check_new_folder
from nvembed.encoding.export import stock
from nvembed.interop.model_folder import ModelSource, check_model_name, model_kind
from nvembed.interop.official import LatentShape, official_name, write_config
from nvembed.interop.weights import MAX_SHARD_BYTES, write_shards
from nvembed.model.backbone import Backbone, merge_lora
from nvembed.model.card import CARD, model_card
from nvembed.model.embedder import NVEmbed
from nvembed.model.pooling import LatentAttentionPooling
from nvembed.model.tokens import TextTokenizer, plain_backend

EXPORT = "export"
ExportFormat = Literal["nv-embed", "nvembed", "sentence-transformers", "onnx"]
Dtype = Literal["float32", "bfloat16", "float16"]

# In NVIDIA's code the same texts must become the same tokens, with the same ones pooled.
_PROBE_TEXTS = ("how do I sort a list?", "A passage.", "")


@checked
def export_folder(
    name: str,
    to: str | Path,
    kind: ExportFormat,
    *,
    dtype: Dtype | None = None,
    max_shard_bytes: Annotated[int, Field(ge=1)] = MAX_SHARD_BYTES,
) -> None:
    """Load an embedding model and write it in another format.

    Args:
        name: folder or hub id of a model that was saved here or has the official layout.
        to: the new folder; it appears when it is complete.
        kind: see the module.
        dtype: type of the weights; ``None`` keeps the stored one (float32 for a graph).
        max_shard_bytes: size of a weight file of the official layout.

    Raises:
        ConfigError: ``to`` holds something, lies in the model, or is called like a file.
        ModelError: the model cannot be loaded, or not be expressed in that format.
    """
    to = Path(to)
    check_new_folder(to, [name])
    model = load_own(name, dtype or ("float32" if kind == "onnx" else "auto"))
    export_model(model, to, kind, name=name, max_shard_bytes=max_shard_bytes)


def load_own(name: str, dtype: Dtype | Literal["auto"]) -> NVEmbed:
    """An embedding model of our own modules, on the CPU; a ModelError where it is another."""
    check_model_name(name)
    if model_kind(ModelSource(name)) == "language_model":
        raise ModelError(
            "a language model, not an embedding model",
            where=name,
            expected="a folder that nvembed saved, or the layout of nvidia/NV-Embed-v2",
            hint="Train it first: nvembed train",
        )
    model = NVEmbed.from_pretrained(name, device="cpu", dtype=dtype)
    if not isinstance(model[0], Backbone):
        message = f"its first module is a {type(model[0]).__name__}"
        hint = "It is a sentence-transformers model already"
        raise ModelError(message, where=name, expected="a model that nvembed saved", hint=hint)
    return model


@checked
def export_model(
    model: NVEmbed,
    to: str | Path,
    kind: ExportFormat,
    *,
    name: str,
    max_shard_bytes: Annotated[int, Field(ge=1)] = MAX_SHARD_BYTES,
) -> None:
    """Write a loaded model in its own dtype; adapters are merged into it first.

    ``name`` is what it is called in errors and in its card; the rest as of ``export_folder``.
    """
    to = Path(to)
    merge_lora(model.backbone)
    for_stock = False
    with atomic_folder(to, EXPORT) as temporary:
        match kind:
            case "nv-embed":
                _write_official(model, temporary, to, name, max_shard_bytes)
            case "nvembed":
                model.save_pretrained(str(temporary), create_model_card=False)
            case "sentence-transformers":
                stock.write_stock(model, temporary, name=name)
                stock.prove_stock(model, temporary, name=name)
            case "onnx":
                from nvembed.encoding.export.onnx import write_onnx  # needs the extra onnx

                for_stock = write_onnx(model, temporary, name=name)
        card = model_card(model, kind, origin=name, place=str(to), stock=for_stock)
        write_text(temporary / CARD, card)


def _write_official(
    model: NVEmbed, folder: Path, to: Path, name: str, max_shard_bytes: int
) -> None:
    backbone, pooling = model.backbone, model.pooling
    config: Any = backbone.model.config
    if not isinstance(pooling, LatentAttentionPooling) or config.model_type != "mistral":
        raise ModelError(
            f"{type(pooling).__name__} on a {config.model_type} backbone",
            where=name,
            expected="LatentAttentionPooling on a mistral backbone; the official code knows "
            "no other",
            hint="Use --format nvembed, or sentence-transformers for mean pooling",
        )
    for key, found, wanted in (  # what an official text_config cannot say
        ("attention", backbone.attention, "bidirectional"),
        ("rope_type", config.rope_parameters.get("rope_type", "default"), "default"),
        ("head_dim", config.head_dim, config.hidden_size // config.num_attention_heads),
    ):
        if found != wanted:
            raise ModelError(f"{key} is {found!r}", where=name, expected=repr(wanted))
    _require_official_tokens(backbone, name)
    weights = {official_name(own) or own: value for own, value in model.state_dict().items()}
    # One dtype for all: training keeps the pooling in float32 above a backbone in 16 bit.
    dtype = backbone.model.dtype
    write_shards(
        folder,
        weights,
        {key: value.numel() * dtype.itemsize for key, value in weights.items()},
        lambda key: weights[key].detach().to("cpu", dtype).contiguous(),
        max_bytes=max_shard_bytes,
    )
    layer = pooling.layer
    shape = LatentShape(pooling.num_latents, layer.num_heads, layer.head_width)
    settings = write_config(config, shape, dtype=dtype, tokenizer_path=str(to))
    write_json(folder / "config.json", settings)
    stock.write_tokenizer(plain_backend(backbone.tokenizer), backbone, folder, official=True)
    stock.write_modules(model, folder)


def _require_official_tokens(backbone: Backbone, name: str) -> None:
    """Refuse a model for which NVIDIA's token rules would give other tokens than it learned."""
    official = TextTokenizer(backbone.tokenizer, max_tokens=backbone.max_tokens, style="official")
    for prompt in stock.PROOF_PROMPTS:
        ours = backbone.tokenize_texts(_PROBE_TEXTS, prompt)
        theirs = official(_PROBE_TEXTS, prompt)
        if backbone.text_style == "official" or ours == theirs:
            continue
        same_ids = [text.ids for text in ours] == [text.ids for text in theirs]
        raise ModelError(
            "the official code would "
            + ("pool other tokens of a query" if same_ids else "read other token ids")
            + " than this model was trained with",
            where=name,
            expected="a tokenizer like Mistral's, which puts BOS in front by itself and joins the "
            "prompt's last space to the text",
            hint="Use --format nvembed",
        )
