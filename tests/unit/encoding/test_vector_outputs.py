"""Files of truncated and quantised vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hash_encoder import HashEncoder
from nvembed.cli.main import run
from nvembed.core.errors import ConfigError
from nvembed.core.files import write_jsonl
from nvembed.core.ownership import MARK
from nvembed.encoding.files import encode_file
from nvembed.encoding.outputs import OutputFormat, OutputPrecision
from nvembed.model import bulk as embed

# Enough words that no vector loses everything when it is cut.
TEXTS = [" ".join(f"word{i * j % 97}" for j in range(1, 41)) for i in range(1, 51)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])
    return tmp_path / "in.jsonl"


def write(source: Path, truncate_dim: int | None, precision: OutputPrecision):
    form = OutputFormat(truncate_dim, precision)
    done = encode_file(HashEncoder(64), source, source.with_name("out.npy"), task=None, form=form)
    return done, np.load(done.output)


@pytest.mark.parametrize("window", [4096, 7])
def test_values(source: Path, window: int, monkeypatch) -> None:
    monkeypatch.setattr(embed, "WINDOW_TEXTS", window)
    full = HashEncoder(64).encode_document(TEXTS)
    cut = full[:, :20] / np.linalg.norm(full[:, :20], axis=1, keepdims=True)
    done, vectors = write(source, 20, "float32")
    np.testing.assert_allclose(vectors, cut, atol=1e-6)
    assert (done.dimension, done.ranges) == (20, None)

    done, vectors = write(source, 20, "uint8")
    assert vectors.dtype == np.uint8
    assert done.ranges is not None
    least, greatest = np.load(done.ranges)
    np.testing.assert_allclose([least, greatest], [cut.min(0), cut.max(0)], atol=1e-6)
    steps = (greatest - least) / 255
    assert np.abs(vectors * steps + least - cut).max() <= steps.max() * 1.01
    assert len(np.unique(vectors)) > 10
    _, signed = write(source, 20, "int8")
    assert signed.dtype == np.int8
    np.testing.assert_array_equal(signed.astype(int) + 128, vectors)

    done, bits = write(source, 20, "binary")
    assert bits.shape == (50, 3)  # 20 bits in 3 bytes
    assert bits.dtype == np.int8
    signs = np.unpackbits((bits.astype(int) + 128).astype(np.uint8), axis=1)[:, :20]
    np.testing.assert_array_equal(signs.astype(bool), cut > 0)
    assert done.ranges is None
    # What an earlier run left, and nothing temporary, is gone.
    names = {"in.jsonl", "out.npy", "out.npy.run.json", MARK}
    assert {path.name for path in source.parent.iterdir()} == names


@pytest.mark.parametrize("dimension", [0, 65])
def test_dimensions_that_are_not_there(source: Path, dimension: int) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 64, the width of the model"):
        write(source, dimension, "float32")
    assert not source.with_name("out.npy").exists()


def test_the_command(source: Path, tiny_decoder_dir: Path, capsys) -> None:
    output = source.with_name("v.npy")
    command = ["encode", str(tiny_decoder_dir), "--input", str(source), "--output", str(output)]
    assert run([*command, "--truncate-dim", "16", "--precision", "int8"]) == 0
    out = capsys.readouterr().out
    assert "50 vectors of width 16" in out
    assert "v.npy.ranges.npy" in out
    assert np.load(output).dtype == np.int8
    assert np.load(f"{output}.ranges.npy").shape == (2, 16)
    assert run([*command, "--truncate-dim", "33"]) == 2
    assert run([*command, "--precision", "int4"]) == 2
