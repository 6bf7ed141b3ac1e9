"""The 7.85 B shape of NV-Embed-v2 with random weights made on the device, and how it is timed.

Letters: T tokens, L tokens of a text, Q query heads · head width, D width, H · R heads and latents.
"""

from __future__ import annotations

import gc
import random
import statistics
import string
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from load_memory import write_tokenizer
from sentence_transformers.base.modules import Normalize
from torch import nn

from nvembed.interop.official import read_config
from nvembed.model.backbone import Backbone
from nvembed.model.embedder import NVEmbed
from nvembed.model.memory import weight_bytes
from nvembed.model.official_load import empty_modules
from nvembed.model.pooling import LatentAttentionPooling

MAX_TOKENS = 4096


def device_of(rehearse: bool) -> torch.device:
    """The GPU, which must be there unless this is a rehearsal."""
    if rehearse:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; --rehearse runs on a CPU")
    return torch.device("cuda")


def official_values(rehearse: bool) -> dict[str, Any]:
    """``config.json`` of NV-Embed-v2, or of a model of the same kind that any machine holds."""
    width, inner, layers, heads, keys, latents = (
        (64, 128, 2, 4, 2, 16) if rehearse else (4096, 14336, 32, 32, 8, 512)
    )
    latent = {"num_latents_value": latents, "num_cross_heads": 2 if rehearse else 8}
    latent |= {"cross_dim_head": width, "hidden_dim": width, "latent_dim": width}
    return {
        "model_type": "nvembed",
        "hidden_size": width,
        "latent_attention_config": latent,
        "text_config": {
            "model_type": "bidir_mistral",
            "vocab_size": 32000,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": keys,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
        },
    }


def random_model(device: torch.device, folder: Path, *, rehearse: bool = False) -> NVEmbed:
    """The shape in bfloat16; ``folder`` gets a tokenizer of one token per byte."""
    config, latent = read_config(official_values(rehearse), where="gpu_parts/shapes.py")
    decoder, pooling = empty_modules(config, latent)
    torch.manual_seed(0)
    for module in (decoder, pooling):
        module.to(torch.bfloat16).to_empty(device=device)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 1.0 if "latents" in name else 0.02)
                else:
                    parameter.fill_(float("norm" in name and name.endswith("weight")))
    # Its buffers are computed: what was empty holds anything.
    decoder.rotary_emb = type(decoder.rotary_emb)(config).to(device)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder)
    backbone = Backbone(decoder.eval(), tokenizer, max_tokens=MAX_TOKENS, text_style="official")
    return NVEmbed(modules=[backbone, pooling.eval(), Normalize()], device=str(device)).eval()


def random_texts(count: int, tokens: int, *, seed: int = 0) -> list[str]:
    """Different texts of letters, which are so many tokens with BOS and EOS."""
    generator = random.Random(seed)
    return ["".join(generator.choices(string.ascii_letters, k=tokens - 2)) for _ in range(count)]


# --- Operations -----------------------------------------------------------------------------------


def linear_weights(model: NVEmbed) -> int:
    """Weights of the backbone's linear layers, adapters left out."""
    layers = model.backbone.model.named_modules()
    return sum(
        layer.in_features * layer.out_features
        for name, layer in layers
        if isinstance(layer, nn.Linear) and "lora_" not in name
    )


def forward_operations(model: NVEmbed, lengths: Sequence[int]) -> float:
    """Floating point operations of one forward: 2 per weight and token, 4 Q L² per layer and text.

    Latent attention counts as folded: 4 H R D per token, and its MLP 24 D².
    """
    config = model.backbone.model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_pair = 4 * config.num_hidden_layers * config.num_attention_heads * head
    per_token = 2 * linear_weights(model)
    if isinstance(model.pooling, LatentAttentionPooling):
        layer, width = model.pooling.layer, model.pooling.width
        per_token += 4 * layer.num_heads * len(layer.latents_RD) * width + 24 * width**2
    return float(sum(per_token * length + per_pair * length**2 for length in lengths))


# --- The clock ------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(
    compute: Callable[[], object], device: torch.device, *, most: float, runs: int = 7
) -> float:
    """Median of up to ``runs`` runs after one to warm up, in at most about ``most`` seconds."""
    compute()
    wait(device)
    found: list[float] = []
    until = time.perf_counter() + most
    while len(found) < runs and (not found or time.perf_counter() < until):
        started = time.perf_counter()
        compute()
        wait(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def products_ceiling(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations per second of a large product of random matrices, as torch computes it."""
    size = 8192 if device.type == "cuda" else 256
    # Not of zeros, which multiply faster; several products, so that starting one costs nothing.
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(8):
            left @ right

    with torch.inference_mode():
        return 8 * 2.0 * size**3 / seconds_of(multiply, device, most=1.0)


def freed(device: torch.device) -> None:
    """Give the memory of what is gone back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def gigabytes(model: nn.Module) -> float:
    """Of all weights and buffers, quantised ones too."""
    return sum(weight_bytes(model).values()) / 1e9


def peak_gb(device: torch.device) -> float:
    """Highest memory of the device since the last call; of a CPU nothing is counted."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return peak
