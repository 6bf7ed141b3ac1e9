"""A LoRA step at the 7.85 B shape: tokens/s, utilisation and memory, beside sentence-transformers.

A step needs 4 operations per frozen weight and token: 2 forward, 2 back to the inputs. That is the
``useful`` share of the measured products ceiling; ``done`` counts what is computed twice as well.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gpu import Context
from torch import Tensor

from gpu_parts.shapes import (
    device_of,
    forward_operations,
    freed,
    peak_gb,
    products_ceiling,
    random_model,
    random_texts,
    seconds_of,
)
from nvembed.data.batch import ContrastiveBatch, build_batch
from nvembed.data.examples import PairSource
from nvembed.data.records import PairRecord
from nvembed.kernels.layers import compile_elementwise, restore
from nvembed.model.backbone import add_lora, free_bytes, hold_frozen, recompute_layers
from nvembed.model.embedder import NVEmbed, hold_masters
from nvembed.model.settings import LoraSettings
from nvembed.training.contrastive_loss import Objective
from nvembed.training.distributed import DistributedContext
from nvembed.training.model import measure_activation_budget
from nvembed.training.stages import tokenized
from nvembed.training.step import StepSettings, contrastive_step

NEGATIVES = 3
TEMPERATURE = 0.05
MEMORY_SHARE = 0.75  # of what is free, for graphs; a run's own choice is half


def batch_of(queries: int, tokens: int) -> ContrastiveBatch:
    """Queries with a positive and three negatives, all texts of one length."""
    texts = random_texts(queries * (2 + NEGATIVES), tokens)
    columns = [texts[n * queries : (n + 1) * queries] for n in range(2 + NEGATIVES)]
    rows = zip(*columns, strict=True)
    records = [PairRecord(query, (positive,), tuple(rest)) for query, positive, *rest in rows]
    source = PairSource(records, "random", None)
    generator = np.random.default_rng(0)
    examples = [source.example(n, generator, NEGATIVES) for n in range(queries)]
    return build_batch(examples, in_batch_negatives=True)


def adapted(context: Context, device: torch.device) -> NVEmbed:
    """The shape with adapters, as a run in bfloat16 holds it."""
    model = random_model(device, context.work / "train", rehearse=context.rehearse)
    add_lora(model.backbone, LoraSettings(rank=16, alpha=32, dropout=0.0))
    hold_frozen(model.backbone, torch.bfloat16)
    hold_masters(model)
    return model.train()


def step_row(
    context: Context, model: NVEmbed, name: str, queries: int, tokens: int, *, again: bool = False
) -> None:
    """Measure a step of an option; ``again`` where layers are computed again on the way back."""
    device = model.device
    batch = batch_of(queries, tokens)
    texts = tokenized(model.backbone.text_tokenizer, batch.texts)
    lengths = list(map(len, texts))
    pack_tokens = 64 if context.rehearse else 6144
    room = MEMORY_SHARE * free_bytes(device) / 1e9
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    found: dict[str, Any] = {}
    with torch.autocast(device.type, torch.bfloat16):
        budget = measure_activation_budget(
            model, SimpleNamespace(memory_gb=room, pack_tokens=pack_tokens)
        )
        settings = StepSettings(Objective(TEMPERATURE), True, pack_tokens, budget.tokens)

        def step() -> None:
            found["result"] = contrastive_step(
                model, batch, texts, settings, DistributedContext(device=device), seed=1
            )
            fused.step()
            fused.zero_grad()

        peak_gb(device)
        seconds = seconds_of(step, device, most=min(10.0, context.left() / 4), runs=3)
    recomputed = found["result"].recomputed
    forward = forward_operations(model, lengths)
    rate = forward / seconds / products_ceiling(device)
    context.row(
        name,
        tokens=sum(lengths),
        tokens_per_second=sum(lengths) / seconds,
        seconds=seconds,
        useful=2 * rate,
        done=(2 + max(recomputed, float(again))) * rate,
        recomputed=recomputed,
        kb_per_token=budget.bytes_per_token / 1e3,
        peak_gb=peak_gb(device),
        loss=found["result"].loss,
    )


def peer_row(context: Context, device: torch.device, queries: int, tokens: int) -> None:
    """sentence-transformers' cached loss on the same decoder and adapters, mean pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
    )
    from sentence_transformers.sentence_transformer.modules import Pooling

    ours = adapted(context, device)
    decoder: Any = ours.backbone.model
    restore(decoder)  # it computes as transformers and peft do
    decoder.config._attn_implementation = "sdpa"
    plain = _Padded(decoder, ours.tokenizer)
    pooling = Pooling(decoder.config.hidden_size, "mean")
    model = SentenceTransformer(modules=[plain, pooling, Normalize()], device=str(device)).train()
    batch = batch_of(queries, tokens)
    by_column = [
        [batch.texts[row][1] for row in rows]
        for rows in np.arange(queries * (2 + NEGATIVES)).reshape(2 + NEGATIVES, queries)
    ]
    features = [plain.features(texts, device) for texts in by_column]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    size = 2 if context.rehearse else 32
    loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=size)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss([dict(each) for each in features], torch.empty(0)).backward()
        fused.step()
        fused.zero_grad()

    peak_gb(device)
    seconds = seconds_of(step, device, most=min(10.0, context.left() / 3), runs=2)
    counted = sum(int(each["attention_mask"].sum()) for each in features)
    rate = forward_operations(ours, [tokens] * (counted // tokens)) / seconds
    context.row(
        "sentence-transformers, cached",
        tokens=counted,
        tokens_per_second=counted / seconds,
        seconds=seconds,
        useful=2 * rate / products_ceiling(device),
        mini_batch=size,
        peak_gb=peak_gb(device),
    )


class _Padded(torch.nn.Module):
    """What sentence-transformers' ``Transformer`` computes, around weights that are there."""

    def __init__(self, decoder: Any, tokenizer: Any) -> None:
        super().__init__()
        self.decoder, self.tokenizer = decoder, tokenizer

    def features(self, texts: list[str], device: torch.device) -> dict[str, Tensor]:
        found = self.tokenizer(texts, padding=True, return_tensors="pt")
        return {key: found[key].to(device) for key in ("input_ids", "attention_mask")}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        ids, mask = features["input_ids"], features["attention_mask"]
        output = self.decoder(input_ids=ids, attention_mask=mask)
        return features | {"token_embeddings": output.last_hidden_state}


def our_rows(context: Context, device: torch.device, few: int, many: int, tokens: int) -> None:
    """Our step in its forms: graphs of all texts kept, or of some, or of layers' inputs alone."""
    model = adapted(context, device)

    def attempt(name: str, queries: int, **options: bool) -> None:
        context.attempt(name, lambda: step_row(context, model, name, queries, tokens, **options))
        freed(device)  # after a failure, whose traceback held its tensors

    attempt("all kept", few)
    attempt("many texts", many)
    if device.type == "cuda":
        compile_elementwise(model.backbone.model)
        attempt("all kept, compiled", few)
    recompute_layers(model.backbone)
    attempt("layers computed again", many, again=True)


def run(context: Context) -> None:
    device = device_of(context.rehearse)
    few, many, tokens = (2, 4, 16) if context.rehearse else (6, 32, 256)
    our_rows(context, device, few, many, tokens)
    freed(device)
    context.attempt("sentence-transformers", lambda: peer_row(context, device, many, tokens))
