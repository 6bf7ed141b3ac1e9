"""A model under examination, ours or foreign, and the diagnosis of ``nvembed doctor``."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.util import batch_to_device
from torch import Tensor

from nvembed.core.errors import ConfigError, ModelError
from nvembed.encoding.doctor.checks import CHECKS
from nvembed.encoding.doctor.report import Diagnosis, Finding, Placement, Role, Sample, SampleToken
from nvembed.encoding.encoder import Encoder, SentenceTransformerEncoder, load_encoder, prompts_of
from nvembed.model import memory, packs
from nvembed.model.attention import short_tokens
from nvembed.model.embedder import NVEmbed
from nvembed.model.pooling import SelfAttentionPooling
from nvembed.model.probe import probe_pooled
from nvembed.text.instructions import resolve_prompt, task_instruction

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


_Examined = NVEmbed | SentenceTransformerEncoder


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """What to examine a model with; ``None`` is what is built in."""

    task: str | None = None  # of the sample query; the built-in one is that of MTEB's NQ
    query: str | None = None
    document: str | None = None
    batch: int = 32  # texts of the memory forecast
    max_tokens: int | None = None  # of each of them; the model's limit


def examine_model(name: str, options: DoctorOptions) -> Diagnosis:
    """Load a model by folder or hub id and examine it."""
    return examine(load_encoder(name), Path(name).name or name, options)


def examine(encoder: Encoder, name: str, options: DoctorOptions) -> Diagnosis:
    """Examine a loaded model; it is left as it was."""
    query, document = options.query or QUERIES[0], options.document or DOCUMENTS[0]
    for what, text in (("query", query), ("document", document)):
        if not text.strip():
            raise ConfigError("the sample is empty", where=f"--{what}", expected="a text")
    if not isinstance(encoder, _Examined):
        raise ModelError(f"{type(encoder).__name__} cannot be examined", where=name)
    task = options.task or task_instruction("NQ").instruction
    takes_task = isinstance(encoder, NVEmbed) or encoder.follows_instructions
    prompt = (resolve_prompt(task, prompts_of(encoder)) or "") if takes_task else ""
    _model_of(encoder).eval()
    subject = Subject(encoder, prompt, query, document, task)
    return Diagnosis(
        name,
        _description(subject),
        tuple(Finding(title, *check(subject)) for title, check in CHECKS.items()),
        subject.samples,
        subject.placement,
        _memory(subject, options),
        memory.FORMULA,
    )


class Subject:
    """A loaded model, ours or foreign, and all that the checks look at."""

    def __init__(
        self,
        encoder: _Examined,
        prompt: str,  # of the sample query; empty for a model that takes none
        query: str,
        document: str,
        task: str = "",
    ) -> None:
        self.encoder, self.prompt, self.document = encoder, prompt, document
        self.ours = encoder if isinstance(encoder, NVEmbed) else None
        self.model = model = _model_of(encoder)
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


def _drift(encoder: _Examined, task: str | None) -> dict[str, float] | str:
    """The smallest cosines of ways to compute in 16 bit to float32, or why there are none."""
    model = _model_of(encoder)
    needed = 6 * sum(parameter.numel() for parameter in model.parameters())
    free = memory.free_bytes(model.device)
    if needed > free:
        return f"copies need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    encoder = copy.deepcopy(encoder)
    model = _model_of(encoder)

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


def _model_of(encoder: _Examined) -> SentenceTransformer:
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


def _memory(subject: Subject, options: DoctorOptions) -> tuple[memory.MemoryForecast, ...]:
    """Forecast encoding; nothing for a model without a transformer inside."""
    if subject.transformer is None:
        return ()
    each = options.max_tokens or subject.model.max_seq_length or 512
    tokens, pooling = options.batch * each, None
    longest_scored = dict.fromkeys(memory.BYTES, 0)
    if subject.ours is not None:
        pooling, on_gpu = subject.ours.pooling, subject.device.type == "cuda"
        if not on_gpu:
            longest_scored = {name: short_tokens(getattr(torch, name)) for name in memory.BYTES}
        # encode packs: a forward has no more than its budget, or one longer text.
        budget = packs.CUDA_PACK_TOKENS if on_gpu else packs.CPU_PACK_TOKENS
        tokens = min(tokens, max(budget, each))
    shape = memory.Shape.of_config(
        subject.transformer.config.get_text_config(),
        pooling_heads=int(getattr(pooling, "num_heads", 0)),
        pooling_latents=int(getattr(pooling, "num_latents", 0)),
    )
    return tuple(
        memory.forecast(shape, name, tokens, subject.elements, score_tokens=min(each, longest))
        for name, longest in longest_scored.items()
    )


def _description(subject: Subject) -> str:
    model, inner, limit = subject.model, subject.transformer, subject.model.max_seq_length
    kind = "sentence-transformers" if subject.ours is None else "ours"
    family = type(model[0]).__name__ if inner is None else inner.config.model_type
    texts = "any length" if limit is None or math.isinf(limit) else f"at most {limit} tokens"
    return (
        f"{kind}: {family}, {subject.elements / 1e6:.1f} M weights, {subject.pooling}, "
        f"width {subject.encoder.dimension}, {texts}"
    )
