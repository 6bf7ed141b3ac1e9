from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hash_encoder import HashEncoder
from nvembed.core.errors import DataError, ModelError
from nvembed.data.config import MiningConfig
from nvembed.data.records import PairRecord, StsRecord
from nvembed.data.similarity import text_key
from nvembed.mining import run
from nvembed.mining.miner import mine_negatives
from oracles import mining as oracle


def _signs(text: str) -> list[float]:
    digest = hashlib.sha256(text_key(text).encode()).digest()
    return [0.25 if digest[i] % 3 else -0.25 for i in range(16)]


class SignEncoder:
    """Unit vectors whose products are eighths: exact in any order of summing, with many ties."""

    dimension = 16

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> NDArray[np.float32]:
        return np.array([_signs(text) for text in texts], dtype=np.float32).reshape(-1, 16)

    encode_document = encode_query


class TableEncoder:
    """Vectors in the plane, by angle in degrees; remembers what it was asked."""

    dimension = 2

    def __init__(self, angles: dict[str, float]) -> None:
        self.angles = angles
        self.calls: list[tuple[str, str | None, list[str]]] = []

    def _encode(self, side: str, texts: Sequence[str], task: str | None) -> NDArray[np.float32]:
        self.calls.append((side, task, list(texts)))
        angles = np.radians([self.angles[text] for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> NDArray[np.float32]:
        return self._encode("query", texts, task)

    def encode_document(
        self, texts: Sequence[str], *, task: str | None = None
    ) -> NDArray[np.float32]:
        return self._encode("document", texts, task)


# cos 0 = 1, 20 = .940, 25 = .906, 30 = .866, 40 = .766, 50 = .643, 60 = .5, 80 = .174
PLANE = {"q": 0.0, "pos": 30.0, "same-ish": 20.0, "close": 25.0, "d40": 40.0, "d50": 50.0}
PLANE |= {"d60": 60.0, "d80": 80.0, "Q2": 0.0}
CORPUS = ["d80", "same-ish", "d50", "close", "d60", "d40"]


def _plain(config: MiningConfig, record: PairRecord | None = None) -> tuple[str, ...]:
    record = record or PairRecord("q", ("pos",))
    mined, _ = mine_negatives([record], CORPUS, TableEncoder(PLANE), config)
    return mined[0].negatives


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # positive .866: below .823, nearest first
        (MiningConfig(num_negatives=2), ("d40", "d50")),
        (MiningConfig(num_negatives=9), ("d40", "d50", "d60", "d80")),
        (MiningConfig(threshold=0.7, num_negatives=9), ("d60", "d80")),
        (MiningConfig(strategy="margin", threshold=0.25, num_negatives=9), ("d60", "d80")),
        (MiningConfig(strategy="absolute", num_negatives=9), ("d50", "d60", "d80")),
        (MiningConfig(strategy="top_k", num_negatives=3), ("same-ish", "close", "d40")),
        # passed over are the nearest that are no positive, whatever the rule says about them
        (MiningConfig(strategy="top_k", num_negatives=2, skip_top=1), ("close", "d40")),
        (MiningConfig(num_negatives=2, skip_top=3), ("d50", "d60")),
        # of the four nearest (same-ish, close, pos, d40) one passes
        (MiningConfig(num_negatives=2, search_depth=4), ("d40",)),
        (MiningConfig(num_negatives=2, search_depth=3), ()),
    ],
)
def test_strategies_by_hand(config: MiningConfig, expected: tuple[str, ...]) -> None:
    assert _plain(config) == expected


WORDS = [f"t{i}" for i in range(14)] + ["T3", " t5 "]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    strategy=st.sampled_from(["percent_of_positive", "margin", "absolute", "top_k"]),
    depth=st.integers(1, 20),
    skip=st.integers(0, 3),
    num_negatives=st.integers(1, 5),
)
def test_equals_plain_loops(
    seed: int, strategy: str, depth: int, skip: int, num_negatives: int
) -> None:
    rng = np.random.default_rng(seed)

    def draw(low: int, high: int) -> tuple[str, ...]:
        return tuple(dict.fromkeys(rng.choice(WORDS, rng.integers(low, high)).tolist()))

    records = [
        PairRecord(str(rng.choice(["t1", "t2", "t3", "t3 ", "x"])), draw(1, 4), draw(0, 3))
        for _ in range(rng.integers(1, 6))
    ]
    extra = list(draw(0, 12))
    config = MiningConfig(
        strategy=strategy,
        num_negatives=num_negatives,
        search_depth=depth,
        skip_top=skip,
        near_duplicate=None,
    )
    mined, report = mine_negatives(records, extra, SignEncoder(), config)
    # A given negative that is spelled twice is one; the oracle is handed what is left of such.
    unique = [
        (r.query, r.positives, list({text_key(t): t for t in reversed(r.negatives)}.values())[::-1])
        for r in records
    ]
    texts = {t for r in records for t in (r.query, *r.positives, *r.negatives)} | set(extra)
    expected = oracle.mine(
        unique,
        extra,
        {text: _signs(text) for text in texts},
        strategy=strategy,
        threshold=config.limit,
        num_negatives=num_negatives,
        search_depth=depth,
        skip_top=skip,
    )
    assert [list(record.negatives) for record in mined] == expected
    assert [(r.query, r.positives) for r in mined] == [(r.query, r.positives) for r in records]
    short = sum(len(negatives) < num_negatives for negatives in expected)
    assert report.share_with_fewer == short / len(records)
    assert report.negatives + report.given_kept == sum(len(negatives) for negatives in expected)


def test_no_known_positive_in_any_spelling() -> None:
    records = [
        PairRecord("what is a cat", ("A cat is a pet.",)),
        PairRecord("What is  a CAT", ("Cats are small felines.",), ("a cat is a PET.",)),
        PairRecord("other", ("dogs bark",)),
    ]
    corpus = ["a cat  is a pet.", "WHAT is a cat", "A cat is not a dog.", "cats purr a lot"]
    config = MiningConfig(strategy="top_k", num_negatives=10, near_duplicate=None)
    mined, report = mine_negatives(records, corpus, HashEncoder(), config)
    for record in mined[:2]:
        assert set(record.negatives) == {"A cat is not a dog.", "cats purr a lot", "dogs bark"}
    # The other query may have all of them.
    assert len(mined[2].negatives) == 5
    assert report.given_dropped == 1
    assert report.documents == 6


def test_near_duplicates_of_positive_and_query_are_refused() -> None:
    positive = "the list sort method sorts the items of a list in place and returns none"
    corpus = [
        positive + "!",  # the same words, another text
        positive.replace("none", "nothing"),  # 11 of 13 words: .85
        "how do I sort the list, in place?",
        "random numbers",
    ]
    record = PairRecord("how do I sort the list in place", (positive,))
    config = MiningConfig(strategy="top_k", num_negatives=4)
    mined, report = mine_negatives([record], corpus, HashEncoder(), config)
    assert set(mined[0].negatives) == {corpus[1], "random numbers"}
    assert report.near_duplicates == 2
    stricter = config.model_copy(update={"near_duplicate": 0.8})
    assert mine_negatives([record], corpus, HashEncoder(), stricter)[0][0].negatives == (
        "random numbers",
    )
    equal_only = config.model_copy(update={"near_duplicate": None})
    assert len(mine_negatives([record], corpus, HashEncoder(), equal_only)[0][0].negatives) == 4


def test_lowest_of_several_positives_sets_the_bar() -> None:
    record = PairRecord("q", ("close", "d50"))
    # .95 * .643 = .611, so .5 passes; by the best positive (.906) .766 would pass as well.
    assert _plain(MiningConfig(), record) == ("d60", "d80")


def test_given_negatives_stay_in_front_or_make_way() -> None:
    record = PairRecord("q", ("pos",), ("d80", "same-ish"))
    keep = MiningConfig(num_negatives=3)
    assert _plain(keep, record) == ("d80", "same-ish", "d40")
    assert _plain(keep.model_copy(update={"given": "replace"}), record) == ("d40", "d50", "d60")
    # Given ones are never cut, not even below what they number.
    assert _plain(MiningConfig(num_negatives=1), record) == ("d80", "same-ish")


def test_random_sampling_is_seeded_per_record() -> None:
    corpus = [f"document number {i} about topic {i % 7}" for i in range(60)]
    records = [PairRecord(f"topic {i}", (f"answer topic {i}",)) for i in range(4)]
    options = {"strategy": "top_k", "num_negatives": 4, "sample": "random"}
    one = MiningConfig(**options, seed=1)
    first, _ = mine_negatives(records, corpus, HashEncoder(), one)
    again, _ = mine_negatives(records, corpus, HashEncoder(), one)
    assert first == again
    other, _ = mine_negatives(records, corpus, HashEncoder(), MiningConfig(**options, seed=2))
    assert first != other
    # Records with the same candidates draw each for itself.
    twins, _ = mine_negatives([records[0]] * 3, corpus, HashEncoder(), one)
    assert len({record.negatives for record in twins}) > 1
    top = MiningConfig(strategy="top_k", num_negatives=6)
    nearest, _ = mine_negatives(records, corpus, HashEncoder(), top)
    narrow, _ = mine_negatives(
        records, corpus, HashEncoder(), MiningConfig(**options, sample_from=6, seed=1)
    )
    for record, pool in zip(narrow, nearest, strict=True):
        assert len(record.negatives) == 4
        # a subset of the six nearest, still nearest first
        assert [text for text in pool.negatives if text in record.negatives] == list(
            record.negatives
        )
    assert any(a.negatives != b.negatives[:4] for a, b in zip(narrow, nearest, strict=True))


@pytest.mark.parametrize("at_once", [1, 3, 7])
def test_what_a_record_draws_depends_on_its_place_and_not_on_the_block(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = [f"document number {i}" for i in range(40)]
    records = [PairRecord("the same query", (f"its answer {i}",)) for i in range(7)]
    config = MiningConfig(strategy="top_k", num_negatives=4, sample="random")
    whole, _ = mine_negatives(records, corpus, HashEncoder(), config)
    assert len({record.negatives for record in whole}) == len(records)
    monkeypatch.setattr(run, "BLOCK_RECORDS", at_once)
    parts, _ = mine_negatives(records, corpus, HashEncoder(), config)
    assert parts == whole


def test_the_instruction_goes_to_queries_only_and_texts_are_encoded_once() -> None:
    encoder = TableEncoder(PLANE)
    records = [PairRecord("q", ("pos",)), PairRecord("q", ("d60",)), PairRecord("Q2", ("pos",))]
    mine_negatives(records, ["pos", "d40"], encoder, MiningConfig(), instruction="Find it")
    assert encoder.calls == [
        ("query", "Find it", ["q", "Q2"]),
        ("document", None, ["pos", "d60", "d40"]),
    ]


def test_a_record_with_an_instruction_is_asked_with_it() -> None:
    encoder = TableEncoder(PLANE)
    own = "Find the opposite"
    records = [
        PairRecord("q", ("pos",)),
        PairRecord("q", ("d60",), instruction=own),
        PairRecord("Q2", ("pos",), instruction=own),
        PairRecord("Q2", ("pos",), instruction="Find more"),
    ]
    mine_negatives(records, None, encoder, MiningConfig(), instruction="Find it")
    asked = {(side, task): texts for side, task, texts in encoder.calls}
    assert asked == {
        ("query", "Find it"): ["q"],
        ("query", own): ["q", "Q2"],
        ("query", "Find more"): ["Q2"],
        ("document", None): ["pos", "d60"],
    }


class TaskEncoder(TableEncoder):
    """Turns queries by the angle that the instruction names."""

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> NDArray[np.float32]:
        angles = np.radians([self.angles[text] + float(task or 0) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_what_is_near_depends_on_the_instruction_of_the_record() -> None:
    records = [PairRecord("q", ("pos",), instruction=angle) for angle in ("40", "80", None)]
    config = MiningConfig(strategy="top_k", num_negatives=1, write_scores=True)
    mined, _ = mine_negatives(records, CORPUS, TaskEncoder(PLANE), config, instruction="60")
    assert [record.negatives for record in mined] == [("d40",), ("d80",), ("d60",)]
    expected = [np.cos(np.radians(angle - 30)) for angle in (40, 80, 60)]
    assert [record.positive_scores[0] for record in mined] == pytest.approx(expected, abs=1e-6)


def test_positives_of_further_records_are_no_negatives() -> None:
    further = [PairRecord("Q ", ("D40",)), PairRecord("other", ("d50",)), PairRecord("q", ("x",))]
    config = MiningConfig(strategy="top_k", num_negatives=4)
    mined, _ = mine_negatives(
        [PairRecord("q", ("pos",))], CORPUS, TableEncoder(PLANE), config, further=further
    )
    assert [record.negatives for record in mined] == [("same-ish", "close", "d50", "d60")]


def test_report_counts_by_hand() -> None:
    record = PairRecord("q", ("pos",))
    _, report = mine_negatives([record], CORPUS, TableEncoder(PLANE), MiningConfig(num_negatives=5))
    assert report.records == 1
    assert report.documents == 7
    assert report.negatives == 4
    assert report.candidates == 6
    assert report.share_rejected == pytest.approx(2 / 6)
    assert (report.share_with_fewer, report.share_with_none) == (1.0, 0.0)
    assert report.share_positive_not_found == 0.0
    degrees = np.array([40, 50, 60, 80])
    assert report.mean_positive_score == pytest.approx(np.cos(np.radians(30)), abs=1e-6)
    assert report.mean_negative_score == pytest.approx(np.cos(np.radians(degrees)).mean(), abs=1e-6)
    (sample,) = report.samples
    assert (sample.query, sample.positive.text) == ("q", "pos")
    assert [negative.text for negative in sample.negatives] == ["d40", "d50", "d60", "d80"]
    shallow = MiningConfig(search_depth=2)
    _, report = mine_negatives([record], CORPUS, TableEncoder(PLANE), shallow)
    assert (report.share_positive_not_found, report.share_with_none) == (1.0, 1.0)
    assert (report.negatives, report.mean_negative_score) == (0, None)


def test_samples_are_spread_over_the_records() -> None:
    records = [PairRecord(f"query {i}", (f"answer {i}",)) for i in range(300)]
    mined, report = mine_negatives(records, None, HashEncoder(), MiningConfig())
    assert [sample.query for sample in report.samples] == [f"query {i}" for i in range(0, 300, 60)]
    # 300 records are several search blocks; every negative is another record's answer.
    assert all(f"answer {i}" not in record.negatives for i, record in enumerate(mined))
    assert all(record.negatives for record in mined)


def test_sts_negatives_suit_both_sentences() -> None:
    angles = {"a": 0.0, "b": 30.0, "near a": -25.0, "near b": 55.0, "far": 90.0, "mid": 15.0}
    angles |= {"c": -60.0, "other": 200.0}
    records = [
        StsRecord("a", "b", 4.5),
        StsRecord("near a", "near b", 1.0),
        StsRecord("far", "mid", 0.0),
        StsRecord("c", "a", 4.0),
        StsRecord("other", "Other", 5.0),
    ]
    encoder = TableEncoder(angles | {"Other": 200.0})
    config = MiningConfig(num_negatives=7, near_duplicate=None)
    mined, report = mine_negatives(records, None, encoder, config, instruction="Similar")
    assert {(side, task) for side, task, _ in encoder.calls} == {
        ("query", "Similar"),
        ("document", "Similar"),
    }
    # Pair (a, b) scores .866, the bar is .823. "near a" is .906 to a, "near b" .906 to b,
    # "mid" .966 to both; "c" is a positive of a by the fourth record. "far": .5 to b; "other": < 0.
    assert mined[0].negatives == ("far", "other")
    assert [record.negatives for record in mined[1:3]] == [(), ()]
    # Pair (c, a) scores .5, the bar is .475: b is a positive of a; far is 0 to a, -.87 to c.
    assert mined[3].negatives == ("far", "other")
    assert mined[4] == records[4]
    assert report.records == 2


def test_nothing_to_mine_for_is_a_data_error() -> None:
    with pytest.raises(DataError, match="no records to mine for"):
        mine_negatives([], ["a"], HashEncoder(), MiningConfig())
    with pytest.raises(DataError, match="scored 4 or more"):
        mine_negatives([StsRecord("a", "b", 3.9)], None, HashEncoder(), MiningConfig())


def test_a_teacher_that_gives_nan_is_refused() -> None:
    encoder = TableEncoder(PLANE | {"d50": float("nan")})
    with pytest.raises(ModelError, match=r"NaN or infinity for 1 of 7 texts.*'d50'"):
        mine_negatives([PairRecord("q", ("pos",))], CORPUS, encoder, MiningConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.2}, "percent_of_positive takes"),
        ({"threshold": 1.01}, "percent_of_positive takes"),
        ({"threshold": 0.0}, "percent_of_positive takes"),
        ({"threshold": -1.0}, "percent_of_positive takes"),
        ({"strategy": "margin", "threshold": -0.1}, "margin takes"),
        ({"strategy": "absolute", "threshold": 3.0}, "absolute takes a cosine"),
        ({"strategy": "top_k", "threshold": 0.5}, "no meaning for strategy top_k"),
        ({"sample_from": 9}, "no meaning for sample top"),
        ({"sample": "random", "sample_from": 3}, "below num_negatives"),
        ({"num_negatives": 0}, "num_negatives"),
        ({"skip_top": -1}, "skip_top"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiningConfig(**options)
