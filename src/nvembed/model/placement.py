"""Where the layers of a backbone lie when one device is too small for them (``device_map``).

Layers placed on the CPU beside a GPU wait there and are copied over for every forward.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from transformers import PreTrainedModel

from nvembed.core.errors import ModelError

DeviceMap = str | Mapping[str, int | str | torch.device]
"""``"auto"``, or module of the backbone → device, ``""`` standing for all that is not named."""


def plan_places(
    decoder: PreTrainedModel, device_map: DeviceMap, dtype: torch.dtype | None
) -> dict[str, torch.device]:
    """Settle where every module goes; ``dtype`` is that of the weights to come."""
    if isinstance(device_map, str):
        if device_map != "auto":
            raise ModelError(
                f"unknown device_map {device_map!r}",
                expected='"auto", or a mapping from module names to devices',
            )
        whole = list(decoder._no_split_modules or ())
        memory = get_balanced_memory(decoder, dtype=dtype, no_split_module_classes=whole)
        asked: Mapping[str, int | str | torch.device] = infer_auto_device_map(
            decoder, max_memory=memory, dtype=dtype, no_split_module_classes=whole
        )
    else:
        asked = device_map
    if "disk" in asked.values():
        raise ModelError(
            "the model does not fit into the memory of all devices together",
            where="device_map",
            expected="places other than disk, which no forward could wait for",
            hint="Ask for dtype='bfloat16', or quantise it",
        )
    places = {name: torch.device(place) for name, place in asked.items()}
    for name, _ in decoder.named_parameters():
        place_of(name, places)
    return places


def place_of(parameter: str, places: Mapping[str, torch.device]) -> torch.device:
    """Return the device of a parameter of the backbone: that of the longest name that covers it."""
    parts = parameter.split(".")
    for length in range(len(parts), -1, -1):
        if (found := places.get(".".join(parts[:length]))) is not None:
            return found
    raise ModelError(
        f"no device for {parameter}",
        where="device_map",
        expected="a place for every module of the backbone, such as {'': 'cuda:0'}",
    )


def spread(decoder: PreTrainedModel, places: Mapping[str, torch.device]) -> None:
    """Let the states of a loaded backbone travel between its places, in place."""
    # accelerate knows the CPU by "cpu" alone: "cpu:0" would count as another device.
    named = {name: "cpu" if place.type == "cpu" else str(place) for name, place in places.items()}
    dispatch_model(decoder, device_map=named, force_hooks=True)
