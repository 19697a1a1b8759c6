"""Errors a user can act on: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 1500
"""Characters of a message."""


class VismemError(Exception):
    """Base of all errors raised on purpose; the CLI prints it as one line and exits with 1."""

    def __str__(self) -> str:
        """One line that can be printed, whatever file or model it quotes."""
        return cut(" ".join(super().__str__().split()), LONGEST)


class ConfigError(VismemError):
    """A configuration key or value that does not exist or does not fit."""


class DataError(VismemError):
    """A bad row, image or answer; the message starts with ``file:line`` where there is one."""


class PluginError(VismemError):
    """A plugin, or a name in a registry, that is unknown or failed to load."""


class AttachError(VismemError):
    """A model, processor or ``generate`` call that memory cannot work with."""


class CheckpointError(VismemError):
    """A memory checkpoint that is missing, damaged, or made for another base."""


class TrainingError(VismemError):
    """Training that cannot go on, such as an output directory that holds another run."""


class RunInterruptedError(TrainingError):
    """Training that a signal ended; the message says what was saved.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, signal: int = 2) -> None:
        super().__init__(message)
        self.signal = signal


class RewardError(VismemError):
    """A reward that failed or gave no number from 0 to 1; the message names the reward and the sample."""


class MetricError(VismemError):
    """A metric that failed or gave no number for an answer; the message names it."""


class ServiceError(RewardError):
    """A service that a reward asks is away, whatever the sample."""


def cut(value: object, length: int = 80) -> str:
    """A value's text for a message: shortened in its middle if it is long, and fit to be printed and encoded."""
    text = str(value).encode(errors="backslashreplace").decode()
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-(length // 2 - 1) :]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint naming the nearest known word, or all of them: ``"did you mean 'lora'?"``."""
    words = sorted(known)
    close = difflib.get_close_matches(name, words, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {cut(', '.join(words), 400)}" if words else "none are known"
