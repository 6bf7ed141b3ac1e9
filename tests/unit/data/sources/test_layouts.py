"""Every layout on rows in the true schema of its sources (made up for the test)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from nvembed.core.errors import SourceError
from nvembed.data.config import DatasetConfig
from nvembed.data.loading import open_dataset
from nvembed.data.records import BadRow, Converted, LabelRecord, PairRecord, StsRecord
from nvembed.data.sources.layouts import Source, record_values
from nvembed.data.sources.rows import Columns, Row


def write(path: Path, rows: Sequence[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path.name


def convert(folder: Path, rows: Sequence[Any], **keys: Any) -> list[Any]:
    """Records of the rows, and of bad ones what is wrong."""
    config = DatasetConfig.model_validate(
        {"name": "set", "path": write(folder / "rows.jsonl", rows), "kind": "retrieval"}
        | {"instruction": None}
        | keys
    )
    return outcome(folder, config)


def outcome(folder: Path, config: DatasetConfig) -> list[Any]:
    rows = list(open_dataset(config, base_dir=folder).rows)
    assert all(isinstance(row, Converted | BadRow) for row in rows)
    return [row.record if isinstance(row, Converted) else row.problem for row in rows]


# (source, keys of the recipe, row, record), schemas from the cards of the sets
ROW_BY_ROW: list[tuple[str, dict[str, Any], dict[str, Any], Any]] = [
    (
        "msmarco-bm25 triplet",
        {"layout": "tuples"},
        {"query": "what is lime mortar", "positive": "Lime mortar is", "negative": "Lime juice is"},
        PairRecord("what is lime mortar", ("Lime mortar is",), ("Lime juice is",)),
    ),
    (
        "hotpotqa, miracl, mr-tydi triplet",
        {"layout": "tuples"},
        {"anchor": "Which river?", "positive": "The Foo", "negative": "The Bar"},
        PairRecord("Which river?", ("The Foo",), ("The Bar",)),
    ),
    (
        "n-tuples, in the order of the numbers",
        {"layout": "tuples", "max_negatives": 3},
        {"anchor": "q", "positive": "p"}
        | {f"negative_{n}": f"n{n}" for n in (10, 2, 0, 1)}
        | {"negative_3": None},
        PairRecord("q", ("p",), ("n0", "n1", "n2")),
    ),
    (
        "natural-questions, paq pair",
        {"columns": {"positive": "answer"}},
        {"query": "who built the old bridge", "answer": "Old Bridge The bridge was built by"},
        PairRecord("who built the old bridge", ("Old Bridge The bridge was built by",)),
    ),
    (
        "squad",
        {"columns": {"query": "question", "positive": "answer"}},
        {"question": "When did the fair open?", "answer": "The fair opened in 1901"},
        PairRecord("When did the fair open?", ("The fair opened in 1901",)),
    ),
    (
        "rajpurkar/squad: a place inside a column",
        {"columns": {"query": "question", "positive": "answers.text.0"}},
        {"question": "When?", "answers": {"text": ["1901"], "answer_start": [4]}},
        PairRecord("When?", ("1901",)),
    ),
    (
        "stackexchange-duplicates",
        {"columns": {"query": "title1", "positive": "title2"}},
        {"title1": "Reset a password", "title2": "Forgot my password"},
        PairRecord("Reset a password", ("Forgot my password",)),
    ),
    (
        "stackexchange title-body",
        {"columns": {"query": "texts.0", "positive": "texts.1"}},
        {"texts": ["How to", "I have"], "tags": ["unity", "2d"]},
        PairRecord("How to", ("I have",)),
    ),
    (
        "PAQ_pairs",
        {"columns": {"query": "set.0", "positive": "set.1"}},
        {"set": ["question", "passage"]},
        PairRecord("question", ("passage",)),
    ),
    (
        "FlagEmbedding",
        {"layout": "lists"},
        {"query": "q", "pos": ["p"], "neg": ["n1", "n2"], "prompt": "Given", "type": "normal"},
        PairRecord("q", ("p",), ("n1", "n2")),
    ),
    (
        "FlagEmbedding, null scores",
        {"layout": "lists"},
        {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": None, "neg_scores": None},
        PairRecord("q", ("p",), ("n",)),
    ),
    (
        "FlagEmbedding, scores",
        {"layout": "lists", "max_negatives": 1, "max_positives": 1},
        {"query": "q", "pos": ["p", "r"], "neg": ["n", "m"]}
        | {"pos_scores": [0.9, 0.8], "neg_scores": [0.5, 0.4]},
        PairRecord("q", ("p",), ("n",), (0.9,), (0.5,)),
    ),
    (
        "BeastyZ/E5-R",
        {"columns": {"positive": "positive", "negative": "negative"}},
        {"query": "q", "positive": ["p"], "negative": ["n"]},
        PairRecord("q", ("p",), ("n",)),
    ),
    (
        "nomic supervised",
        {"columns": {"positive": "document", "negative": "negatives"}},
        {"query": "q", "document": "d", "negatives": ["n1", "n2"]},
        PairRecord("q", ("d",), ("n1", "n2")),
    ),
    (
        "MEDI2",
        {"columns": {"query": "query.1", "positive": "pos.0.1", "negative": "neg.0.1"}},
        {"query": ["Represent", "q"], "pos": [["", "p"]], "neg": [["", "n"]]},
        PairRecord("q", ("p",), ("n",)),
    ),
    (
        "mr-tydi raw: a passage without any text is left out",
        {"layout": "passages"},
        {
            "query_id": "1",
            "query": "when?",
            "positive_passages": [{"docid": "25#12", "title": "T", "text": "one"}],
            "negative_passages": [
                {"docid": "34#8", "title": "U", "text": "two"},
                {"docid": "34#9", "title": "", "text": ""},
                {"docid": "34#9", "title": "", "text": "three"},
            ],
        },
        PairRecord("when?", ("T one",), ("U two", "three")),
    ),
    (
        "banking77: the name of the label",
        {"kind": "classification", "columns": {"label": "label_text"}},
        {"text": "where is my card", "label": 11, "label_text": "card_arrival"},
        LabelRecord("where is my card", "card_arrival"),
    ),
    (
        "amazon reviews: names for numbers",
        {"kind": "classification", "label_names": ["1 star", "2 stars", "3 stars"]},
        {"text": "Nice\n\nI like it", "label": 2, "label_text": "2"},
        LabelRecord("Nice\n\nI like it", "3 stars"),
    ),
    (
        "massive: labels are texts",
        {"kind": "classification", "where": {"lang": ["en", "en-US"]}},
        {"id": "1", "label": "alarm_set", "label_text": "alarm_set", "text": "wake", "lang": "en"},
        LabelRecord("wake", "alarm_set"),
    ),
    (
        "raw_biorxiv P2P",
        {"kind": "clustering", "columns": {"text": ["title", "abstract"], "label": "category"}},
        {"id": "10.1101/1", "title": "On foo ", "abstract": "We", "category": "neuroscience"},
        LabelRecord("On foo We", "neuroscience"),
    ),
    (
        "raw_arxiv S2S: the first category",
        {"kind": "clustering", "columns": {"text": "title", "label": "categories.0"}},
        {"id": "0704.0001", "title": "On foo", "abstract": "We", "categories": "math.CO cs.CG"},
        LabelRecord("On foo", "math.CO"),
    ),
    (
        "reddit title and body",
        {"kind": "clustering", "columns": {"text": ["title", "body"], "label": "subreddit"}},
        {"title": "Best trail shoes?", "body": "I run", "subreddit": "running"},
        LabelRecord("Best trail shoes? I run", "running"),
    ),
    (
        "stackexchange P2P",
        {"kind": "clustering", "columns": {"text": ["texts.0", "texts.1"], "label": "tags.0"}},
        {"texts": ["How to", "I have"], "tags": ["unity", "2d"]},
        LabelRecord("How to I have", "unity"),
    ),
    (
        "sts12, stsbenchmark",
        {"kind": "sts", "max_score": 5},
        {"sentence1": "A dog runs.", "sentence2": "A dog is running.", "score": 4.8},
        StsRecord("A dog runs.", "A dog is running.", 4.8),
    ),
    (
        "stsb from 0 to 1",
        {"kind": "sts", "max_score": 1},
        {"sentence1": "a", "sentence2": "b", "score": 0.8},
        StsRecord("a", "b", 4.0),
    ),
]


@pytest.mark.parametrize(
    ("keys", "row", "expected"),
    [entry[1:] for entry in ROW_BY_ROW],
    ids=[entry[0] for entry in ROW_BY_ROW],
)
def test_row_by_row(
    tmp_path: Path, keys: dict[str, Any], row: dict[str, Any], expected: Any
) -> None:
    assert convert(tmp_path, [row], **keys) == [expected]


@pytest.mark.parametrize("layout", ["records", "lists"])
def test_an_instruction_per_row_is_passed_on(layout: str) -> None:
    values = {"name": "s", "path": "p", "kind": "retrieval", "instruction": None, "layout": layout}
    config = DatasetConfig.model_validate(values | {"columns": {"instruction": "prompt"}})
    row = {"query": "q", "pos": ["p"], "neg": ["n"], "positive": ["p"], "negative": ["n"]}
    values = row | {"prompt": "Given", "type": "normal"}
    rows = iter([Row("place", values)])
    found = record_values(rows, Source(config, Columns(config.columns)))
    assert [values for _, values in found] == [
        {"query": "q", "positive": ["p"], "negative": ["n"], "instruction": "Given"}
    ]


def test_clusters_become_one_record_per_text(tmp_path: Path) -> None:
    row = {
        "sentences": ["How to ...", "Why does ...", ""],
        "labels": ["ux.stackexchange.com.txt", "music.stackexchange.com.txt", "x"],
    }
    assert (
        convert(tmp_path, [row, row], kind="clustering", layout="clusters")
        == [
            LabelRecord("How to ...", "ux.stackexchange.com"),
            LabelRecord("Why does ...", "music.stackexchange.com"),
            '"text" is empty, expected a text',
        ]
        * 2
    )


def test_where_leaves_rows_out_and_they_count_as_read(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": n % 3, "lang": "en" if n % 2 else "de"} for n in range(6)]
    config = DatasetConfig(
        name="set",
        path=write(tmp_path / "rows.jsonl", rows),
        kind="classification",
        instruction=None,
        where={"lang": ("en",), "label": ("0", "2")},
    )
    opened = open_dataset(config, base_dir=tmp_path)
    assert [row.record for row in opened.rows if isinstance(row, Converted)] == [
        LabelRecord("t3", "0"),
        LabelRecord("t5", "2"),
    ]
    assert opened.rows_read == 6


@pytest.mark.parametrize(
    ("keys", "row", "problem"),
    [
        ({}, {"query": "q", "answer": "a"}, 'no column "positive"; found: query, answer'),
        (
            {"columns": {"positive": "reply"}},
            {"query": "q", "answer": "a"},
            'no column "reply" for "positive"; found: query, answer',
        ),
        (
            {"columns": {"positive": ["title", "text"]}},
            {"query": "q", "title": "a"},
            'no column "title + text" for "positive"; found: query, title',
        ),
        (
            {"columns": {"positive": "set.3"}},
            {"query": "q", "set": ["a"]},
            'no column "set.3" for "positive"; found: query, set',
        ),
        (
            {"layout": "tuples"},
            {"q": "q", "positive": "p"},
            'no column "query"; found: q, positive',
        ),
        (
            {"kind": "sts", "max_score": 1},
            {"sentence1": "a", "sentence2": "b", "score": 4.5},
            '"score" is 4.5, above max_score 1',
        ),
        (
            {"kind": "classification", "label_names": ["a", "b"]},
            {"text": "t", "label": 2},
            "\"label\" is '2', expected 0 to 1 (label_names)",
        ),
        (
            {"kind": "classification", "label_names": ["a", "b"]},
            {"text": "t", "label": -1},
            "\"label\" is '-1', expected 0 to 1 (label_names)",
        ),
        (
            {"max_characters": 9},
            {"query": "q", "positive": ["p", "ten chars."]},
            "a text of 10 characters, expected at most 9 (max_characters)",
        ),
        (
            {"layout": "passages"},
            {"query": "q", "positive_passages": [{"docid": "1", "title": "", "text": ""}]},
            '"positive_passages" holds no text',
        ),
        (
            {"layout": "lists"},
            {"query": "q", "pos": [], "neg": []},
            '"positive" is an empty list, expected at least one text',
        ),
        (
            {"kind": "clustering", "layout": "clusters"},
            {"sentences": ["a"], "labels": ["x", "y"]},
            "1 sentences and 2 labels",
        ),
    ],
)
def test_bad_rows_say_what_is_wrong(
    tmp_path: Path, keys: dict[str, Any], row: dict[str, Any], problem: str
) -> None:
    assert convert(tmp_path, [row], **keys) == [problem]


def test_a_source_of_which_nothing_can_be_used_is_given_up(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": "a"} for n in range(1200)]
    config = DatasetConfig(
        name="set", path=write(tmp_path / "r.jsonl", rows), kind="retrieval", instruction=None
    )
    opened = open_dataset(config, base_dir=tmp_path)
    with pytest.raises(SourceError, match=r'none of the first 1,000 rows .* no column "query"'):
        list(opened.rows)
    # one good row is enough to go on
    write(tmp_path / "r.jsonl", [*rows[:999], {"query": "q", "positive": "p"}, *rows])
    assert len(list(open_dataset(config, base_dir=tmp_path).rows)) == 2200


# --- Layouts that put rows together ---------------------------------------------------------------


CORPUS = [
    {"_id": "MED-1", "title": "Fibre and sleep", "text": "We asked 40 adults"},
    {"_id": "MED-2", "title": "", "text": "no title "},
    {"_id": "MED-3", "title": "Other", "text": "document"},
]
QUERIES = [{"_id": "PLAIN-7", "text": "does fibre help"}, {"_id": "PLAIN-8", "text": "of test"}]


def beir_folder(folder: Path, judgements: str, split: str = "train") -> Path:
    write(folder / "corpus.jsonl", CORPUS)
    write(folder / "queries.jsonl", QUERIES)
    (folder / "qrels").mkdir()
    (folder / "qrels" / f"{split}.tsv").write_text(judgements)
    return folder


HEADER = "query-id\tcorpus-id\tscore\n"
THREE = HEADER + "PLAIN-7\tMED-1\t1\nPLAIN-7\tMED-3\t0\nPLAIN-7\tMED-2\t2\n"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [PairRecord("does fibre help", ("no title", "Fibre and sleep We asked 40 adults"))]),
        ({"max_positives": 1}, [PairRecord("does fibre help", ("no title",))]),
        (
            {"one_record_per": "positive"},
            [
                PairRecord("does fibre help", ("no title",)),
                PairRecord("does fibre help", ("Fibre and sleep We asked 40 adults",)),
            ],
        ),
        (
            {"judged_negatives": True, "max_positives": 1},
            [PairRecord("does fibre help", ("no title",), ("Other document",))],
        ),
    ],
)
def test_beir_folder(tmp_path: Path, keys: dict[str, Any], expected: list[Any]) -> None:
    beir_folder(tmp_path / "nfcorpus", THREE)
    config = DatasetConfig(
        name="n", path="nfcorpus", kind="retrieval", instruction=None, layout="beir", **keys
    )
    assert outcome(tmp_path, config) == expected
    first = next(open_dataset(config, base_dir=tmp_path).rows)
    assert first.place.endswith("qrels/train.tsv:" + ("4" if "one_record_per" in keys else "2"))


def test_judgements_without_texts_are_bad_rows_and_the_rest_stays(tmp_path: Path) -> None:
    lines = "PLAIN-7\tMED-9\t1\nPLAIN-7\tMED-1\t1\nPLAIN-9\tMED-1\t1\nPLAIN-8\tMED-8\t1\n"
    folder = beir_folder(tmp_path / "b", HEADER + lines, split="dev")
    config = DatasetConfig(
        name="n", path="b", kind="retrieval", instruction=None, layout="beir", split="dev"
    )
    assert list(open_dataset(config, base_dir=tmp_path).rows) == [
        BadRow(
            f"{folder}/qrels/dev.tsv:2",
            f"document 'MED-9' is not in {folder}/corpus.jsonl",
            harmless=True,
        ),
        Converted(
            PairRecord("does fibre help", ("Fibre and sleep We asked 40 adults",)),
            f"{folder}/qrels/dev.tsv:2",
        ),
        BadRow(
            f"{folder}/qrels/dev.tsv:4",
            f"query 'PLAIN-9' is not in {folder}/queries.jsonl",
            harmless=True,
        ),
        BadRow(
            f"{folder}/qrels/dev.tsv:5",
            f"document 'MED-8' is not in {folder}/corpus.jsonl",
            harmless=True,
        ),
    ]
    with pytest.raises(SourceError, match=r"train\.tsv: no such file; .* there: dev\. Say"):
        open_dataset(config.model_copy(update={"split": "train"}), base_dir=tmp_path)
    by_file = config.model_copy(update={"split": "train", "path": "b/qrels/dev.tsv"})
    assert outcome(tmp_path, by_file) == outcome(tmp_path, config)


def test_miracl_from_its_raw_files(tmp_path: Path) -> None:
    """Topics and judgements without header; a judgement of 0 is a negative."""
    (tmp_path / "topics.tsv").write_text('3\twhat is "foo\n4\tnot judged\n')
    (tmp_path / "qrels.tsv").write_text("3\tQ0\t25#1\t1\n3\tQ0\t25#2\t0\n")
    write(
        tmp_path / "corpus.jsonl",
        [{"docid": f"25#{n}", "title": "T", "text": f"text {n}"} for n in range(4)],
    )
    config = DatasetConfig.model_validate(
        {
            "name": "miracl",
            "path": "qrels.tsv",
            "kind": "retrieval",
            "instruction": None,
            "layout": "beir",
            "header": ["query-id", "iteration", "corpus-id", "score"],
            "judged_negatives": True,
            "queries": {"path": "topics.tsv", "header": ["id", "text"]},
            "corpus": {"path": "corpus.jsonl", "columns": {"id": "docid"}},
        }
    )
    assert outcome(tmp_path, config) == [PairRecord('what is "foo', ("T text 1",), ("T text 2",))]


@pytest.mark.parametrize("ids", [[11, 42, 11], "[11, 42]", [11.0, 42.0]])
def test_bioasq_passages_by_number(tmp_path: Path, ids: Any) -> None:
    write(
        tmp_path / "corpus.jsonl",
        [{"passage": f"Passage {n}", "id": n} for n in range(50)] + [{"passage": None, "id": 60}],
    )
    rows = [
        {"question": "Is X linked?", "answer": "Yes", "relevant_passage_ids": ids, "id": 5},
        {"question": "Gone?", "answer": "Yes", "relevant_passage_ids": [70], "id": 6},
        {"question": "Broken?", "answer": "Yes", "relevant_passage_ids": "[7", "id": 7},
    ]
    found = convert(
        tmp_path,
        rows,
        layout="references",
        columns={"query": "question", "ids": "relevant_passage_ids"},
        corpus={"path": "corpus.jsonl", "columns": {"text": "passage"}},
    )
    assert found == [
        "\"ids\" is '[7', expected a list",
        PairRecord("Is X linked?", ("Passage 11", "Passage 42")),
        f"document '70' is not in {tmp_path}/corpus.jsonl",
    ]


def test_hover_joins_wikipedia_by_title(tmp_path: Path) -> None:
    """Titles are spelled with HTML entities and decomposed accents here, and not there."""
    write(
        tmp_path / "corpus.jsonl",
        [
            {"_id": "1", "title": "Café & Co (novel)", "text": "A novel."},
            {"_id": "2", "title": "Jane Roe", "text": "A writer."},
        ],
    )
    hover = [
        {
            "uid": "ab-12",
            "claim": "The author was born in Bar.",
            "supporting_facts": [
                ["Cafe\u0301 &amp; Co (novel)", 0],
                ["Jane Roe", 1],
                ["Jane Roe", 2],
            ],
            "label": "SUPPORTED",
            "num_hops": 2,
            "hpqa_id": "5a7a",
        }
    ]
    (tmp_path / "hover.json").write_text(json.dumps(hover, indent=1))
    config = DatasetConfig.model_validate(
        {
            "name": "hover",
            "path": "hover.json",
            "kind": "retrieval",
            "instruction": None,
            "layout": "references",
            "columns": {"query": "claim", "ids": "supporting_facts"},
            "corpus": {
                "path": "corpus.jsonl",
                "columns": {"id": "title", "text": ["title", "text"]},
            },
        }
    )
    assert outcome(tmp_path, config) == [
        PairRecord(
            "The author was born in Bar.", ("Café & Co (novel) A novel.", "Jane Roe A writer.")
        )
    ]


def test_negatives_by_id(tmp_path: Path) -> None:
    """The layout of NVIDIA's Automodel: documents are named by objects with an id."""
    write(tmp_path / "corpus.jsonl", [{"id": f"d_{n}", "text": f"text {n}"} for n in range(9)])
    rows = [
        {"question": "q", "pos_doc": [{"id": "d_2"}], "neg_doc": [{"id": "d_8"}, {"id": "d_7"}]},
        {"question": "r", "pos_doc": [{"id": "d_3"}], "neg_doc": None},
        {"question": "s", "pos_doc": [], "neg_doc": []},
        {"question": "t", "pos_doc": [{"id": "d_4"}], "neg_doc": [{"id": "d_9"}]},
        {"question": "u", "pos_doc": [{"name": "d_4"}], "neg_doc": []},
    ]
    found = convert(
        tmp_path,
        rows,
        layout="references",
        columns={"query": "question", "ids": "pos_doc", "negative_ids": "neg_doc"},
        corpus={"path": "corpus.jsonl"},
    )
    assert found == [
        '"ids" is empty, expected at least one',
        "an id is NoneType, expected a text or a number",
        PairRecord("q", ("text 2",), ("text 8", "text 7")),
        PairRecord("r", ("text 3",)),
        f"document 'd_9' is not in {tmp_path}/corpus.jsonl",
        PairRecord("t", ("text 4",)),
    ]


def test_scored_mining_keeps_what_scores_well_below_the_positive(tmp_path: Path) -> None:
    write(tmp_path / "queries.jsonl", [{"query_id": 0, "query": "q"}])
    write(tmp_path / "documents.jsonl", [{"document_id": n, "document": f"d{n}"} for n in range(9)])
    scores = [0.80, 0.77, 0.75, -1, 0.10, 0.05]
    found = convert(
        tmp_path,
        [{"query_id": 0, "document_ids": ["3", "8", "4", "7", "1", "2"], "scores": scores}],
        layout="scored",
        max_negatives=2,
        queries={"path": "queries.jsonl"},
        corpus={"path": "documents.jsonl"},
    )
    # 95 % of 0.80 is 0.76: 0.77 is too near; -1 was not scored; two at most
    assert found == [PairRecord("q", ("d3",), ("d4", "d1"), (0.80,), (0.75, 0.10))]


def test_entailment_is_grouped_by_premise(tmp_path: Path) -> None:
    def row(premise: str, hypothesis: str, label: Any) -> dict[str, Any]:
        return {"premise": premise, "hypothesis": hypothesis, "label": label}

    rows = [
        row("drum", "music", 0),
        row("dog", "animal", 0),  # nothing contradicts it
        row("drum", "sleeps", 2),
        row("cat", "dog", "contradiction"),
        row("drum", "loud", 1),
        row("drum", "no gold label", -1),
        row("cat", "animal", "entailment"),
        row("drum", "sound", 0),
        row("drum", "?", 7),
    ]
    assert convert(tmp_path, rows, kind="nli", layout="entailment") == [
        '"label" is 7, expected 0 to 2 or entailment, …',
        PairRecord("drum", ("music", "sound"), ("sleeps",)),
        PairRecord("cat", ("animal",), ("dog",)),
    ]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"path": None}, "neither path nor hub is given"),
        ({"hub": {"id": "a/b"}}, "both path and hub are given"),
        ({"layout": "clusters"}, "layout clusters gives records of kind classification or"),
        ({"layout": "entailment", "kind": "sts"}, "records of kind retrieval or nli, not sts"),
        ({"layout": "references"}, "layout references needs corpus"),
        ({"layout": "scored"}, "layout scored needs corpus and queries"),
        ({"corpus": {"path": "c"}}, "layout records has no use for corpus"),
        (
            {"path": None, "hub": {"id": "a/b", "config": "c", "files": ["f.csv"]}},
            "config has no meaning beside them",
        ),
    ],
)
def test_entries_that_make_no_sense_are_refused(keys: dict[str, Any], message: str) -> None:
    values = {"name": "s", "path": "p", "kind": "retrieval", "instruction": None}
    with pytest.raises(ValidationError, match=message):
        DatasetConfig.model_validate(values | keys)
