"""What a recipe says about the model, and work for it; free of torch, so that it loads quickly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from nvembed.core.arguments import FloatPrecision, check_arguments
from nvembed.core.config import StrictModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

AttentionDirection = Literal["bidirectional", "causal"]
PoolingKind = Literal["mean", "last", "latent", "self_attention"]
LongTextWay = Literal["cut", "windows", "late"]


@dataclass(frozen=True, slots=True)
class LongTexts:
    """What becomes of texts beyond the model's limit, in encoding.

    Attributes:
        way: ``cut`` keeps the beginning. ``windows`` embeds overlapping windows and takes their
            mean, weighted by pooled tokens. ``late`` (late chunking) reads a text as a whole, as
            far as the model has positions, and pools the states of each of its chunks: several
            vectors for a text, of chunks that know what stands around them.
        overlap: tokens that a window shares with the one before.
        chunk_tokens: most tokens of a chunk.
        max_tokens: that ``late`` reads at once; None is the number of positions.

    Raises:
        ConfigError: a value is of a wrong type or below its limit.
    """

    way: LongTextWay = "cut"
    overlap: Annotated[int, Field(ge=0)] = 64
    chunk_tokens: Annotated[int, Field(ge=1)] = 256
    max_tokens: Annotated[int, Field(ge=1)] | None = None

    def __post_init__(self) -> None:
        check_arguments(type(self), asdict(self))


@dataclass(frozen=True, slots=True)
class Work:
    """Some texts that are ready for the model.

    Attributes:
        launch: runs the model and returns a function that gives the vectors ``(N, D)`` once they
            have arrived: float32, chunks of a text one after the other. On a GPU the next work may
            be launched before.
        tokens: that the model reads; None where nobody counts.
        spans: first and last-plus-one character of the chunks of each text; None where a text has
            one vector.
    """

    launch: Callable[[], Callable[[], NDArray[np.float32]]]
    tokens: int | None = None
    spans: Sequence[tuple[tuple[int, int], ...]] | None = None


TunedPart = Literal["adapters", "all", "head"]
# Weights of the backbone, and the peak rate that was good there: by the paper at 7 B, else measured
# (Mistral 7 B and SmolLM2-135M; decoders of 6 M and 135 M).
_GOOD_RATES: dict[TunedPart, tuple[tuple[float, float], tuple[float, float]]] = {
    "adapters": ((134.5e6, 5e-4), (7.11e9, 2e-5)),
    "all": ((6.0e6, 2e-3), (134.5e6, 1.5e-4)),
}
_HEAD_RATE = 1e-3  # on a frozen backbone, measured at 22 M
_HIGHEST_RATE = 2e-3  # twice as much was worse with the smallest


def fitting_rate(elements: int, part: TunedPart) -> float:
    """A peak learning rate for a backbone of so many weights, with two digits.

    The logarithm of the rate falls in that of the size, through two sizes at which a rate is known,
    and is never above the highest of these; a head on a frozen backbone has one for all.
    """
    if part == "head":
        return _HEAD_RATE
    (size, rate), (other_size, other_rate) = _GOOD_RATES[part]
    slope = math.log(other_rate / rate) / math.log(other_size / size)
    fitting = rate * (max(elements, 1) / size) ** slope
    return float(f"{min(_HIGHEST_RATE, fitting):.1e}")


def shown_rate(rate: float) -> str:
    """A rate as a recipe may have it: ``5e-4``."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


class PoolingSettings(StrictModel):
    """From token states to one vector.

    Args:
        kind: ``mean``, ``last`` (EOS), ``latent`` (NV-Embed) or ``self_attention``.
        num_latents: rows of the latent array (paper: 512).
        num_heads: heads of latent or self attention (paper: 8).
    """

    kind: PoolingKind = "latent"
    num_latents: int = Field(default=512, ge=1)
    num_heads: int = Field(default=8, ge=1)


class ModelSettings(StrictModel):
    """What training starts from.

    Args:
        backbone: folder (relative to the recipe) or hub id of a decoder LM, an encoder, or an
            embedding model that is tuned further: one saved by nvembed, NVIDIA's, or one of stock
            sentence-transformers modules, which is started from like an encoder. A decoder LM may
            be a GGUF file, or ``package:NAME`` for the one inside an installed package.
        attention: ``bidirectional`` (default), or ``causal`` for ablations; a saved embedding model
            has its own, so leave it out then.
        pooling: latent attention by default; leave it out for an embedding model. One of stock
            modules keeps its own (mean or last) unless another is given.
        max_tokens: longest sequence with BOS, prompt and EOS; longer texts are cut. ``None`` keeps
            the limit of a saved embedding model, and is 512 for the others (NVIDIA's was trained on
            512, whatever it reads). The limit of a model of stock modules, and a table of
            positions, are never exceeded.
        dtype: type of the backbone; float32 by default, a saved embedding model keeps its own,
            NVIDIA's gets bfloat16 on CUDA. What is trained is held in float32 until it is saved.
        quantization: holds the frozen base in fewer bits while it trains: ``nf4`` (4, as QLoRA)
            or ``int8``. The model is saved in ``dtype``, adapters merged into the base as it was.
    """

    backbone: str = Field(min_length=1)
    attention: AttentionDirection | None = None
    pooling: PoolingSettings | None = None
    max_tokens: Annotated[int, Field(ge=8)] | None = None
    dtype: FloatPrecision | None = None
    quantization: Literal["nf4", "int8"] | None = None


class LoraSettings(StrictModel):
    """Low-rank adapters on the backbone; the defaults are the paper's.

    Args:
        rank: width of the adapter matrices.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: on the adapter's input.
        targets: names of linear layers; ``all-linear`` means every one of the backbone (the paper
            does not say which it took).
        dora: learn the length of every row of a weight apart from its direction (DoRA, arXiv
            2402.09353; peft's ``use_dora``); a step takes longer.
        rslora: scale the update by ``alpha / sqrt(rank)`` instead, so that a high rank learns as
            fast as a low one (arXiv 2312.03732; peft's ``use_rslora``). At rank 16 that is four
            times as much: lower ``alpha`` or the rate.
        save_adapter: write them unmerged too, with the pooling, into ``adapter/`` of the run
            folder: a model that loads where its base is at hand, in peft's format.
        from_backbone: go on with the adapters that the backbone is saved as, on their base; rank,
            alpha and kind have to be theirs, targets are. Off, they are merged, and fresh ones put
            on top.
    """

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    dora: bool = False
    rslora: bool = False
    save_adapter: bool = False
    from_backbone: bool = False
