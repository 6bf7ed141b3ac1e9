"""NV-Embed in the open: train, mine, evaluate and search with text-embedding models.

Names are loaded on first use, so ``import nvembed`` costs nothing and does not import torch.
``docs/api.md`` lists them; ``make docs`` adds their arguments.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nvembed.core import __version__

if TYPE_CHECKING:
    from nvembed.building.build import build_recipe as build_data
    from nvembed.core.config import load_config
    from nvembed.core.errors import (
        ConfigError,
        DataError,
        ModelError,
        NVEmbedError,
        SourceError,
        TrainingError,
        UserError,
    )
    from nvembed.data.config import MiningConfig
    from nvembed.encoding.compression.compress import compress
    from nvembed.encoding.doctor.examine import DoctorOptions
    from nvembed.encoding.doctor.examine import examine_model as doctor
    from nvembed.encoding.export.folders import export_folder as export
    from nvembed.encoding.file_search import search_file
    from nvembed.encoding.files import encode_file
    from nvembed.encoding.outputs import OutputFormat
    from nvembed.evaluation.comparison import compare_results as compare
    from nvembed.evaluation.session import evaluate
    from nvembed.evaluation.soup import merge
    from nvembed.evaluation.tasks import load_tasks
    from nvembed.index.build import IndexOptions
    from nvembed.index.build import index_documents as build_index
    from nvembed.index.search import SearchOptions, search_index
    from nvembed.mining.miner import mine_file as mine
    from nvembed.mining.miner import mine_negatives
    from nvembed.model.embedder import NVEmbed
    from nvembed.model.encoder import load_encoder
    from nvembed.model.settings import LongTexts
    from nvembed.serving.server import serve
    from nvembed.training.config import TrainConfig
    from nvembed.training.trainer import train

__all__ = [
    "ConfigError",
    "DataError",
    "DoctorOptions",
    "IndexOptions",
    "LongTexts",
    "MiningConfig",
    "ModelError",
    "NVEmbed",
    "NVEmbedError",
    "OutputFormat",
    "SearchOptions",
    "SourceError",
    "TrainConfig",
    "TrainingError",
    "UserError",
    "__version__",
    "build_data",
    "build_index",
    "compare",
    "compress",
    "doctor",
    "encode_file",
    "evaluate",
    "export",
    "load_config",
    "load_encoder",
    "load_tasks",
    "merge",
    "mine",
    "mine_negatives",
    "search_file",
    "search_index",
    "serve",
    "train",
]

# Where a name is defined, as ``module.attribute`` below ``nvembed``.
_HOMES = {
    "ConfigError": "core.errors.ConfigError",
    "DataError": "core.errors.DataError",
    "DoctorOptions": "encoding.doctor.examine.DoctorOptions",
    "IndexOptions": "index.build.IndexOptions",
    "LongTexts": "model.settings.LongTexts",
    "MiningConfig": "data.config.MiningConfig",
    "ModelError": "core.errors.ModelError",
    "NVEmbed": "model.embedder.NVEmbed",
    "NVEmbedError": "core.errors.NVEmbedError",
    "OutputFormat": "encoding.outputs.OutputFormat",
    "SearchOptions": "index.search.SearchOptions",
    "SourceError": "core.errors.SourceError",
    "TrainConfig": "training.config.TrainConfig",
    "TrainingError": "core.errors.TrainingError",
    "UserError": "core.errors.UserError",
    "build_data": "building.build.build_recipe",
    "build_index": "index.build.index_documents",
    "compare": "evaluation.comparison.compare_results",
    "compress": "encoding.compression.compress.compress",
    "doctor": "encoding.doctor.examine.examine_model",
    "encode_file": "encoding.files.encode_file",
    "evaluate": "evaluation.session.evaluate",
    "export": "encoding.export.folders.export_folder",
    "load_config": "core.config.load_config",
    "load_encoder": "model.encoder.load_encoder",
    "load_tasks": "evaluation.tasks.load_tasks",
    "merge": "evaluation.soup.merge",
    "mine": "mining.miner.mine_file",
    "mine_negatives": "mining.miner.mine_negatives",
    "search_file": "encoding.file_search.search_file",
    "search_index": "index.search.search_index",
    "serve": "serving.server.serve",
    "train": "training.trainer.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].rpartition(".")
    return getattr(import_module(f"nvembed.{module}"), attribute)


def __dir__() -> list[str]:
    return __all__
