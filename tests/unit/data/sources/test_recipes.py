"""The recipes of the paper against its table of data sets, and by the rules of sources."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nvembed.core.config import load_config
from nvembed.data.config import DatasetConfig
from nvembed.training.config import TrainConfig

FOLDER = Path(__file__).resolve().parents[4] / "recipes"

# Table 12 of the paper: data set → samples (recalled, medium-high); see the notes of the recipes.
RETRIEVAL_V1 = {
    "msmarco": 500_000,
    "hotpotqa": 170_000,
    "nq": 100_000,
    "paq": 500_000,
    "stackexchange": 80_000,
    "nli": 270_000,
    "squad": 87_000,
    "arguana": 16_000,
    "bioasq": 2_400,
    "fiqa": 5_000,
    "fever": 140_000,
}
RETRIEVAL_V2 = RETRIEVAL_V1 | {
    "hover": 17_000,
    "scifact": 900,
    "nfcorpus": 3_600,
    "miracl": 2_000,
    "mrtydi": 2_000,
}
OTHERS_V1 = {
    "sts12": 1_800,
    "sts22": 300,
    "stsb": 2_700,
    "amazon_counterfactual": 6_000,
    "amazon_reviews": 40_000,
    "banking77": 10_000,
    "emotion": 16_000,
    "imdb": 24_000,
    "mtop_intent": 15_000,
    "toxic_conversations": 50_000,
    "tweet_sentiment": 27_000,
    "arxiv_p2p": 50_000,
    "arxiv_s2s": 50_000,
    "biorxiv_p2p": 15_000,
    "biorxiv_s2s": 15_000,
    "medrxiv_p2p": 2_300,
    "medrxiv_s2s": 2_300,
    "twentynewsgroups": 1_700,
}
OTHERS_V2 = OTHERS_V1 | {
    "amazon_polarity": 20_000,
    "mtop_domain": 15_000,
    "massive_intent": 11_000,
    "massive_scenario": 11_000,
    "reddit": 50_000,
    "reddit_p2p": 40_000,
    "stackexchange_clustering": 50_000,
    "stackexchange_clustering_p2p": 40_000,
}
# Converted by example in v2: five sets of classes (its Table 5) and all clusters.
BY_EXAMPLE = {"emotion", "massive_intent", "massive_scenario", "mtop_domain", "mtop_intent"}
BINARY = {"amazon_counterfactual", "amazon_polarity", "imdb", "toxic_conversations"}


def load(version: str) -> TrainConfig:
    return load_config(TrainConfig, FOLDER / f"{version}.yaml")


def by_name(config: TrainConfig) -> dict[str, DatasetConfig]:
    return {dataset.name: dataset for dataset in config.datasets}


@pytest.mark.parametrize(
    ("version", "retrieval", "others"),
    [("nv-embed-v1", RETRIEVAL_V1, OTHERS_V1), ("nv-embed-v2", RETRIEVAL_V2, OTHERS_V2)],
)
def test_sets_stages_and_sizes_are_those_of_the_paper(
    version: str, retrieval: dict[str, int], others: dict[str, int]
) -> None:
    found = by_name(load(version))
    assert set(found) == set(retrieval) | set(others)
    for name, samples in (retrieval | others).items():
        dataset = found[name]
        assert dataset.stages == ((1, 2) if name in retrieval else (2,)), name
        if dataset.kind == "sts":  # of which the rule of scores decides how many there are
            assert dataset.max_records is None
            continue
        size = dataset.max_records or dataset.weight
        assert size is not None, name
        assert abs(size - samples) <= 0.1 * samples, name


@pytest.mark.parametrize("version", ["nv-embed-v1", "nv-embed-v2"])
def test_every_set_says_where_it_is_what_it_is_and_how_certain(version: str) -> None:
    for dataset in load(version).datasets:
        assert dataset.hub is not None, dataset.name
        assert all((dataset.licence, dataset.note, dataset.instruction)), dataset.name
        # MTEB's copies that hold test rows as well are pinned; others are noted at the first build.
        if dataset.hub.id.startswith("mteb/") and not dataset.hub.id.startswith("mteb/raw_"):
            assert re.fullmatch("[0-9a-f]{40}", dataset.hub.revision or ""), dataset.name


def test_classes_are_converted_as_in_the_paper() -> None:
    first, second = by_name(load("nv-embed-v1")), by_name(load("nv-embed-v2"))
    for name, dataset in second.items():
        if dataset.kind == "classification":
            assert dataset.conversion == ("example" if name in BY_EXAMPLE else "label"), name
        if dataset.kind == "clustering":
            assert dataset.conversion == "example", name
    for name in BINARY:
        assert second[name].label_names is not None
        assert len(second[name].label_names or ()) == 2
    for dataset in first.values():
        if dataset.kind in ("classification", "clustering"):
            assert dataset.conversion == "label", dataset.name


def test_numbers_of_training_are_those_of_the_paper() -> None:
    config = load("nv-embed-v2")
    assert config.model.backbone == "mistralai/Mistral-7B-v0.1"
    assert config.model.max_tokens == 512
    assert config.lora is not None
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (16, 32, 0.1)
    assert config.optimizer.weight_decay == 0.03
    stages = [
        (stage.steps, stage.batch_size, stage.learning_rate, stage.in_batch_negatives)
        for stage in config.stages
    ]
    assert stages == [(20_000, 128, 2e-5, True), (18_000, 128, 1.5e-5, False)]
    assert [stage.num_negatives for stage in config.stages] == [7, 7]
    assert config.build is not None
    assert config.build.mine is not None
    mine = config.build.mine
    assert (mine.teacher, mine.strategy, mine.limit, mine.num_negatives) == (
        "intfloat/e5-mistral-7b-instruct",
        "percent_of_positive",
        0.95,
        7,
    )


def test_reddit_and_stackexchange_keep_away_from_the_evaluation_rows() -> None:
    found = by_name(load("nv-embed-v2"))
    for name in ("reddit", "reddit_p2p"):
        hub = found[name].hub
        assert hub is not None
        assert not any("2021" in file for file in hub.files or ())
    sites = found["stackexchange_clustering_p2p"].hub
    assert sites is not None
    names = {file.split(".")[0] for file in sites.files or ()}
    evaluated = {"gamedev", "android", "english", "gaming", "gis", "mathematica", "physics"}
    evaluated |= {"programmers", "softwareengineering", "stats", "tex", "unix", "webmasters"}
    assert len(names) > 10
    assert not names & (evaluated | {"wordpress"})


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_begin_with_command_hardware_time_and_expectation(path: Path) -> None:
    beginning = "\n".join(path.read_text(encoding="utf-8").split("\n")[:7])
    assert beginning.startswith(f"# nvembed train recipes/{path.name}\n")
    for word in ("# Hardware: ", "# Expectation: "):
        assert word in beginning
    assert re.search(r"\bTime: |minutes", beginning)
