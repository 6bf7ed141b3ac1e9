"""Checkpoints: bit-exact for every optimizer, spread parameters included; safe from accidents."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from nvembed.core.errors import ModelError, TrainingError, UserError
from nvembed.training.checkpoint import (
    Position,
    check_recipe,
    file_order,
    latest_checkpoint,
    read_position,
    read_tensors,
    remove_leftovers,
    restore_optimizer,
    restore_weights,
    save_checkpoint,
    save_weights,
    trained_parameters,
    write_tensors,
)
from nvembed.training.config import OptimizerConfig, StageConfig, recipe_differences
from nvembed.training.distributed import DistributedContext
from nvembed.training.stages import build_optimizer, set_learning_rate, training_weights

STAGE = StageConfig(name="one", steps=6, in_batch_negatives=True, learning_rate=0.01)
RECIPE = {"seed": 1, "stages": [{"steps": 6, "learning_rate": 0.01}], "log_every": 1}


class Toy(nn.Module):
    """A matrix large enough for 8-bit moments, a head in float32, and weights in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(64, 80)
        self.coarse = nn.Parameter(torch.randn(5, 3).bfloat16())
        self.head = nn.Linear(4, 3)
        self.base = nn.Linear(100, 100).requires_grad_(False)


class Counted(DistributedContext):
    """The first of several processes, of which the others are not there."""

    def agree(self, flag: bool) -> bool:
        return flag


class Run:
    """A model in training whose gradients are a function of the weights and the step."""

    def __init__(self, kind: str = "adamw") -> None:
        self.model = Toy()
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.trained = trained_parameters(self.model, temperature=self.temperature)
        self.optimizer = build_optimizer(
            self.trained, self.model.head, STAGE, OptimizerConfig(kind=kind)
        )
        training_weights(self.optimizer)

    def steps(self, first: int, last: int) -> None:
        for number in range(first, last):
            generator = torch.Generator().manual_seed(number)
            for p in self.trained.values():
                p.grad = torch.sin(p.detach() * 7 + torch.randn(p.shape, generator=generator)).to(
                    p.dtype
                )
            set_learning_rate(self.optimizer, 1 / (number + 1))
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, folder: Path, step: int, *, keep: int = 2, **options) -> Path:
        position = options.pop("position", Position(step, 0, step, 0.1 * step))
        options.setdefault("processes", DistributedContext())
        return save_checkpoint(
            folder, position, self.trained, self.optimizer, recipe=RECIPE, keep=keep, **options
        )

    def restore(self, checkpoint: Path) -> None:
        restore_weights(checkpoint, self.trained)
        restore_optimizer(checkpoint, self.trained, self.optimizer)


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, about a missing GPU
@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "schedule_free"])
def test_three_steps_and_three_more_equal_six(tmp_path: Path, kind: str) -> None:
    if kind != "adamw":
        pytest.importorskip({"adamw_8bit": "bitsandbytes", "schedule_free": "schedulefree"}[kind])
    whole, first, second = Run(kind), Run(kind), Run(kind)
    whole.steps(0, 6)
    first.steps(0, 3)
    first.save(tmp_path, 3)
    first.steps(3, 4)  # what comes after the checkpoint must not reach it
    with torch.no_grad():
        for parameter in second.trained.values():
            parameter.add_(1)
    second.restore(latest_checkpoint(tmp_path))
    second.steps(3, 6)
    start = Run(kind).trained
    for name, parameter in whole.trained.items():
        assert torch.equal(parameter, second.trained[name]), name
        assert not torch.equal(parameter, start[name]), name
        for key, value in whole.optimizer.state[parameter].items():
            restored = second.optimizer.state[second.trained[name]][key]
            assert type(value) is type(restored)
            if isinstance(value, torch.Tensor):
                assert value.dtype == restored.dtype
                assert torch.equal(value, restored), (name, key)
            else:
                assert value == restored
    for group, other in zip(
        whole.optimizer.param_groups, second.optimizer.param_groups, strict=True
    ):
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in other.items() if k != "params"
        }


def test_state_of_another_type_than_its_weight_stays_as_it_is(tmp_path: Path) -> None:
    """As optimizers of 8 bits keep it for small 16-bit weights."""
    run, other = Run(), Run()
    run.steps(0, 2)
    (name,) = [name for name, p in run.trained.items() if p.dtype == torch.bfloat16]
    kept = run.optimizer.state[run.trained[name]]
    kept["exp_avg"] = kept["exp_avg"].float() + 1e-6
    run.save(tmp_path, 2)
    other.restore(latest_checkpoint(tmp_path))
    restored = other.optimizer.state[other.trained[name]]["exp_avg"]
    assert restored.dtype == torch.float32
    assert torch.equal(restored, kept["exp_avg"])


def test_a_run_without_its_optimizer_state_ends_elsewhere(tmp_path: Path) -> None:
    """The vacuity guard of the test above."""
    whole, other = Run(), Run()
    whole.steps(0, 6)
    other.steps(0, 3)
    restarted = Run()
    restore_weights(other.save(tmp_path, 3), restarted.trained)
    restarted.steps(3, 6)
    assert not torch.equal(whole.model.body.weight, restarted.model.body.weight)


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    run = Run()
    run.steps(0, 1)
    position = Position(7, 1, 2, 0.1 + 0.2, {"best": {"score": 1 / 3, "step": 5}})
    path = run.save(tmp_path, 7, position=position, processes=Counted(count=4))
    assert sorted(file.name for file in path.iterdir()) == [
        "optimizer.safetensors",
        "state.json",
        "weights.safetensors",
    ]
    weights = load_file(path / "weights.safetensors")
    assert weights.keys() == {
        "body.weight", "body.bias", "coarse", "head.weight", "head.bias", "temperature"
    }  # fmt: skip
    assert weights["coarse"].dtype == torch.bfloat16
    assert read_position(path) == position  # floats exactly
    assert json.loads((path / "state.json").read_text())["processes"] == 4


def test_tensor_files_are_those_of_safetensors(tmp_path: Path) -> None:
    dtypes = [torch.uint8, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.float16]
    tensors = {
        f'{number}é"{dtype}': (torch.randn(3, number) * 9).to(dtype)
        for number, dtype in enumerate([*dtypes, torch.int8, torch.int16, torch.int32])
    } | {"scalar": torch.tensor(0.5), "across": torch.randn(4, 6).T}
    ordered = file_order(tensors)
    write_tensors(tmp_path / "t.safetensors", ordered, iter(ordered.values()))
    found = load_file(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
        with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
            assert torch.equal(file.get_tensor(name), value)
    assert {name for name, _ in read_tensors(tmp_path / "t.safetensors")} == tensors.keys()
    write_tensors(tmp_path / "none.safetensors", {}, iter(()))
    assert load_file(tmp_path / "none.safetensors") == {}


def test_the_latest_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    run = Run()
    run.steps(0, 1)
    for name in (
        ".step-0000000001.abcd1234.nvembed-new",
        ".step-0000000001.nvembed-old",
        ".best.xyz98765.nvembed-new",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(b"coarse")
    (tmp_path / "best").mkdir()
    for step in (1, 2, 3):
        run.save(tmp_path, step)
    end = run.save(tmp_path, 3, position=Position(3, 1, 0))
    assert end.name == "step-0000000003-end"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best",
        "step-0000000003",
        "step-0000000003-end",
    ]
    assert latest_checkpoint(tmp_path) == end  # the next stage goes on from it
    run.save(tmp_path, 4, position=Position(4, 1, 1))
    assert latest_checkpoint(tmp_path).name == "step-0000000004"
    remove_leftovers(tmp_path / "nowhere")
    assert latest_checkpoint(tmp_path / "nowhere") is None


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files may not grow beyond 20 kB: the kernel's own way to be full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, request) -> None:
    run = Run()
    run.steps(0, 1)
    run.save(tmp_path, 1, keep=1)
    good = {file.name: file.read_bytes() for file in (tmp_path / "step-0000000001").iterdir()}
    assert len(good["weights.safetensors"]) > 20_000
    request.getfixturevalue("small_disk")
    with pytest.raises(UserError, match=r"step-0000000002: cannot write: File too large") as caught:
        run.save(tmp_path, 2, keep=1)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000001"]
    assert good == {
        file.name: file.read_bytes() for file in (tmp_path / "step-0000000001").iterdir()
    }
    with pytest.raises(UserError, match="best: cannot write"):
        save_weights(tmp_path / "best", run.trained, DistributedContext())
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000001"]


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "zeros", "gone"])
def test_a_broken_checkpoint_is_passed_over(tmp_path: Path, file: str, damage: str) -> None:
    run = Run()
    run.steps(0, 1)
    good = run.save(tmp_path, 3)
    broken = run.save(tmp_path, 6) / file
    size = broken.stat().st_size
    if damage == "cut":
        os.truncate(broken, size - 10)
    elif damage == "zeros":
        broken.write_bytes(bytes(size))
    else:
        broken.unlink()
    notes: list[str] = []
    assert latest_checkpoint(tmp_path, log=notes.append) == good
    assert len(notes) == 1
    assert notes[0].startswith("checkpoint step-0000000006 cannot be read (")
    assert "\n" not in notes[0]
    # The steps are done again. Were the broken one counted among the kept, no good one would be.
    run.save(tmp_path, 4, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000004"]
    os.truncate(tmp_path / "step-0000000004" / "weights.safetensors", 100)
    with pytest.raises(TrainingError, match=r"none of the 1 checkpoints can be read .*--fresh"):
        latest_checkpoint(tmp_path)


def test_another_recipe_is_refused_by_its_keys(tmp_path: Path) -> None:
    path = Run().save(tmp_path, 0, processes=Counted(count=2))
    assert check_recipe(path, RECIPE, 2) is None
    assert check_recipe(path, {**RECIPE, "log_every": 5, "threads": 1}, 2) is None
    note = check_recipe(path, RECIPE, 1)
    assert note is not None
    assert "written by 2 processes and 1 go on" in note
    other = {"seed": 2, "stages": [{"steps": 6, "learning_rate": 0.02}], "precision": "float32"}
    with pytest.raises(
        TrainingError,
        match=r"another recipe: seed: 1 → 2; stages\.0\.learning_rate: 0\.01 → 0\.02; "
        r'precision: not there → "float32"\. Train with',
    ) as caught:
        check_recipe(path, other, 2)
    assert "\n" not in str(caught.value)
    assert recipe_differences({"a": [1, 2]}, {"a": [1]}) == ["a.1: 2 → not there"]
    assert recipe_differences({"a": None}, {"a": {"b": 1}}) == [
        "a: null → not there",
        "a.b: not there → 1",
    ]


def test_another_model_is_refused(tmp_path: Path) -> None:
    run = Run()
    path = run.save(tmp_path, 0)
    with pytest.raises(TrainingError, match="1 parameters differ, first temperature"):
        restore_weights(path, trained_parameters(run.model))
    wider = {**run.trained, "coarse": nn.Parameter(torch.zeros(5, 4))}
    with pytest.raises(TrainingError, match="1 parameters differ, first coarse"):
        restore_weights(path, wider)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    run = Run()
    path = run.save(tmp_path, 0)
    weights = {
        name: tensor.clone() for name, tensor in load_file(path / "weights.safetensors").items()
    }
    weights["body.weight"][3, 2] = float("nan")
    save_file(weights, path / "weights.safetensors")
    with pytest.raises(ModelError, match=r"tensor body\.weight is not finite: 1 of 5120 values"):
        restore_weights(path, run.trained)


def test_the_best_weights_alone(tmp_path: Path) -> None:
    run, other = Run(), Run()
    run.steps(0, 2)
    for number in range(2):
        run.steps(2 + number, 3 + number)
        save_weights(tmp_path / "best", run.trained, DistributedContext())
    restore_weights(tmp_path / "best", other.trained)
    assert all(torch.equal(p, other.trained[name]) for name, p in run.trained.items())


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A group of one process, which is enough for spread tensors to be what they are."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_spread_parameters_are_written_whole_and_spread_again(tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (1,))

    def spread_run() -> Run:
        run = Run()
        for module in (run.model.body, run.model.head):
            for name, parameter in list(module.named_parameters()):
                shared = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
                setattr(module, name, nn.Parameter(shared))
        run.trained = trained_parameters(run.model, temperature=run.temperature)
        run.optimizer = build_optimizer(run.trained, run.model.head, STAGE, OptimizerConfig())
        return run

    def steps(run: Run, first: int, last: int) -> None:
        for number in range(first, last):
            for parameter in run.trained.values():
                parameter.grad = torch.sin(parameter.detach() * (number + 2))
            run.optimizer.step()

    plain, first, second = Run(), spread_run(), spread_run()
    steps(plain, 0, 3)
    steps(first, 0, 3)
    path = first.save(tmp_path / "c", 3)
    stored = load_file(path / "weights.safetensors")
    for name, parameter in plain.trained.items():
        assert torch.equal(stored[name], parameter), name
    second.restore(path)
    steps(plain, 3, 5)
    steps(second, 3, 5)
    weight = second.model.body.weight
    assert isinstance(weight, DTensor)
    assert isinstance(second.optimizer.state[weight]["exp_avg"], DTensor)
    assert torch.equal(weight.full_tensor(), plain.model.body.weight)
    # Whatever spreads it: the same checkpoint goes on without spreading.
    alone = Run()
    alone.restore(path)
    steps(alone, 3, 5)
    assert torch.equal(alone.model.body.weight, plain.model.body.weight)


@pytest.mark.usefixtures("one_process")
def test_a_process_that_does_not_write_leaves_no_trace(tmp_path: Path) -> None:
    run = Run()
    run.save(tmp_path / "c", 1, processes=DistributedContext(rank=1))
    assert not (tmp_path / "c").exists()
