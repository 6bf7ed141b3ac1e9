"""How fast this machine multiplies matrices of a decoder's own shapes, and how much it needs."""

from __future__ import annotations

import timeit
from collections import Counter
from typing import Any

import torch

from nvembed.kernels.functions import product
from peers.job import child_main

ROWS = 1024


def product_shapes(decoder: str) -> Counter[tuple[int, int]]:
    """Inputs and outputs of the decoder's linear layers, and how many there are of each."""
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(decoder))
    layers = (layer for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    return Counter((layer.in_features, layer.out_features) for layer in layers)


def token_flops(decoder: str) -> float:
    """Operations in products of one token's forward pass."""
    shapes = product_shapes(decoder)
    return float(sum(2 * inner * outer * count for (inner, outer), count in shapes.items()))


def run(given: dict[str, Any]) -> dict[str, Any]:
    """The best of 9 products of each shape, by our kernels or torch's, weighed as in the model."""
    torch.set_num_threads(given["threads"])
    dtype = getattr(torch, given["dtype"])
    work = seconds = 0.0
    each = {}
    for (inner, outer), count in product_shapes(given["decoder"]).items():
        left, right = torch.randn(ROWS, inner).to(dtype), torch.randn(outer, inner).to(dtype)
        with torch.inference_mode():
            best = min(
                min(timeit.repeat(lambda: multiply(left, right), number=1, repeat=9))  # noqa: B023
                for multiply in (product, torch.nn.functional.linear)
            )
        operations = 2.0 * ROWS * inner * outer
        each[f"{inner} to {outer}"] = operations / best / 1e9
        work, seconds = work + count * operations, seconds + count * best
    return {"gflops": work / seconds / 1e9, "shapes": each}


if __name__ == "__main__":
    child_main(run)
