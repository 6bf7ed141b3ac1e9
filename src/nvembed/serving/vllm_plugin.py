"""Entry point ``vllm.general_plugins``: vLLM's own engine serves our models, as they are saved.

It registers an architecture (``serving/vllm_model.py``) and what leads a folder to it: a reader of
``config.json`` and a tokenizer. Folders that are none of ours are left to vLLM. vLLM calls this in
every process that it starts, so nothing here imports what a model needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers.registry import TokenizerRegistry
from vllm.transformers_utils import config as vllm_config

ARCHITECTURE = "NVEmbedModel"
"""The name that NVIDIA's layout has in ``architectures``, and models saved here get."""
_TOKENIZER = "nvembed"
_MODEL_FILE = "nvembed.serving.vllm_model"


class _ConfigReader(vllm_config.HFConfigParser):
    """Reads a folder of ours as its backbone's configuration, and any other as vLLM does."""

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **options: Any,
    ) -> tuple[dict[str, Any], Any]:
        """See vLLM: the content of the file and the configuration."""
        from nvembed.serving.vllm_model import is_ours, served_config

        def read() -> tuple[dict[str, Any], Any]:
            return super(_ConfigReader, self).parse(
                model, trust_remote_code, revision, code_revision, **options
            )

        if not is_ours(str(model), revision):
            return read()
        values, config = served_config(str(model), revision, read)
        config.architectures = [ARCHITECTURE]
        return values, config


class _Updates(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Choose our tokenizer where the user has chosen none."""
        if model_config.tokenizer_mode == "auto":
            model_config.tokenizer_mode = _TOKENIZER


def register() -> None:
    """Tell vLLM about our models; called as often as vLLM likes."""
    if ARCHITECTURE in MODELS_CONFIG_MAP:
        return
    ModelRegistry.register_model(ARCHITECTURE, f"{_MODEL_FILE}:ServedModel")
    MODELS_CONFIG_MAP[ARCHITECTURE] = _Updates
    TokenizerRegistry.register(_TOKENIZER, _MODEL_FILE, "ServedTokenizer")
    RENDERER_REGISTRY.register(_TOKENIZER, "vllm.renderers.hf", "HfRenderer")
    # Not by register_config_parser, which warns of every name that is there already.
    vllm_config._CONFIG_FORMAT_TO_CONFIG_PARSER["hf"] = _ConfigReader
