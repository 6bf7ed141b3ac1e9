"""Several processes and Ray: the same files as one process writes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from hash_encoder import HashEncoder
from nvembed.core.errors import ConfigError
from nvembed.core.files import write_jsonl
from nvembed.encoding.files import encode_file
from nvembed.encoding.outputs import OutputFormat
from nvembed.model import bulk as embed
from nvembed.model.settings import LongTexts


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(embed, "WINDOW_TEXTS", 8)
    rows = [{"id": f"d{i}", "text": f"text number {i} " * (1 + i % 30)} for i in range(60)]
    write_jsonl(tmp_path / "in.jsonl", rows)
    return tmp_path / "in.jsonl"


@pytest.mark.slow
def test_two_processes_write_what_one_writes(source: Path, tiny_decoder_dir: Path) -> None:
    model, long = str(tiny_decoder_dir), LongTexts("late", chunk_tokens=90)
    one, two = (source.with_name(f"{name}.npy") for name in ("one", "two"))
    encode_file(model, source, one, task=None, long=long)
    done = encode_file(model, source, two, task=None, long=long, processes=2)
    assert done.rows > 60
    for end in ("", ".ids.json", ".spans.npy"):
        assert (
            two.with_name(f"two.npy{end}").read_bytes()
            == one.with_name(f"one.npy{end}").read_bytes()
        )
    assert not two.with_name("two.npy.parts").exists()


@pytest.mark.slow
def test_what_a_process_raises_is_told(source: Path, tiny_decoder_dir: Path) -> None:
    output, form = source.with_name("out.npy"), OutputFormat(33)
    with pytest.raises(ConfigError, match="expected 1 to 32, the width of the model"):
        encode_file(str(tiny_decoder_dir), source, output, task=None, form=form, processes=2)
    assert not output.exists()


def test_a_loaded_model_stays_where_it_is(source: Path) -> None:
    with pytest.raises(ConfigError, match="load the model by its name"):
        encode_file(HashEncoder(), source, source.with_name("o.npy"), task=None, processes=2)


@pytest.mark.slow
def test_ray_writes_what_one_process_writes(
    source: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="needs ray: pip install 'nvembed[ray]'")
    model, long = str(tiny_decoder_dir), LongTexts("late", chunk_tokens=90)
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    here, there = (source.with_name(f"{name}.npy") for name in ("here", "there"))
    encode_file(model, source, here, task=None, long=long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ray's own
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
        try:
            done = encode_file(model, source, there, task=None, long=long, engine="ray")
            form = OutputFormat(33)
            with pytest.raises(ConfigError, match="expected 1 to 32, the width of the model"):
                encode_file(model, source, there, task="x", form=form, engine="ray")
        finally:
            ray.shutdown()
    assert done.rows > 60
    for end in ("", ".ids.json", ".spans.npy"):
        made, wanted = there.with_name(f"there.npy{end}"), here.with_name(f"here.npy{end}")
        assert made.read_bytes() == wanted.read_bytes()
