"""Sources of training data: files and sets on the hub, in whatever layout, as records."""

from nvembed.core.errors import SourceError
from nvembed.data.sources.config import (
    Column,
    DatasetConfig,
    HubLocation,
    Layout,
    TableConfig,
    file_dataset,
)
from nvembed.data.sources.loading import load_records
from nvembed.data.sources.opening import open_dataset
from nvembed.data.sources.rows import BadRow, Converted, OpenedDataset

__all__ = [
    "BadRow",
    "Column",
    "Converted",
    "DatasetConfig",
    "HubLocation",
    "Layout",
    "OpenedDataset",
    "SourceError",
    "TableConfig",
    "file_dataset",
    "load_records",
    "open_dataset",
]
