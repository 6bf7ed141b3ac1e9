"""``NVEmbed``: backbone, pooling and normalisation as one sentence-transformers model.

Saving, prompts, similarity, truncated and quantised outputs come from ``SentenceTransformer``. What
is ours: loading without remote code, instructions (``task=``), and encoding in packs of a token
budget instead of padded batches (``model/encoding.py``). Next file in the tour:
``losses/contrastive.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from sentence_transformers.base.modules import Module, Normalize
from sentence_transformers.util import get_device_name, import_from_string

from nvembed.core.errors import ModelError
from nvembed.model.backbone import Backbone
from nvembed.model.encoding import PackModel
from nvembed.model.kind import model_kind
from nvembed.model.native_elementwise import native_elementwise
from nvembed.model.native_layer import native_layers
from nvembed.model.official_load import load_official
from nvembed.model.placement import DeviceMap
from nvembed.model.pooling import (
    LastTokenPooling,
    LatentAttentionPooling,
    MeanPooling,
    SelfAttentionPooling,
    build_pooling,
)
from nvembed.model.products import fast_products
from nvembed.model.settings import AttentionDirection, PoolingKind
from nvembed.model.source import ModelSource
from nvembed.model.stock import read_stock
from nvembed.text.instructions import task_prompts
from nvembed.text.template import query_prompt

# What modules.json may name without remote code: our classes by name, and anything inside
# sentence-transformers itself.
_OWN_MODULES: dict[str, type[Module]] = {
    f"{cls.__module__}.{cls.__name__}": cls
    for cls in (
        Backbone,
        MeanPooling,
        LastTokenPooling,
        LatentAttentionPooling,
        SelfAttentionPooling,
    )
}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where and in which type the weights of a model are wanted; see ``from_pretrained``."""

    device: str | None
    device_map: DeviceMap | None
    dtype: torch.dtype | str | None


class NVEmbed(PackModel):
    """A text-embedding model made from a decoder LM by the NV-Embed recipe.

    Use :meth:`from_pretrained`; the constructor is that of ``SentenceTransformer``.

    Attributes:
        types_before_training: of parameters that are held in float32 while they are trained, by
            name; see ``model/master_weights.py``.
    """

    types_before_training: dict[str, torch.dtype]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.types_before_training = {}
        self._compute_fast()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compute_fast()

    def _compute_fast(self) -> None:
        fast_products(self)
        native_elementwise(self)
        native_layers(self)

    def start_multi_process_pool(self, *given: Any, **options: Any) -> Any:
        """As in sentence-transformers, which ``encode(device=[…])`` calls for several devices."""
        # Classes that were derived here have no name to send: each process derives its own.
        derived = [m for m in self.modules() if type(m).__name__.startswith("Native")]
        kinds = [type(module) for module in derived]
        for module in derived:
            module.__class__ = type(module).__bases__[0]
        try:
            return super().start_multi_process_pool(*given, **options)
        finally:
            for module, kind in zip(derived, kinds, strict=True):
                module.__class__ = kind

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        pooling: PoolingKind | None = None,
        num_latents: int | None = None,
        num_heads: int | None = None,
        attention: AttentionDirection | None = None,
        max_tokens: int | None = None,
        device: str | None = None,
        device_map: DeviceMap | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_folder: str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load an embedding model, or start one from any decoder or encoder.

        Args:
            name_or_path: folder or hub id. ``nvidia/NV-Embed-v2``, ``-v1`` and folders in their
                layout (``model_type: nvembed``) are read without their code; another one with a
                ``modules.json`` is loaded as saved; anything else is a language model to start
                from. So is a model of stock sentence-transformers modules, whose transformer,
                length limit and prompts are taken.
            pooling: for a new model (default ``mean``, which needs no training; the model's own
                where one of stock modules is started from).
            num_latents: for a new latent pooling (default 512).
            num_heads: for a new latent or self-attention pooling (default 8).
            attention: for a new model (default ``bidirectional``).
            max_tokens: longest sequence; ``None`` keeps the saved limit (512 for a new model). A
                stock model's own limit is never exceeded.
            device: ``None`` picks the best there is.
            device_map: spread the backbone over devices: ``"auto"``, or module name → device.
            dtype: ``None`` keeps the saved dtype (float32 for a new model; for an official one
                bfloat16 on CUDA and float32 elsewhere); ``"auto"`` is the stored dtype.
            revision: commit, tag or branch on the hub.
            token: of the hub, for gated models.
            cache_folder: where downloads are kept.
            local_files_only: never ask the hub.

        Raises:
            ModelError: nothing there that can be loaded, or options that a saved model fixes
                already.
        """
        source = ModelSource(str(name_or_path), revision, token, cache_folder, local_files_only)
        source.check()
        place = _Place(device, device_map, dtype)
        new = {
            "pooling": pooling,
            "num_latents": num_latents,
            "num_heads": num_heads,
            "attention": attention,
        }
        match model_kind(source):
            case "official":
                _refuse_new(new, source)
                return cls._load_official(source, place, max_tokens)
            case "saved":
                stock = read_stock(source)
                if stock is None:
                    _refuse_new(new, source)
                    return cls._load_saved(source, place, max_tokens)
                pooling = pooling or stock.pooling(source)
                own = stock.max_tokens or 512
                limit = min(max_tokens or own, own)
            case _:
                stock, limit = None, max_tokens or 512
        backbone = Backbone.from_pretrained(
            source.name,
            subfolder=stock.folder if stock else "",
            dtype=dtype,
            device_map=device_map,
            attention=attention or "bidirectional",
            max_tokens=limit,
            **source.options(),
        )
        head = build_pooling(
            pooling or "mean",
            backbone.width,
            num_latents=num_latents or 512,
            num_heads=num_heads or 8,
        )
        model = cls(modules=[backbone, head, Normalize()], device=device)
        if stock:
            model._read_settings(source)
        return model

    @classmethod
    def _load_official(cls, source: ModelSource, place: _Place, max_tokens: int | None) -> Self:
        device = place.device or get_device_name()
        backbone, pooling = load_official(
            source,
            device=device,
            device_map=place.device_map,
            dtype=place.dtype,
            max_tokens=max_tokens,
        )
        model = cls(modules=[backbone, pooling, Normalize()], device=device)
        model.prompts.update(task_prompts())
        model._read_settings(source)
        return model

    @classmethod
    def _load_saved(cls, source: ModelSource, place: _Place, max_tokens: int | None) -> Self:
        modules_json = source.require("modules.json")
        modules: list[torch.nn.Module] = []
        for entry in json.loads(modules_json.read_text(encoding="utf-8")):
            module_class = _OWN_MODULES.get(entry["type"])
            if module_class is None:
                if not entry["type"].startswith("sentence_transformers."):
                    raise ModelError(
                        f"module class {entry['type']} is not part of nvembed",
                        where=str(modules_json),
                        expected=", ".join(sorted(_OWN_MODULES)),
                        hint="Load it with SentenceTransformer(..., trust_remote_code=True)",
                    )
                module_class = import_from_string(entry["type"])
            wanted = {"dtype": place.dtype, "device_map": place.device_map}
            model_kwargs = {key: value for key, value in wanted.items() if value is not None}
            modules.append(
                module_class.load(
                    source.name,
                    subfolder=entry["path"],
                    model_kwargs=model_kwargs,
                    trust_remote_code=False,
                    **source.options(),
                )
            )
        model = cls(modules=modules, device=place.device)
        model._read_settings(source)
        if max_tokens is not None:
            model.max_seq_length = max_tokens
        return model

    def _read_settings(self, source: ModelSource) -> None:
        """Take over the prompts that were saved with the model."""
        saved = source.read_json("config_sentence_transformers.json") or {}
        self.prompts.update(saved.get("prompts") or {})
        self.default_prompt_name = saved.get("default_prompt_name")
        self.similarity_fn_name = saved.get("similarity_fn_name")

    def encode_query(  # type: ignore[override]  # one signature for the overloads
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        task: str | None = None,
        **options: Any,
    ) -> Any:
        """Embed queries.

        Args:
            inputs: one text or a sequence of texts.
            prompt_name: name of a prompt saved with the model.
            prompt: the prompt itself; wins over ``prompt_name``.
            task: the instruction, e.g. "Given a question, retrieve passages that answer the
                question"; rendered by the template and wins over both. Without any of them the
                model's ``query`` prompt is used if it has one.
            **options: those of ``SentenceTransformer.encode``.
        """
        if task is not None:
            prompt, prompt_name = query_prompt(task), None
        return super().encode_query(inputs, prompt_name=prompt_name, prompt=prompt, **options)

    def encode_document(  # type: ignore[override]
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        task: str | None = None,
        **options: Any,
    ) -> Any:
        """Embed documents: bare texts; in symmetric tasks both sides carry ``task``."""
        if task is not None:
            prompt, prompt_name = query_prompt(task), None
        return super().encode_document(inputs, prompt_name=prompt_name, prompt=prompt, **options)


def _refuse_new(options: Mapping[str, object], source: ModelSource) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ModelError(
            f"{', '.join(given)}: pooling and attention are fixed in a saved model",
            where=source.name,
            hint="Leave these options out, or start from the language model",
        )
