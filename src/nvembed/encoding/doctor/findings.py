"""What the doctor reports: findings, tokens of the samples, memory; plain data without torch.

Next file: ``encoding/doctor/checks.py``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "warning", "problem"]
Role = Literal["BOS", "instruction", "text", "EOS", "special"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One checked property.

    Attributes:
        name: of the property, one or two words.
        status: ``problem`` means that vectors are wrong or not what NV-Embed means.
        message: what was found.
        advice: one line on what to do; ``None`` where all is well.
    """

    name: str
    status: Status
    message: str
    advice: str | None = None


@dataclass(frozen=True, slots=True)
class SampleToken:
    """One token of a sample text, and whether it is pooled (``None``: cannot be told)."""

    text: str
    role: Role
    pooled: bool | None


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample text as the model sees it."""

    side: Literal["query", "document"]
    tokens: tuple[SampleToken, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the weights of a module are, and in which dtype."""

    module: str
    device: str
    dtype: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """The forecast of encoding a batch, in bytes."""

    dtype: str
    tokens: int
    weights: int
    activations: int
    total: int


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that ``nvembed doctor`` has to say about a model.

    Attributes:
        model: the name it was loaded by.
        description: family, size, pooling, width, limit.
        findings: one per check.
        samples: a query with instruction and a document.
        placement: per module, device and dtype.
        memory: per dtype.
        memory_formula: how the forecast is made.
    """

    model: str
    description: str
    findings: tuple[Finding, ...]
    samples: tuple[Sample, ...]
    placement: tuple[Placement, ...]
    memory: tuple[Memory, ...]
    memory_formula: str

    @property
    def healthy(self) -> bool:
        """No finding is a problem; warnings may be there."""
        return all(finding.status != "problem" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Plain data, with ``healthy`` in it."""
        return {"healthy": self.healthy, **asdict(self)}
