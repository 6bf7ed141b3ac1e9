"""The model under examination, ours or foreign, and its sample texts token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.util import batch_to_device
from torch import Tensor

from nvembed.encoding.doctor.findings import Role, SampleToken
from nvembed.encoding.load import SentenceTransformerEncoder
from nvembed.encoding.protocol import Encoder
from nvembed.model.embedder import NVEmbed
from nvembed.model.pooling import SelfAttentionPooling
from nvembed.model.probe import probe_pooled

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Subject:
    """A loaded model with the texts that it is examined with.

    Attributes:
        encoder: what evaluation and search would use.
        prompt: rendered instruction of the sample query; empty for a model that takes none.
        query: the sample query.
        document: the sample document.
    """

    encoder: Encoder
    prompt: str
    query: str
    document: str

    @property
    def nvembed(self) -> NVEmbed | None:
        """The model if it is one of ours."""
        return self.encoder if isinstance(self.encoder, NVEmbed) else None

    @property
    def model(self) -> SentenceTransformer:
        """The sentence-transformers model."""
        if isinstance(self.encoder, SentenceTransformerEncoder):
            return self.encoder.model
        assert isinstance(self.encoder, NVEmbed)
        return self.encoder

    @property
    def transformer(self) -> PreTrainedModel | None:
        """The transformers model inside, if there is one."""
        first = self.model[0]
        return getattr(first, "model", None) or getattr(first, "auto_model", None)

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return torch.device(self.model.device)

    @property
    def pools_last(self) -> bool:
        """One token stands for the text: the last."""
        kind = type(self.model[1]).__name__ if len(self.model) > 1 else ""
        mode = getattr(self.model[1], "pooling_mode", "") if len(self.model) > 1 else ""
        return kind == "LastTokenPooling" or mode == "lasttoken"

    def states(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Last hidden states ``(T, D)`` of rows of ids, end to end; the longest row first."""
        if self.nvembed is not None:
            return self.nvembed.backbone.states(rows)
        longest = max(map(len, rows))
        padded_ids = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        features = {"input_ids": padded_ids, "attention_mask": mask, "modality": "text"}
        padded: Tensor = self.model[0](batch_to_device(features, self.device))["token_embeddings"]
        return padded[mask.bool()]

    def features(self, text: str, prompt: str) -> dict[str, Any]:
        """What the model's own path from text to tokens gives for one text."""
        features = self.model.preprocess([text], prompt=prompt or None)
        return batch_to_device(features, self.device)

    def ids(self, text: str, prompt: str) -> list[int] | None:
        """Token ids of one text as the model sees it; ``None`` if it shows none."""
        return _ids(self.features(text, prompt))

    def tokens(self, text: str, prompt: str) -> tuple[SampleToken, ...]:
        """The tokens of one text, each with its role and whether it is pooled."""
        features = self.features(text, prompt)
        ids = _ids(features)
        if ids is None:
            return ()
        roles = _roles(self.model.tokenizer, ids, prompt, text)
        if self.nvembed is not None and isinstance(self.nvembed.pooling, SelfAttentionPooling):
            # Every token has a say through this layer's attention; what is averaged is the mask.
            pooled: Tensor | None = features["flat"].pool_mask_T
        else:
            pooled = probe_pooled(list(self.model), features)
        marks = [None] * len(ids) if pooled is None else pooled.tolist()
        pieces = self.model.tokenizer.convert_ids_to_tokens(ids)
        return tuple(map(SampleToken, map(_readable, pieces), roles, marks))


def _ids(features: dict[str, Any]) -> list[int] | None:
    if "flat" in features:
        found: list[int] = features["flat"].token_ids_T.tolist()
        return found
    if "input_ids" not in features or "attention_mask" not in features:
        return None
    found = features["input_ids"][features["attention_mask"].bool()].tolist()
    return found


def _roles(tokenizer: Any, ids: list[int], prompt: str, text: str) -> list[Role]:
    """Tell instruction from text by character offsets; ids of neither are special."""
    encoded = tokenizer(prompt + text, add_special_tokens=False, return_offsets_mapping=True)
    body, offsets = encoded["input_ids"], encoded["offset_mapping"]
    first = 1 if ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else 0
    last = 1 if ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id) else 0
    inner = ids[first : len(ids) - last]
    roles: list[Role] = ["BOS"] if first else []
    for position, token in enumerate(inner):
        if position >= len(body) or body[position] != token:
            roles.append("special")
        else:
            roles.append("text" if offsets[position][1] > len(prompt) else "instruction")
    if last:
        roles.append("EOS")
    return roles


def _readable(piece: str) -> str:
    """Show the marks that tokenizers use for spaces and line ends."""
    return piece.replace("Ġ", "␣").replace("▁", "␣").replace("Ċ", "⏎").replace("<0x0A>", "⏎")
