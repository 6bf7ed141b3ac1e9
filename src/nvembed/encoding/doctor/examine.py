"""The diagnosis of ``nvembed doctor``: a model's subject, the checks on it, its memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from nvembed.core.errors import ConfigError, ModelError
from nvembed.encoding.doctor.checks import CHECKS
from nvembed.encoding.doctor.report import Diagnosis, Finding
from nvembed.encoding.doctor.subject import DOCUMENTS, QUERIES, Examined, Subject, model_of
from nvembed.encoding.encoder import Encoder, load_encoder, prompts_of
from nvembed.model import memory, packs
from nvembed.model.attention import short_tokens
from nvembed.model.embedder import NVEmbed
from nvembed.text.instructions import resolve_prompt, task_instruction


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
    if not isinstance(encoder, Examined):
        raise ModelError(f"{type(encoder).__name__} cannot be examined", where=name)
    task = options.task or task_instruction("NQ").instruction
    takes_task = isinstance(encoder, NVEmbed) or encoder.follows_instructions
    prompt = (resolve_prompt(task, prompts_of(encoder)) or "") if takes_task else ""
    model_of(encoder).eval()
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
