"""What every test has: no network, one thread, fixed seeds, a tiny tokenizer and a tiny decoder."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Before torch and the Hugging Face libraries are imported, and passed on to child processes.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# As the command line sets them.
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["PYTHONPATH"] = str(ROOT / "src")
os.environ.pop("NVEMBED_PROGRESS", None)

import random
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHARED = Path(os.environ.get("NVEMBED_SHARED", ROOT.parent / "shared"))


class NetworkBlockedError(AssertionError):
    """A test tried to leave this machine."""


def _is_local(address: Any) -> bool:
    # A unix socket's address is a path.
    return not isinstance(address, tuple) or str(address[0]) in ("localhost", "127.0.0.1", "::1")


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Any:
    """Let no test open a connection to another machine."""
    patch = pytest.MonkeyPatch()
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guarded(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: socket.socket, address: Any) -> Any:
            if not _is_local(address):
                raise NetworkBlockedError(f"network is blocked in tests: {address}")
            return original(self, address)

        return call

    patch.setattr(socket.socket, "connect", guarded(connect))
    patch.setattr(socket.socket, "connect_ex", guarded(connect_ex))
    yield
    patch.undo()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Keep what tests cache out of the home folder, child processes included."""
    patch = pytest.MonkeyPatch()
    patch.setenv("NVEMBED_CACHE", str(tmp_path_factory.mktemp("nvembed-cache")))
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Start every test from the same global random state."""
    random.seed(0)
    np.random.seed(0)
    # torch takes seconds to import: tests that do not use it should not pay for it.
    import sys

    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Find a path of the shared folder beside the checkout (or of ``$NVEMBED_SHARED``), or skip."""

    def find(relative: str) -> Path:
        path = SHARED / relative
        if not path.exists():
            pytest.skip(f"needs {path} (set NVEMBED_SHARED to the folder that holds {relative})")
        return path

    return find


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, one token per byte, with ``<unk> <s> </s>`` as ids 0, 1, 2."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    vocabulary = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def tiny_decoder_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """Folder of a random Mistral (2 layers, width 32) with its tokenizer."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    path = tmp_path_factory.mktemp("tiny-decoder")
    config = MistralConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        initializer_range=0.1,  # the default 0.02 leaves states of this width almost alike
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MistralForCausalLM(config)
    model.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def wide_decoder_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A random Mistral whose widths are multiples of 64."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    path = tmp_path_factory.mktemp("wide")
    config = MistralConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MistralForCausalLM(config).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


_TRAINING_TEXTS = [
    "Instruct: find the words that answer a question\nQuery: what is the answer to the question?",
    "the answer is in the other words, and the words are in the text that answers it",
    "Instruct: tell what the text is about\nQuery: the other question, asked in other words",
]


def _trained_tokenizer(pre_tokenizer: Any, decoder: Any, alphabet: list[str]) -> Any:
    """A BPE vocabulary with merges, trained on a few sentences; BOS comes from its template."""
    from tokenizers import Tokenizer, models, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXTS * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, as of Qwen and Llama 3: a space belongs to the word after it."""
    from tokenizers import decoders, pre_tokenizers

    return _trained_tokenizer(
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
        pre_tokenizers.ByteLevel.alphabet(),
    )


@pytest.fixture(scope="session")
def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """BPE with ``▁`` for spaces and one in front of everything, as of Mistral and Llama 2."""
    from tokenizers import decoders, pre_tokenizers

    return _trained_tokenizer(
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        decoders.Metaspace(prepend_scheme="first"),
        [chr(code) for code in range(33, 127)] + ["\n"],
    )
