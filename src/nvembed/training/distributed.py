"""Several processes train one model: gathered rows, summed gradients, agreement, sharded weights.

The gradient of a step is the sum (no average) over packs, wherever a pack was computed. FSDP2
shards the backbone alone; with LoRA adapters stay replicated. Gathering is collective: every
process runs as many packs as the others, in the same order; an empty one is filled with ``FILLER``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nvembed.core.errors import TrainingError
from nvembed.model.embedder import NVEmbed
from nvembed.model.packs import embed_pack
from nvembed.model.tokens import TokenizedText

Plain = TypeVar("Plain")

# Bytes of one all-reduce: large enough for full bandwidth, small beside the gradients.
BUCKET_BYTES = 64 * 2**20

# One process may work alone for long (mining, writing the model) while the others wait for it. One
# that dies closes its connection, which is noticed at once.
_PATIENCE = timedelta(days=30)

# Stands in an empty pack: ``embed_pack(model, texts or [FILLER])[: len(texts)]`` has no rows, and
# its backward pass adds zero to every gradient.
FILLER = TokenizedText(ids=(0,), pool_start=0)


@dataclass(frozen=True)
class DistributedContext:
    """What a run has to know of its other processes."""

    rank: int = 0  # of this process
    count: int = 1  # of all processes, on all machines
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sharded: bool = False  # backbone weights are to be sharded over the processes
    control: dist.ProcessGroup | None = None  # for messages between CPUs

    @classmethod
    def of_environment(cls, *, shard: bool = False, timeout_minutes: float = 30) -> Self:
        """Join the launched processes, or be alone; before anything else of accelerate."""
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        shard = _launcher_shards() or shard
        on_cpu = _flag("ACCELERATE_USE_CPU") or (launched > 1 and not torch.cuda.is_available())
        options = {"timeout": timedelta(minutes=timeout_minutes)} if launched > 1 else {}
        state = PartialState(cpu=on_cpu, **options)
        if state.num_processes != launched:
            raise TrainingError(
                f"{launched} processes were started, but they do not see each other",
                expected="CUDA devices, or CPUs",
                hint="Start one process",
            )
        if launched == 1:
            return cls(device=state.device)
        device = torch.device("cpu") if state.device.type == "cpu" else state.device  # not cpu:0
        control = dist.new_group(backend="gloo", timeout=_PATIENCE)
        return cls(state.process_index, launched, device, shard, control)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def gather_rows(self, rows_ND: Tensor, counts: Sequence[int]) -> Tensor:
        """Rows of all processes in their order, without gradient; ``counts`` is N of each."""
        rows_ND = rows_ND.detach()
        if self.count == 1:
            return rows_ND
        # Pieces of one size, because gloo knows no others.
        padded_MD = rows_ND.new_zeros((max(counts), *rows_ND.shape[1:]))
        padded_MD[: len(rows_ND)] = rows_ND
        pieces = [torch.empty_like(padded_MD) for _ in counts]
        dist.all_gather(pieces, padded_MD)
        return torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])

    @contextmanager
    def syncing(self, model: NVEmbed, *, last: bool) -> Iterator[None]:
        """Around the backward pass of a pack; at the ``last`` FSDP waits for sums on their way."""
        decoder = model.backbone.model
        if isinstance(decoder, FSDPModule):
            decoder.set_is_last_backward(last)
        yield

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients of replicated parameters; a missing one is zero unless all lack it."""
        if self.count == 1:
            return
        replicated = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
        used = torch.tensor([p.grad is not None for p in replicated], dtype=torch.uint8)
        dist.all_reduce(used, dist.ReduceOp.MAX, group=self.control)
        gradients = []
        for parameter, is_used in zip(replicated, used.tolist(), strict=True):
            if is_used:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def clip_gradients(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> float:
        """Scale gradients down to a norm and return what it was, equal on all processes."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        sharded = [g.to_local() for g in gradients if isinstance(g, DTensor)]
        replicated = [g for g in gradients if not isinstance(g, DTensor)]
        # Replicated ones are counted by the first process alone: the sum is then equal everywhere.
        square = _square(sharded) + (_square(replicated) if self.is_main else 0.0)
        if self.count > 1:
            total = torch.tensor(square, dtype=torch.float64)
            dist.all_reduce(total, group=self.control)
            square = float(total)
        norm = math.sqrt(square)
        if max_norm is not None and (scale := max_norm / (norm + 1e-6)) < 1:  # as torch does
            for gradient in (*sharded, *replicated):
                gradient.mul_(scale)
        return norm

    def agree(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        if self.count == 1:
            return flag
        flags = torch.tensor(flag, dtype=torch.uint8)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        return bool(flags)

    def of_main(self, value: Plain) -> Plain:
        """What the first process has: measurements on which all must act alike."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def of_all(self, value: Plain) -> list[Plain]:
        """What every process has, by rank; the same list on all of them."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        """Wait until every process is here, however long that takes."""
        if self.count > 1:
            dist.barrier(group=self.control)

    @torch.no_grad()
    def broadcast_parameters(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give all processes the values of the first; before sharding."""
        if self.count > 1:
            for parameter in parameters:
                # Weights that are to be sharded are on the CPU still, where NCCL does not reach.
                group = self.control if parameter.device.type == "cpu" else None
                dist.broadcast(parameter.data, src=0, group=group)


@contextmanager
def dead_peer_is_an_error(checkpoints: str) -> Iterator[None]:
    """Turn a broken connection into one line: another process died, or did not answer in time."""
    try:
        yield
    except RuntimeError as error:  # gloo raises nothing more exact
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise TrainingError(
            f"another process died or did not answer ({' '.join(str(error).split())[:120]})",
            where=checkpoints,
            hint="Its own error says why; the same command goes on from the last checkpoint there",
        ) from error


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one type and device, up to ``BUCKET_BYTES`` together."""
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for gradient in gradients:
        bucket = by_kind.setdefault((gradient.dtype, gradient.device), [])
        if bucket and sum(g.nbytes for g in bucket) + gradient.nbytes > BUCKET_BYTES:
            yield list(bucket)
            bucket.clear()
        bucket.append(gradient)
    yield from by_kind.values()


def _square(gradients: Sequence[Tensor]) -> float:
    """Sum of squares, in float32 whatever the type of the gradients."""
    if not gradients:
        return 0.0
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    return float(torch.stack(norms).double().square().sum())


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _launcher_shards() -> bool:
    """Whether ``accelerate launch`` asks for FSDP2."""
    start = "Start with: accelerate launch --use_fsdp --fsdp_version 2"
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        raise TrainingError(
            "training does not run on DeepSpeed",
            expected="DDP, or FSDP2, which shards the same weights as ZeRO-3",
            hint=start,
        )
    if not _flag("ACCELERATE_USE_FSDP"):
        return False
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise TrainingError(
            f"training does not run on FSDP version {version}", expected="version 2", hint=start
        )
    if _flag("FSDP_OFFLOAD_PARAMS"):
        raise TrainingError("training does not offload weights", hint="Unset fsdp_offload_params")
    return True


def shard_backbone(
    model: NVEmbed, processes: DistributedContext, *, compute_dtype: torch.dtype | None = None
) -> None:
    """Shard the backbone over the processes, in place, and move the rest to the device.

    ``compute_dtype`` is autocast's, which would otherwise keep a second copy of whole weights.
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
    # The layers: of all lists of modules the one that holds most weights.
    lists = [list(module) for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    layers = max(
        lists, key=lambda each: sum(p.numel() for m in each for p in m.parameters()), default=[]
    )
    for module in (*layers, decoder):
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


def _check_shardable(decoder: Any) -> set[nn.Parameter]:
    """The trained parameters among frozen ones (adapters), which stay replicated."""
    parameters = list(decoder.parameters())
    is_spread = getattr(decoder, "hf_device_map", None)
    plain = all(type(p) is nn.Parameter and p.is_floating_point() for p in parameters)
    if is_spread or not plain:
        raise TrainingError(
            f"a {'spread' if is_spread else 'quantised'} backbone cannot be sharded",
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


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, where it is spread over processes; all of them must ask at once."""
    detached = tensor.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


def spread(value: Tensor, like: Tensor) -> Tensor:
    """``value`` on the device of ``like``, and this process's share of it where that is spread."""
    # A copy in any case: values read from a file are its pages.
    moved = value.to(like.device, copy=True)
    if not isinstance(like, DTensor):
        return moved
    # Nothing is sent: every process has the whole value.
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)
