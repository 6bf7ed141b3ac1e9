"""The losses of a stage beside the contrastive one, as a recipe gives them; ``None`` means off."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from nvembed.core.arguments import PrecisionChoice
from nvembed.core.config import StrictModel


class DistillationConfig(StrictModel):
    """Learning from a teacher's scores that the records hold; for its vectors see ``teacher``.

    Args:
        weight: factor of the distillation loss, which is added to the contrastive one.
        teacher_temperature: the teacher's scores are divided by it before the softmax: about 1 for
            logits of a reranker, about the stage's temperature for cosines.
    """

    weight: float = Field(default=1.0, gt=0)
    teacher_temperature: float = Field(default=1.0, gt=0)


class CosentConfig(StrictModel):
    """Learning the order of graded pairs.

    Args:
        weight: factor of the loss of the pairs of a step, besides their share of the step's records
            that are pairs or have a positive: a pair weighs as much as any other record.
        temperature: divides the cosines.
    """

    weight: float = Field(default=1.0, gt=0)
    temperature: float = Field(default=0.05, gt=0)


class SpreadConfig(StrictModel):
    """Keeping the texts of a step apart, queries from queries and documents from documents.

    Args:
        mean: factor of the squared mean of the cosines; ``None`` is off (as in EmbeddingGemma).
        second_moment: factor of what the mean of the squared cosines is above 1 / width; ``None``
            is off.
    """

    mean: float | None = Field(default=1.0, gt=0)
    second_moment: float | None = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _spreads(self) -> Self:
        if self.mean is None and self.second_moment is None:
            raise ValueError("mean and second_moment are both off: nothing to spread by")
        return self


class VectorsConfig(StrictModel):
    """Vectors that were computed before, relative to the recipe.

    Args:
        vectors: ``.npy`` or Parquet file in float32, as ``nvembed encode`` writes it.
        texts: the file that it was encoded from, which has all texts that the stage draws.
    """

    vectors: str = Field(min_length=1)
    texts: str = Field(min_length=1)


class TeacherConfig(StrictModel):
    """Learning from a teacher's vectors of all texts of a step, labelled or not.

    They are computed before the stage, once for all runs, and kept in 16 bit in the folder
    ``teachers`` of the cache (``$NVEMBED_CACHE``).

    Args:
        model: folder (relative to the recipe) or hub id of an embedding model, or the address of an
            OpenAI-compatible endpoint.
        file: in place of a model, a file of vectors; a text has one vector, whatever its side and
            instruction.
        endpoint_model: name of the model at an endpoint.
        dtype: type of the teacher's weights, see ``model/encoder.py``; ``None`` is what was
            saved.
        similarities: factor of the mean over the texts of a step of KL(softmax(teacher's cosines to
            all other texts / its temperature) ‖ softmax(own cosines / temperature)); widths may
            differ. ``None`` is off.
        vectors: factor of the mean over the texts of 1 − cosine of own and teacher's vector;
            ``None`` is off.
        states: factor of the mean over all tokens of the squared distance of own and teacher's last
            hidden state, over the square of the latter; for a model that was made smaller from the
            teacher. It is loaded beside the model and reads every step's texts, with their
            instructions; tokenizer and width must be the model's. ``None`` is off.
        temperature: divides the cosines in the softmax.
        teacher_temperature: the same for the teacher's cosines; ``None`` is ``temperature``.
        projection: where widths differ, ``vectors`` are compared behind a linear map to the
            teacher's width, which begins as least squares on the first texts, learns at the rate
            of the pooling head and is no part of the model; ``False`` refuses another width.
        instructions: tell the teacher the instructions of the data sets, in its own way: an NVEmbed
            or a model trained with "Instruct: …" takes them, an endpoint gets them in front of the
            text, others do not see them.
        query_prefix: put before queries, for models like E5 (``"query: "``).
        document_prefix: put before documents.
    """

    model: str | None = Field(default=None, min_length=1)
    file: VectorsConfig | None = None
    endpoint_model: str | None = None
    dtype: PrecisionChoice | None = None
    similarities: float | None = Field(default=1.0, gt=0)
    vectors: float | None = Field(default=None, gt=0)
    states: float | None = Field(default=None, gt=0)
    temperature: float = Field(default=0.05, gt=0)
    teacher_temperature: float | None = Field(default=None, gt=0)
    projection: bool = True
    instructions: bool = True
    query_prefix: str = ""
    document_prefix: str = ""

    @property
    def name(self) -> str:
        """What the teacher is called."""
        return self.model or (self.file.vectors if self.file else "")

    @property
    def of_texts(self) -> bool:
        """Whether its vectors count, which are computed before the stage."""
        return self.similarities is not None or self.vectors is not None

    @model_validator(mode="after")
    def _teaches(self) -> Self:
        if not self.of_texts and self.states is None:
            raise ValueError("similarities, vectors and states are all off: nothing to learn")
        if (self.model is None) == (self.file is None):
            raise ValueError("a teacher is either a model or a file of vectors: give one of them")
        address = self.name.startswith(("http://", "https://"))
        if address and not self.endpoint_model:
            raise ValueError("an endpoint serves models by name: give endpoint_model")
        if self.endpoint_model and not address:
            raise ValueError("endpoint_model is given, and model is no address of an endpoint")
        changed = self.query_prefix or self.document_prefix or not self.instructions
        if self.states is not None and (self.file or address or changed):
            raise ValueError(
                "states are those of a model that reads the same texts: no file, no endpoint, no "
                "prefixes, and instructions=true"
            )
        if self.states is not None and (self.dtype or "").startswith("auto"):
            raise ValueError("states are computed in every step: name the type, or leave it out")
        return self
