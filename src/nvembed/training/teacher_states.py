"""A teacher of the same tokens that is read token by token, beside the model, in every step.

A vector tells one thing of a text; the last hidden states tell one of each of its tokens. So a
model that was made smaller from its teacher learns the more from them. They are computed anew in
every step, for keeping them would take more room than the texts. T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from nvembed.core.errors import ConfigError
from nvembed.model.backbone import Backbone
from nvembed.model.embedder import NVEmbed
from nvembed.model.encoder import load_encoder
from nvembed.model.packing import flatten
from nvembed.model.packs import filler
from nvembed.model.tokens import TokenizedText, plain_backend
from nvembed.training.config import StageConfig
from nvembed.training.teacher import teacher_source


class TeacherStates:
    """The states that tokens have in another model."""

    def __init__(self, backbone: Backbone, weight: float) -> None:
        self._backbone, self._weight = backbone.eval().requires_grad_(False), weight

    @torch.no_grad()
    def states(self, texts: Sequence[TokenizedText]) -> Tensor:
        """Last hidden states ``(T, D)`` of a pack of texts, as it is laid out, in float32."""
        filled = [*texts, *filler(sum(map(len, texts)))]
        flat = flatten(filled).to(self._backbone.device)
        with torch.autocast(self._backbone.device.type, enabled=False):
            hidden_TD = self._backbone.hidden(flat)
        own = [len(filled[row]) * [row < len(texts)] for row in flat.order]
        return hidden_TD[torch.tensor(list(chain.from_iterable(own)))].float()

    def distance(self, texts: Sequence[TokenizedText], hidden_TD: Tensor) -> Tensor:
        """The weighted sum of ``distance_of_states`` over the tokens of texts."""
        return self._weight * distance_of_states(hidden_TD, self.states(texts)).sum()


def distance_of_states(hidden_TD: Tensor, wanted_TD: Tensor) -> Tensor:
    """Squared distance of each token's states ``(T,)``, over the square of the wanted one."""
    with torch.autocast(hidden_TD.device.type, enabled=False):
        missing_T = (hidden_TD.float() - wanted_TD).square().sum(dim=1)
        return missing_T / wanted_TD.square().sum(dim=1).clamp(min=1e-12)


def teacher_states(stage: StageConfig, base_dir: Path, model: NVEmbed) -> TeacherStates | None:
    """Load a stage's teacher of states; ``None`` where they do not count.

    Raises:
        ConfigError: it is no model of ours, reads other tokens or has states of another width.
    """
    settings = stage.teacher
    if settings is None or settings.states is None:
        return None
    name, where = teacher_source(settings, base_dir), f"stages.{stage.name}.teacher.states"
    taught = model.backbone
    given = load_encoder(name, settings.dtype)
    if not isinstance(given, NVEmbed) or not isinstance(given[0], Backbone):
        raise ConfigError(
            f"{name} has no states that can be read",
            where=where,
            expected="a model that nvembed saved, or NVIDIA's layout",
            hint="Learn from its vectors: set teacher.vectors, and states to null",
        )
    backbone = given.to(taught.device).backbone
    if backbone.width != taught.width:
        raise ConfigError(
            f"the states of {name} are {backbone.width} wide, and the model's {taught.width}",
            where=where,
            expected="equal widths",
            hint="Learn from its vectors: set teacher.vectors, and states to null",
        )
    own, other = (plain_backend(each.tokenizer).to_str() for each in (taught, backbone))
    if own != other:
        raise ConfigError(
            f"{name} has another tokenizer than the model",
            where=where,
            expected="the same tokens",
            hint="Learn from its vectors: set teacher.vectors, and states to null",
        )
    return TeacherStates(backbone, settings.states)
