"""Stop a training run from outside, at a chosen place."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from nvembed.training import trainer


def interrupt_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """Send SIGINT to this process while the given step (counted from 1, all runs) is computed."""
    original = trainer.contrastive_step
    calls = []

    def noted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **options)

    patch.setattr(trainer, "contrastive_step", noted)
