"""``device_map``: the plan, and that a spread backbone gives the same vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nvembed.core.errors import ModelError
from nvembed.model import placement
from nvembed.model.backbone import main_device
from nvembed.model.embedder import NVEmbed
from nvembed.model.placement import place_of, plan_places
from official_folders import write_official

TEXTS = ["one", "two words", "rather a longer text, with commas in it"]
PROMPT = "Instruct: find it\nQuery: "
BY_LAYER = dict.fromkeys(["embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb"], "cpu")


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    return write_official(tmp_path_factory.mktemp("official"), tiny_tokenizer)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, BY_LAYER], ids=str)
@pytest.mark.parametrize("kind", ["official", "decoder", "saved"])
def test_a_spread_backbone_gives_the_same_vectors(
    kind: str, device_map, official: Path, tiny_decoder_dir: Path, tmp_path: Path
) -> None:
    source = official if kind == "official" else tiny_decoder_dir
    if kind == "saved":
        NVEmbed.from_pretrained(source, device="cpu").save_pretrained(str(tmp_path))
        source = tmp_path
    plain = NVEmbed.from_pretrained(source, device="cpu")
    model = NVEmbed.from_pretrained(source, device="cpu", device_map=device_map)
    # Under accelerate's hooks norms and gates are torch's own, elsewhere the compiled ones.
    np.testing.assert_allclose(
        model.encode(TEXTS, prompt=PROMPT), plain.encode(TEXTS, prompt=PROMPT), rtol=0, atol=1e-6
    )
    if kind != "official":
        return  # transformers loads these, and spreads nothing that lies on one device
    assert model.backbone.model.hf_device_map
    model.to("meta")  # moves the rest, but gathers nothing that was spread
    assert {p.device.type for p in model.backbone.parameters()} == {"cpu"}
    plain.to("meta")
    assert {p.device.type for p in plain.backbone.parameters()} == {"meta"}


def test_states_travel_by_hooks(official: Path) -> None:
    model = NVEmbed.from_pretrained(official, device="cpu", device_map=BY_LAYER)
    assert hasattr(model.backbone.model.layers[1], "_hf_hook")
    assert model.backbone.device == torch.device("cpu")


def test_the_longest_name_decides() -> None:
    places = {"": torch.device("cuda:0"), "layers.1": torch.device("cuda:1"), "norm": "cpu"}
    assert place_of("layers.1.mlp.up_proj.weight", places) == torch.device("cuda:1")
    assert place_of("layers.10.mlp.up_proj.weight", places) == torch.device("cuda:0")
    assert place_of("norm.weight", places) == "cpu"


def test_inputs_go_to_the_first_accelerator() -> None:
    module = torch.nn.Linear(1, 1)
    assert main_device(module) == torch.device("cpu")
    module.hf_device_map = {"embed_tokens": "cpu", "layers.0": "cuda:1", "norm": "cuda:0"}
    assert main_device(module) == torch.device("cuda:1")
    module.hf_device_map = {"": "cpu"}
    assert main_device(module) == torch.device("cpu")


def test_a_plan_that_cannot_be_followed_is_one_line(
    official: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"no device for layers\.1.*every module"):
        NVEmbed.from_pretrained(
            official, device_map={"embed_tokens": "cpu", "layers.0": "cpu", "norm": "cpu"}
        )
    with pytest.raises(ModelError, match="unknown device_map 'sideways'"):
        NVEmbed.from_pretrained(official, device_map="sideways")
    monkeypatch.setattr(placement, "infer_auto_device_map", lambda *a, **k: {"": "disk"})
    decoder = NVEmbed.from_pretrained(official, device="cpu").backbone.model
    with pytest.raises(ModelError, match="does not fit into the memory of all devices"):
        plan_places(decoder, "auto", None)
