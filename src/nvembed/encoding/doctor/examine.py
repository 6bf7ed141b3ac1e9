"""Runs the checks on a model: name → loaded model → ``Diagnosis``."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nvembed.core.errors import ConfigError, ModelError
from nvembed.encoding.doctor import checks
from nvembed.encoding.doctor.report import Diagnosis, Memory, Placement, Sample
from nvembed.encoding.doctor.subject import Subject
from nvembed.encoding.encoder import Encoder, SentenceTransformerEncoder, load_encoder, prompts_of
from nvembed.model.attention import short_tokens
from nvembed.model.embedder import NVEmbed
from nvembed.model.memory import BYTES, FORMULA, Shape, forecast, free_bytes, weight_bytes
from nvembed.model.packs import CPU_PACK_TOKENS, CUDA_PACK_TOKENS
from nvembed.text.instructions import resolve_prompt, task_instruction

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
    query_text, document_text = options.query or QUERIES[0], options.document or DOCUMENTS[0]
    for what, text in (("query", query_text), ("document", document_text)):
        if not text.strip():
            raise ConfigError("the sample is empty", where=f"--{what}", expected="a text")
    if not isinstance(encoder, NVEmbed | SentenceTransformerEncoder):
        raise ModelError(f"{type(encoder).__name__} cannot be examined", where=name)
    task = options.task or task_instruction("NQ").instruction
    takes_task = isinstance(encoder, NVEmbed) or encoder.follows_instructions
    prompt = (resolve_prompt(task, prompts_of(encoder)) or "") if takes_task else ""
    subject = Subject(encoder, prompt, query_text, document_text)
    subject.model.eval()
    query = Sample("query", subject.tokens(query_text, prompt))
    document = Sample("document", subject.tokens(document_text, ""))
    placement = _placement(subject)
    together = encoder.encode_document(DOCUMENTS)
    alone = encoder.encode_document(DOCUMENTS[:1])[0]
    drift, needed = _drift(subject, task)
    findings = (
        checks.check_direction(subject),
        checks.check_pooled(subject, query, document),
        checks.check_ends(subject, query, document),
        checks.check_truncation(subject),
        checks.check_tokenizer(subject),
        checks.check_vectors(subject, together, alone),
        checks.check_placement(placement),
        checks.check_drift(drift, needed),
        checks.check_precision(subject, placement),
    )
    memory = _memory(subject, options)
    return Diagnosis(
        name, _description(subject), findings, (query, document), placement, memory, FORMULA
    )


def _description(subject: Subject) -> str:
    model, transformer = subject.model, subject.transformer
    elements = sum(parameter.numel() for parameter in model.parameters())
    family = transformer.config.model_type if transformer is not None else type(model[0]).__name__
    pooling = type(model[1]).__name__ if len(model) > 1 else "no pooling"
    limit = model.max_seq_length
    texts = "any length" if limit is None or math.isinf(limit) else f"at most {limit} tokens"
    kind = "ours" if subject.nvembed is not None else "sentence-transformers"
    return (
        f"{kind}: {family}, {elements / 1e6:.1f} M weights, {pooling}, "
        f"width {subject.encoder.dimension}, {texts}"
    )


def _placement(subject: Subject) -> tuple[Placement, ...]:
    return tuple(
        Placement(type(module).__name__, device, dtype, count)
        for module in subject.model
        for (device, dtype), count in sorted(weight_bytes(module).items())
    )


def _memory(subject: Subject, options: DoctorOptions) -> tuple[Memory, ...]:
    """Forecast encoding; nothing for a model without a transformer inside."""
    transformer = subject.transformer
    if transformer is None:
        return ()
    each = options.max_tokens or subject.model.max_seq_length or 512
    tokens = options.batch * each
    heads = latents = 0
    longest_scored = dict.fromkeys(BYTES, 0)
    if subject.nvembed is not None:
        on_gpu = subject.device.type == "cuda"
        if not on_gpu:
            longest_scored = {name: short_tokens(getattr(torch, name)) for name in BYTES}
        budget = CUDA_PACK_TOKENS if on_gpu else CPU_PACK_TOKENS
        # encode packs: a forward has no more than its budget, or one longer text.
        tokens = min(tokens, max(budget, each))
        heads = int(getattr(subject.nvembed.pooling, "num_heads", 0))
        latents = int(getattr(subject.nvembed.pooling, "num_latents", 0))
    shape = Shape.of_config(
        transformer.config.get_text_config(), pooling_heads=heads, pooling_latents=latents
    )
    elements = sum(parameter.numel() for parameter in subject.model.parameters())
    found = (
        forecast(shape, name, tokens, elements, score_tokens=min(each, longest))
        for name, longest in longest_scored.items()
    )
    return tuple(Memory(**asdict(each), total=each.total) for each in found)


def _drift(subject: Subject, task: str) -> tuple[dict[str, float] | None, str]:
    """The smallest cosines of bfloat16 weights and autocast to float32, or why there are none."""
    needed = 6 * sum(parameter.numel() for parameter in subject.model.parameters())
    free = free_bytes(subject.device)
    if needed > free:
        return None, f"copies need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    plain = Subject(copy.deepcopy(subject.encoder), subject.prompt, "", "")
    plain.model.float()
    expected = _vectors(plain, task)
    with torch.autocast(subject.device.type, torch.bfloat16):
        autocast = _vectors(plain, task)
    # The head too: sentence-transformers gives all modules the dtype of the first.
    plain.model.to(torch.bfloat16)
    halved = _vectors(plain, task)
    return {
        "bfloat16 weights": _smallest_cosine(expected, halved),
        "autocast": _smallest_cosine(expected, autocast),
    }, ""


def _vectors(subject: Subject, task: str) -> NDArray[np.float64]:
    queries = subject.encoder.encode_query(QUERIES, task=task if subject.prompt else None)
    return np.concatenate([queries, subject.encoder.encode_document(DOCUMENTS)]).astype(np.float64)


def _smallest_cosine(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(((first * second).sum(1) / lengths).min())
