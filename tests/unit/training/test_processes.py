"""Two processes give what one gives: rows, sums of gradients, norms, weights after a step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from forked import in_processes, outcomes_in_processes
from nvembed.core.errors import TrainingError
from nvembed.data.batch import ContrastiveBatch, build_batch
from nvembed.data.examples import Example
from nvembed.model.backbone import add_lora
from nvembed.model.embedder import NVEmbed
from nvembed.model.packing import share_packs
from nvembed.model.packs import embed_pack
from nvembed.model.settings import LoraSettings
from nvembed.model.tokens import TokenizedText
from nvembed.training import distributed as module
from nvembed.training.contrastive_loss import Objective
from nvembed.training.distributed import (
    FILLER,
    DistributedContext,
    dead_peer_is_an_error,
    shard_backbone,
)
from nvembed.training.distributed import full as whole
from nvembed.training.loss_config import TeacherConfig
from nvembed.training.step import StepSettings, contrastive_step
from nvembed.training.teacher_states import TeacherStates


def parameter(values: list[float], gradient: list[float] | None = None, **kind) -> nn.Parameter:
    made = nn.Parameter(torch.tensor(values, **kind))
    made.grad = None if gradient is None else torch.tensor(gradient, **kind)
    return made


def plain_collectives() -> dict[str, Any]:
    """What every collective does to small tensors, in a process of two."""
    here = DistributedContext.of_environment()
    first = here.is_main
    sums = [
        parameter([0.0, 0.0], [1.0, 2.0] if first else [10.0, 20.0]),
        parameter([0.0], None if first else [5.0]),  # used by the second process alone
        parameter([0.0], None),  # used by none
        parameter([0.0, 0.0], [1.0, 2.0], dtype=torch.bfloat16),
        parameter([0.0, 0.0, 0.0], [3.0, 4.0, float(here.rank)]),
    ]
    frozen = parameter([0.0], [float(here.rank)])
    frozen.requires_grad_(False)
    here.sum_gradients([*sums, frozen])
    fresh = parameter([float(here.rank)] * 2)
    here.broadcast_parameters([fresh])
    rows_ND = torch.full((2, 3), 1.0, dtype=torch.bfloat16) if first else torch.empty(0, 3)
    norm = here.clip_gradients(sums, 2.0)
    here.barrier()
    return {
        "who": (here.rank, here.count, here.is_main, str(here.device)),
        "unequal": here.gather_rows(torch.arange(3.0 + here.rank).reshape(-1, 1), [3, 4]),
        "empty": here.gather_rows(rows_ND.bfloat16(), [2, 0]),
        "clipped": [p.grad for p in sums],
        "norm": norm,
        "frozen": frozen.grad,
        "fresh": fresh.data,
        "of_main": here.of_main({"é": [here.rank, 0.1]}),
        "of_all": here.of_all({"é" * (1 + here.rank): here.rank}),
        "agreed": [here.agree(False), here.agree(True), here.agree(first), here.agree(not first)],
    }


def test_collectives_of_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUCKET_BYTES", 8)  # every float32 vector fills a bucket
    results = in_processes(plain_collectives)
    sums = [[11.0, 22.0], [5.0], None, [2.0, 4.0], [6.0, 8.0, 1.0]]
    norm = sum(x * x for values in sums for x in values or ()) ** 0.5
    for rank, result in enumerate(results):
        assert result["who"] == (rank, 2, rank == 0, "cpu")
        assert result["unequal"].flatten().tolist() == [0, 1, 2, 0, 1, 2, 3]
        assert result["empty"].dtype == torch.bfloat16
        assert result["empty"].tolist() == [[1.0] * 3] * 2
        assert result["norm"] == pytest.approx(norm, rel=1e-6)
        for got, expected in zip(result["clipped"], sums, strict=True):
            if expected is None:
                assert got is None
            else:
                clipped = torch.tensor(expected) * 2.0 / norm
                torch.testing.assert_close(got.float(), clipped, rtol=4e-3, atol=0)
        assert result["frozen"].tolist() == [rank]
        assert result["fresh"].tolist() == [0.0, 0.0]
        assert result["of_main"] == {"é": [0, 0.1]}
        assert result["of_all"] == [{"é": 0}, {"éé": 1}]
        assert result["agreed"] == [False, True, True, True]
    assert results[0]["norm"] == results[1]["norm"]


def test_weights_that_wait_on_a_cpu_are_sent_between_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before sharding they lie there, and NCCL sends what lies on GPUs alone."""
    sent: list[tuple[str, Any]] = []
    monkeypatch.setattr(
        module.dist, "broadcast", lambda x, src, group: sent.append((x.device.type, group))
    )
    context = DistributedContext(count=2, control="gloo")  # type: ignore[arg-type]
    context.broadcast_parameters([parameter([1.0]), parameter([1.0], device="meta")])
    assert sent == [("cpu", "gloo"), ("meta", None)]


def test_one_process_is_alone() -> None:
    alone = DistributedContext.of_environment(shard=True)
    assert (alone.rank, alone.count, alone.is_main) == (0, 1, True)
    rows_ND = torch.ones(2, 3, requires_grad=True)
    assert not alone.gather_rows(rows_ND, [2]).requires_grad
    weight = parameter([0.0, 0.0], [3.0, 4.0])
    alone.sum_gradients([weight])
    assert alone.clip_gradients([weight], None) == 5.0
    assert weight.grad.tolist() == [3.0, 4.0]
    assert alone.clip_gradients([weight], 1.0) == 5.0
    expected = parameter([0.0, 0.0], [3.0, 4.0])
    nn.utils.clip_grad_norm_([expected], 1.0)
    torch.testing.assert_close(weight.grad, expected.grad, rtol=0, atol=0)
    assert alone.of_main(3) == 3
    assert alone.of_all(3) == [3]
    assert alone.agree(True)
    assert not alone.agree(False)
    alone.barrier()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1"),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_OFFLOAD_PARAMS": "true",
            },
            "offload",
        ),
        ({"WORLD_SIZE": "2"}, "2 processes were started"),
    ],
)
def test_what_training_does_not_do_is_one_line(
    environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    DistributedContext.of_environment()  # accelerate's state is that of one process
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=words) as raised:
        DistributedContext.of_environment()
    assert "\n" not in str(raised.value)


def launcher_shards() -> bool:
    return DistributedContext.of_environment().sharded


def test_the_launcher_may_ask_for_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_processes(launcher_shards) == [False, False]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert in_processes(launcher_shards) == [True, True]


# Packs of two processes; the second process has none for its last one.
PACKS = [
    [[[5, 9, 12, 40, 7], [8, 30, 31]], [[44, 3], [60, 61, 62, 63]]],
    [[[90, 80, 70], [6, 5, 4, 3, 99]], []],
]
WIDTH = 32


def texts_of(pack: list[list[int]]) -> list[TokenizedText]:
    return [TokenizedText(tuple(ids), 1) for ids in pack]


def gradient_of(pack: list[list[int]]) -> Tensor:
    """Some gradient of the embeddings, which depends on the pack alone."""
    generator = torch.Generator().manual_seed(sum(map(sum, pack)))
    return torch.randn(len(pack), WIDTH, generator=generator)


Lora = bool | LoraSettings
DORA = LoraSettings(rank=2, dropout=0.0, dora=True)


def small_model(folder: Path, *, lora: Lora, base: torch.dtype = torch.float32) -> NVEmbed:
    torch.manual_seed(1)
    model = NVEmbed.from_pretrained(
        folder, pooling="latent", num_latents=4, num_heads=2, device="cpu", dtype=base
    )
    if lora:
        plain = LoraSettings(rank=2, dropout=0.0)
        add_lora(model.backbone, lora if isinstance(lora, LoraSettings) else plain)
    model.pooling.float()
    for name, weight in model.named_parameters():
        # Zeros at first, behind which no gradient reaches the rest.
        if "lora_B" in name or (weight.ndim > 1 and not weight.any()):
            nn.init.normal_(weight, std=0.1)
    return model.train()


def step_of(
    model: NVEmbed,
    here: DistributedContext,
    packs: list[list[list[int]]],
    *,
    keep: int,
    updates: int,
) -> dict[str, Any]:
    """Updates from given gradients of the embeddings; all but ``keep`` packs are recomputed."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sharded = [p for p in trained.values() if isinstance(p, DTensor)]
    replicated = [p for p in trained.values() if not isinstance(p, DTensor)]
    groups = [{"params": part} for part in (sharded, replicated) if part]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    result: dict[str, Any] = {"norms": []}
    for _ in range(updates):
        graphs = []
        for number, pack in enumerate(packs):
            with torch.set_grad_enabled(number < keep):
                rows_ND = embed_pack(model, texts_of(pack) or [FILLER])[: len(pack)]
            graphs.append(rows_ND)
        result.setdefault("embeddings", [rows_ND.detach() for rows_ND in graphs])
        for number, pack in enumerate(packs):
            if number >= keep:
                graphs[number] = embed_pack(model, texts_of(pack) or [FILLER])[: len(pack)]
            with here.syncing(model, last=number == len(packs) - 1):
                graphs[number].backward(gradient_of(pack))
        here.sum_gradients(trained.values())
        result["norms"].append(here.clip_gradients(trained.values(), 1.0))
        result.setdefault("gradients", {n: whole(p.grad) for n, p in trained.items()})
        optimizer.step()
        optimizer.zero_grad()
    result["weights"] = {name: whole(p).detach() for name, p in trained.items()}
    result["sharded"] = sum(isinstance(p, DTensor) for p in model.parameters())
    return result


def one_process(folder: Path, *, lora: Lora, keep: int) -> dict[str, Any]:
    packs = [pack for own in PACKS for pack in own if pack]
    model = small_model(folder, lora=lora)
    return step_of(model, DistributedContext(), packs, keep=keep, updates=2)


def of_two(folder: Path, lora: Lora, shard: bool, keep: int) -> dict[str, Any]:
    here = DistributedContext.of_environment(shard=shard)
    model = small_model(folder, lora=lora)
    if here.sharded:
        shard_backbone(model, here)
        # A forward in inference mode between two steps must not harm the next ones.
        model.encode(["a text", "another"])
        model.train()
    return step_of(model, here, PACKS[here.rank], keep=keep, updates=2)


HOW = [
    (lora, shard, keep) for lora in (True, False) for shard in (False, True) for keep in range(3)
]


@pytest.mark.parametrize(("lora", "shard", "keep"), [*HOW, (DORA, True, 1)])
def test_two_processes_step_as_one(
    tiny_decoder_dir: Path, lora: Lora, shard: bool, keep: int
) -> None:
    expected = one_process(tiny_decoder_dir, lora=lora, keep=keep)
    results = in_processes(of_two, tiny_decoder_dir, lora, shard, keep)
    assert expected["norms"][0] > 1
    assert bool(results[0]["sharded"]) == shard
    rows = [rows_ND for result in results for rows_ND in result["embeddings"]]
    torch.testing.assert_close(torch.cat(rows), torch.cat(expected["embeddings"]))
    for result in results:
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        for what, atol in (("gradients", 1e-6), ("weights", 2e-5)):
            assert result[what].keys() == expected[what].keys()
            for name, value in expected[what].items():
                assert value.abs().max() > 0, name
                torch.testing.assert_close(result[what][name], value, rtol=1e-4, atol=atol)
    assert results[0]["norms"] == results[1]["norms"]
    for name, value in results[0]["weights"].items():
        assert torch.equal(value, results[1]["weights"][name]), name


def mixed_types(folder: Path) -> dict[str, Any]:
    here = DistributedContext.of_environment(shard=True)
    model = small_model(folder, lora=True, base=torch.bfloat16)
    for name, weight in model.named_parameters():
        if "lora" in name:
            weight.data = weight.data.float()
    shard_backbone(model, here, compute_dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        return step_of(model, here, PACKS[here.rank], keep=1, updates=1)


def test_a_16_bit_base_under_float32_adapters_is_sharded(tiny_decoder_dir: Path) -> None:
    expected = one_process(tiny_decoder_dir, lora=True, keep=1)
    for result in in_processes(mixed_types, tiny_decoder_dir):
        assert {g.dtype for g in result["gradients"].values()} == {torch.float32}
        flat = torch.cat([g.flatten() for g in result["gradients"].values()])
        wanted = torch.cat([expected["gradients"][n].flatten() for n in result["gradients"]])
        assert torch.cosine_similarity(flat, wanted, dim=0) > 0.99


def refusals(folder: Path) -> list[str]:
    here = DistributedContext.of_environment(shard=True)
    messages = []
    spread = small_model(folder, lora=True)
    spread.backbone.model.hf_device_map = {"": "cpu"}
    mixed = small_model(folder, lora=False)
    mixed.backbone.model.norm.bfloat16()
    whole_numbers = small_model(folder, lora=True)
    whole_numbers.backbone.model.get_input_embeddings().weight = nn.Parameter(
        torch.zeros(4, 4, dtype=torch.int8), requires_grad=False
    )
    for model in (spread, mixed, whole_numbers):
        try:
            shard_backbone(model, here)
        except TrainingError as error:
            messages.append(str(error))
    return messages


def test_what_cannot_be_sharded_is_one_line(tiny_decoder_dir: Path) -> None:
    for messages in in_processes(refusals, tiny_decoder_dir):
        spread, mixed, quantised = messages
        assert "spread backbone" in spread
        assert "torch.bfloat16, torch.float32" in mixed
        assert "quantised backbone" in quantised


def lose_a_process() -> str:
    here = DistributedContext.of_environment()
    if not here.is_main:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        with dead_peer_is_an_error("run/checkpoints"):
            here.gather_rows(torch.ones(1, 1), [1, 1])
    except TrainingError as error:
        assert time.monotonic() - started < 5
        return str(error)
    return "nothing"


def test_a_dead_process_is_one_line_in_the_others() -> None:
    (kind, message), dead = outcomes_in_processes(lose_a_process)
    assert dead == ("error", "died")
    assert kind == "result", message
    assert message.startswith("run/checkpoints: another process died")
    assert "\n" not in message


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shape"), dead_peer_is_an_error("run/checkpoints"):
        raise RuntimeError("shape")


def step_with_graphs_of(folder: Path, activation_budget: int, shard: bool) -> tuple[float, ...]:
    here = DistributedContext.of_environment(shard=shard)
    model = small_model(folder, lora=True)
    if here.sharded:
        shard_backbone(model, here)
    batch, texts = batch_and_texts(model)
    rng = np.random.default_rng(0)
    batch = replace(batch, teacher_UE=rng.standard_normal((len(texts), 5)).astype(np.float16))
    teacher = TeacherConfig(model="t", similarities=1.0, vectors=1.0)
    other = small_model(folder, lora=False).backbone
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(weight.sign() * 0.02)
    objective, states = Objective(0.1, teacher=teacher), TeacherStates(other, 0.5)
    settings = StepSettings(objective, True, 100, activation_budget, states=states)
    projection = parameter(rng.standard_normal((5, WIDTH)).tolist())
    result = contrastive_step(model, batch, texts, settings, here, seed=1, projection=projection)
    assert set(result.parts) == {"contrastive", "similarities", "vectors", "states"}
    assert projection.grad is not None
    trained = [p for p in model.parameters() if p.requires_grad]
    here.sum_gradients(trained)
    # What belongs to the loss is whole in every process.
    beside = float(projection.grad.norm())
    return result.loss, here.clip_gradients(trained, None), beside, *result.parts.values()


def batch_and_texts(model: NVEmbed) -> tuple[ContrastiveBatch, Sequence[TokenizedText]]:
    examples = [
        Example(
            query=f"what is {'so ' * (i % 4)}{i}",
            positive=f"{i} times {'very ' * (i % 3)}much",
            negatives=(f"{i}",),
            known_positives=(f"{i} times {'very ' * (i % 3)}much",),
            labels=(),
            instruction="find",
            symmetric=False,
            dataset="d",
        )
        for i in range(7)
    ]
    batch = build_batch(examples, in_batch_negatives=True)
    tokenize = model.backbone.tokenize_texts
    return batch, [tokenize([text], prompt)[0] for prompt, text in batch.texts]


@pytest.mark.parametrize("shard", [False, True], ids=["replicated", "sharded"])
def test_a_budget_that_ends_in_other_packs_of_other_processes(
    tiny_decoder_dir: Path, shard: bool
) -> None:
    _, texts = batch_and_texts(small_model(tiny_decoder_dir, lora=True))
    lengths = [len(text) for text in texts]
    first, second = (
        list(accumulate(sum(lengths[row] for row in pack) for pack in share))
        for share in share_packs(lengths, 100, 2)
    )
    # Memory that would keep another number of graphs in one process than in the other.
    activation_budget = next(max(a, b) - 1 for a, b in zip(first, second, strict=True) if a != b)
    assert activation_budget >= 100
    alone = step_with_graphs_of(tiny_decoder_dir, 10**6, shard)
    for result in in_processes(step_with_graphs_of, tiny_decoder_dir, activation_budget, shard):
        assert result == pytest.approx(alone, rel=1e-5)
