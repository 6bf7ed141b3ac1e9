"""A model under examination, ours or foreign: what the checks of ``nvembed doctor`` look at."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.util import batch_to_device
from torch import Tensor

from nvembed.encoding.doctor.report import Placement, Role, Sample, SampleToken
from nvembed.encoding.encoder import SentenceTransformerEncoder
from nvembed.model import memory
from nvembed.model.attention import probe_pooled
from nvembed.model.backbone import free_bytes
from nvembed.model.embedder import NVEmbed
from nvembed.model.pooling import SelfAttentionPooling

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel

QUERIES = (
    "how do I sort a list?",
    "What is the capital of France?",
    "causes of high blood pressure",
    "Which planet has the most moons?",
)
DOCUMENTS = (
    "sorted(iterable) returns a new list with the items in ascending order.",
    "Paris is the capital and the largest city of France, on the river Seine.",
    "Salt, too little exercise and age raise the pressure in the arteries.",
    "Bread is baked from flour, water, salt and yeast.",
)


Examined = NVEmbed | SentenceTransformerEncoder


class Subject:
    """A loaded model, ours or foreign, and all that the checks look at."""

    def __init__(
        self,
        encoder: Examined,
        prompt: str,  # of the sample query; empty for a model that takes none
        query: str,
        document: str,
        task: str = "",
    ) -> None:
        self.encoder, self.prompt, self.document = encoder, prompt, document
        self.ours = encoder if isinstance(encoder, NVEmbed) else None
        self.model = model = model_of(encoder)
        inner = getattr(model[0], "model", None) or getattr(model[0], "auto_model", None)
        self.transformer: PreTrainedModel | None = inner
        self.device = torch.device(model.device)
        self.elements = sum(parameter.numel() for parameter in model.parameters())
        self.pooling = type(model[1]).__name__ if len(model) > 1 else "no pooling"
        last = len(model) > 1 and getattr(model[1], "pooling_mode", "") == "lasttoken"
        self.pools_last = last or self.pooling == "LastTokenPooling"
        tokens = self.tokens(query, prompt), self.tokens(document, "")
        self.samples = Sample("query", tokens[0]), Sample("document", tokens[1])
        self.placement = tuple(
            Placement(type(module).__name__, device, dtype, count)
            for module in model
            for (device, dtype), count in sorted(memory.weight_bytes(module).items())
        )
        self.together = encoder.encode_document(DOCUMENTS)  # unrelated texts
        self.alone = encoder.encode_document(DOCUMENTS[:1])[0]
        self.drift = _drift(encoder, task if prompt else None)

    def states(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Last hidden states ``(T, D)`` of rows of ids, end to end; the longest row first."""
        if self.ours is not None:
            return self.ours.backbone.states(rows)
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        features = {"input_ids": ids, "attention_mask": mask, "modality": "text"}
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
        if self.ours is not None and isinstance(self.ours.pooling, SelfAttentionPooling):
            # Every token has a say through this layer's attention; what is averaged is the mask.
            pooled: Tensor | None = features["flat"].pool_mask_T
        else:
            pooled = probe_pooled(list(self.model), features)
        marks = [None] * len(ids) if pooled is None else pooled.tolist()
        pieces = self.model.tokenizer.convert_ids_to_tokens(ids)
        for mark, shown in (("Ġ", "␣"), ("▁", "␣"), ("Ċ", "⏎"), ("<0x0A>", "⏎")):
            pieces = [piece.replace(mark, shown) for piece in pieces]
        return tuple(map(SampleToken, pieces, roles, marks))


def _drift(encoder: Examined, task: str | None) -> dict[str, float] | str:
    """The smallest cosines of ways to compute in 16 bit to float32, or why there are none."""
    model = model_of(encoder)
    needed = 6 * sum(parameter.numel() for parameter in model.parameters())
    free = free_bytes(model.device)
    if needed > free:
        return f"copies need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    encoder = copy.deepcopy(encoder)
    model = model_of(encoder)

    def encoded() -> NDArray[np.float64]:
        queries = encoder.encode_query(QUERIES, task=task)
        return np.concatenate([queries, encoder.encode_document(DOCUMENTS)]).astype(np.float64)

    model.float()
    expected = encoded()
    with torch.autocast(model.device.type, torch.bfloat16):
        autocast = encoded()
    # The head too: sentence-transformers gives all modules the dtype of the first.
    model.to(torch.bfloat16)
    length = np.linalg.norm(expected, axis=1)
    return {
        how: float(((expected * x).sum(1) / (length * np.linalg.norm(x, axis=1))).min())
        for how, x in (("bfloat16 weights", encoded()), ("autocast", autocast))
    }


def model_of(encoder: Examined) -> SentenceTransformer:
    """Return the sentence-transformers model that an encoder is, or holds."""
    return encoder if isinstance(encoder, NVEmbed) else encoder.model


def _roles(tokenizer: Any, ids: list[int], prompt: str, text: str) -> list[Role]:
    """Tell instruction from text by character offsets; ids of neither are special."""
    encoded = tokenizer(prompt + text, add_special_tokens=False, return_offsets_mapping=True)
    body, offsets = encoded["input_ids"], encoded["offset_mapping"]
    first = 1 if ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else 0
    last = 1 if ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id) else 0
    roles: list[Role] = ["BOS"] if first else []
    for position, token in enumerate(ids[first : len(ids) - last]):
        if position >= len(body) or body[position] != token:
            roles.append("special")
        else:
            roles.append("text" if offsets[position][1] > len(prompt) else "instruction")
    return [*roles, "EOS"] if last else roles
