"""The pretraining script: corpus rules, optimizer, resumption, and the exported folder."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import pretrain_corpus as corpus
import pretrain_decoder as script
from pretrain_model import ChunkedCrossEntropy, DecoderShape, PretrainDecoder, export_folder
from pretrain_muon import orthogonalize

from pydocs.split import held_out

CPU = torch.device("cpu")
SHAPE = DecoderShape(
    vocab_size=400,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


def make_documents(count: int) -> list[corpus.Document]:
    words = ["return", "the", "value", "of", "a", "tensor", "along", "given", "axis"]
    rng = random.Random(0)
    texts = (" ".join(rng.choices(words, k=30)) for _ in range(count))
    return [corpus.Document("made up", "MIT", "doc", text) for text in texts]


class ConstantRate:
    """A schedule without warm-up, which a few steps would never leave."""

    def factor(self, progress: float) -> float:
        return 1.0


def options(work: Path, **changes: object) -> script.Options:
    values: dict[str, object] = {
        "work": work, "tokens": 10**9, "batch": 8, "length": 32, "checkpoint_seconds": 1e9,
        "precision": "float32",
    }  # fmt: skip
    return script.Options(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny corpus, and a constant learning rate."""
    monkeypatch.setattr(script, "Schedule", ConstantRate)
    script.build_corpus(tmp_path, make_documents(400), SHAPE.vocab_size)
    return tmp_path


def test_training_lowers_the_loss_and_exports_what_transformers_loads(work: Path) -> None:
    model = script.train(options(work, max_steps=40), SHAPE, CPU)
    tokens = np.fromfile(work / "corpus/validation.bin", dtype=np.uint16)
    untrained = PretrainDecoder(SHAPE)
    before = script.validation_loss(untrained, tokens, 32, CPU)
    after = script.validation_loss(model, tokens, 32, CPU)
    assert before == pytest.approx(np.log(SHAPE.vocab_size), abs=0.3)
    assert after < before - 1.5

    target = work / "out"
    target.mkdir()
    (target / "README.md").write_text("kept")
    export_folder(model, work / "corpus/tokenizer.json", target)
    assert (target / "README.md").read_text() == "kept"
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tokenizer("the value of a tensor").input_ids
    assert ids[0] == 1
    assert 2 not in ids
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token == "</s>"
    assert tokenizer.decode(ids[1:]) == "the value of a tensor"
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert loaded.config.tie_word_embeddings
    assert loaded.config.sliding_window is None
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    for parameter in model.parameters():  # the folder holds bfloat16
        parameter.data = parameter.data.bfloat16().float()
    row = torch.tensor([ids])
    with torch.no_grad():
        expected = model(row) @ model.embed_tokens.weight.T
        assert torch.allclose(loaded(row).logits, expected, atol=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one(work: Path) -> None:
    script.train(options(work, max_steps=4), SHAPE, CPU)
    resumed = script.train(options(work, max_steps=8), SHAPE, CPU)
    (work / "checkpoint.pt").unlink()
    whole = script.train(options(work, max_steps=8), SHAPE, CPU)
    for left, right in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(left, right)


def test_schedule_warms_up_holds_and_decays() -> None:
    schedule = script.Schedule(warmup=0.1, decay=0.4)
    factors = [schedule.factor(share) for share in (0.0, 0.05, 0.3, 0.6, 0.8, 1.0)]
    assert factors == pytest.approx([0.01, 0.51, 1.0, 1.0, 0.5, 0.02])


def test_an_epoch_reads_every_window_once() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    firsts = []
    for step in range(14):  # (1000 - 21) // 10 // 7 steps make an epoch
        inputs, targets, epochs = script.batch_at(tokens, step, 7, 10, seed=3)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        firsts += inputs[:, 0].tolist()
        assert epochs < 1.1
    assert len(set(firsts[: 13 * 7])) == 13 * 7
    assert len({first % 10 for first in firsts[: 13 * 7]}) == 1


def test_chunked_cross_entropy_equals_torch_in_value_and_gradients() -> None:
    torch.manual_seed(0)
    states = torch.randn(1100, 16, requires_grad=True)  # more than two chunks
    table = torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (1100,))
    expected = torch.nn.functional.cross_entropy(states @ table.T, targets)
    wanted = torch.autograd.grad(3 * expected, (states, table))
    loss = ChunkedCrossEntropy.apply(states, table, targets)
    got = torch.autograd.grad(3 * loss, (states, table))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for left, right in zip(got, wanted, strict=True):
        assert torch.allclose(left, right, atol=1e-6)


def test_orthogonalize_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 20, 40)
    values = torch.linalg.svdvals(orthogonalize(stack))
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("License-Expression: BSD-3-Clause\n", "BSD-3-Clause"),
        ("License: MIT License\n", "MIT License"),
        ("Classifier: License :: OSI Approved :: Apache Software License\n",
         "Apache Software License"),
        ("Classifier: License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)\n", None),
        ("License-Expression: MPL-2.0 AND MIT\n", None),
        ("License-Expression: GPL-3.0-or-later\n", None),
        ("License-Expression: BSD-3-Clause AND GPL-3.0-or-later WITH GCC-exception-3.1\n",
         "BSD-3-Clause AND GPL-3.0-or-later WITH GCC-exception-3.1"),
        ("Name: silent\n", None),
    ],
)  # fmt: skip
def test_only_permissive_licences_pass(metadata: str, expected: str | None) -> None:
    assert corpus.package_license(metadata) == expected


def write_package(site: Path, modules: dict[str, str], license_name: str) -> None:
    info = site / "pkg-1.0.dist-info"
    info.mkdir(parents=True)
    info.joinpath("METADATA").write_text(f"Name: pkg\nLicense-Expression: {license_name}\n\n")
    paths = {name: site / (name.replace(".", "/") + ".py") for name in modules}
    for name, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(modules[name])
    lines = [f"{path.relative_to(site)},," for path in paths.values()]
    info.joinpath("RECORD").write_text("\n".join(lines))


def package_documents(site: Path, monkeypatch: pytest.MonkeyPatch) -> list[corpus.Document]:
    monkeypatch.setattr(corpus, "standard_library_files", lambda: iter(()))
    monkeypatch.setattr(corpus, "MAX_PACKAGE_SHARE", 1.0)
    monkeypatch.setattr(corpus.multiprocessing, "Pool", InlinePool)
    return corpus.collect([site], None, source_share=10.0, seed=0)


class InlinePool:
    """`multiprocessing.Pool` without processes."""

    def __init__(self, processes: int) -> None: ...

    def __enter__(self) -> InlinePool:
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, function, items, chunksize):
        return [function(item) for item in items]


def test_no_text_of_a_held_out_module_is_read(tmp_path: Path, monkeypatch) -> None:
    names = [f"pkg.part{i}" for i in range(40)]
    hidden = next(name for name in names if held_out(name))
    open_names = [name for name in names if not held_out(name)][:2]
    secret = "The secret paragraph of a module that is held out for the evaluation."
    public = "A public paragraph that explains at some length what this function returns."
    modules = {
        hidden: f'def f(x):\n    """{secret}"""\n',
        # the same paragraph again, in a module that is not held out, beside one of its own
        open_names[0]: f'def g(x):\n    """{secret}\n\n    {public}\n    """\n',
        open_names[1]: f'class C:\n    def h(self, y=1):\n        """{public}"""\n',
    }
    write_package(tmp_path, modules, "MIT")
    documents = package_documents(tmp_path, monkeypatch)
    assert not any(secret in document.text for document in documents)
    (kept,) = documents  # the public paragraph once, under its signature
    assert kept.text in (
        f"{open_names[0]}.g(x)\n{public}",
        f"{open_names[1]}.C.h(self, y=1)\n{public}",
    )
    assert (kept.source, kept.license, kept.kind) == ("pkg", "MIT", "doc")


def test_a_source_file_that_repeats_a_held_out_paragraph_is_left_out(
    tmp_path: Path, monkeypatch
) -> None:
    names = [f"pkg.part{i}" for i in range(40)]
    hidden = next(name for name in names if held_out(name))
    open_names = [name for name in names if not held_out(name)][:2]
    secret = "The secret paragraph of a module that is held out for the evaluation."
    code = "".join(f"value_{i} = {i}\n" for i in range(60))  # long enough to be read as source
    modules = {
        hidden: f'def f(x):\n    """{secret}"""\n',
        open_names[0]: f'def g(x):\n    """{secret}"""\n\n\n{code}',
        open_names[1]: f"def h(x):\n    return x\n\n\n{code}",
    }
    write_package(tmp_path, modules, "MIT")
    # Source is weighed against documentation, of which nothing is left here.
    monkeypatch.setattr(corpus, "limit_shares", lambda documents, source_share: documents)
    (kept,) = package_documents(tmp_path, monkeypatch)
    assert kept.kind == "source"
    assert kept.text.startswith("def h(x)")


def test_a_restricted_package_is_not_read(tmp_path: Path, monkeypatch) -> None:
    text = '"""A long enough module docstring, which must not be read at all by the script."""\n'
    write_package(tmp_path, {"pkg.open": text}, "GPL-3.0-only")
    assert package_documents(tmp_path, monkeypatch) == []
