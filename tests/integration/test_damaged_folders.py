"""Damaged folders of models, runs, recipes and data: one line each, never a traceback or a change.

Everything is drawn from fixed seeds: a few in the default run, many more with ``-m slow``.
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

import tiny_build
import tiny_run
from damage import damage
from nvembed import NVEmbed, UserError
from nvembed.cli.main import run
from nvembed.core.config import dump_config
from official_folders import write_official
from task_folders import write_task

LIMIT_SECONDS = 120


class HangError(AssertionError):
    """A command did not come to an end."""


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise HangError(f"no end in {LIMIT_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def command(*arguments: object) -> int:
    """Run a command; it succeeds, or says in lines of ``error:`` what is wrong."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    out, err = io.StringIO(), io.StringIO()
    with (
        no_hang(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        warnings.simplefilter("ignore")  # of libraries, about files that are odd
        code = run([str(argument) for argument in arguments])
    assert code in (0, 1, 2), err.getvalue()
    assert "Traceback" not in err.getvalue()
    if code == 2:
        last = err.getvalue().splitlines()[-1]
        assert last.startswith("error: "), err.getvalue()
        assert len(last) < 3000, last
    return code


def in_python(folder: Path) -> None:
    """Load and encode by the Python API."""
    with no_hang(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vectors = np.zeros(1)
        with contextlib.suppress(UserError):
            vectors = NVEmbed.from_pretrained(folder, device="cpu").encode(["a text", "b"])
    # Damage that nothing shows gives numbers all the same.
    assert np.isfinite(vectors).all()


# --- Models ---------------------------------------------------------------------------------------


def base(folder: Path, decoder: Path, tokenizer: Any) -> None:
    shutil.copytree(decoder, folder)


def saved(folder: Path, decoder: Path, tokenizer: Any) -> None:
    options = {"pooling": "latent", "num_latents": 4, "num_heads": 2}
    model = NVEmbed.from_pretrained(decoder, device="cpu", **options)
    model.prompts = {"query": "Instruct: x\nQuery: ", "document": ""}
    model.save_pretrained(str(folder), create_model_card=False)


def stock(folder: Path, decoder: Path, tokenizer: Any) -> None:
    transformer = Transformer(str(decoder))
    transformer.tokenizer.pad_token = "</s>"
    modules = [transformer, Pooling(32, "mean")]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(
        str(folder), create_model_card=False
    )


def official(folder: Path, decoder: Path, tokenizer: Any) -> None:
    write_official(folder, tokenizer, shards=2)


MODELS: dict[str, Callable[[Path, Path, Any], None]] = {
    "base": base,
    "saved": saved,
    "stock": stock,
    "official": official,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_decoder_dir: Path, tiny_tokenizer) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        make(root / name, tiny_decoder_dir, tiny_tokenizer)
    return {name: root / name for name in MODELS}


def model_case(models: dict[str, Path], tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    kind = rng.choice(list(models))
    folder = shutil.copytree(models[kind], tmp_path / "model")
    done = damage(folder, rng)
    print(f"{kind}: {done}")  # shown where the test fails
    before = tiny_build.contents(folder)
    texts = tmp_path / "texts.txt"
    texts.write_text("a text\nanother one\n")
    ways: list[Callable[[], object]] = [
        lambda: in_python(folder),
        lambda: command("doctor", folder),
        lambda: command("encode", folder, "--input", texts, "--output", tmp_path / "x.npy"),
        lambda: command("export", folder, "--to", tmp_path / "to", "--format", "nvembed"),
    ]
    rng.choice(ways)()
    assert tiny_build.contents(folder) == before


# --- Recipes, runs, data and tasks ----------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny_decoder_dir: Path) -> Path:
    """A folder with recipes, their data and tasks, built data, and a run that stopped half-way."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(tiny_decoder_dir, folder / "decoder")
    tiny_run.write_inputs(folder, Path("decoder"))
    config = tiny_run.recipe(Path("decoder"))
    stages = tuple(stage.model_copy(update={"steps": 2}) for stage in config.stages)
    config = config.model_copy(update={"stages": stages, "memory_gb": None})
    (folder / "recipe.yaml").write_text(dump_config(config), encoding="utf-8")
    write_task(folder / "task", "STS")
    write_task(folder / "retrieval", "Retrieval")
    assert command("train", folder / "recipe.yaml", f"output={folder / 'run'}") == 0
    shutil.rmtree(folder / "run" / "model")  # as if it had died before the end
    (folder / "build").mkdir()
    assert command("data", "build", tiny_build.write_inputs(folder / "build")) == 0
    return folder


def recipe_case(work: Path, tmp_path: Path, seed: int, part: str) -> None:
    """Damage one part of the folder, and run what reads it."""
    rng = random.Random(seed)
    folder = shutil.copytree(work, tmp_path / "work")
    torch.manual_seed(0)
    if part == "recipe":
        damaged = folder / "only-recipe"
        damaged.mkdir()
        (folder / "recipe.yaml").rename(damaged / "recipe.yaml")
        done = damage(damaged, rng)
        for path in damaged.iterdir():
            path.rename(folder / path.name)
    elif part == "data":
        damaged = folder / "only-data"
        damaged.mkdir()
        (folder / "pairs.jsonl").rename(damaged / "pairs.jsonl")
        done = damage(damaged, rng)
        for path in damaged.iterdir():
            path.rename(folder / path.name)
    else:
        done = damage(folder / part, rng)
    print(f"{part}: {done}")  # shown where the test fails
    inputs = inputs_of(folder)
    recipe, output = folder / "recipe.yaml", f"output={folder / 'run'}"
    fresh = f"output={tmp_path / 'fresh'}"
    backbone = f"model.backbone={folder / 'decoder'}"
    task = folder / ("retrieval" if part == "retrieval" else "task")

    def evaluate() -> int:
        scores = tmp_path / "results.json"
        return command("evaluate", folder / "decoder", "--tasks", task, "--output", scores)

    ways: dict[str, list[Callable[[], object]]] = {
        "recipe": [
            lambda: command("train", recipe, fresh, "--dry-run"),
            lambda: command("data", "check", recipe),
        ],
        "run": [lambda: command("train", recipe, output)],
        "data": [
            lambda: command("data", "check", recipe),
            lambda: command("train", recipe, fresh, "--dry-run"),
            lambda: command("mine", folder / "pairs.jsonl", "--output", tmp_path / "mined.jsonl"),
        ],
        "decoder": [
            lambda: command("train", recipe, fresh, "--dry-run"),
            lambda: command("train", recipe, fresh),
            evaluate,
            lambda: command(
                *("mine", folder / "pairs.jsonl", "--teacher", folder / "decoder"),
                *("--output", tmp_path / "mined.jsonl"),
            ),
        ],
        "build/built": [
            lambda: command("data", "build", folder / "build" / "recipe.yaml"),
            lambda: command(
                "train", folder / "build" / "recipe.yaml", fresh, backbone, "--dry-run"
            ),
        ],
        "build": [lambda: command("data", "build", folder / "build" / "recipe.yaml")],
        "task": [evaluate],
        "retrieval": [evaluate],
    }
    rng.choice(ways[part])()
    assert inputs_of(folder) == inputs


def inputs_of(folder: Path) -> dict[str, bytes]:
    """What no command may change: everything but the run and the built data, which go on."""
    outputs = ("run/", "build/built/", "build/.")
    return {
        name: data
        for name, data in tiny_build.contents(folder).items()
        if not name.startswith(outputs)
    }


PARTS = ("recipe", "run", "data", "decoder", "build/built", "build", "task", "retrieval")


@pytest.mark.parametrize("seed", range(30))
def test_damaged_models(models: dict[str, Path], tmp_path: Path, seed: int) -> None:
    model_case(models, tmp_path, seed)


@pytest.mark.parametrize("part", PARTS)
def test_damaged_work(work: Path, tmp_path: Path, part: str) -> None:
    for seed in range(3):
        recipe_case(work, tmp_path / str(seed), seed, part)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1400))
def test_many_damaged_models(models: dict[str, Path], tmp_path: Path, seed: int) -> None:
    model_case(models, tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("seed", range(1000, 1040))
def test_much_damaged_work(work: Path, tmp_path: Path, part: str, seed: int) -> None:
    recipe_case(work, tmp_path, seed, part)
