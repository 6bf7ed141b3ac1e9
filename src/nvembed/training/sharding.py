"""Backbone weights sharded over the processes by FSDP2, where one device is too small for them.

Asked for by ``shard: true`` in the recipe or by ``accelerate launch --use_fsdp --fsdp_version 2``.
Every process holds a share of each backbone weight; a layer is gathered for its forward and its
backward pass.

With LoRA only the frozen base is sharded: adapters are small, so they stay replicated, FSDP never
reduces a gradient, and their type may differ from that of the base. In full fine-tuning gradients
of the backbone are reduce-scattered after every pack, since waiting for the last one would keep a
whole gradient on every process. The pooling head lies outside FSDP in both cases.

Gathering is collective: every process must run as many packs as the others, with and without
gradient in the same order. An empty pack is filled with ``FILLER``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from nvembed.core.errors import TrainingError
from nvembed.model.embedder import NVEmbed
from nvembed.model.packs import embed_pack
from nvembed.text.tokens import TokenizedText
from nvembed.training.processes import Processes

FILLER = TokenizedText(ids=(0,), pool_start=0)
"""Stands in an empty pack.

``embed_pack(model, texts or [FILLER])[: len(texts)]`` has no rows, and its backward pass adds zero
to every gradient.
"""


def shard_backbone(
    model: NVEmbed, processes: Processes, *, compute_dtype: torch.dtype | None = None
) -> None:
    """Shard the backbone over the processes, in place, and move the rest to the device.

    The model may still lie on the CPU: only the shares go to the device. A sharded model cannot be
    copied or saved as it is: ``training/tensor_files.py`` gathers tensor by tensor.

    Args:
        model: loaded, with its adapters, equal on all processes.
        processes: the run's; with one there is nothing to shard.
        compute_dtype: weights are gathered in it: autocast's, where it is on, which would otherwise
            keep a second copy of whole weights; ``None`` leaves them as they are.

    Raises:
        TrainingError: the backbone is spread over devices, quantised, or trained in a mix of types.
    """
    if processes.count == 1:
        return
    decoder: Any = model.backbone.model
    adapters = _check_shardable(decoder)
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32 if compute_dtype else None,
        cast_forward_inputs=False,  # the residual stream keeps its type, as under autocast
    )
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for module in (*_layers(decoder), decoder):
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            ignored_params=adapters,
            # Of the root too: between two packs its parameters are then the sharded ones.
            reshard_after_forward=True,
        )
        module.set_gradient_divide_factor(1.0)  # a sum, as everywhere
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    for adapter in adapters:
        adapter.data = adapter.data.to(processes.device)
    model.pooling.to(processes.device)
    with torch.no_grad():
        # FSDP allocates at the first use; that must not be a forward in inference mode.
        embed_pack(model, [FILLER])


def _layers(decoder: nn.Module) -> list[nn.Module]:
    """The layers: of all lists of modules the one that holds most weights."""
    lists = [list(m) for m in decoder.modules() if isinstance(m, nn.ModuleList)]
    return max(
        lists, key=lambda layers: sum(p.numel() for m in layers for p in m.parameters()), default=[]
    )


def _check_shardable(decoder: Any) -> set[nn.Parameter]:
    """The trained parameters among frozen ones (adapters), which stay replicated.

    Raises:
        TrainingError: see :func:`shard_backbone`.
    """
    parameters = list(decoder.parameters())
    spread = getattr(decoder, "hf_device_map", None)
    plain = all(type(p) is nn.Parameter and p.is_floating_point() for p in parameters)
    if spread or not plain:
        raise TrainingError(
            f"a {'spread' if spread else 'quantised'} backbone cannot be sharded",
            where="shard",
            expected="floating point weights on one device",
            hint="Leave sharding out",
        )
    trained = {p for p in parameters if p.requires_grad}
    if len(trained) < len(parameters):
        return trained
    if len(dtypes := {str(p.dtype) for p in trained}) > 1:
        raise TrainingError(
            f"weights of types {', '.join(sorted(dtypes))} cannot be sharded together",
            where="model.dtype",
            hint="Load the model in one type",
        )
    return set()
