"""The same run on one process and on two: losses, norms, weights; and when processes die.

Numbers are float32 and dropout is 0. Two processes add up the same terms as one in another order,
so losses and norms agree to 1e-5 of themselves and weights, after a few steps of AdamW that divide
by the size of small gradients, to 1e-4. Runs on the same number of processes agree to the bit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from forked import in_processes, outcomes_in_processes
from nvembed.core.config import dump_config
from nvembed.core.errors import TrainingError
from nvembed.core.files import write_jsonl
from nvembed.model.embedder import NVEmbed
from nvembed.training import trainer
from nvembed.training.config import TrainConfig
from nvembed.training.trainer import train

WORDS = ["red", "blue", "green", "fox", "owl", "cat", "tree", "lake"]
WORDS += ["hill", "sun", "moon", "star", "rain", "snow", "wind", "fire"]
PAIRS = [
    {
        "query": f"{word} {'and ' * (i % 5)}{i}",
        "positive": f"{i * 7 % 16} of {word[::-1] * (1 + i % 3)}",
        "negative": [f"{WORDS[(i + k) % 16]} {k}" for k in (3, 5)],
    }
    for i, word in enumerate(WORDS)
]
STEPS = 3  # of each of two stages


def recipe(folder: Path, decoder: Path, name: str, **changes: Any) -> TrainConfig:
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    stage = {
        "steps": STEPS,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "temperature": 0.1,
        "num_negatives": 2,
    }
    data = {
        "output": str(folder / name),
        "model": {
            "backbone": str(decoder),
            "max_tokens": 64,
            "pooling": {"kind": "latent", "num_latents": 4, "num_heads": 2},
        },
        "lora": {"rank": 4, "dropout": 0.0},
        "datasets": [
            {
                "name": "pairs",
                "path": "pairs.jsonl",
                "kind": "retrieval",
                "instruction": "find",
                "stages": [1, 2],
            }
        ],
        "stages": [
            {"name": "one", "in_batch_negatives": True, **stage},
            {"name": "two", "in_batch_negatives": False, **stage},
        ],
        "checkpoint_every": 2,
        "precision": "float32",
        "pack_tokens": 128,
        "memory_gb": 1.0,
    }
    return TrainConfig.model_validate({**data, **changes})


# Graphs of about one pack of 128 tokens: the rest of a step is recomputed, or goes in groups.
LITTLE = {"memory_gb": 0.0016}
AGAIN = {"activation_checkpointing": True}
FULL = {"lora": None}
DROPOUT = {"rank": 4, "dropout": 0.1}


def run(config: TrainConfig, folder: Path, before_step: Callable[[int], None]) -> str:
    """Train in this process and tell the error if there is one."""
    original = trainer.contrastive_step
    calls = []

    def noted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        before_step(len(calls))
        return original(*arguments, **options)

    trainer.contrastive_step = noted
    try:
        return str(train(config, base_dir=folder))
    except TrainingError as error:
        return f"error: {error}"
    finally:
        trainer.contrastive_step = original


def peacefully(step: int) -> None:
    pass


def on_two(config: TrainConfig, folder: Path) -> None:
    assert in_processes(run, config, folder, peacefully) == [str(Path(config.output) / "model")] * 2


def rows(config: TrainConfig) -> list[dict[str, Any]]:
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted((Path(config.output) / "model").rglob("*.safetensors")):
        found |= {f"{path.parent.name}/{k}": v for k, v in load_file(path).items()}
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_decoder_dir: Path) -> dict[str, Any]:
    """Runs of one process, with adapters and in full."""
    folder = tmp_path_factory.mktemp("alone")
    done = {}
    for name, changes in (("lora", {}), ("full", FULL)):
        config = recipe(folder, tiny_decoder_dir, name, **changes)
        train(config, base_dir=folder)
        done[name] = config
    return done


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("lora", {}),
        ("lora", LITTLE),
        ("lora", {"shard": True}),
        ("full", {**FULL, "shard": True, **LITTLE}),
        ("lora", {"shard": True, **AGAIN}),
        pytest.param("full", {**FULL, "shard": True, **AGAIN}, marks=pytest.mark.slow),
        pytest.param("lora", {"shard": True, **LITTLE}, marks=pytest.mark.slow),
        pytest.param("full", FULL, marks=pytest.mark.slow),
        pytest.param("full", {**FULL, **LITTLE}, marks=pytest.mark.slow),
        pytest.param("full", {**FULL, "shard": True}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_two_processes_train_as_one(
    tmp_path: Path, tiny_decoder_dir: Path, alone: dict[str, Any], kind: str, changes: dict
) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, "two", **changes)
    on_two(config, tmp_path)
    expected, found = rows(alone[kind]), rows(config)
    assert [row["step"] for row in found] == list(range(1, 2 * STEPS + 1))
    if "memory_gb" in changes:
        assert found[0]["recomputed"] > 0.2
    for one, two in zip(expected, found, strict=True):
        for what in ("loss", "grad_norm", "margin", "positive_similarity"):
            assert two[what] == pytest.approx(one[what], rel=1e-5, abs=1e-6), what
        assert two["tokens"] == one["tokens"]
    first, second = weights(alone[kind]), weights(config)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_masters_of_16_bit_weights_are_sharded(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    options = {"pooling": "latent", "num_latents": 4, "num_heads": 2, "dtype": "bfloat16"}
    start = NVEmbed.from_pretrained(tiny_decoder_dir, device="cpu", **options)
    start.save_pretrained(str(tmp_path / "start"))
    model = {"backbone": "start", "max_tokens": 64}
    one = recipe(tmp_path, tiny_decoder_dir, "one", **FULL, model=model)
    train(one, base_dir=tmp_path)
    two = recipe(tmp_path, tiny_decoder_dir, "two", **FULL, model=model, shard=True)
    on_two(two, tmp_path)
    first, second = (
        load_file(Path(config.output) / "checkpoints/step-0000000006-end/weights.safetensors")
        for config in (one, two)
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype is second[name].dtype is torch.float32
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-4)
    assert {value.dtype for value in weights(two).values()} == {torch.bfloat16}


@pytest.mark.parametrize("shard", [False, True], ids=["replicated", "sharded"])
def test_two_processes_mine_as_one(tmp_path: Path, tiny_decoder_dir: Path, shard: bool) -> None:
    stage = {"name": "one", "steps": 2, "batch_size": 4, "in_batch_negatives": True}
    mining = {"strategy": "top_k", "num_negatives": 2, "given": "replace"}
    dataset = {"name": "pairs", "path": "pairs.jsonl", "kind": "retrieval", "instruction": "find"}
    found = []
    for name in ("alone", "two"):
        config = recipe(
            tmp_path,
            tiny_decoder_dir,
            name,
            stages=[{**stage, "mine": mining}],
            datasets=[{**dataset, "stages": [1]}],
            shard=shard,
        )
        if name == "alone":
            train(config, base_dir=tmp_path)
        else:
            on_two(config, tmp_path)
        found.append((tmp_path / name / "mined" / "one" / "pairs.jsonl").read_text())
    assert found[0] == found[1]
    assert found[0] != (tmp_path / "pairs.jsonl").read_text()


def die_in_step(step: int) -> None:
    """Both processes die in step 4, after a checkpoint of step 2 and of the stage's end."""
    if step == STEPS + 1:
        os.kill(os.getpid(), signal.SIGKILL)


def lose_one_in_step(step: int) -> None:
    if os.environ["RANK"] == "1":
        die_in_step(step)


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, tiny_decoder_dir: Path
) -> dict[bool, Any]:
    """Runs of two processes with dropout, replicated and sharded."""
    folder = tmp_path_factory.mktemp("whole")
    done = {}
    for shard in (False, True):
        config = recipe(folder, tiny_decoder_dir, f"{shard}", shard=shard, lora=DROPOUT, **LITTLE)
        on_two(config, folder)
        done[shard] = config
    return done


@pytest.mark.parametrize(
    ("shard", "lost"),
    [
        (False, die_in_step),
        (True, lose_one_in_step),
        pytest.param(False, lose_one_in_step, marks=pytest.mark.slow),
        pytest.param(True, die_in_step, marks=pytest.mark.slow),
    ],
)
def test_killed_processes_lose_nothing(
    tmp_path: Path,
    tiny_decoder_dir: Path,
    uninterrupted: dict[bool, Any],
    shard: bool,
    lost: Callable[[int], None],
) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, "parts", shard=shard, lora=DROPOUT, **LITTLE)
    first, second = outcomes_in_processes(run, config, tmp_path, lost)
    assert second == ("error", "died")
    if lost is die_in_step:
        assert first == ("error", "died")
    else:
        kind, message = first
        assert kind == "result"
        assert f"{config.output}/checkpoints: another process died" in message
        assert "\n" not in message
    assert not (tmp_path / "parts" / "model").exists()
    on_two(config, tmp_path)
    one, two = weights(uninterrupted[shard]), weights(config)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [row["loss"] for row in rows(config)] == [
        row["loss"] for row in rows(uninterrupted[shard])
    ]


@pytest.mark.parametrize("changes", [{}, {**FULL, "shard": True}], ids=["lora", "full-shard"])
def test_one_process_goes_on_where_two_were_killed(
    tmp_path: Path, tiny_decoder_dir: Path, alone: dict[str, Any], changes: dict
) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, "fewer", **changes)
    outcomes = outcomes_in_processes(run, config, tmp_path, die_before_the_last_step)
    assert outcomes == [("error", "died")] * 2
    train(config, base_dir=tmp_path)
    first, second = weights(alone["full" if "lora" in changes else "lora"]), weights(config)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-4)


def die_before_the_last_step(step: int) -> None:
    """In the middle of the second stage, after the checkpoint of step 4."""
    if step == 2 * STEPS:
        os.kill(os.getpid(), signal.SIGKILL)


def stop_the_second(step: int) -> None:
    if step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_stop_signal_to_one_process_stops_both_at_the_same_step(
    tmp_path: Path, tiny_decoder_dir: Path
) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, "stopped")
    for message in in_processes(run, config, tmp_path, stop_the_second):
        assert message.startswith("error:")
        assert "interrupted after step 2" in message
    assert [row["step"] for row in rows(config)] == [1, 2]


LAUNCHERS = {
    "torchrun": "torch.distributed.run --nproc-per-node 2",
    "accelerate": "accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 1",
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_start_the_command(
    tmp_path: Path, tiny_decoder_dir: Path, alone: dict[str, Any], launcher: str
) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, "launched")
    (tmp_path / "recipe.yaml").write_text(dump_config(config), encoding="utf-8")
    command = f"{sys.executable} -m {LAUNCHERS[launcher]} -m nvembed train {tmp_path}/recipe.yaml"
    done = subprocess.run(
        command.split(),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = weights(alone["lora"]), weights(config)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-4)
