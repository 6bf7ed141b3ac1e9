"""Which model the demo starts from when none is named.

The project's own embedding model, where its base is installed (``make model``); else its small
decoder, which has to learn everything in the time there is.
"""

from __future__ import annotations

from pathlib import Path

from nvembed.core.errors import ModelError
from nvembed.interop.identity import find_base
from nvembed.interop.model_folder import ModelSource, model_kind

ASSETS = Path(__file__).resolve().parents[2] / "assets"
MODEL, DECODER = "nvembed-smollm2-135m", "decoder-6m"


def default_backbone(assets: Path = ASSETS) -> str:
    """Return the folder of the project's embedding model if it can be used, else of its decoder.

    Raises:
        ModelError: this is not a checkout of the repository, which alone holds them.
    """
    model, decoder = assets / MODEL, assets / DECODER
    if (model / "modules.json").is_file():
        try:
            find_base(ModelSource(str(model)))
            return str(model)
        except ModelError:
            pass  # its base is not installed
    if not (decoder / "config.json").is_file():
        raise ModelError(
            "the project's own decoder is not here",
            where=str(decoder),
            expected="a checkout of the repository, as the decoder is not part of the package",
            hint="Run it in a checkout, or name a decoder with --backbone",
        )
    return str(decoder)


def is_tuned(backbone: str) -> bool:
    """Whether a model is an embedding model already, not a bare language model."""
    return model_kind(ModelSource(backbone)) != "language_model"
