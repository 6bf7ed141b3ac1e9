"""Every entry of the v2 recipe, as it is written there, on a stand-in for its source.

The stand-ins are local folders with the configurations, splits, files and columns of the sets on
the hub; their rows are made up.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

datasets = pytest.importorskip("datasets")

from nvembed.core.config import load_config
from nvembed.data.loading import open_dataset
from nvembed.data.records import Converted, LabelRecord, PairRecord, Record, StsRecord
from nvembed.training.config import TrainConfig

RECIPE = Path(__file__).resolve().parents[4] / "recipes" / "nv-embed-v2.yaml"
Rows = list[dict[str, Any]]


def beir(query: str, document: str) -> dict[tuple[str, str], Rows]:
    """The three configurations of MTEB's retrieval sets; ids in the style of the set."""
    return {
        ("default", "train"): [{"query-id": query, "corpus-id": document, "score": 1.0}],
        ("corpus", "corpus"): [
            {"_id": "other", "title": "Other", "text": "document"},
            {"_id": document, "title": "Title", "text": "text of it"},
        ],
        ("queries", "queries"): [{"_id": query, "text": "the query"}, {"_id": "t", "text": "test"}],
    }


def labelled(**row: Any) -> Rows:
    return [{"text": "the text"} | row]


BEIR_RECORD = PairRecord("the query", ("Title text of it",))
PREPRINT = {"id": "10.1101/1", "title": "On foo", "abstract": "We", "category": "neuroscience"}
ARXIV = {"id": "0704.1", "title": "On foo", "abstract": "We", "categories": "math.CO cs.CG"}
REDDIT = {"title": "Best shoes?", "body": "I run", "subreddit": "running"}

# name in the recipe → (what is in the folder, the first record)
SOURCES: dict[str, tuple[dict[Any, Rows], Record]] = {
    "msmarco": (
        {("triplet", "train"): [{"query": "lime mortar", "positive": "is", "negative": "juice"}]},
        PairRecord("lime mortar", ("is",)),
    ),
    "hotpotqa": (beir("5a7a06935542990198eaf050", "12"), BEIR_RECORD),
    "nq": (
        {("default", "train"): [{"query": "who built it", "answer": "Old Bridge was"}]},
        PairRecord("who built it", ("Old Bridge was",)),
    ),
    "paq": (
        {("pair", "train"): [{"query": "who built it", "answer": "Old Bridge was"}]},
        PairRecord("who built it", ("Old Bridge was",)),
    ),
    "stackexchange": (
        {("post-post-pair", "train"): [{"post1": "title body", "post2": "other body"}]},
        PairRecord("title body", ("other body",)),
    ),
    "nli": (
        {
            ("pair-class", "train"): [
                {"premise": "A man plays.", "hypothesis": "Music.", "label": 0},
                {"premise": "A man plays.", "hypothesis": "He is loud.", "label": 1},
                {"premise": "A man plays.", "hypothesis": "He sleeps.", "label": 2},
            ]
        },
        PairRecord("A man plays.", ("Music.",), ("He sleeps.",)),
    ),
    "squad": (
        {("default", "train"): [{"question": "When?", "answer": "The fair opened"}]},
        PairRecord("When?", ("The fair opened",)),
    ),
    "arguana": (
        {("default", "arguana"): [{"query": "q", "pos": ["p"], "neg": ["n"], "type": "normal"}]},
        PairRecord("q", ("p",)),
    ),
    "bioasq": (
        {
            ("question-answer-passages", "train"): [
                {"question": "Is X?", "answer": "Yes", "relevant_passage_ids": [11, 42], "id": 5}
            ],
            ("text-corpus", "test"): [
                {"passage": "We studied", "id": 42},
                {"passage": "We found", "id": 11},
            ],
        },
        PairRecord("Is X?", ("We found", "We studied")),
    ),
    "fiqa": (beir("0", "18850"), BEIR_RECORD),
    "fever": (beir("150448", "Some_Title_-LRB-film-RRB-"), BEIR_RECORD),
    "hover": (
        {("default", "train"): [{"claim": "The author", "label": 1, "evidence": "Foo is"}]},
        PairRecord("The author", ("Foo is",)),
    ),
    "scifact": (beir("0", "31715818"), BEIR_RECORD),
    "nfcorpus": (beir("PLAIN-7", "MED-1"), BEIR_RECORD),
    "miracl": (
        {("en-triplet", "train"): [{"anchor": "q", "positive": "p", "negative": "n"}]},
        PairRecord("q", ("p",)),
    ),
    "mrtydi": (
        {("en-triplet", "train"): [{"anchor": "q", "positive": "p", "negative": "n"}]},
        PairRecord("q", ("p",)),
    ),
    "sts12": (
        {("default", "train"): [{"sentence1": "a", "sentence2": "b", "score": 4.8}]},
        StsRecord("a", "b", 4.8),
    ),
    "sts22": (
        {("en", "train"): [{"id": "1_2", "score": 3.5, "sentence1": "a", "sentence2": "b"}]},
        StsRecord("a", "b", 3.5),
    ),
    "stsb": (
        {
            ("default", "train"): [
                {"sentence1": "a", "sentence2": "b", "score": 5.0, "year": "2012"}
            ]
        },
        StsRecord("a", "b", 5.0),
    ),
    "amazon_counterfactual": (
        {("en-ext", "train"): labelled(label=1, label_text="counterfactual")},
        LabelRecord("the text", "counterfactual"),
    ),
    "amazon_polarity": (
        {("default", "train"): labelled(label=1)},
        LabelRecord("the text", "positive"),
    ),
    "amazon_reviews": (
        {("en", "train"): labelled(label=4, label_text="4", id="en_1")},
        LabelRecord("the text", "5 stars"),
    ),
    "banking77": (
        {("default", "train"): labelled(label=11, label_text="card_arrival")},
        LabelRecord("the text", "card_arrival"),
    ),
    "emotion": (
        {("default", "train"): labelled(label=1, label_text="joy")},
        LabelRecord("the text", "joy"),
    ),
    "imdb": ({("default", "train"): labelled(label=0)}, LabelRecord("the text", "negative")),
    "mtop_domain": (
        {("en", "train"): labelled(label=3, label_text="alarm")},
        LabelRecord("the text", "alarm"),
    ),
    "mtop_intent": (
        {("en", "train"): labelled(label=3, label_text="GET_WEATHER")},
        LabelRecord("the text", "GET_WEATHER"),
    ),
    "massive_scenario": (
        {("en", "train"): labelled(id="1", label="alarm", label_text="alarm", lang="en")},
        LabelRecord("the text", "alarm"),
    ),
    "massive_intent": (
        {("en", "train"): labelled(id="1", label="alarm_set", label_text="alarm_set", lang="en")},
        LabelRecord("the text", "alarm_set"),
    ),
    "toxic_conversations": (
        {("default", "train"): labelled(label=1)},
        LabelRecord("the text", "toxic"),
    ),
    "tweet_sentiment": (
        {("default", "train"): labelled(label=1)},
        LabelRecord("the text", "neutral"),
    ),
    "arxiv_p2p": ({("default", "train"): [ARXIV]}, LabelRecord("On foo We", "math.CO")),
    "arxiv_s2s": ({("default", "train"): [ARXIV]}, LabelRecord("On foo", "math.CO")),
    "biorxiv_p2p": ({("default", "train"): [PREPRINT]}, LabelRecord("On foo We", "neuroscience")),
    "biorxiv_s2s": ({("default", "train"): [PREPRINT]}, LabelRecord("On foo", "neuroscience")),
    "medrxiv_p2p": ({("default", "train"): [PREPRINT]}, LabelRecord("On foo We", "neuroscience")),
    "medrxiv_s2s": ({("default", "train"): [PREPRINT]}, LabelRecord("On foo", "neuroscience")),
    "twentynewsgroups": (
        {("default", "train"): labelled(label=7, label_text="rec.autos")},
        LabelRecord("the text", "rec.autos"),
    ),
    "reddit": (
        {"reddit_title_text_2019.jsonl.gz": [REDDIT]},
        LabelRecord("Best shoes?", "running"),
    ),
    "reddit_p2p": (
        {"reddit_title_text_2019.jsonl.gz": [REDDIT]},
        LabelRecord("Best shoes? I run", "running"),
    ),
    "stackexchange_clustering": (
        {"valid.jsonl": [{"sentences": ["How to"], "labels": ["ux.stackexchange.com.txt"]}]},
        LabelRecord("How to", "ux.stackexchange.com"),
    ),
    "stackexchange_clustering_p2p": (
        {"*": [{"texts": ["How to", "I have"], "tags": ["unity", "2d"]}]},
        LabelRecord("How to I have", "unity"),
    ),
}


def write(path: Path, rows: Rows) -> None:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def stand_in(folder: Path, content: dict[Any, Rows], files: tuple[str, ...]) -> None:
    """Write a folder with the card and files of a set on the hub."""
    folder.mkdir(parents=True)
    card: list[str] = []
    for where, rows in content.items():
        if isinstance(where, str):
            for file in files if where == "*" else (where,):
                write(folder / file, rows)
            continue
        config, split = where
        write(folder / f"{config}-{split}.jsonl", rows)
        card += [
            f"- config_name: {config}",
            f"  data_files: [{{split: {split}, path: {config}-{split}.jsonl}}]",
        ]
    if card:
        (folder / "README.md").write_text("\n".join(["---", "configs:", *card, "---", ""]))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def test_every_entry_converts_its_source(tmp_path: Path) -> None:
    recipe = load_config(TrainConfig, RECIPE)
    assert {dataset.name for dataset in recipe.datasets} == set(SOURCES)
    for dataset in recipe.datasets:
        content, expected = SOURCES[dataset.name]
        assert dataset.hub is not None
        base = tmp_path / dataset.name
        files = dataset.hub.files or ()
        stand_in(base / dataset.hub.id, content, files)
        rows = list(open_dataset(dataset, base_dir=base).rows)
        assert len(rows) == (len(files) if "*" in content else 1), dataset.name
        assert isinstance(rows[0], Converted), (dataset.name, rows[0])
        assert rows[0].record == expected, dataset.name
