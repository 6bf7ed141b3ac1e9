"""Two processes with FSDP2: what is spread is saved whole, and a failure reaches both."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from nvembed.core.errors import UserError
from nvembed.training.checkpoint import (
    Position,
    restore_optimizer,
    restore_weights,
    save_checkpoint,
    trained_parameters,
)
from nvembed.training.config import OptimizerConfig, StageConfig
from nvembed.training.distributed import DistributedContext
from nvembed.training.stages import build_optimizer, training_weights

STAGE = StageConfig(name="one", steps=6, in_batch_negatives=True, learning_rate=0.01)


def build(kind: str, *, spread: bool) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 81), nn.Linear(81, 3))
    if spread:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    trained = trained_parameters(model)
    optimizer = build_optimizer(trained, model[1], STAGE, OptimizerConfig(kind=kind))
    training_weights(optimizer)
    return trained, optimizer


def steps(trained: dict[str, nn.Parameter], optimizer, first: int, last: int) -> None:
    for number in range(first, last):
        for parameter in trained.values():
            parameter.grad = torch.sin(parameter.detach() * (number + 2))
        optimizer.step()


def save(folder: Path, trained, optimizer, step: int, processes: DistributedContext) -> Path:
    position = Position(step, 0, step)
    return save_checkpoint(
        folder,
        position,
        trained,
        optimizer,
        recipe={"stages": [{}, {}]},
        processes=processes,
        keep=2,
    )


def train(rank: int, folder: str, kind: str) -> None:
    """What each process does; processes share a folder."""
    root = Path(folder)
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    store = torch.distributed.FileStore(str(root / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    processes = DistributedContext(rank, 2, control=torch.distributed.new_group(backend="gloo"))
    trained, optimizer = build(kind, spread=True)
    steps(trained, optimizer, 0, 3)
    path = save(root / "c", trained, optimizer, 3, processes)
    torch.distributed.barrier()
    again, fresh = build(kind, spread=True)
    restore_weights(path, again)
    restore_optimizer(path, again, fresh)
    steps(again, fresh, 3, 6)
    save(root / "c", again, fresh, 6, processes)
    steps(trained, optimizer, 3, 6)
    for name, parameter in trained.items():
        assert torch.equal(parameter.to_local(), again[name].to_local()), name
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, -1))
    with pytest.raises(UserError) as caught:
        save(root / "c", again, fresh, 9, processes)
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    (root / f"error-{rank}").write_text(str(caught.value))
    torch.distributed.destroy_process_group()
    # At the end of an interpreter the threads of sharded modules abort it now and then.
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "schedule_free"])
def test_two_processes_write_what_one_would(tmp_path: Path, kind: str) -> None:
    torch.multiprocessing.spawn(train, (str(tmp_path), kind), nprocs=2)
    trained, optimizer = build(kind, spread=False)
    steps(trained, optimizer, 0, 3)
    start = build(kind, spread=False)[0]
    three = {name: parameter.detach().clone() for name, parameter in trained.items()}
    steps(trained, optimizer, 3, 6)
    for step, expected in ((3, three), (6, trained)):
        stored = load_file(tmp_path / "c" / f"step-000000000{step}" / "weights.safetensors")
        assert stored.keys() == expected.keys()
        for name, value in expected.items():
            # The fused kernel rounds the ends of a share in another way than its middle.
            torch.testing.assert_close(stored[name], value, rtol=0, atol=1e-7)
    assert (trained["0.weight"] - start["0.weight"]).abs().max() > 1e-3
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "step-0000000003",
        "step-0000000006",
    ]
    assert "cannot write: File too large" in (tmp_path / "error-0").read_text()
    assert "the process that writes could not" in (tmp_path / "error-1").read_text()
