"""The feed of a stage: batch after batch with its tokens, on a device prepared one step ahead.

A batch is a pure function of (seed, stage, step); the thread that prepares the next one while the
model works on this one changes nothing but the time.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from nvembed.core.seeding import derive_seed
from nvembed.data.batch import ContrastiveBatch, build_batch
from nvembed.data.mixture import Mixture
from nvembed.text.token_cache import TokenCache
from nvembed.text.tokens import TokenizedText
from nvembed.training.config import StageConfig

# New tokens wait in memory until they are written; this bounds how many, and what a kill costs.
FLUSH_STEPS = 200

Fed = tuple[ContrastiveBatch, Sequence[TokenizedText]]


class Feed:
    """Batches of a stage.

    Args:
        mixture: the data of the stage.
        stage: batch size and what a batch holds.
        seed: of the run.
        tokens: from text to ids, computed once.
    """

    def __init__(
        self, mixture: Mixture, stage: StageConfig, *, seed: int, tokens: TokenCache
    ) -> None:
        self.mixture = mixture
        self.stage = stage
        self.tokens = tokens
        self._seed = derive_seed(seed, "data", stage.name)
        self._order = mixture.order(
            self._seed,
            stage.steps * stage.batch_size,
            run_length=stage.batch_size if stage.batches == "homogeneous" else 1,
        )

    def queries_used(self) -> list[int]:
        """How many slots of the stage each source fills, in the order of the mixture."""
        counts = np.bincount(self._order[:, 0], minlength=len(self.mixture.sources))
        return [int(count) for count in counts]

    def batch(self, step: int) -> ContrastiveBatch:
        """The batch of a step of the stage, counted from 0."""
        first = step * self.stage.batch_size
        examples = self.mixture.examples(
            self._order,
            first,
            first + self.stage.batch_size,
            seed=self._seed,
            num_negatives=self.stage.num_negatives,
            num_positives=self.stage.num_positives,
        )
        return build_batch(examples, in_batch_negatives=self.stage.in_batch_negatives)

    def step(self, step: int) -> Fed:
        """The batch of a step and the tokens of its texts."""
        batch = self.batch(step)
        return batch, self.tokens(batch.texts)

    @contextmanager
    def steps(self, start: int, *, ahead: bool) -> Iterator[Iterator[Fed]]:
        """Give an iterator over the steps from ``start`` to the last.

        New tokens are kept for the next run when the block ends, however it ends.

        Args:
            start: first step.
            ahead: prepare a step while the one before it is computed. On a CPU that takes cores
                away from threads which wait for each other.
        """
        fed = self._ahead(start) if ahead else self._one_by_one(start)
        try:
            yield fed
        finally:
            fed.close()  # where the block ends early, a step may still be in preparation
            self.tokens.flush()

    def _one_by_one(self, start: int) -> Generator[Fed]:
        for step in range(start, self.stage.steps):
            yield self._prepared(step)

    def _ahead(self, start: int) -> Generator[Fed]:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed") as pool:
            coming: Future[Fed] | None = None
            for step in range(start, self.stage.steps):
                coming = coming or pool.submit(self._prepared, step)
                ready = coming.result()
                more = step + 1 < self.stage.steps
                coming = pool.submit(self._prepared, step + 1) if more else None
                yield ready

    def _prepared(self, step: int) -> Fed:
        fed = self.step(step)
        if (step + 1) % FLUSH_STEPS == 0:
            self.tokens.flush()
        return fed
