"""Many texts through an encoder, window by window: checked, counted, in order.

In: texts; out: their vectors. Used by files, search and mining, so that no model can hand any of
them vectors of the wrong shape or with NaN in them. Next file: ``inference/files.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import ModelError
from nvembed.core.progress import progress
from nvembed.inference.protocol import Encoder

Side = Literal["query", "document"]

# Texts per call of the encoder: enough for it to sort by length, few enough to show progress.
WINDOW_TEXTS = 1024


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
    vectors = np.empty((len(texts), encoder.dimension), dtype=np.float32)
    with progress(len(texts), description) as bar:
        for start in range(0, len(texts), WINDOW_TEXTS):
            window = texts[start : start + WINDOW_TEXTS]
            vectors[start : start + len(window)] = encode_window(
                encoder, window, side=side, task=task
            )
            bar.advance(len(window))
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
    expected = (len(texts), encoder.dimension)
    if vectors.shape != expected:
        raise ModelError(f"the model gave vectors of shape {vectors.shape}", expected=str(expected))
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        text = texts[int(bad[0])]
        raise ModelError(
            f"the model gave NaN or infinity for {len(bad)} of {len(texts)} texts, "
            f"the first is {text[:60]!r}",
            hint="Load it in float32; if that does not help, the weights are damaged",
        )
    return vectors
