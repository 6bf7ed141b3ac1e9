from __future__ import annotations

import pytest

pytest.importorskip("lancedb", reason="needs the extra nvembed[index]")
