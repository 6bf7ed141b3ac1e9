"""The error tree; every UserError is one line and exit code 2.

Anything else that reaches the command line is a bug and keeps its traceback.
"""

from __future__ import annotations


class NVEmbedError(Exception):
    """Base of all errors raised on purpose."""


class UserError(NVEmbedError):
    """A mistake in the input, explained in one line.

    Args:
        message: what was wrong, with the offending value.
        where: ``file:line`` or config key.
        expected: what would have been right.
        hint: what to do about it.
    """

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.where = where
        self.expected = expected
        self.hint = hint
        text = f"{where}: {message}" if where else message
        if expected:
            text += f"; expected {expected}"
        if hint:
            text += f". {hint}"
        super().__init__(" ".join(text.splitlines()))


class ConfigError(UserError):
    """A recipe, override or option that cannot be used."""


class DataError(UserError):
    """A record, file or evaluation task that cannot be used."""


class SourceError(DataError):
    """A source of training data that is out of reach, or that has another form than was said."""


class ModelError(UserError):
    """A model folder or backbone that cannot be used."""


class TrainingError(UserError):
    """A run that had to stop before harm was done."""
