"""The model as the server sees it: texts become items with a token count, items become vectors.

``prepare`` is called one at a time, from any thread; ``embed`` from ``forwards`` threads at once.
Next file: ``serving/model_engines.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from nvembed.text.instructions import Side

Cut = Literal["end", "start", "none"]
"""What is cut of a text that is too long for the model; ``none`` keeps it all."""


@dataclass(frozen=True, slots=True)
class Wish:
    """How texts are to be read.

    Attributes:
        side: which of the encoder's two methods they are for.
        task: see ``Encoder``; ``None`` is the model's own prompt of that side.
        prompt: what stands in front of the texts, in place of that.
        cut: what becomes of long texts.
        normalize: vectors have length 1; False leaves them as the pooling gives them.
    """

    side: Side = "document"
    task: str | None = None
    prompt: str | None = None
    cut: Cut = "end"
    normalize: bool = True


@dataclass(frozen=True, slots=True)
class Item:
    """One text, ready for the model.

    Attributes:
        content: what ``embed`` of the same engine reads.
        tokens: its length, at least 1; above ``max_tokens`` where nothing was to be cut.
        normalize: see ``Wish``.
    """

    content: Any
    tokens: int
    normalize: bool = True


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a text.

    Attributes:
        id: its number in the vocabulary.
        text: the characters, or the name of a special token.
        special: put in by the tokenizer, as BOS and EOS are.
        start: first character, counted from the beginning of the prompt; ``None`` of a special one.
        stop: last-plus-one character.
    """

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class Engine(Protocol):
    """What the server needs of a model."""

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        ...

    @property
    def max_tokens(self) -> int:
        """Longest sequence, with prompt and special tokens."""
        ...

    @property
    def prompts(self) -> Mapping[str, str | None]:
        """The model's own prompts by name."""
        ...

    @property
    def dtype(self) -> str:
        """Type of the weights, such as ``float32``."""
        ...

    @property
    def pooling(self) -> str:
        """Kind of the pooling, such as ``mean``."""
        ...

    @property
    def takes_ids(self) -> bool:
        """Whether token ids can be embedded."""
        ...

    @property
    def supports_tokens(self) -> bool:
        """Whether its tokenizer is known: ``tokens`` works, and ``cut`` may be anything."""
        ...

    @property
    def supports_raw(self) -> bool:
        """Whether ``normalize`` may be False."""
        ...

    @property
    def batch_tokens(self) -> int:
        """Tokens of a forward that the device is fastest with."""
        ...

    @property
    def forwards(self) -> int:
        """How many threads may call ``embed`` at once."""
        ...

    def prepare(self, texts: Sequence[str], wish: Wish) -> list[Item]:
        """Tokenise texts.

        Raises:
            UserError: the instruction leaves no room for a text.
        """
        ...

    def prepare_ids(self, rows: Sequence[Sequence[int]], wish: Wish) -> list[Item]:
        """Take ids of the model's tokenizer, without special tokens; no prompt is put before them.

        Raises:
            UserError: an id that the vocabulary does not have.
        """
        ...

    def tokens(self, texts: Sequence[str], prompt: str, *, special: bool) -> list[list[Token]]:
        """Return all tokens of texts behind a prompt, with BOS and EOS where ``special`` says so.

        Raises:
            UserError: its tokenizer is not known.
        """
        ...

    def embed(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Embed in one forward: ``(len(items), dimension)``, rows of length 1 where wanted."""
        ...
