"""Which Python modules the demo holds out for evaluation.

The demo evaluates on the documentation of held-out modules. Everything that prepares it, the
pretraining corpus of the demo's decoder included, asks this file, so that no held-out text is
ever seen before the evaluation. Nothing heavy is imported here.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

HELD_OUT_SHARE = 0.12
"""Share of the modules that is held out, in expectation."""


def held_out(module: str) -> bool:
    """Return whether the documentation of `module` is kept for evaluation.

    The answer depends on the name alone (its SHA-256), never on what else is installed, so it is
    the same on every machine and for every version of a package.

    Args:
        module: Full dotted name of the module, such as `numpy.linalg` or `json.decoder`.
    """
    digest = hashlib.sha256(module.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def module_name(path: Path, root: Path) -> str:
    """Return the dotted module name of a Python source file.

    Args:
        path: The source file, below `root`.
        root: The folder that is on the import path: site-packages, or that of the standard
            library.

    Returns:
        The path relative to `root`, dotted, without `.py` and without a final `.__init__`.

    Raises:
        ValueError: `path` is not below `root`.
    """
    parts = path.relative_to(root).with_suffix("").parts
    if len(parts) > 1 and parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)
