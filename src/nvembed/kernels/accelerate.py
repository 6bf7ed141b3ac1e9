"""The one hook of the kernels: which modules of a model compute by this package, and the way back.

    accelerate(model)       model's linear layers, norms, MLPs, decoder layers and adapters
    restore(model)          plain torch, transformers and peft again

``KINDS`` is the whole list. A module keeps its class, weights and names, and gets a ``forward`` of
its own: ``functools.partial(function, module)``, which is pickled and deep-copied with it and
undone by deleting it. Each function falls back to the forward of the class wherever its kernel
cannot run. A shallow copy, such as ``nn.DataParallel`` makes, would compute with the weights of the
original: ``restore`` the model first.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nvembed.kernels.layers import (
    decoder_layer,
    fits_decoder_layer,
    gated_mlp,
    is_silu,
    rms_norm,
)
from nvembed.kernels.linear import fused_lora, has_plain_base, linear


class Kind(NamedTuple):
    """What computes in place of a class's forward, and for which of its modules."""

    forward: Callable[..., Any]
    fits: Callable[[Any], bool] = lambda module: True


def _transformers(name: str, *families: str) -> list[str]:
    return [f"transformers.models.{f.lower()}.modeling_{f.lower()}.{f}{name}" for f in families]


_ROTARY = ("Llama", "Mistral", "Qwen2")

# Class → what computes in its place. A decoder layer of these families is norm, attention with
# rotary positions, norm, gated MLP, and nothing else.
KINDS: dict[str, Kind] = {
    "torch.nn.modules.linear.Linear": Kind(linear),
    "peft.tuners.lora.layer.Linear": Kind(fused_lora, has_plain_base),
    **dict.fromkeys(_transformers("RMSNorm", *_ROTARY, "Qwen3"), Kind(rms_norm)),
    **dict.fromkeys(_transformers("MLP", *_ROTARY, "Qwen3"), Kind(gated_mlp, is_silu)),
    **dict.fromkeys(
        _transformers("DecoderLayer", *_ROTARY), Kind(decoder_layer, fits_decoder_layer)
    ),
}


def accelerate(model: nn.Module) -> Counter[str]:
    """Let a model compute by the kernels, in place; count the modules by what computes them.

    Modules whose forward is another library's hook already, such as accelerate's for layers on
    several devices, are left alone.
    """
    counts: Counter[str] = Counter()
    for module in model.modules():
        cls = type(module)
        kind = KINDS.get(f"{cls.__module__}.{cls.__qualname__}")
        if kind is not None and "forward" not in vars(module) and kind.fits(module):
            module.forward = partial(kind.forward, module)
            counts[kind.forward.__name__] += 1
    return counts


def restore(model: nn.Module) -> None:
    """Give every module the forward of its class again, in place."""
    for module in model.modules():
        if _is_ours(module):
            del module.forward


def _is_ours(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func in _FORWARDS


def compile_elementwise(backbone: nn.Module) -> int:
    """Compile the norms and gated MLPs of a backbone, in place; return how many.

    One compiled loop reads and writes a tensor once. Products and attention stay as they are: their
    libraries do better than generated code, and attention over packs of ever other lengths would be
    compiled again and again. Compiled once per process, for all lengths, which needs a C++ compiler
    on a CPU and takes some seconds. What it gains is in docs/results.md.
    """
    count = 0
    for module in backbone.modules():
        name = type(module).__name__
        if name.endswith(("RMSNorm", "MLP")) and (
            "forward" not in vars(module) or _is_ours(module)
        ):
            function = compiled_norm if name.endswith("RMSNorm") else compiled_mlp
            module.forward = partial(function, module)
            count += 1
    return count


def compiled_norm(module: Any, x: Tensor) -> Tensor:
    """The norm of its class, compiled."""
    out: Tensor = _compiled(type(module).forward)(module, x)
    return out


def compiled_mlp(module: Any, x: Tensor) -> Tensor:
    """``down(act(gate x) · up x)``, the form of the gated MLPs of transformers."""
    gated = _compiled(_gate)(module.act_fn, module.gate_proj(x), module.up_proj(x))
    out: Tensor = module.down_proj(gated)
    return out


def _gate(activation: Any, gate: Tensor, up: Tensor) -> Tensor:
    out: Tensor = activation(gate) * up
    return out


@cache
def _compiled(function: Any) -> Any:
    # On first use: importing the compiler takes seconds.
    return torch.compile(function, dynamic=True)


_FORWARDS = {kind.forward for kind in KINDS.values()} | {compiled_norm, compiled_mlp}

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT = 256 << 20
_LARGEST_REUSED = 32 << 20  # the most that glibc allows


@cache
def keep_freed_memory() -> None:
    """Let up to 256 MB of freed memory stay with this process, for buffers of up to 32 MB.

    Each forward on a CPU frees what the next one needs again. By default glibc returns such buffers
    to the system and gets them as fresh pages, which have to be cleared: a third of the time of
    encoding in float32 (docs/results.md). Where ``MALLOC_TRIM_THRESHOLD_`` or ``GLIBC_TUNABLES`` is
    set, and with other C libraries, nothing changes.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ or "GLIBC_TUNABLES" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # no glibc
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_REUSED)
    mallopt(_TRIM_THRESHOLD, _KEPT)
