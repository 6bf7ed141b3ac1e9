"""What a folder or hub id holds: NVIDIA's layout, a saved embedding model, or a language model."""

from __future__ import annotations

from typing import Literal

from transformers import CONFIG_MAPPING

from nvembed.core.errors import ModelError
from nvembed.interop.official import MODEL_TYPE, is_official
from nvembed.interop.source import ModelSource

ONNX_FILE = "nvembed_onnx.json"
"""What ``nvembed export --format onnx`` writes beside a graph."""


def model_kind(source: ModelSource) -> Literal["official", "saved", "language_model"]:
    """Tell what a name stands for; what ``config.json`` says goes before ``modules.json``.

    Raises:
        ModelError: there is nothing of that name, or its model type is unknown.
    """
    if source.find(ONNX_FILE) is not None:
        raise ModelError(
            "an exported ONNX graph",
            where=source.name,
            expected="a model with weights",
            hint="nvembed encode and onnxruntime run it; load the model that it was exported from",
        )
    config = source.read_json("config.json")
    if is_official(config):
        return "official"
    if source.find("modules.json") is not None:
        return "saved"
    if config is None:
        source.require("config.json")
    model_type = (config or {}).get("model_type")
    if model_type is not None and model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"unknown model_type {model_type!r} in config.json",
            where=source.name,
            expected=f"{MODEL_TYPE} or a type that the installed transformers knows",
            hint="Upgrade transformers, or check that this is the right folder",
        )
    return "language_model"
