"""Mixtures: which query comes when, as a pure function of the seed.

Every stretch of the order holds the sources in their proportions (NV-Embed trains on well-blended
batches; paper s4; homogeneous ones are an option). The place in the order is the whole state of the
data, so a run can stop and go on anywhere. Next file: ``data/batch.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import DataError
from nvembed.core.runs import derive_seed
from nvembed.data.config import DatasetConfig
from nvembed.data.examples import Example, ExampleSource, make_source
from nvembed.data.loading import load_records
from nvembed.data.records import records_digest

# The additive sequence of the golden ratio covers [0, 1) more evenly than any other of its sort.
GOLDEN_RATIO = (5**0.5 - 1) / 2


def load_source(
    config: DatasetConfig, *, base_dir: Path, records: Sequence[Any] | None = None
) -> ExampleSource:
    """Read the records of a data set, unless they are given, and make its source."""
    return make_source(
        load_records(config, base_dir=base_dir) if records is None else records,
        config.kind,
        name=config.name,
        instruction=config.instruction,
        conversion=config.conversion,
        max_records=config.max_records,
    )


def load_mixture(
    datasets: Sequence[DatasetConfig], *, stage: int, base_dir: Path, temperature: float = 1.0
) -> Mixture:
    """Load the sets that a stage uses, from 1; a DataError names every file that cannot be used.

    ``temperature`` evens out the sets without a weight of their own; see ``tempered_weights``.
    """
    chosen = [config for config in datasets if stage in config.stages]
    sources: list[ExampleSource] = []
    digests: dict[str, str] = {}
    errors: list[DataError] = []
    for config in chosen:
        try:
            records = load_records(config, base_dir=base_dir)
            sources.append(load_source(config, base_dir=base_dir, records=records))
            digests[config.name] = records_digest(records)
        except DataError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise DataError(f"{len(errors)} data sets cannot be used: {' | '.join(map(str, errors))}")
    sizes, given = [len(source) for source in sources], [config.weight for config in chosen]
    return Mixture(sources, tempered_weights(sizes, given, temperature), digests)


def tempered_weights(
    sizes: Sequence[int], weights: Sequence[float | None], temperature: float
) -> list[float]:
    """Weights of sets by their sizes; given ones (not None) are left as they are.

    Sets without a weight share the sum of their sizes in proportion to ``size ** (1 / T)``. At 1
    these are the sizes themselves; a higher temperature moves queries from large sets to small
    ones, and neither to nor from the sets whose weight is given.
    """
    assert temperature >= 1
    by_size = [size for size, weight in zip(sizes, weights, strict=True) if weight is None]
    scale = sum(by_size) / sum(size ** (1 / temperature) for size in by_size) if by_size else 1.0
    return [
        weight if weight is not None else scale * size ** (1 / temperature)
        for size, weight in zip(sizes, weights, strict=True)
    ]


@dataclass(frozen=True)
class Mixture:
    """Sources, each with a name of its own, and their relative weights.

    ``digests`` holds, by name, ``records_digest`` of all records of a set that was read from files.
    """

    sources: Sequence[ExampleSource]
    weights: Sequence[float]
    digests: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.sources) == len(self.weights) > 0
        assert len({source.name for source in self.sources}) == len(self.sources)
        assert all(weight > 0 for weight in self.weights)

    def order(self, seed: int, num_examples: int, *, run_length: int = 1) -> NDArray[np.int64]:
        """Plan (source, query) of every slot; the order of fewer slots begins that of more.

        The source of slot t is where ``offset + t * golden ratio`` (mod 1) falls among the shares
        of the sources laid end to end: after any n slots each is within a few of n times its share.
        Each is walked in freshly shuffled epochs. With a ``run_length``, each run of so many slots
        takes its queries from one source.
        """
        shares = np.cumsum(np.asarray(self.weights, dtype=np.float64))
        offset = np.random.default_rng(derive_seed(seed, "blend")).random()
        points = (offset + np.arange(num_examples) // run_length * GOLDEN_RATIO) % 1.0
        order = np.empty((num_examples, 2), dtype=np.int64)
        # Dividing before the comparison would let a point of 0.999… fall behind the last share.
        order[:, 0] = np.searchsorted(shares[:-1], points * shares[-1], side="right")
        for number, source in enumerate(self.sources):
            slots = np.flatnonzero(order[:, 0] == number)
            rng = np.random.default_rng(derive_seed(seed, "walk", source.name))
            # Whole shuffled epochs, the last one cut.
            num_epochs = -(-len(slots) // len(source))
            epochs = np.tile(np.arange(len(source), dtype=np.int64), (num_epochs, 1))
            order[slots, 1] = rng.permuted(epochs, axis=1).reshape(-1)[: len(slots)]
        return order

    def examples(
        self,
        order: NDArray[np.int64],
        start: int,
        stop: int,
        *,
        seed: int,
        num_negatives: int,
        num_positives: int = 1,
    ) -> list[Example]:
        """Make the examples of some slots; each draws by the seed and the slot alone."""
        found = []
        for slot, (source, index) in enumerate(order[start:stop].tolist(), start):
            rng = np.random.default_rng(derive_seed(seed, "draw", slot))
            found.append(self.sources[source].example(index, rng, num_negatives, num_positives))
        return found
