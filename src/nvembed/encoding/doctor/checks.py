"""The checks of ``nvembed doctor``: each looks at one property of a model and gives a finding."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import ParamSpec

import numpy as np
from numpy.typing import NDArray

from nvembed.encoding.doctor.report import Finding, Placement, Sample, Status
from nvembed.encoding.doctor.subject import Subject
from nvembed.kernels.precision import fastest_precision
from nvembed.model.attention import probe_direction

# Below these cosines to float32 a dtype changes rankings noticeably, or is broken.
DRIFT_WARNING, DRIFT_PROBLEM = 0.999, 0.98
# Unrelated texts nearer than this leave a ranking little room.
ALIKE_WARNING = 0.95
# Lengths normalised in bfloat16 are off by up to 0.4 %.
NORM_TOLERANCE = 1e-2

P = ParamSpec("P")
# Status, what was found, and advice where there is any.
Verdict = tuple[Status, str] | tuple[Status, str, str]


def _finding(name: str) -> Callable[[Callable[P, Verdict]], Callable[P, Finding]]:
    """Make a check return a finding of that name."""

    def named(check: Callable[P, Verdict]) -> Callable[P, Finding]:
        @functools.wraps(check)
        def call(*args: P.args, **kwargs: P.kwargs) -> Finding:
            return Finding(name, *check(*args, **kwargs))

        return call

    return named


@_finding("attention")
def check_direction(subject: Subject) -> Verdict:
    """Bidirectional or causal, by the probe."""
    transformer = subject.transformer
    if transformer is None:
        return "ok", "no transformer inside: nothing attends to anything"
    try:
        found = probe_direction(subject.states, transformer.config.get_text_config().vocab_size)
    except (TypeError, RuntimeError, KeyError) as error:
        return "warning", f"the probe does not run ({error})", "Check its direction by hand"
    if found.neighbours_seen:
        return (
            "problem",
            "texts that are encoded together change each other",
            "Use another backbone: vectors depend on the batch",
        )
    if found.direction == "bidirectional":
        return "ok", "bidirectional; texts of a pack do not see each other"
    if subject.pools_last:
        return (
            "warning",
            "causal, with the last token pooled",
            "Works; the paper gains about a point with bidirectional attention",
        )
    return (
        "problem",
        "causal, although other tokens than the last are pooled: they have not read what follows",
        "Load the language model with attention=bidirectional and train it, or pool the last token",
    )


@_finding("pooled tokens")
def check_pooled(subject: Subject, query: Sample, document: Sample) -> Verdict:
    """The text is pooled and the instruction is not."""
    tokens = query.tokens
    if not tokens or tokens[0].pooled is None:
        return "ok", "the model keeps no token states; nothing to tell"
    instruction = sum(t.pooled is True for t in tokens if t.role == "instruction")
    text = sum(t.pooled is True for t in tokens if t.role == "text")
    pooled = sum(t.pooled is True for t in tokens)
    if instruction:
        ours = subject.nvembed is not None
        return (
            "problem" if ours else "warning",
            f"{instruction} tokens of the instruction are pooled",
            "The pool mask must start after the prompt: check text_style and the tokenizer"
            if ours
            else "Fine if it was trained so; NV-Embed leaves the instruction out",
        )
    if subject.pools_last:
        if pooled == 1 and tokens[-1].pooled:
            return "ok", f"the last token alone ({tokens[-1].role})"
        return "problem", "not the last token alone", "Check the pooling module"
    if not text or not any(t.pooled for t in document.tokens if t.role == "text"):
        return "problem", "no token of the text is pooled", "Check the pooling module"
    left_out = "the instruction is left out" if subject.prompt else "the model takes no instruction"
    return "ok", f"{pooled} of {len(tokens)} of the sample query; {left_out}"


@_finding("BOS and EOS")
def check_ends(subject: Subject, query: Sample, document: Sample) -> Verdict:
    """BOS and EOS are where the model expects them."""
    tokens = query.tokens
    if not tokens:
        return "ok", "the model shows no tokens"
    starts = all(sample.tokens[0].role == "BOS" for sample in (query, document))
    ends = all(sample.tokens[-1].role == "EOS" for sample in (query, document))
    tokenizer = subject.model.tokenizer
    has_bos = tokenizer.bos_token_id is not None or tokenizer.cls_token_id is not None
    bos = f"{tokens[0].text} in front" if starts else "no BOS in front"
    eos = f"{tokens[-1].text} at the end" if ends else "no EOS at the end"
    message = f"{bos}, {eos}"
    wants_eos = subject.nvembed is not None and subject.nvembed.backbone.add_eos
    if not ends and subject.nvembed is None and subject.pools_last:
        return "warning", message, "The last word stands for the text unless the EOS is appended"
    if not ends and subject.nvembed is not None and (wants_eos or subject.pools_last):
        return (
            "problem",
            message,
            "The EOS is pooled: set add_eos, and check that the tokenizer's eos_token is one token",
        )
    wants_bos = subject.nvembed is None or subject.nvembed.backbone.add_bos
    if not starts and has_bos and wants_bos and subject.nvembed is not None:
        return "problem", message, "Check add_bos and the tokenizer's bos_token"
    if not ends and subject.nvembed is not None:
        return "warning", message, "Fine if it was trained with add_eos=false"
    return "ok", message


@_finding("truncation")
def check_truncation(subject: Subject) -> Verdict:
    """What a text that is too long loses."""
    limit = subject.model.max_seq_length
    if limit is None or math.isinf(limit):
        return "ok", "no limit"
    long = f"{subject.document} " * (1 + 2 * limit // len(subject.document.split()))
    short_tokens = subject.tokens(subject.document, subject.prompt)
    short, cut = (subject.read(text, subject.prompt)[1] for text in (subject.document, long))
    if cut is None or short is None:
        return "ok", f"longest text: {limit} tokens"
    if len(cut) > limit:
        return "problem", f"a long text keeps {len(cut)} tokens of {limit}", "Check max_tokens"
    head = sum(token.role in ("BOS", "instruction") for token in short_tokens)
    if cut[:head] != short[:head]:
        return "problem", "the instruction is cut", "Raise max_tokens"
    has_eos = short_tokens[-1].role == "EOS"
    if has_eos and cut[-1] != short[-1]:
        return (
            "warning",
            f"texts over {limit} tokens lose their EOS, as NVIDIA's code has it",
            "Only right for checkpoints trained so; text_style=nvembed keeps it",
        )
    kept = (["the instruction"] if subject.prompt else []) + (["the EOS"] if has_eos else [])
    rest = f", but not {' or '.join(kept)}" if kept else ""
    return "ok", f"texts over {limit} tokens lose their end{rest}"


@_finding("tokenizer")
def check_tokenizer(subject: Subject) -> Verdict:
    """Ids fit the embedding table, special tokens agree, positions are enough."""
    transformer = subject.transformer
    if transformer is None:
        return "ok", "no embedding table of a transformer to fit"
    tokenizer, config = subject.model.tokenizer, transformer.config.get_text_config()
    rows = next(transformer.get_input_embeddings().parameters()).shape[0]
    if len(tokenizer) > rows:
        return (
            "problem",
            f"{len(tokenizer)} tokens, but the model has {rows} embeddings",
            "Use the tokenizer that the model was trained with",
        )
    known = config.eos_token_id
    known = known if isinstance(known, list) else [known]
    if None not in (tokenizer.eos_token_id, *known) and tokenizer.eos_token_id not in known:
        return (
            "warning",
            f"EOS is {tokenizer.eos_token_id} in the tokenizer, {known[0]} in the model's config",
            "Make them agree: the model may not know the token that ends its texts",
        )
    if subject.nvembed is None and tokenizer.pad_token_id is None:
        return "warning", "no pad token", "Give the tokenizer one: batches are padded"
    limit = subject.model.max_seq_length
    positions = getattr(config, "max_position_embeddings", None)
    if limit and positions and limit > positions:
        return (
            "warning",
            f"texts of {limit} tokens are let in, the model knows {positions} positions",
            f"Set max_tokens to {positions} or less",
        )
    pad = "no pad token needed" if subject.nvembed is not None else "has a pad token"
    return "ok", f"{len(tokenizer)} tokens, {rows} embeddings; {pad}"


@_finding("placement")
def check_placement(placement: tuple[Placement, ...]) -> Verdict:
    """All weights are on one device, and really there."""
    devices = sorted({part.device for part in placement})
    if "meta" in devices:
        return "problem", "weights are not loaded (meta)", "Load them"
    if len(devices) > 1:
        return "problem", f"spread over {', '.join(devices)}", "model.to(one device)"
    dtypes = sorted({part.dtype for part in placement if part.dtype.startswith(("float", "bf"))})
    return "ok", f"{' and '.join(dtypes)} on {devices[0] if devices else '-'}"


@_finding("speed")
def check_precision(subject: Subject, placement: tuple[Placement, ...]) -> Verdict:
    """The dtype of the weights is the one this machine computes fastest in."""
    fastest = fastest_precision(subject.device.type)
    largest = max(placement, key=lambda part: part.bytes, default=None)
    if largest is not None and largest.dtype == "bfloat16" and fastest == "float32":
        return (
            "warning",
            f"bfloat16 weights, but this {subject.device.type} multiplies faster in float32",
            "Load with dtype=float32 if it fits",
        )
    gain = ": half the memory, too" if fastest == "bfloat16" else ""
    return "ok", f"matrix products are fastest in {fastest} here{gain}"


@_finding("vectors")
def check_vectors(
    subject: Subject, documents: NDArray[np.float32], alone: NDArray[np.float32]
) -> Verdict:
    """Vectors are finite, of length 1, the same in any batch, and not all alike.

    ``documents`` are ``(N, D)`` vectors of unrelated texts, ``alone`` is the first encoded alone.
    """
    if not (np.isfinite(documents).all() and np.isfinite(alone).all()):
        return "problem", "NaN or infinity", "Load in float32, or the weights are damaged"
    norms = np.linalg.norm(documents, axis=1)
    if np.abs(norms - 1).max() > NORM_TOLERANCE:
        return (
            "problem",
            f"lengths from {norms.min():.3g} to {norms.max():.3g} instead of 1",
            "Add a Normalize module: dot products are no cosines",
        )
    cosine = documents @ documents.T
    nearest = float((cosine - 2 * np.eye(len(cosine))).max())
    shift = float(np.abs(documents[0] - alone).max())
    facts = f"finite, of length 1; unrelated texts reach a cosine of {nearest:.2f}"
    if nearest > ALIKE_WARNING:
        return "warning", facts, "Untrained or collapsed: train it before use"
    if shift > 0.05:
        return "warning", f"{facts}; a vector moves by {shift:.2g} in a batch", "Use float32"
    return "ok", facts


@_finding("16-bit drift")
def check_drift(drift: dict[str, float] | None, needed: str) -> Verdict:
    """16 bit gives nearly the vectors of float32; without ``drift``, ``needed`` says why not."""
    if drift is None:
        return "warning", f"not measured: {needed}", "Run it on a larger machine"
    worst = min(drift.values())
    facts = "cosine to float32: " + ", ".join(f"{how} {value:.5f}" for how, value in drift.items())
    if worst < DRIFT_PROBLEM or not np.isfinite(worst):
        return "problem", facts, "Do not use 16 bit with this model"
    if worst < DRIFT_WARNING:
        return "warning", facts, "Compare scores before using 16 bit"
    return "ok", facts
