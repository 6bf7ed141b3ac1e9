"""Poolings behind a stock ``Transformer``: the prompt is left out, and nothing of the text."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Transformer

from nvembed.core.errors import ModelError
from nvembed.model.pooling import MeanPooling, build_pooling

PROMPT = "Instruct: find it\nQuery: "
TEXTS = ["hello there", "x", "中文", "a longer text than the others", ""]


@pytest.fixture(scope="module")
def merging_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random decoder whose tokenizer joins a space to the word after it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import MistralConfig, MistralModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("merging")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["Query: hello there find it x a longer text"] * 9, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.save_pretrained(path)
    config = MistralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    MistralModel(config).save_pretrained(path)
    return path


def stock(folder: Path, kind: str, side: str = "right") -> SentenceTransformer:
    transformer = Transformer(str(folder))
    transformer.tokenizer.padding_side = side
    head = build_pooling(kind, 32, num_latents=4, num_heads=2)
    torch.manual_seed(1)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return SentenceTransformer(modules=[transformer, head, Normalize()], device="cpu")


def oracle(model: SentenceTransformer, text: str) -> np.ndarray:
    """One text: the states of the tokens that hold a character of it, and of the EOS."""
    encoded = model.tokenizer(PROMPT + text, return_offsets_mapping=True)
    spans = encoded["offset_mapping"]
    pooled = [end > len(PROMPT) for _, end in spans[:-1]] + [True]
    ids = torch.tensor([encoded["input_ids"]])
    with torch.inference_mode():
        states = model[0].model(ids).last_hidden_state[0]
        head = copy.deepcopy(model[1])
        if hasattr(head, "layer"):
            states = head.layer(states)
        mean = states[torch.tensor(pooled)].mean(0)
    return torch.nn.functional.normalize(mean, dim=0).numpy()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["mean", "latent"])
def test_no_word_of_the_text_is_lost_to_the_prompt(merging_dir: Path, kind: str, side: str) -> None:
    model = stock(merging_dir, kind, side)
    pieces = model.tokenizer.tokenize(PROMPT + "hello")
    assert pieces[-1] == "Ġhello"  # or nothing is tested
    expected = np.stack([oracle(model, text) for text in TEXTS])
    np.testing.assert_allclose(model.encode(TEXTS, prompt=PROMPT), expected, atol=2e-6)
    for text, wanted in zip(TEXTS, expected, strict=True):
        np.testing.assert_allclose(model.encode(text, prompt=PROMPT), wanted, atol=2e-6)


def test_a_batch_without_its_pieces_is_refused_where_they_are_needed(merging_dir: Path) -> None:
    model = stock(merging_dir, "mean")
    features = dict(model[0](model[0].preprocess(TEXTS[:2], prompt=PROMPT)))
    assert features["prompt_length"] == len(model.tokenizer(PROMPT)["input_ids"]) - 1
    with pytest.raises(ModelError, match=r"last space of the prompt.*from_pretrained"):
        model[1](features)
    plain = dict(model[0](model[0].preprocess(TEXTS[:2], prompt="Query:")))
    model[1](plain)  # a prompt whose end joins nothing


@pytest.mark.parametrize("length", [3, torch.tensor([3]), torch.tensor([3, 3])])
@pytest.mark.parametrize("side", ["right", "left"])
def test_prompt_length_counts_from_the_first_real_token(length, side: str) -> None:
    states = torch.randn(2, 7, 8)
    mask = torch.ones(2, 7, dtype=torch.long)
    padding = slice(5, 7) if side == "right" else slice(0, 2)
    mask[1, padding] = 0
    found = MeanPooling(8)(
        {"token_embeddings": states, "attention_mask": mask, "prompt_length": length}
    )["sentence_embedding"]
    first = 0 if side == "right" else 2
    torch.testing.assert_close(found[0], states[0, 3:].mean(0))
    torch.testing.assert_close(found[1], states[1, first + 3 : first + 5].mean(0))
