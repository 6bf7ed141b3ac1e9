from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvembed.model import tokens as module
from nvembed.model.tokens import batches


@given(st.lists(st.integers(0, 12)), st.integers(1, 5))
def test_runs_are_as_long_as_they_may_be(lengths: list[int], count: int) -> None:
    texts = [f"{number % 10}" * length for number, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BATCH_CHARACTERS", 10)
        found = list(batches(iter(texts), count))
    assert [text for batch in found for text in batch] == texts
    for batch in found:
        assert 1 <= len(batch) <= count
        assert len(batch) == 1 or sum(map(len, batch)) <= 10
    for batch, after in pairwise(found):
        assert len(batch) == count or sum(map(len, batch)) + len(after[0]) > 10
