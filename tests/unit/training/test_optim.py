"""Schedules in closed form; each optimizer against plain arithmetic; exact looks at the average."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from nvembed.core.errors import ConfigError
from nvembed.training.checkpoint import trained_parameters
from nvembed.training.config import OptimizerConfig, StageConfig
from nvembed.training.metrics import evaluation_weights
from nvembed.training.stages import (
    averaged_weights,
    build_optimizer,
    schedule,
    set_learning_rate,
    stage_schedule,
    training_weights,
)


class Toy(nn.Module):
    """A body and a head, with every kind of parameter that is treated differently."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.embed_tokens = nn.Embedding(5, 3)
        self.head = nn.Module()
        self.head.latents = nn.Parameter(torch.randn(2, 4))
        self.head.out = nn.Linear(4, 2)
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)


def stage(**changes) -> StageConfig:
    given = {"name": "one", "steps": 10, "in_batch_negatives": True, "learning_rate": 1e-3}
    return StageConfig.model_validate({**given, "warmup_steps": 0, **changes})


def build(model: Toy, config: OptimizerConfig, **changes) -> torch.optim.Optimizer:
    return build_optimizer(trained_parameters(model), model.head, stage(**changes), config)


def step(model: Toy, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One update with gradients that depend on the step alone."""
    generator = torch.Generator().manual_seed(number)
    for parameter in trained_parameters(model).values():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(
            parameter.dtype
        )
    optimizer.step()
    optimizer.zero_grad()


def gradient_of(first: torch.Tensor, number: int) -> torch.Tensor:
    """What ``step`` gives the first parameter, a float64 one."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(first.shape, generator=generator, dtype=torch.float64)


def test_cosine_and_constant_schedules_in_closed_form() -> None:
    cosine = [schedule(n, steps=12, warmup_steps=4, kind="cosine") for n in range(12)]
    fall = [(1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)]
    np.testing.assert_allclose(cosine, [0.2, 0.4, 0.6, 0.8, *fall], rtol=1e-12)
    assert cosine[8] == pytest.approx(0.5)  # half-way through the fall
    constant = [schedule(n, steps=12, warmup_steps=4, kind="constant") for n in range(12)]
    np.testing.assert_allclose(constant, [0.2, 0.4, 0.6, 0.8, *[1.0] * 8])
    for kind in ("linear", "cosine", "constant"):
        assert schedule(0, steps=1, warmup_steps=0, kind=kind) == 1.0
        # All of it is warm-up, which then ends with the stage.
        rises = [schedule(n, steps=3, warmup_steps=9, kind=kind) for n in range(3)]
        assert rises == [1 / 4, 2 / 4, 3 / 4]


def test_the_schedule_of_a_stage() -> None:
    adamw, free = OptimizerConfig(), OptimizerConfig(kind="schedule_free")
    assert stage_schedule(5, stage(), adamw) == 0.5
    assert stage_schedule(5, stage(schedule="linear"), adamw) == 0.5
    assert stage_schedule(8, stage(schedule="cosine"), adamw) == pytest.approx(
        (1 + math.cos(0.8 * math.pi)) / 2
    )
    assert stage_schedule(8, stage(schedule="constant"), adamw) == 1.0
    assert stage_schedule(8, stage(), free) == 1.0
    assert stage_schedule(0, stage(warmup_steps=3), free) == 0.25


def test_groups_have_their_rates_and_decays() -> None:
    model = Toy()
    optimizer = build(
        model, OptimizerConfig(weight_decay=0.5), learning_rate=1e-2, head_learning_rate=1e-3
    )
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        names[id(p)]: (group["peak"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found == {
        "body.weight": (1e-2, 0.5),
        "body.bias": (1e-2, 0.0),
        "embed_tokens.weight": (1e-2, 0.0),
        "head.latents": (1e-3, 0.0),
        "head.out.weight": (1e-3, 0.5),
        "head.out.bias": (1e-3, 0.0),
    }
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-3, 5e-4}


def test_a_parameter_outside_the_model_is_trained_without_decay() -> None:
    model = Toy()
    temperature = nn.Parameter(torch.tensor(3.0))
    trained = trained_parameters(model, temperature=temperature)
    assert list(trained) == [
        "body.weight", "body.bias", "embed_tokens.weight", "head.latents", "head.out.weight",
        "head.out.bias", "temperature",
    ]  # fmt: skip
    optimizer = build_optimizer(trained, model.head, stage(), OptimizerConfig(weight_decay=0.5))
    group = next(g for g in optimizer.param_groups if any(p is temperature for p in g["params"]))
    assert group["weight_decay"] == 0.0


def test_adamw_is_fused_and_equals_plain_arithmetic() -> None:
    torch.manual_seed(0)
    model = Toy().double()
    config = OptimizerConfig(weight_decay=0.1, beta1=0.8, beta2=0.95)
    optimizer = build(model, config, learning_rate=0.01)
    assert all(group["fused"] for group in optimizer.param_groups)
    start = model.body.weight.detach().clone()
    for number in range(4):
        step(model, optimizer, number)
    weight, mean, square = start, torch.zeros_like(start), torch.zeros_like(start)
    for number in range(4):
        gradient = gradient_of(start, number)
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.95 * square + 0.05 * gradient**2
        weight = weight * (1 - 0.01 * 0.1)
        corrected = mean / (1 - 0.8 ** (number + 1))
        scale = (square / (1 - 0.95 ** (number + 1))).sqrt() + 1e-8
        weight = weight - 0.01 * corrected / scale
    torch.testing.assert_close(model.body.weight.detach(), weight, rtol=1e-12, atol=1e-12)
    assert (weight - start).abs().min() > 1e-3


def test_schedule_free_equals_plain_arithmetic() -> None:
    """x averages the steps z with weights of the square of the rate; gradients are taken at y."""
    pytest.importorskip("schedulefree")
    torch.manual_seed(0)
    model = Toy().double()
    config = OptimizerConfig(kind="schedule_free", weight_decay=0.1, beta2=0.95)
    optimizer = build(model, config, learning_rate=0.01)
    training_weights(optimizer)
    shares = [0.5, 1.0, 1.0, 1.0]
    y = z = x = model.body.weight.detach().clone()
    square, total = torch.zeros_like(z), 0.0
    for number, share in enumerate(shares):
        set_learning_rate(optimizer, share)
        step(model, optimizer, number)
        gradient = gradient_of(z, number)
        rate = 0.01 * share
        square = 0.95 * square + 0.05 * gradient**2
        scale = (square / (1 - 0.95 ** (number + 1))).sqrt() + 1e-8
        total += rate**2
        z = z - rate * (gradient / scale + 0.1 * y)
        x = x + (z - x) * rate**2 / total
        y = 0.9 * x + 0.1 * z
        torch.testing.assert_close(model.body.weight.detach(), y, rtol=1e-9, atol=1e-12)
    with evaluation_weights(optimizer):
        torch.testing.assert_close(model.body.weight.detach(), x, rtol=1e-9, atol=1e-12)
    assert (x - y).abs().max() > 1e-3
    averaged_weights(optimizer)
    torch.testing.assert_close(model.body.weight.detach(), x, rtol=1e-9, atol=1e-12)


def test_a_look_at_the_average_changes_no_bit() -> None:
    pytest.importorskip("schedulefree")
    torch.manual_seed(0)
    model = Toy()
    optimizer = build(model, OptimizerConfig(kind="schedule_free"), learning_rate=0.01)
    training_weights(optimizer)
    for number in range(3):
        step(model, optimizer, number)
    before = {name: p.detach().clone() for name, p in trained_parameters(model).items()}
    inside = []

    def failing_evaluation() -> None:
        with evaluation_weights(optimizer):
            inside.append(model.body.weight.detach().clone())
            raise KeyError

    with pytest.raises(KeyError):
        failing_evaluation()
    assert not torch.equal(inside[0], before["body.weight"])
    assert all(torch.equal(p, before[name]) for name, p in trained_parameters(model).items())
    step(model, optimizer, 3)  # in training again, or it would refuse


def test_weights_of_adamw_stay_where_they_are() -> None:
    model = Toy()
    optimizer = build(model, OptimizerConfig())
    before = model.body.weight.detach().clone()
    training_weights(optimizer)
    with evaluation_weights(optimizer):
        assert torch.equal(model.body.weight, before)
    averaged_weights(optimizer)
    assert torch.equal(model.body.weight, before)


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, about a missing GPU
def test_eight_bit_moments_train_nearly_the_same() -> None:
    pytest.importorskip("bitsandbytes")
    ends = []
    for kind in ("adamw", "adamw_8bit"):
        torch.manual_seed(0)
        model = Toy()
        model.body = nn.Linear(64, 128)  # those below 4096 numbers keep whole moments
        optimizer = build(model, OptimizerConfig(kind=kind), learning_rate=0.01)
        for number in range(5):
            step(model, optimizer, number)
        ends.append(model.body.weight.detach())
        states = optimizer.state[model.body.weight]
    assert states["state1"].dtype == torch.uint8
    # 5 steps of at most 0.01 each: moments in 8 bits keep most of the way.
    difference = (ends[0] - ends[1]).abs()
    assert 0 < difference.mean() < 1e-3


def test_a_device_without_8_bit_kernels_and_missing_packages_are_told(monkeypatch) -> None:
    model = Toy()
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    for kind in ("adamw_8bit", "schedule_free"):
        with pytest.raises(
            ConfigError, match=rf"{kind} needs the package .*'nvembed\[optimizers\]'"
        ) as caught:
            build(model, OptimizerConfig(kind=kind))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"adamw_8bit cannot run on meta; .* Use adamw"):
        build(model.to("meta"), OptimizerConfig(kind="adamw_8bit"))


@pytest.mark.parametrize("given", [None, "constant", "linear", "cosine"])
def test_a_falling_rate_under_schedule_free_is_refused(given) -> None:
    from nvembed.training.config import TrainConfig

    data = {
        "output": "run",
        "model": {"backbone": "m"},
        "datasets": [
            {"name": "d", "path": "d.jsonl", "kind": "sts", "instruction": "x", "stages": [1]}
        ],
        "stages": [{"name": "one", "steps": 1, "in_batch_negatives": True, "schedule": given}],
        "optimizer": {"kind": "schedule_free"},
    }
    if given in (None, "constant"):
        TrainConfig.model_validate(data)
    else:
        with pytest.raises(ValueError, match=f"no use for a {given} schedule; .* say constant"):
            TrainConfig.model_validate(data)
    TrainConfig.model_validate({**data, "optimizer": {"kind": "adamw"}})
