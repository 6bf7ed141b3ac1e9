"""The demo's split by module: fixed for ever, about 12 %, the same name from any root."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pydocs.split import held_out, module_name


def test_share_of_held_out_modules_is_twelve_percent() -> None:
    names = [f"package{i % 97}.part{i}.module" for i in range(20_000)]
    share = sum(map(held_out, names)) / len(names)
    assert share == pytest.approx(0.12, abs=0.01)


def test_split_is_the_top_of_the_sha256_of_the_name() -> None:
    for name in ("json", "json.decoder", "numpy.linalg", "torch.nn.functional", "pathlib"):
        top = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16)
        assert held_out(name) == (top / 2**64 < 0.12)


def test_split_of_known_modules_never_changes() -> None:
    # Another rule would put pretraining text of the shipped decoder into the evaluation.
    names = ["abc", "argparse", "ast", "cmd", "collections", "dataclasses", "functools", "inspect"]
    kept = ["cmd", "collections", "dataclasses", "inspect"]
    assert [name for name in names if held_out(name)] == kept


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("json/__init__.py", "json"),
        ("json/decoder.py", "json.decoder"),
        ("abc.py", "abc"),
        ("a/b/__init__.py", "a.b"),
        ("__init__.py", "__init__"),
    ],
)
def test_module_name_is_the_dotted_path(path: str, name: str) -> None:
    assert module_name(Path("/root") / path, Path("/root")) == name


def test_module_name_refuses_a_path_outside_the_root() -> None:
    with pytest.raises(ValueError, match="subpath"):
        module_name(Path("/elsewhere/a.py"), Path("/root"))
