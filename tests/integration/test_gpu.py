"""On an NVIDIA GPU (``pytest -m gpu``): the numbers of a CPU, within the rounding of the type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nvembed.data.batch import build_batch
from nvembed.data.examples import PairSource
from nvembed.data.records import PairRecord
from nvembed.model.attention import flat_attention
from nvembed.model.embedder import NVEmbed
from nvembed.model.packing import Segments
from nvembed.training.contrastive_loss import Objective
from nvembed.training.distributed import DistributedContext
from nvembed.training.step import StepResult, StepSettings, contrastive_step
from oracles.attention import attend

pytestmark = pytest.mark.gpu

TEXTS = [f"text number {i} " + "and more " * (i % 7) for i in range(40)]
EVERYTHING = 10**9


@pytest.fixture(autouse=True)
def _cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)],
)
def test_attention_and_its_gradients_equal_the_dense_oracle(
    causal: bool, key_heads: int, dtype: torch.dtype, tolerance: float
) -> None:
    lengths = [70, 33, 33, 8, 1]
    leaves = [
        torch.randn(1, heads, sum(lengths), 64, device="cuda", dtype=dtype, requires_grad=True)
        for heads in (4, key_heads, key_heads)
    ]
    segments = Segments.of_lengths(lengths, device="cuda")
    for scaling in (None, 0.2):
        found, _ = flat_attention(
            nn.Identity(), *leaves, None, segments=segments, causal=causal, scaling=scaling
        )
        scale = 64**-0.5 if scaling is None else scaling
        expected = attend(*(leaf[0] for leaf in leaves), lengths, scale, causal=causal)
        assert found.dtype is dtype
        torch.testing.assert_close(found[0].double(), expected, rtol=tolerance, atol=tolerance)
        weight = torch.randn_like(expected)
        got = torch.autograd.grad((found[0].double() * weight).sum(), leaves)
        wanted = torch.autograd.grad((expected * weight).sum(), leaves)
        for left, right in zip(got, wanted, strict=True):
            # Of the 16-bit types the gradients pass through products of rounded numbers.
            torch.testing.assert_close(left, right, rtol=4 * tolerance, atol=4 * tolerance)


def step(model: NVEmbed, device: str, activation_budget: int) -> tuple[StepResult, torch.Tensor]:
    """A step of ten queries; the gradients end to end on the CPU."""
    records = [
        PairRecord(f"what is {TEXTS[i]}", (TEXTS[i],), (TEXTS[i + 10], TEXTS[i + 20]))
        for i in range(10)
    ]
    source = PairSource(records, "d", "find")
    examples = [source.example(i, np.random.default_rng(0), 2) for i in range(10)]
    batch = build_batch(examples, in_batch_negatives=True)
    texts = [model.backbone.tokenize_texts([text], prompt)[0] for prompt, text in batch.texts]
    model.zero_grad()
    result = contrastive_step(
        model,
        batch,
        texts,
        StepSettings(Objective(0.1), True, 400, activation_budget),
        DistributedContext(device=torch.device(device)),
        seed=1,
    )
    gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    return result, torch.cat(gradients).cpu()


def load(folder: Path, device: str) -> NVEmbed:
    torch.manual_seed(0)
    return NVEmbed.from_pretrained(folder, pooling="latent", max_tokens=128, device=device).train()


def test_a_bfloat16_step_has_the_loss_and_gradients_of_a_float32_one(
    wide_decoder_dir: Path,
) -> None:
    expected, wanted = step(load(wide_decoder_dir, "cpu"), "cpu", EVERYTHING)
    model = load(wide_decoder_dir, "cuda")
    exact, gradients = step(model, "cuda", EVERYTHING)
    assert exact.loss == pytest.approx(expected.loss, rel=1e-3)
    assert torch.cosine_similarity(gradients, wanted, dim=0) > 0.9999
    for activation_budget in (EVERYTHING, 400):  # everything kept, or all but one pack recomputed
        with torch.autocast("cuda", torch.bfloat16):
            result, gradients = step(model, "cuda", activation_budget)
        assert result.loss == pytest.approx(expected.loss, rel=3e-2)
        assert torch.cosine_similarity(gradients, wanted, dim=0) > 0.99
        assert (result.recomputed > 0) is (activation_budget == 400)


@pytest.mark.parametrize("pooling", ["mean", "last", "latent", "self_attention"])
@pytest.mark.parametrize(
    ("dtype", "closeness"), [(torch.float32, 1 - 1e-5), (torch.bfloat16, 0.99)]
)
def test_encode_equals_the_cpu(
    wide_decoder_dir: Path, pooling: str, dtype: torch.dtype, closeness: float
) -> None:
    found = {}
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        torch.manual_seed(0)  # of the new pooling
        model = NVEmbed.from_pretrained(
            wide_decoder_dir, pooling=pooling, max_tokens=128, device=device, dtype=kind
        )
        found[device] = np.asarray(model.encode_query(TEXTS, task="find it"), dtype=np.float32)
    assert ((found["cpu"] * found["cuda"]).sum(axis=1) > closeness).all()
