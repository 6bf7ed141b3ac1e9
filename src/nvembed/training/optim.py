"""Optimizer and learning-rate schedule.

adamw          torch's, with all updates of a step in one fused kernel where there is one
adamw_8bit     bitsandbytes': both moments in 8 bits per weight
schedule_free  AdamW that trains at one point and is evaluated at an average of its steps, which
               takes the place of a falling learning rate (Defazio et al., 2024)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nvembed.core.errors import ConfigError
from nvembed.training.config import OptimizerConfig, ScheduleKind, StageConfig
from nvembed.training.distributed import spread

# Of a parameter group: how this machine computes, which is not part of the run's state.
_MACHINE = {"params", "fused", "foreach", "capturable"}

# What torch's fused kernels, and bitsandbytes' 8-bit ones, exist for.
_FUSED_DEVICES = {"cpu", "cuda"}


_EIGHT_BIT_DEVICES = {"cpu", "cuda", "xpu"}


def schedule(step: int, *, steps: int, warmup_steps: int, kind: ScheduleKind = "linear") -> float:
    """Share of the peak learning rate at an update, counted from 0.

    Linear rise over the warm-up, then by ``kind``: a line to zero (paper: linear decay), half a
    cosine to zero, or the peak to the end. The last update still moves: the fall reaches zero at
    ``steps``, which is no update any more.
    """
    warmup_steps = min(warmup_steps, steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    left = (steps - step) / max(1, steps - warmup_steps)
    match kind:
        case "linear":
            return left
        case "cosine":
            return (1 - math.cos(math.pi * left)) / 2
        case "constant":
            return 1.0


def stage_schedule(step: int, stage: StageConfig, config: OptimizerConfig) -> float:
    """``schedule`` at an update of a stage, of the kind that stage and optimizer ask for."""
    default: ScheduleKind = "constant" if config.kind == "schedule_free" else "linear"
    return schedule(
        step,
        steps=stage.steps,
        warmup_steps=stage.warmup_steps,
        kind=stage.schedule or default,
    )


def build_optimizer(
    trained: Mapping[str, nn.Parameter],
    head: nn.Module,
    stage: StageConfig,
    config: OptimizerConfig,
) -> torch.optim.Optimizer:
    """The optimizer of a stage; no weight decay on vectors and latents.

    Each parameter group remembers its peak rate as ``peak``.

    Args:
        trained: by name, see ``trained_parameters``.
        head: the pooling head, whose parameters have a rate of their own.
        stage: for the peak rates.
        config: for everything else.

    Raises:
        ConfigError: the package for this kind is not installed, or it has no kernel for the device
            of the parameters.
    """
    in_head = {id(parameter) for parameter in head.parameters()}
    head_rate = stage.head_learning_rate or stage.learning_rate
    split: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        rate = head_rate if id(parameter) in in_head else stage.learning_rate
        decays = parameter.ndim > 1 and "latents" not in name and "embed_tokens" not in name
        # No kernel takes sharded and other parameters together.
        kind = (rate, config.weight_decay if decays else 0.0, isinstance(parameter, DTensor))
        split.setdefault(kind, []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay}
        for (rate, decay, _), parameters in split.items()
    ]
    devices = {parameter.device.type for parameter in trained.values()}
    betas = (config.beta1, config.beta2)
    match config.kind:
        case "adamw":
            fused = devices <= _FUSED_DEVICES and all(
                parameter.is_floating_point() for parameter in trained.values()
            )
            return torch.optim.AdamW(groups, betas=betas, fused=fused)
        case "adamw_8bit":
            return _eight_bit(groups, betas, devices)
        case "schedule_free":
            return _schedule_free(groups, betas, devices)


def _eight_bit(
    groups: list[dict[str, Any]], betas: tuple[float, float], devices: set[str]
) -> torch.optim.Optimizer:
    if unfit := sorted(devices - _EIGHT_BIT_DEVICES):
        raise ConfigError(
            f"adamw_8bit cannot run on {unfit[0]}",
            where="optimizer.kind",
            expected=f"parameters on {', '.join(sorted(_EIGHT_BIT_DEVICES))}",
            hint="Use adamw",
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ModuleNotFoundError as error:
        raise _missing("adamw_8bit", error) from error
    made: torch.optim.Optimizer = AdamW8bit(groups, betas=betas)
    return made


def _schedule_free(
    groups: list[dict[str, Any]], betas: tuple[float, float], devices: set[str]
) -> torch.optim.Optimizer:
    try:
        from schedulefree import AdamWScheduleFree
    except ModuleNotFoundError as error:
        raise _missing("schedule_free", error) from error
    # On a CPU, going over all tensors operation by operation only costs cache misses.
    made: torch.optim.Optimizer = AdamWScheduleFree(
        groups, betas=betas, foreach=devices == {"cuda"}
    )
    return made


def _missing(kind: str, error: ModuleNotFoundError) -> ConfigError:
    return ConfigError(
        f"{kind} needs the package {error.name!r}",
        where="optimizer.kind",
        hint="Install it with: pip install 'nvembed[optimizers]'",
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group to its share of the peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


@runtime_checkable
class _Averaging(Protocol):
    """An optimizer whose parameters stand at one of two points, as schedulefree's do."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def training_weights(optimizer: torch.optim.Optimizer) -> None:
    """Bring the parameters to where gradients are taken, which must precede the first step.

    Does nothing with optimizers that evaluate where they train.
    """
    if isinstance(optimizer, _Averaging):
        optimizer.train()


def averaged_weights(optimizer: torch.optim.Optimizer) -> None:
    """Bring the parameters to where the model is evaluated and saved, at the end of a stage.

    Does nothing with optimizers that evaluate where they train. The way back rounds: for a look in
    the middle of a stage there is ``evaluation_weights``.
    """
    if isinstance(optimizer, _Averaging):
        optimizer.eval()


@contextmanager
def evaluation_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Evaluate or save inside; after it the parameters are back, bit for bit.

    Where the optimizer has two points, a copy of the trained parameters is kept meanwhile.
    """
    if not isinstance(optimizer, _Averaging):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def optimizer_state(
    trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of the state by ``parameter|key``, and everything else as plain data."""
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, dict[str, Any]] = {}
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}|{key}"] = value
            else:
                parameters.setdefault(name, {})[key] = value
    groups = [
        {key: value for key, value in group.items() if key not in _MACHINE}
        for group in optimizer.param_groups
    ]
    return tensors, {"parameters": parameters, "groups": groups}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    trained: Mapping[str, nn.Parameter],
    numbers: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Put back what ``optimizer_state`` gave, on the devices and shares of the parameters."""
    machine = {
        id(parameter): group for group in optimizer.param_groups for parameter in group["params"]
    }
    state: dict[Tensor, dict[str, Any]] = {
        trained[name]: dict(values) for name, values in numbers["parameters"].items()
    }
    for entry, value in tensors:
        name, _, key = entry.rpartition("|")
        parameter = trained[name]
        group = machine[id(parameter)]
        if value.shape == parameter.shape:
            # Moments of a run whose weights were not held in float32 yet are of 16 bits.
            is_narrow = value.dtype in (torch.bfloat16, torch.float16)
            wide = value.float() if is_narrow and parameter.dtype == torch.float32 else value
            restored = spread(wide, parameter)
        elif key == "step" and not (group.get("fused") or group.get("capturable")):
            restored = value.clone()  # torch's loops count on the CPU, its kernels on the device
        else:
            restored = value.to(parameter.device, copy=True)
        state.setdefault(parameter, {})[key] = restored
    optimizer.state.clear()
    optimizer.state.update(state)
    # By rate and decay: sharded parameters have groups of their own, and a run may go on without
    # sharding.
    groups = {(group["peak"], group["weight_decay"]): group for group in numbers["groups"]}
    for group in optimizer.param_groups:
        saved = groups[group["peak"], group["weight_decay"]]
        for key, value in saved.items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
