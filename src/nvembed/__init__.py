"""NV-Embed in the open: train, mine, evaluate and search with text-embedding models.

Names are loaded on first use, so ``import nvembed`` costs nothing and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nvembed.core import __version__

if TYPE_CHECKING:
    from nvembed.core.config import load_config
    from nvembed.core.errors import NVEmbedError, UserError
    from nvembed.model.embedder import NVEmbed
    from nvembed.training.config import TrainConfig
    from nvembed.training.trainer import train

__all__ = [
    "NVEmbed",
    "NVEmbedError",
    "TrainConfig",
    "UserError",
    "__version__",
    "load_config",
    "train",
]

_HOMES = {
    "NVEmbed": "nvembed.model.embedder",
    "NVEmbedError": "nvembed.core.errors",
    "TrainConfig": "nvembed.training.config",
    "UserError": "nvembed.core.errors",
    "load_config": "nvembed.core.config",
    "train": "nvembed.training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
