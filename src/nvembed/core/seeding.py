"""Seeds and random state.

Every random choice draws from a generator seeded by ``derive_seed(run seed, what, which step)``, so
no choice depends on how many others came before it. What still uses the global generators (dropout,
libraries) is seeded before every pack; around evaluations it is captured and restored.
"""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

import numpy as np


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed made of ``seed`` and all ``names``, the same on every machine."""
    # JSON keeps ("a", "b") apart from ("ab",) and 1 from "1".
    digest = hashlib.sha256(json.dumps([seed, *names]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (with all CUDA devices)."""
    import torch

    random.seed(derive_seed(seed, "python"))
    np.random.seed(derive_seed(seed, "numpy") % 2**32)  # NumPy's global generator takes 32 bits
    torch.manual_seed(derive_seed(seed, "torch"))


def capture_rng() -> dict[str, Any]:
    """Take the state of the global generators, as ``torch.load(weights_only=True)`` reads it."""
    import torch

    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    numbers = [[int(key) for key in keys], int(position), int(has_gauss), float(cached)]
    return {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), *numbers],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Put the global generators back to a state taken by ``capture_rng``."""
    import torch

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *others = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *others))
    torch.set_rng_state(state["torch"].cpu())
    # A run saved on a GPU may go on elsewhere: then there is no such generator to restore.
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([tensor.cpu() for tensor in state["cuda"]])
