"""Many texts through an encoder, window by window: checked, counted, in order.

In: texts; out: their vectors. Used by files, search and mining, so that no model can hand any of
them vectors of the wrong shape or with NaN in them. Next file: ``encoding/files.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from nvembed.core.background import ahead
from nvembed.core.errors import ConfigError, ModelError
from nvembed.core.reporting import Rates, progress
from nvembed.encoding.protocol import Encoder, unit_rows
from nvembed.model.settings import LongTexts
from nvembed.model.work import Work

Side = Literal["query", "document"]

# Texts per call of the encoder: enough for it to sort by length, few enough to show progress.
WINDOW_TEXTS = 1024


@dataclass(frozen=True, slots=True)
class Way:
    """How texts are embedded.

    Attributes:
        side: which of the encoder's two methods is called.
        task: the instruction; ``None`` is none.
        truncate_dim: keep the first dimensions, at length 1; ``None`` keeps all.
        long: what becomes of texts beyond the model's limit.
    """

    side: Side
    task: str | None = None
    truncate_dim: int | None = None
    long: LongTexts = field(default_factory=LongTexts)

    @property
    def key(self) -> tuple[object, ...]:
        """All that vectors depend on, besides model and text."""
        return (self.side, self.task, self.truncate_dim, *astuple(self.long))

    def width(self, encoder: Encoder) -> int:
        """Numbers in a vector.

        Raises:
            ConfigError: the model has fewer than are wanted.
        """
        width = encoder.dimension
        wanted = width if self.truncate_dim is None else self.truncate_dim
        if not 1 <= wanted <= width:
            raise ConfigError(
                f"{wanted} dimensions asked for",
                where="truncate_dim",
                expected=f"1 to {width}, the width of the model",
            )
        return wanted


@runtime_checkable
class PreparingEncoder(Protocol):
    """An encoder that can do a part of its work before the model is free: ``NVEmbed``."""

    def prepare(
        self,
        texts: Sequence[str],
        *,
        side: Side,
        task: str | None = None,
        truncate_dim: int | None = None,
        long: LongTexts = ...,
    ) -> Work:
        """Tokenise, as if for ``encode_query`` or ``encode_document``."""
        ...


def prepare_window(encoder: Encoder, texts: Sequence[str], way: Way) -> Work:
    """Do what can be done before the model is free.

    Raises:
        ConfigError: the encoder has not so many dimensions, or does not know windows or chunks.
    """
    width = way.width(encoder)
    if isinstance(encoder, PreparingEncoder):
        return encoder.prepare(
            texts, side=way.side, task=way.task, truncate_dim=way.truncate_dim, long=way.long
        )
    if way.long.way != "cut":
        raise ConfigError(
            f"this model cannot read long texts by {way.long.way!r}",
            where="long",
            hint="NVEmbed models and bare language models can; others cut",
        )

    def launch() -> Callable[[], NDArray[np.float32]]:
        vectors = encode_window(encoder, texts, side=way.side, task=way.task)
        if width != vectors.shape[1]:
            vectors = unit_rows(vectors[:, :width])
        return lambda: vectors

    return Work(launch)


def encode_texts(
    encoder: Encoder,
    texts: Sequence[str],
    *,
    side: Side,
    task: str | None = None,
    description: str = "encode",
) -> NDArray[np.float32]:
    """Embed all texts, with a progress bar.

    Args:
        encoder: the model.
        texts: any number, none included.
        side: which of the encoder's two methods is called.
        task: the instruction; ``None`` is no instruction.
        description: what the progress bar says.

    Returns:
        ``(len(texts), encoder.dimension)`` float32 in the order of the texts.

    Raises:
        ModelError: the encoder gave another shape, or values that are not finite.
    """
    way = Way(side, task)
    starts = range(0, len(texts), WINDOW_TEXTS)
    windows = (texts[start : start + WINDOW_TEXTS] for start in starts)
    works = ((window, prepare_window(encoder, window, way)) for window in windows)
    vectors = np.empty((len(texts), encoder.dimension), dtype=np.float32)
    rates, done = Rates(), 0
    with progress(len(texts), description) as bar:
        for window, work in ahead(works) if len(starts) > 1 else works:
            found = work.launch()()
            check_vectors(found, (len(window), encoder.dimension), window)
            vectors[done : done + len(window)] = found
            done += len(window)
            bar.advance(len(window), **rates.add(texts=len(window)))
    return vectors


def encode_window(
    encoder: Encoder, texts: Sequence[str], *, side: Side, task: str | None = None
) -> NDArray[np.float32]:
    """Embed a few texts in one call of the encoder and check what comes back.

    Raises:
        ModelError: the encoder gave another shape, or values that are not finite.
    """
    encode = encoder.encode_query if side == "query" else encoder.encode_document
    vectors = np.asarray(encode(texts, task=task), dtype=np.float32)
    check_vectors(vectors, (len(texts), encoder.dimension), texts)
    return vectors


def check_vectors(
    vectors: NDArray[np.float32], expected: tuple[int, int], texts: Sequence[str]
) -> None:
    """Refuse vectors that nobody could use.

    Args:
        vectors: of some texts.
        expected: their shape.
        texts: to name one of them, where each has one vector.

    Raises:
        ModelError: the shape is another, or values are not finite.
    """
    if vectors.shape != expected:
        raise ModelError(f"the model gave vectors of shape {vectors.shape}", expected=str(expected))
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        text = texts[min(int(bad[0]), len(texts) - 1)]
        raise ModelError(
            f"the model gave NaN or infinity for {len(bad)} of {len(vectors)} texts, "
            f"the first is {text[:60]!r}",
            hint="Load it in float32; if that does not help, the weights are damaged",
        )
