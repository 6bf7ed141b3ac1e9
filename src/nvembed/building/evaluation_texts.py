"""Which texts of an evaluation task must not be trained on.

In: loaded tasks; out: their ``EvaluationText`` objects, of test parts alone.

    Retrieval, Reranking    the queries; documents are shared by design and never listed
    Classification          the texts of the test part
    Clustering              the texts
    STS, PairClassification the pairs, on request each sentence as well
    Summarization           the articles and all their summaries
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nvembed.building.contamination import EvaluationText
from nvembed.evaluation.task_files import (
    ClassificationData,
    LabelledTexts,
    PairData,
    RerankingData,
    RetrievalData,
)
from nvembed.evaluation.tasks import LocalTask


def evaluation_texts(
    tasks: Sequence[LocalTask], *, sentences: bool = False
) -> Iterator[EvaluationText]:
    """List what the tasks evaluate, in the order of the tasks and their files.

    Args:
        tasks: as ``evaluation.tasks.load_tasks`` gives them.
        sentences: list the sentences of pairs singly as well, as for STS22, whose texts are rare;
            those of other STS sets are captions and headlines that many sets share.
    """
    for task in tasks:
        data = task.data
        if isinstance(data, RetrievalData | RerankingData):
            parts = [("query", data.queries)]
        elif isinstance(data, ClassificationData):
            parts = [("text", data.test.texts)]
        elif isinstance(data, LabelledTexts):
            parts = [("text", data.texts)]
        elif isinstance(data, PairData):
            for first, second in zip(data.first, data.second, strict=True):
                yield EvaluationText((first, second), task.name, "pair")
            both = [t for pair in zip(data.first, data.second, strict=True) for t in pair]
            parts = [("sentence", tuple(both))] if sentences else []
        else:
            summaries = [
                text
                for human, machine in zip(data.human, data.machine, strict=True)
                for text in (*human, *machine)
            ]
            parts = [("article", data.articles), ("summary", tuple(summaries))]
        for part, texts in parts:
            for text in texts:
                yield EvaluationText((text,), task.name, part)
