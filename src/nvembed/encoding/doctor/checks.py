"""The checks of ``nvembed doctor``: what they look at of a model, and a table of functions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.util import batch_to_device
from torch import Tensor

from nvembed.kernels.machine import fastest_precision
from nvembed.model import memory
from nvembed.model.attention import probe_direction, probe_pooled
from nvembed.model.backbone import free_bytes
from nvembed.model.embedder import NVEmbed
from nvembed.model.encoder import SentenceTransformerEncoder
from nvembed.model.pooling import SelfAttentionPooling
from nvembed.model.settings import TunedPart, fitting_rate, shown_rate

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

Role = Literal["BOS", "instruction", "text", "EOS", "special"]
Examined = NVEmbed | SentenceTransformerEncoder


@dataclass(frozen=True, slots=True)
class SampleToken:
    """One token of a sample text, and whether it is pooled (``None``: cannot be told)."""

    text: str
    role: Role
    pooled: bool | None


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample text as the model sees it."""

    side: Literal["query", "document"]
    tokens: tuple[SampleToken, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the weights of a module are, and in which dtype."""

    module: str
    device: str
    dtype: str
    bytes: int


class Subject:
    """A loaded model and all that the checks look at; ``prompt`` is that of the sample query."""

    def __init__(
        self, encoder: Examined, prompt: str, query: str, document: str, task: str = ""
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
        self.samples = (
            Sample("query", self.tokens(query, prompt)),
            Sample("document", self.tokens(document, "")),
        )
        self.placement = tuple(
            Placement(type(module).__name__, device, dtype, count)
            for module in model
            for (device, dtype), count in sorted(memory.weight_bytes(module).items())
        )
        self.together = encoder.encode_document(DOCUMENTS)  # unrelated texts
        self.alone = encoder.encode_document(DOCUMENTS[:1])[0]
        self.drift = _measure_drift(encoder, task if prompt else None)

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
        tokenizer: Any = self.model.tokenizer
        if self.ours is not None and isinstance(self.ours.pooling, SelfAttentionPooling):
            # Every token has a say through this layer's attention; what is averaged is the mask.
            pooled: Tensor | None = features["flat"].pool_mask_T
        else:
            pooled = probe_pooled(list(self.model), features)
        marks = [None] * len(ids) if pooled is None else pooled.tolist()
        pieces = tokenizer.convert_ids_to_tokens(ids)
        for mark, shown in (("Ġ", "␣"), ("▁", "␣"), ("Ċ", "⏎"), ("<0x0A>", "⏎")):
            pieces = [piece.replace(mark, shown) for piece in pieces]
        return tuple(map(SampleToken, pieces, _roles(tokenizer, ids, prompt, text), marks))


def model_of(encoder: Examined) -> SentenceTransformer:
    """Return the sentence-transformers model that an encoder is, or holds."""
    return encoder if isinstance(encoder, NVEmbed) else encoder.model


def _measure_drift(encoder: Examined, task: str | None) -> dict[str, float] | str:
    """The smallest cosines of ways to compute in 16 bit to float32, or why there are none."""
    needed = 6 * sum(parameter.numel() for parameter in model_of(encoder).parameters())
    free = free_bytes(model_of(encoder).device)
    if needed > free:
        return f"copies need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    encoder = copy.deepcopy(encoder)
    model = model_of(encoder)

    def encoded() -> NDArray[np.float64]:
        queries = encoder.encode_query(QUERIES, task=task)
        vectors = np.concatenate([queries, encoder.encode_document(DOCUMENTS)]).astype(np.float64)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    model.float()
    expected = encoded()
    with torch.autocast(model.device.type, torch.bfloat16):
        autocast = encoded()
    # The head too: sentence-transformers gives all modules the dtype of the first.
    model.to(torch.bfloat16)
    return {
        how: float((expected * found).sum(1).min())
        for how, found in (("bfloat16 weights", encoded()), ("autocast", autocast))
    }


def _roles(tokenizer: Any, ids: list[int], prompt: str, text: str) -> list[Role]:
    """Tell instruction from text by character offsets; ids of neither are special."""
    encoded = tokenizer(prompt + text, add_special_tokens=False, return_offsets_mapping=True)
    body, offsets = encoded["input_ids"], encoded["offset_mapping"]
    first = int(ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id))
    last = int(ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id))
    roles: list[Role] = ["BOS"] * first
    for position, token in enumerate(ids[first : len(ids) - last]):
        if position >= len(body) or body[position] != token:
            roles.append("special")
        else:
            roles.append("text" if offsets[position][1] > len(prompt) else "instruction")
    return roles + ["EOS"] * last


# --- Checks ---------------------------------------------------------------------------------------

# Below these cosines to float32 a dtype changes rankings noticeably, or is broken.
_DRIFT_WARNING, _DRIFT_PROBLEM = 0.999, 0.98
# Unrelated texts nearer than this leave a ranking little room.
_ALIKE_WARNING = 0.95
# Lengths normalised in bfloat16 are off by up to 0.4 %.
_NORM_TOLERANCE = 1e-2

# Of a model that is to be tuned.
_PARTS: tuple[TunedPart, ...] = ("adapters", "all")

Status = Literal["ok", "warning", "problem"]
# Status, what was found, and advice where there is any.
_Verdict = tuple[Status, str] | tuple[Status, str, str]


def _direction(subject: Subject) -> _Verdict:
    if subject.transformer is None:
        return "ok", "no transformer inside: nothing attends to anything"
    try:
        vocabulary = subject.transformer.config.get_text_config().vocab_size
        seen = probe_direction(subject.states, vocabulary)
    except (TypeError, RuntimeError, KeyError) as error:
        return "warning", f"the probe does not run ({error})", "Check its direction by hand"
    if seen.neighbours_seen:
        advice = "Use another backbone: vectors depend on the batch"
        return "problem", "texts that are encoded together change each other", advice
    if seen.direction == "bidirectional":
        return "ok", "bidirectional; texts of a pack do not see each other"
    if subject.pools_last:
        advice = "Works; the paper gains about a point with bidirectional attention"
        return "warning", "causal, with the last token pooled", advice
    return (
        "problem",
        "causal, although other tokens than the last are pooled: they have not read what follows",
        "Load the language model with attention=bidirectional and train it, or pool the last token",
    )


def _pooled(subject: Subject) -> _Verdict:
    tokens, document = (sample.tokens for sample in subject.samples)
    if not tokens or tokens[0].pooled is None:
        return "ok", "the model keeps no token states; nothing to tell"
    pooled = [token.role for token in tokens if token.pooled]
    if instruction := pooled.count("instruction"):
        found = f"{instruction} tokens of the instruction are pooled"
        if subject.ours is None:
            advice = "Fine if it was trained so; NV-Embed leaves the instruction out"
            return "warning", found, advice
        if subject.ours.backbone.text_style == "whole":
            return "ok", f"all {len(pooled)} of the sample query, the instruction's among them"
        advice = "The pool mask must start after the prompt: check text_style and the tokenizer"
        return "problem", found, advice
    if subject.pools_last:
        if len(pooled) == 1 and tokens[-1].pooled:
            return "ok", f"the last token alone ({tokens[-1].role})"
        return "problem", "not the last token alone", "Check the pooling module"
    if "text" not in pooled or not any(t.pooled for t in document if t.role == "text"):
        return "problem", "no token of the text is pooled", "Check the pooling module"
    left_out = "the instruction is left out" if subject.prompt else "the model takes no instruction"
    return "ok", f"{len(pooled)} of {len(tokens)} of the sample query; {left_out}"


def _ends(subject: Subject) -> _Verdict:
    tokens, ours, tokenizer = subject.samples[0].tokens, subject.ours, subject.model.tokenizer
    if not tokens:
        return "ok", "the model shows no tokens"
    starts = all(sample.tokens[0].role == "BOS" for sample in subject.samples)
    ends = all(sample.tokens[-1].role == "EOS" for sample in subject.samples)
    found = f"{tokens[0].text} in front" if starts else "no BOS in front"
    found += f", {tokens[-1].text} at the end" if ends else ", no EOS at the end"
    if ours is None:
        if ends or not subject.pools_last:
            return "ok", found
        return "warning", found, "The last word stands for the text unless the EOS is appended"
    if not ends and (ours.backbone.add_eos or subject.pools_last):
        advice = "set add_eos, and check that the tokenizer's eos_token is one token"
        return "problem", found, f"The EOS is pooled: {advice}"
    has_bos = tokenizer.bos_token_id is not None or tokenizer.cls_token_id is not None
    if not starts and has_bos and ours.backbone.add_bos:
        return "problem", found, "Check add_bos and the tokenizer's bos_token"
    return (
        ("ok", found) if ends else ("warning", found, "Fine if it was trained with add_eos=false")
    )


def _truncation(subject: Subject) -> _Verdict:
    limit = subject.model.max_seq_length
    if limit is None or math.isinf(limit):
        return "ok", "no limit"
    long = f"{subject.document} " * (1 + 2 * limit // len(subject.document.split()))
    tokens = subject.tokens(subject.document, subject.prompt)
    short, cut = (subject.read(text, subject.prompt)[1] for text in (subject.document, long))
    if cut is None or short is None:
        return "ok", f"longest text: {limit} tokens"
    if len(cut) > limit:
        return "problem", f"a long text keeps {len(cut)} tokens of {limit}", "Check max_tokens"
    head = sum(token.role in ("BOS", "instruction") for token in tokens)
    if cut[:head] != short[:head]:
        return "problem", "the instruction is cut", "Raise max_tokens"
    has_eos = tokens[-1].role == "EOS"
    if has_eos and cut[-1] != short[-1]:
        found = f"texts over {limit} tokens lose their EOS, as NVIDIA's code has it"
        advice = "Only right for checkpoints trained so; text_style=nvembed keeps it"
        return "warning", found, advice
    kept = ["the instruction"] * bool(subject.prompt) + ["the EOS"] * has_eos
    rest = f", but not {' or '.join(kept)}" if kept else ""
    return "ok", f"texts over {limit} tokens lose their end{rest}"


def _tokenizer(subject: Subject) -> _Verdict:
    if subject.transformer is None:
        return "ok", "no embedding table of a transformer to fit"
    tokenizer, config = subject.model.tokenizer, subject.transformer.config.get_text_config()
    rows = next(subject.transformer.get_input_embeddings().parameters()).shape[0]
    if len(tokenizer) > rows:
        advice = "Use the tokenizer that the model was trained with"
        return "problem", f"{len(tokenizer)} tokens, but the model has {rows} embeddings", advice
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    eos = tokenizer.eos_token_id
    if None not in (eos, *known) and eos not in known:
        found = f"EOS is {eos} in the tokenizer, {known[0]} in the model's config"
        advice = "Make them agree: the model may not know the token that ends its texts"
        return "warning", found, advice
    if subject.ours is None and tokenizer.pad_token_id is None:
        return "warning", "no pad token", "Give the tokenizer one: batches are padded"
    limit = subject.model.max_seq_length
    positions = getattr(config, "max_position_embeddings", None)
    if limit and positions and limit > positions:
        found = f"texts of {limit} tokens are let in, the model knows {positions} positions"
        return "warning", found, f"Set max_tokens to {positions} or less"
    pad = "has a pad token" if subject.ours is None else "no pad token needed"
    return "ok", f"{len(tokenizer)} tokens, {rows} embeddings; {pad}"


def _vectors(subject: Subject) -> _Verdict:
    documents, alone = subject.together, subject.alone
    if not (np.isfinite(documents).all() and np.isfinite(alone).all()):
        return "problem", "NaN or infinity", "Load in float32, or the weights are damaged"
    norms = np.linalg.norm(documents, axis=1)
    if np.abs(norms - 1).max() > _NORM_TOLERANCE:
        found = f"lengths from {norms.min():.3g} to {norms.max():.3g} instead of 1"
        return "problem", found, "Add a Normalize module: dot products are no cosines"
    cosine = documents @ documents.T
    nearest = float((cosine - 2 * np.eye(len(cosine))).max())
    shift = float(np.abs(documents[0] - alone).max())
    found = f"finite, of length 1; unrelated texts reach a cosine of {nearest:.2f}"
    if nearest > _ALIKE_WARNING:
        return "warning", found, "Untrained or collapsed: train it before use"
    if shift > 0.05:
        return "warning", f"{found}; a vector moves by {shift:.2g} in a batch", "Use float32"
    return "ok", found


def _placement(subject: Subject) -> _Verdict:
    devices = sorted({part.device for part in subject.placement})
    if "meta" in devices:
        return "problem", "weights are not loaded (meta)", "Load them"
    if len(devices) > 1:
        return "problem", f"spread over {', '.join(devices)}", "model.to(one device)"
    dtypes = {part.dtype for part in subject.placement if part.dtype.startswith(("float", "bf"))}
    return "ok", f"{' and '.join(sorted(dtypes))} on {devices[0] if devices else '-'}"


def _drift(subject: Subject) -> _Verdict:
    if isinstance(subject.drift, str):
        return "warning", f"not measured: {subject.drift}", "Run it on a larger machine"
    cosines = ", ".join(f"{how} {value:.5f}" for how, value in subject.drift.items())
    found, worst = f"cosine to float32: {cosines}", min(subject.drift.values())
    if worst < _DRIFT_PROBLEM or not np.isfinite(worst):
        return "problem", found, "Do not use 16 bit with this model"
    if worst < _DRIFT_WARNING:
        return "warning", found, "Compare scores before using 16 bit"
    return "ok", found


def _precision(subject: Subject) -> _Verdict:
    fastest = fastest_precision(subject.device.type)
    largest = max(subject.placement, key=lambda part: part.bytes, default=None)
    if largest is not None and largest.dtype == "bfloat16" and fastest == "float32":
        found = f"bfloat16 weights, but this {subject.device.type} multiplies faster in float32"
        return "warning", found, "Load with dtype=float32 if it fits"
    gain = ": half the memory, too" if fastest == "bfloat16" else ""
    return "ok", f"matrix products are fastest in {fastest} here{gain}"


def _training(subject: Subject) -> _Verdict:
    size = sum(parameter.numel() for parameter in subject.model[0].parameters())
    adapters, whole = (shown_rate(fitting_rate(size, part)) for part in _PARTS)
    return "ok", f"learning rate by its size: {adapters} with LoRA, {whole} for all weights"


CHECKS: dict[str, Callable[[Subject], _Verdict]] = {
    "attention": _direction,
    "pooled tokens": _pooled,
    "BOS and EOS": _ends,
    "truncation": _truncation,
    "tokenizer": _tokenizer,
    "vectors": _vectors,
    "placement": _placement,
    "16-bit drift": _drift,
    "speed": _precision,
    "training": _training,
}
