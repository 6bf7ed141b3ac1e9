"""The data sets of a recipe, how rows become records, and how sets are built and mined."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from nvembed.core.arguments import PrecisionChoice
from nvembed.core.config import StrictModel
from nvembed.core.errors import ConfigError
from nvembed.data.records import LABEL_KINDS, PAIR_KINDS, REQUIRED, Conversion, Kind, known_task

Layout = Literal[
    "records",
    "tuples",
    "lists",
    "passages",
    "beir",
    "references",
    "scored",
    "entailment",
    "clusters",
]
# A column, a place inside one (``answers.text.0``), or several that are joined by a space.
Column = str | tuple[str, ...]


class _Form(NamedTuple):
    """The columns that a layout cannot do without, its kinds, and its further tables."""

    needed: tuple[str, ...]
    kinds: tuple[str, ...] = PAIR_KINDS
    tables: tuple[str, ...] = ()


# How rows are converted is in ``data/sources/layouts.py``.
FORMS: dict[Layout, _Form] = {
    "records": _Form((), (*PAIR_KINDS, "sts", *LABEL_KINDS, "text")),
    "tuples": _Form(("positive",)),
    "lists": _Form(("query", "pos")),
    "passages": _Form(("query", "positive_passages")),
    "clusters": _Form(("sentences", "labels"), LABEL_KINDS),
    "beir": _Form(("query-id", "corpus-id"), tables=("queries", "corpus")),
    "references": _Form(("query", "ids"), tables=("corpus",)),
    "scored": _Form(("query_id", "document_ids", "scores"), tables=("queries", "corpus")),
    "entailment": _Form(("premise", "hypothesis", "label")),
}


class HubLocation(StrictModel):
    """Rows on the Hugging Face hub, or in a local folder laid out like a data set of the hub.

    Args:
        id: ``organisation/name``, or a folder; a relative one starts at the folder of the recipe.
        config: name of the configuration; None for the only one.
        split: name of the split.
        revision: commit, branch or tag; None takes what is current, and says which that was.
        files: data files in the repository that are read as they are, without the configuration and
            split of its card (for sets that come with a script, and for single files of large
            ones); JSONL, JSON, CSV, TSV (each also ``.gz``) or Parquet.
        streaming: read over the network row by row instead of downloading everything first.
        take: use so many rows, drawn at random (of a stream through a buffer of
            ``shuffle_buffer`` rows); None uses all, in their order.
        shuffle_buffer: rows held in memory for that.
    """

    id: str = Field(min_length=1)
    config: str | None = None
    split: str = Field(default="train", min_length=1)
    revision: str | None = None
    files: tuple[str, ...] | None = Field(default=None, min_length=1)
    streaming: bool = False
    take: int | None = Field(default=None, ge=1)
    shuffle_buffer: int = Field(default=100_000, ge=1)

    @model_validator(mode="after")
    def _files_have_no_config(self) -> Self:
        if self.files is not None and self.config is not None:
            raise ValueError("files are read as they are, so config has no meaning beside them")
        return self


class TableConfig(StrictModel):
    """One table of rows: a file, or a set on the hub. Its keys are those of ``DatasetConfig``."""

    path: str | None = Field(default=None, min_length=1)
    hub: HubLocation | None = None
    columns: dict[str, Column] = Field(default_factory=dict)
    header: tuple[str, ...] | None = Field(default=None, min_length=1)
    quotes: bool | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        _check_one_place(self.path, self.hub)
        return self


OF_RECORDS = (
    *("name", "kind", "instruction", "weight", "max_records", "stages", "conversion"),
    *("licence", "note"),
)
"""What is said of a set's records, wherever they come from."""


class DatasetConfig(StrictModel):
    """One training set of a recipe.

    Args:
        name: unique name in the recipe; part of the seeds, so renaming reshuffles the set.
        path: JSONL, JSON, CSV, TSV (each also ``.gz``) or Parquet file, or the folder of a set in
            BEIR's layout; relative paths start at the folder of the recipe.
        hub: instead of ``path``: a set on the hub, which ``nvembed data build`` fetches.
        kind: what the records are (``data/records.py``).
        instruction: task in plain words, put before the queries, or the name of an MTEB task for
            its instruction; None for none.
        layout: how rows become records (``data/sources/layouts.py``).
        columns: columns of the source by the names that the layout knows, where they are called
            differently: ``{query: question, positive: answer}``. ``answers.text.0`` is a place
            inside a column (of a list the item, of a text the word), ``[title, text]`` joins two.
        header: names of the columns of a CSV or TSV file whose first line is a row already.
        quotes: whether quotes enclose fields of such a file; None is yes for CSV, no for TSV.
        where: use only rows with one of these values, written as texts, in these columns:
            ``{lang: [en]}``.
        corpus: the table of documents, of layouts that look documents up by their id.
        queries: the table of queries, of such layouts.
        split: which judgements of a BEIR folder are used: ``qrels/<split>.tsv``.
        one_record_per: for ``beir``: a record per ``query`` with all positives, or one per
            ``positive``.
        max_positives: use so many positives of a record at most, those that are judged best.
        max_negatives: use so many negatives of a record at most, the first ones.
        percent_of_positive: for ``scored``: negatives are documents below this share
            of what the positive does.
        judged_negatives: for ``beir``: documents judged 0 are negatives of the query.
        max_score: top of the scale of ``sts`` scores, which become 0 to 5; a score above it is
            refused. None is 5, unchanged.
        label_names: names of integer labels, from 0.
        max_characters: longest text; a row with a longer one is bad.
        weight: share of the mixture relative to the other sets; None takes the number of queries,
            so that all sets finish their epochs together (see ``tempered_weights`` for more even
            shares).
        max_records: use at most this many queries of the set. The other records still say what
            answers a query.
        stages: numbers of the training stages that use the set, from 1.
        conversion: ``example`` or ``label``, for classification and clustering.
        licence: under which the set is published; goes into the manifest of a built set.
        note: what a reader should know, such as how certain a number is.
    """

    name: str = Field(min_length=1)
    path: str | None = Field(default=None, min_length=1)
    hub: HubLocation | None = None
    kind: Kind
    instruction: Annotated[str | None, AfterValidator(known_task)]
    layout: Layout = "records"
    columns: dict[str, Column] = Field(default_factory=dict)
    header: tuple[str, ...] | None = Field(default=None, min_length=1)
    quotes: bool | None = None
    where: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    corpus: TableConfig | None = None
    queries: TableConfig | None = None
    split: str = Field(default="train", min_length=1)
    one_record_per: Literal["query", "positive"] = "query"
    max_positives: int | None = Field(default=None, ge=1)
    max_negatives: int | None = Field(default=None, ge=0)
    percent_of_positive: float = Field(default=0.95, gt=0, le=1)
    judged_negatives: bool = False
    max_score: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    label_names: tuple[str, ...] | None = Field(default=None, min_length=1)
    max_characters: int = Field(default=1_000_000, ge=1)
    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_records: int | None = Field(default=None, ge=1)
    stages: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 2), min_length=1)
    conversion: Conversion = "example"
    licence: str | None = None
    note: str | None = None

    @property
    def table(self) -> TableConfig:
        """The rows of the set itself, beside those that ``corpus`` and ``queries`` name."""
        return TableConfig(**{name: getattr(self, name) for name in TableConfig.model_fields})

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """What the layout calls the columns that it cannot do without."""
        return FORMS[self.layout].needed or REQUIRED[self.kind]

    def with_file(self, path: Path) -> DatasetConfig:
        """The set with a file of plain records in place of its source."""
        return DatasetConfig(path=str(path), **{name: getattr(self, name) for name in OF_RECORDS})

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        _check_one_place(self.path, self.hub)
        if self.conversion == "label" and self.kind not in LABEL_KINDS:
            raise ValueError(
                f"conversion is label, but records of kind {self.kind} have no labels; "
                "expected kind classification or clustering, or no conversion"
            )
        layout, (_, kinds, tables) = self.layout, FORMS[self.layout]
        if self.kind not in kinds:
            raise ValueError(
                f"layout {layout} gives records of kind {' or '.join(kinds)}, not {self.kind}"
            )
        for name in ("corpus", "queries"):
            if getattr(self, name) is not None and name not in tables:
                raise ValueError(f"layout {layout} has no use for {name}")
        if layout == "references" and self.corpus is None:
            raise ValueError("layout references needs corpus, the table of the documents")
        if layout == "scored" and self.hub is None and not (self.corpus and self.queries):
            raise ValueError("layout scored needs corpus and queries, the tables of texts")
        return self


def file_dataset(
    path: Path,
    kind: Kind,
    *,
    layout: str = "records",
    columns: Mapping[str, Column] | None = None,
    conversion: Conversion = "example",
) -> DatasetConfig:
    """The entry that a file of the command line would have in a recipe; or a ConfigError."""
    values = {
        "name": path.name or str(path),
        "path": str(path),
        "kind": kind,
        "instruction": None,
        "layout": layout,
        "columns": dict(columns or {}),
        "conversion": conversion,
    }
    try:
        return DatasetConfig.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = "--" + str(problem["loc"][0]) if problem["loc"] else None
        raise ConfigError(str(problem["msg"]).removeprefix("Value error, "), where=where) from error


def _check_one_place(path: str | None, hub: HubLocation | None) -> None:
    if (path is None) == (hub is None):
        given = "both path and hub are" if path is not None else "neither path nor hub is"
        raise ValueError(f"{given} given, expected exactly one of them")


Strategy = Literal["percent_of_positive", "margin", "absolute", "top_k"]

# NV-Retriever's best setting of each rule (arXiv 2407.15831).
DEFAULT_THRESHOLDS: dict[Strategy, float] = {
    "percent_of_positive": 0.95,
    "margin": 0.05,
    "absolute": 0.7,
}


class MiningConfig(StrictModel):
    """How negatives are chosen among the documents nearest to a query.

    Args:
        strategy: rule by which a near document may be a negative. ``percent_of_positive``: its
            score is below ``threshold`` times the positive's; ``margin``: below the positive's
            minus ``threshold``; ``absolute``: below ``threshold``; ``top_k``: no rule.
        threshold: limit of the strategy; ``None`` is 0.95, 0.05 or 0.7 in that order.
        num_negatives: negatives wanted per record, given ones that are kept included (paper: 7).
        search_depth: how many of the nearest documents are looked at. A query whose positive is
            found further down than this may get no negatives under the first two rules. Deep costs
            little: with hashed bags of words as a (weak) teacher, 31 % of the queries of SQuAD got
            none at a depth of 100, 10 % at 500, in the same time.
        skip_top: how many of the nearest documents that are no known positive are passed over.
        sample: ``top`` takes the nearest of those left, ``random`` draws from them.
        sample_from: ``random`` draws from this many of the nearest left (NV-Retriever: 4 from the
            top 10 is best); ``None`` draws from all.
        seed: decides the draw, which depends on this and on the place of a record alone.
        near_duplicate: a candidate that shares at least this part of its words (intersection over
            union) with a known positive or the query is refused; ``None`` refuses equal texts only.
        given: whether a record's own negatives stay, in front of the mined ones, or make way for
            them.
        write_scores: give pair records (retrieval, NLI) the teacher's cosines of their positives
            and negatives, for distillation; False also takes scores away that a record had, since
            they belong to its old negatives.
        rerank: folder or hub id of a cross-encoder whose scores replace the teacher's, of positives
            and candidates, for the rule, the order and ``write_scores``; ``None`` uses none. The
            positive rules want scores above 0, as those of models that end in a sigmoid.
        rerank_depth: how many of the nearest it scores; the others are no candidates then.
    """

    strategy: Strategy = "percent_of_positive"
    threshold: float | None = None
    num_negatives: Annotated[int, Field(ge=1)] = 7
    search_depth: Annotated[int, Field(ge=1)] = 1000
    skip_top: Annotated[int, Field(ge=0)] = 0
    sample: Literal["top", "random"] = "top"
    sample_from: Annotated[int, Field(ge=1)] | None = None
    seed: int = 0
    near_duplicate: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.9
    given: Literal["keep", "replace"] = "keep"
    write_scores: bool = False
    rerank: str | None = None
    rerank_depth: Annotated[int, Field(ge=1)] = 50

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        limit, threshold = self.limit, f"threshold is {self.limit:g}"
        if self.strategy == "top_k" and self.threshold is not None:
            raise ValueError("threshold has no meaning for strategy top_k; leave it out")
        if self.strategy == "percent_of_positive" and not 0.0 < limit <= 1.0:
            raise ValueError(f"{threshold}, percent_of_positive takes (0, 1]")
        if self.strategy == "margin" and not 0.0 <= limit <= 2.0:
            raise ValueError(f"{threshold}, margin takes 0 to 2")
        if self.strategy == "absolute" and not -1.0 <= limit <= 1.0 and self.rerank is None:
            raise ValueError(f"{threshold}, absolute takes a cosine, -1 to 1")
        if self.sample_from is not None and self.sample == "top":
            raise ValueError("sample_from has no meaning for sample top; leave it out")
        if self.sample_from is not None and self.sample_from < self.num_negatives:
            raise ValueError(
                f"sample_from is {self.sample_from}, below num_negatives ({self.num_negatives})"
            )
        return self

    @property
    def limit(self) -> float:
        """The threshold in force; 0 for ``top_k``, which has none."""
        if self.threshold is not None:
            return self.threshold
        return DEFAULT_THRESHOLDS.get(self.strategy, 0.0)


class BuildMining(MiningConfig):
    """Hard negatives for the retrieval, NLI and STS sets; the other keys are those of mining.

    Args:
        teacher: what scores the candidates: folder (relative to the recipe) or hub id of a model,
            address of an OpenAI-compatible endpoint, or ``bm25``.
        teacher_model: name of the model at an endpoint.
        dtype: type of the teacher's weights, see ``model/encoder.py``.
        datasets: names of the sets to mine; None is all of these kinds.
    """

    teacher: str = Field(min_length=1)
    teacher_model: str | None = None
    dtype: PrecisionChoice = "auto"
    datasets: tuple[str, ...] | None = Field(default=None, min_length=1)


class BuildConfig(StrictModel):
    """How the data sets of a recipe are made into training files.

    Args:
        folder: where they go, one folder per set; relative to the recipe.
        max_refused: share of the rows of a set that may be bad; above it the set is refused.
        tasks: folders of local evaluation tasks, or of several, whose texts must not be trained on;
            relative to the recipe.
        near: Jaccard similarity of pairs of words from which a training text counts as one of an
            evaluation task; None compares equal texts only.
        bm25: name of a set → BM25 similarity in (0, 1] (the lower share of two texts in each
            other, ``building/contamination.py``) from which a text of the set counts as that of a
            task (the paper did this for Emotion and AmazonCounterfactual).
        mine: hard negatives; None leaves the sets with the negatives that they have.
        rows_per_shard: records in a Parquet file.
    """

    folder: str = Field(min_length=1)
    max_refused: float = Field(default=0.01, ge=0, le=1)
    tasks: tuple[str, ...] = ()
    near: float | None = Field(default=0.6, gt=0, le=1)
    bm25: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(default={})
    mine: BuildMining | None = None
    rows_per_shard: int = Field(default=100_000, ge=1)
