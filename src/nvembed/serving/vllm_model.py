"""Our architecture in vLLM: its decoder of the family, our token rules, pool mask and pooling.

A request is a text as the model reads it, a query with its prompt in front; vLLM has no other
field for it. What the pooling leaves out is found from the token ids: they are turned into text,
and a text that begins with a prompt of our template is tokenised by our rules again, which say
where pooling starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.layers.pooler.activations import PoolerNormalize
from vllm.model_executor.layers.pooler.common import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.seqwise import SequencePooler
from vllm.model_executor.layers.pooler.seqwise.heads import EmbeddingPoolerHead
from vllm.model_executor.layers.pooler.seqwise.methods import SequencePoolingMethod
from vllm.model_executor.models.adapters import as_embedding_model
from vllm.tokenizers.hf import get_cached_tokenizer

from nvembed.core.errors import ModelError
from nvembed.data.instructions import split_prompt
from nvembed.encoding.export.stock import attention_settings, closed_tokenizer
from nvembed.interop.loading import loading
from nvembed.interop.model_folder import ModelSource, model_kind
from nvembed.interop.official import official_name, read_config
from nvembed.interop.saved import read_limit, read_modules, read_values
from nvembed.model.backbone import Backbone, SavedBackbone
from nvembed.model.embedder import module_class
from nvembed.model.official_load import DEFAULT_MAX_TOKENS, load_tokenizer
from nvembed.model.packing import Segments
from nvembed.model.pooling import LatentAttentionPooling, Pooling
from nvembed.model.settings import AttentionDirection
from nvembed.model.tokens import TextTokenizer

# Backbones in the layout of NVIDIA, whose names of tensors begin so.
_OFFICIAL_PREFIX = "embedding_model."


def is_ours(name: str, revision: str | None) -> bool:
    """Whether a folder or hub id has the official layout or modules of ours."""
    source = ModelSource(name, revision)
    try:
        if model_kind(source) == "saved":
            return any(entry.type.startswith("nvembed.") for entry in read_modules(source))
        return model_kind(source) == "official"
    except ModelError:  # vLLM says in its own words what is wrong with it
        return False


def served_config(
    name: str, revision: str | None, read: Callable[[], tuple[dict[str, Any], Any]]
) -> tuple[dict[str, Any], Any]:
    """The content of ``config.json`` and the backbone's configuration, in vLLM's terms.

    ``read`` gives both as vLLM reads them.
    """
    source = ModelSource(name, revision)
    if model_kind(source) == "official":
        values = source.read_json("config.json") or {}
        config: Any = read_config(values, where=name)[0]
        config.architectures = ["MistralModel"]
        attention: AttentionDirection = "bidirectional"
    else:
        values, config = read()
        attention = _saved(source).attention
    config.update(attention_settings(config.to_dict(), attention))
    if getattr(config, "use_sliding_window", False):  # Qwen2's in some layers, which vLLM refuses
        config.use_sliding_window, config.sliding_window = False, None
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    config.nvembed_backbone = [_family_name(one, where=name) for one in config.architectures]
    config.model_max_length = served_tokenizer(source).max_tokens
    return values, config


def _family_name(architecture: str, *, where: str) -> str:
    """The name under which vLLM has its own code for a decoder.

    By any other it would take transformers' code, whose attention stays causal there.
    """
    supported = ModelRegistry.get_supported_archs()
    for known in (architecture, architecture.removesuffix("Model") + "ForCausalLM"):
        if known in supported:
            return known
    raise ModelError(
        f"vLLM has no code of its own for {architecture}",
        where=where,
        expected="Llama, Mistral, Qwen2, Qwen3 or Gemma 3",
        hint="Serve it with nvembed serve",
    )


def served_tokenizer(source: ModelSource) -> TextTokenizer:
    """The token rules of a model, without its weights."""
    if model_kind(source) == "official":
        limit = read_limit(source, "sentence_bert_config.json", "max_seq_length")
        limit = limit or DEFAULT_MAX_TOKENS
        return TextTokenizer(load_tokenizer(source), max_tokens=limit, style="official")
    saved = _saved(source)
    with loading(source.name, expected="the model's tokenizer (tokenizer.json)"):
        where = {"revision": source.revision, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(source.name, **where)
    return TextTokenizer(
        tokenizer,
        max_tokens=saved.max_tokens,
        style=saved.text_style,
        add_bos=saved.add_bos,
        add_eos=saved.add_eos,
    )


def _saved(source: ModelSource) -> SavedBackbone:
    file = source.require(Backbone.config_file_name)
    settings = source.read_json(Backbone.config_file_name) or {}
    saved = SavedBackbone(**read_values(SavedBackbone, settings, where=str(file)))
    if saved.bases:
        raise ModelError(
            "vLLM cannot add a model's adapters to its base",
            where=source.name,
            hint="nvembed export --format nvembed writes them as one model",
        )
    return saved


class ServedTokenizer:
    """The tokenizer of a folder, which adds our BOS and EOS; vLLM calls ``from_pretrained``."""

    @classmethod
    def from_pretrained(
        cls, name: str, *_: Any, revision: str | None = None, **options: Any
    ) -> PreTrainedTokenizerFast:
        """A fast tokenizer of transformers."""
        rules = served_tokenizer(ModelSource(str(name), revision))
        special = dict(rules.tokenizer.special_tokens_map)
        special.setdefault("pad_token", rules.tokenizer.eos_token)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=closed_tokenizer(rules),
            truncation_side=options.get("truncation_side", "right"),
            **special,
        )
        return get_cached_tokenizer(tokenizer)


def pool_start(rules: TextTokenizer, ids: list[int]) -> int:
    """The first token of a text that is pooled."""
    prompt, text = split_prompt(rules.tokenizer.decode(ids, skip_special_tokens=True))
    return min(rules([text], prompt)[0].pool_start, len(ids)) if prompt else 0


class _Pooled(SequencePoolingMethod):
    """Our pooling over the texts of vLLM's batch, which is flat as ours is."""

    def __init__(self, pooling: Pooling, rules: TextTokenizer) -> None:
        super().__init__()
        self.pooling, self.rules = pooling, rules

    def get_supported_tasks(self) -> set[Any]:
        return {"embed"}

    def get_pooling_updates(self, task: Any) -> PoolingParamsUpdate:
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> Tensor:
        """Vectors ``(N, D)`` of the token states ``(T, D)``."""
        if pooling_metadata.get_pooling_cursor().is_partial_prefill():
            raise RuntimeError("the tokens of a text came in several batches")
        texts = [ids.tolist() for ids in pooling_metadata.get_prompt_token_ids_cpu()]
        segments = Segments.of_lengths(list(map(len, texts)), device=hidden_states.device)
        starts = [pool_start(self.rules, ids) for ids in texts]
        pooled = [
            at >= start for ids, start in zip(texts, starts, strict=True) for at in range(len(ids))
        ]
        pool_mask_T = torch.tensor(pooled, device=hidden_states.device)
        return self.pooling.pool(hidden_states[: len(pooled)], pool_mask_T, segments)


class ServedModel(nn.Module):
    """What vLLM builds for the architecture ``NVEmbedModel``."""

    is_pooling_model = True
    # Texts are not cut into several batches, nor read from a cache of prefixes.
    default_seq_pooling_type, default_tok_pooling_type = "MEAN", "ALL"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        settings = vllm_config.model_config
        source = ModelSource(settings.model, settings.revision)
        names = settings.hf_config.nvembed_backbone
        inner = vllm_config.with_hf_config(settings.hf_config, architectures=names)
        family, _ = settings.registry.resolve_model_cls(names, inner.model_config)
        self.backbone = as_embedding_model(family)(vllm_config=inner, prefix=prefix)
        self.pooling = _served_pooling(source).to(
            next(self.backbone.parameters()).device, settings.dtype
        )
        rules = served_tokenizer(source)
        rules.max_tokens = 1 << 30  # vLLM has cut the texts already
        head = EmbeddingPoolerHead(head_dtype=torch.float32, activation=PoolerNormalize())
        pooled = SequencePooler(pooling=_Pooled(self.pooling, rules), head=head)
        self.pooler = DispatchPooler({"embed": pooled})
        self._fixed = ExitStack()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """States of tokens before the first layer."""
        return self.backbone.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """Token states ``(T, D)``."""
        return self.backbone(input_ids, positions, intermediate_tensors, inputs_embeds)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill backbone and, of the official layout, pooling; return the names of what is full."""
        own = self.pooling.state_dict()
        head = {official_name(f"1.{name}"): value for name, value in own.items()}

        def of_backbone() -> Iterable[tuple[str, Tensor]]:
            for name, value in weights:
                if name in head:
                    head[name].copy_(value)
                else:
                    yield name.removeprefix(_OFFICIAL_PREFIX), value

        loaded = self.backbone.load_weights(of_backbone())
        self._fixed.enter_context(self.pooling.fixed_weights())
        return {f"backbone.{name}" for name in loaded} | {f"pooling.{name}" for name in own}


def _served_pooling(source: ModelSource) -> Pooling:
    """The pooling of a saved folder, or an empty one of the official layout."""
    if model_kind(source) == "official":
        config, latent = read_config(source.read_json("config.json") or {}, where=source.name)
        return LatentAttentionPooling(config.hidden_size, *latent)
    entry = read_modules(source)[1]
    cls = module_class(entry, source)
    if not issubclass(cls, Pooling):
        raise ModelError(f"its second module is a {cls.__name__}", where=source.name)
    return cls.load(source.name, subfolder=entry.path, revision=source.revision)
