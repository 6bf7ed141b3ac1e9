"""The model under examination, ours or foreign, and its sample texts token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.util import batch_to_device
from torch import Tensor

from nvembed.encoding.doctor.report import Role, SampleToken
from nvembed.encoding.encoder import Encoder, SentenceTransformerEncoder
from nvembed.model.embedder import NVEmbed
from nvembed.model.pooling import SelfAttentionPooling
from nvembed.model.probe import probe_pooled

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Subject:
    """A loaded model, ours or foreign, with the texts that it is examined with."""

    encoder: Encoder
    prompt: str  # of the sample query; empty for a model that takes none
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
        if len(self.model) < 2:
            return False
        pooling = self.model[1]
        mode = getattr(pooling, "pooling_mode", "")
        return type(pooling).__name__ == "LastTokenPooling" or mode == "lasttoken"

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

    def read(self, text: str, prompt: str) -> tuple[dict[str, Any], list[int] | None]:
        """What the model makes of one text, and its token ids; ``None`` if it shows none."""
        features = self.model.preprocess([text], prompt=prompt or None)
        features = batch_to_device(features, self.device)
        if "flat" in features:
            return features, features["flat"].token_ids_T.tolist()
        if "input_ids" not in features or "attention_mask" not in features:
            return features, None
        return features, features["input_ids"][features["attention_mask"].bool()].tolist()

    def tokens(self, text: str, prompt: str) -> tuple[SampleToken, ...]:
        """The tokens of one text, each with its role and whether it is pooled."""
        features, ids = self.read(text, prompt)
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
        for mark, shown in (("Ġ", "␣"), ("▁", "␣"), ("Ċ", "⏎"), ("<0x0A>", "⏎")):
            pieces = [piece.replace(mark, shown) for piece in pieces]
        return tuple(map(SampleToken, pieces, roles, marks))


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
    return [*roles, "EOS"] if last else roles
