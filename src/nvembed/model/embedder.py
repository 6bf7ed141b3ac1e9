"""``NVEmbed``: backbone, pooling and normalisation as one sentence-transformers model.

Saving, prompts, similarity, truncated and quantised outputs come from ``SentenceTransformer``. What
is ours: loading without remote code, instructions (``task=``), and encoding in packs of a token
budget instead of padded batches. Next file in the tour: ``losses/contrastive.py``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module, Normalize
from sentence_transformers.util import import_from_string, load_file_path, truncate_embeddings
from torch import Tensor

from nvembed.core.errors import ModelError
from nvembed.core.progress import progress
from nvembed.model.backbone import Backbone
from nvembed.model.pooling import (
    LastTokenPooling,
    LatentAttentionPooling,
    MeanPooling,
    Pooling,
    SelfAttentionPooling,
    build_pooling,
)
from nvembed.model.settings import AttentionDirection, PoolingKind
from nvembed.text.packing import flatten, plan_packs
from nvembed.text.template import query_prompt
from nvembed.text.tokens import TokenizedText

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

# Tokens per forward in encode. On a CPU a pack should stay in its caches; a GPU wants to be filled.
CPU_PACK_TOKENS = 2048
CUDA_PACK_TOKENS = 16384


class NVEmbed(SentenceTransformer):
    """A text-embedding model made from a decoder LM by the NV-Embed recipe.

    Use :meth:`from_pretrained`; the constructor is that of ``SentenceTransformer``.
    """

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
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_folder: str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load a saved embedding model, or start one from any decoder or encoder.

        Args:
            name_or_path: folder or hub id. With a ``modules.json`` it is an embedding model and is
                loaded as saved; otherwise it is a language model to start from.
            pooling: for a new model (default ``mean``, which needs no training).
            num_latents: for a new latent pooling (default 512).
            num_heads: for a new latent or self-attention pooling (default 8).
            attention: for a new model (default ``bidirectional``).
            max_tokens: longest sequence; ``None`` keeps the saved limit (512 for a new model).
            device: ``None`` picks the best there is.
            dtype: ``None`` keeps the saved dtype (float32 for a new model).
            revision: commit, tag or branch on the hub.
            token: of the hub, for gated models.
            cache_folder: where downloads are kept.
            local_files_only: never ask the hub.

        Raises:
            ModelError: nothing there that can be loaded, or options that a saved model fixes
                already.
        """
        source = str(name_or_path)
        hub: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "cache_folder": cache_folder,
            "local_files_only": local_files_only,
        }
        if Path(source).is_file() or (source.count("/") > 1 and not Path(source).is_dir()):
            raise ModelError("no such model folder", where=source, hint="Check the path")
        modules_json = load_file_path(source, "modules.json", **hub)
        if modules_json is not None:
            if any(x is not None for x in (pooling, num_latents, num_heads, attention)):
                raise ModelError(
                    "pooling and attention are fixed in a saved model",
                    where=source,
                    hint="Leave these options out, or start from the language model",
                )
            return cls._load_saved(source, modules_json, device, dtype, max_tokens, hub)
        backbone = Backbone.from_pretrained(
            source,
            dtype=dtype,
            attention=attention or "bidirectional",
            max_tokens=max_tokens or 512,
            **hub,
        )
        head = build_pooling(
            pooling or "mean",
            backbone.width,
            num_latents=num_latents or 512,
            num_heads=num_heads or 8,
        )
        return cls(modules=[backbone, head, Normalize()], device=device)

    @classmethod
    def _load_saved(
        cls,
        source: str,
        modules_json: str,
        device: str | None,
        dtype: torch.dtype | str | None,
        max_tokens: int | None,
        hub: dict[str, Any],
    ) -> Self:
        modules: list[torch.nn.Module] = []
        for entry in json.loads(Path(modules_json).read_text(encoding="utf-8")):
            module_class = _OWN_MODULES.get(entry["type"])
            if module_class is None:
                if not entry["type"].startswith("sentence_transformers."):
                    raise ModelError(
                        f"module class {entry['type']} is not part of nvembed",
                        where=modules_json,
                        expected=", ".join(sorted(_OWN_MODULES)),
                        hint="Load it with SentenceTransformer(..., trust_remote_code=True)",
                    )
                module_class = import_from_string(entry["type"])
            model_kwargs = {"dtype": dtype} if dtype is not None else {}
            modules.append(
                module_class.load(
                    source,
                    subfolder=entry["path"],
                    model_kwargs=model_kwargs,
                    trust_remote_code=False,
                    **hub,
                )
            )
        model = cls(modules=modules, device=device)
        settings = load_file_path(source, "config_sentence_transformers.json", **hub)
        if settings is not None:
            saved = json.loads(Path(settings).read_text(encoding="utf-8"))
            model.prompts.update(saved.get("prompts") or {})
            model.default_prompt_name = saved.get("default_prompt_name")
            model.similarity_fn_name = saved.get("similarity_fn_name")
        if max_tokens is not None:
            model.max_seq_length = max_tokens
        return model

    @property
    def backbone(self) -> Backbone:
        """The first module."""
        module = self[0]
        assert isinstance(module, Backbone)
        return module

    @property
    def pooling(self) -> Pooling:
        """The second module."""
        module = self[1]
        assert isinstance(module, Pooling)
        return module

    @property
    def dimension(self) -> int:
        """Width of the embeddings, after truncation where ``truncate_dim`` is set."""
        width = self.pooling.width
        return width if self.truncate_dim is None else min(width, self.truncate_dim)

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
                model's
                ``query`` prompt is used if it has one.
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

    @torch.inference_mode()
    def _inference(  # type: ignore[override]  # as SentenceTransformer declares it
        self,
        inputs: list[Any],
        *,
        prompt: str | None,
        batch_size: int,
        show_progress_bar: bool,
        output_value: str | None,
        save_to_cpu: bool,
        normalize_embeddings: bool,
        truncate_dim: int | None,
        device: Any = None,
        **options: Any,
    ) -> Any:
        """Encode in packs of a token budget, longest first; ``encode`` calls it.

        ``batch_size`` has no meaning without padding and is ignored; so are the sizes of the
        batches that the caller cuts, since vectors do not depend on their neighbours.
        """
        if output_value != "sentence_embedding":
            return super()._inference(
                inputs,
                prompt=prompt,
                batch_size=batch_size,
                show_progress_bar=show_progress_bar,
                output_value=output_value,
                save_to_cpu=save_to_cpu,
                normalize_embeddings=normalize_embeddings,
                truncate_dim=truncate_dim,
                device=device,
                **options,
            )
        target = self._resolve_inference_device(device)
        self.eval()
        texts = self.backbone.tokenize_texts(inputs, prompt or "")
        lengths = [len(text) for text in texts]
        budget = CUDA_PACK_TOKENS if target.type == "cuda" else CPU_PACK_TOKENS
        packs = plan_packs(lengths, budget)
        rows: list[Tensor] = []
        with (
            self.pooling.fixed_weights(),
            progress(sum(lengths), "encode", shown=show_progress_bar) as bar,
        ):
            for pack in packs:
                embedding_ND = embed_pack(self, [texts[row] for row in pack])
                if truncate_dim is not None:
                    embedding_ND = truncate_embeddings(embedding_ND, truncate_dim)
                if normalize_embeddings:
                    embedding_ND = torch.nn.functional.normalize(embedding_ND, dim=1)
                rows.append(embedding_ND.cpu() if save_to_cpu else embedding_ND)
                bar.advance(sum(lengths[row] for row in pack))
        if not rows:
            width = min(truncate_dim or self.dimension, self.pooling.width)
            return torch.empty((0, width), device=target)
        stacked = torch.cat(rows)
        order = torch.tensor([row for pack in packs for row in pack], device=stacked.device)
        return torch.empty_like(stacked).index_copy_(0, order, stacked)


def embed_pack(model: torch.nn.Module, texts: Sequence[TokenizedText]) -> Tensor:
    """The only forward of training and encoding.

    Args:
        model: an ``NVEmbed``, or one that accelerate has wrapped.
        texts: one pack.

    Returns:
        ``(N, D)`` embeddings, L2-normalised, rows in the order of ``texts``.
    """
    embedding_ND: Tensor = model({"flat": flatten(texts)})["sentence_embedding"]
    return embedding_ND
