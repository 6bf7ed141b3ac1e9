"""What is shipped of a run of the SmolLM2 recipe: 16 bits, and bases that others have."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nvembed.interop.model_folder import ADAPTER, BACKBONE_CONFIG
from nvembed.model.backbone import add_lora
from nvembed.model.embedder import NVEmbed
from nvembed.model.settings import LoraSettings
from smollm2.ship import BASES, main

TEXTS = ["some text", "another"]


@pytest.fixture
def adapter(tiny_decoder_dir: Path, tmp_path: Path) -> Path:
    model = NVEmbed.from_pretrained(tiny_decoder_dir, pooling="latent", num_latents=4)
    add_lora(model.backbone, LoraSettings(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(tmp_path / "adapter"), create_model_card=False)
    return tmp_path / "adapter"


def ship(monkeypatch: pytest.MonkeyPatch, adapter: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["ship", str(adapter), *arguments])
    main()


def test_the_shipped_folder_is_the_model_in_16_bits(
    adapter: Path, tiny_decoder_dir: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    to = tmp_path / "shipped"
    to.mkdir()
    (to / "README.md").write_text("# the card\n")
    (adapter / "nvembed_merge.json").write_text('{"models": [{"model": "/home/me/one"}]}')
    ship(monkeypatch, adapter, "--to", str(to), "--max-tokens", "33")
    assert capsys.readouterr().out.endswith(f"MB: {to}\n")
    assert (to / "README.md").read_text() == "# the card\n"
    assert not (to / "nvembed_merge.json").exists()  # it names folders of this machine
    for file in (to / ADAPTER, to / "1_LatentAttentionPooling" / "model.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
        assert file.stat().st_mode & 0o444 == 0o444
    settings = json.loads((to / BACKBONE_CONFIG).read_text())
    assert settings["bases"] == BASES
    (to / BACKBONE_CONFIG).write_text(json.dumps(settings | {"bases": [str(tiny_decoder_dir)]}))
    shipped, original = (NVEmbed.from_pretrained(each) for each in (to, adapter))
    assert shipped.max_seq_length == 33
    np.testing.assert_allclose(shipped.encode(TEXTS), original.encode(TEXTS), atol=2e-3)
    with pytest.raises(SystemExit, match=r"holds .* already"):
        ship(monkeypatch, adapter, "--to", str(to))


def test_queries_have_an_instruction_where_none_is_given(
    adapter: Path, tiny_decoder_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    to, task = tmp_path / "shipped", "Given a question, find the answer"
    ship(monkeypatch, adapter, "--to", str(to), "--task", task)
    settings = json.loads((to / BACKBONE_CONFIG).read_text())
    (to / BACKBONE_CONFIG).write_text(json.dumps(settings | {"bases": [str(tiny_decoder_dir)]}))
    shipped, original = (NVEmbed.from_pretrained(each) for each in (to, adapter))
    np.testing.assert_allclose(
        shipped.encode_query(TEXTS), original.encode_query(TEXTS, task=task), atol=2e-3
    )
    np.testing.assert_allclose(
        shipped.encode_document(TEXTS), original.encode_document(TEXTS), atol=2e-3
    )


def test_numbers_that_16_bits_do_not_hold_are_refused(
    adapter: Path, tmp_path: Path, monkeypatch
) -> None:
    weights = load_file(adapter / ADAPTER)
    name = sorted(weights)[0]
    save_file({**weights, name: weights[name] + 1e5}, adapter / ADAPTER)
    with pytest.raises(SystemExit, match=f"{ADAPTER}: .* is not finite in torch.float16"):
        ship(monkeypatch, adapter, "--to", str(tmp_path / "shipped"))
    assert not (tmp_path / "shipped").exists()
    ship(monkeypatch, adapter, "--to", str(tmp_path / "shipped"), "--dtype", "bfloat16")
