from __future__ import annotations

import pytest

from nvembed.core.errors import (
    ConfigError,
    DataError,
    ModelError,
    NVEmbedError,
    TrainingError,
    UserError,
)


def test_text_names_where_what_expected_and_what_to_do():
    error = DataError("score is 7", where="a.jsonl:3", expected="0 to 5", hint="Rescale it")
    assert str(error) == "a.jsonl:3: score is 7; expected 0 to 5. Rescale it"
    assert str(UserError("just this")) == "just this"


@pytest.mark.parametrize("kind", [ConfigError, DataError, ModelError, TrainingError])
def test_every_kind_is_a_user_error_with_exit_code_2(kind):
    assert issubclass(kind, UserError)
    assert issubclass(kind, NVEmbedError)
    assert kind("x").exit_code == 2
