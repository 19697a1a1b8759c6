"""Questions that several processes answer together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from vismem_core.files.samples import Sample
from vismem_core.memory.memory import Memory

from .inference import Answer, answers

Item = TypeVar("Item")


class Processes(Protocol):
    """Those that answer; see :class:`vismem_core.training.processes.Processes`."""

    @property
    def first(self) -> bool:
        """Whether this one says what was found."""

    def part(self, items: Sequence[Item]) -> list[Item]:
        """What this one does of it."""

    def everyones(self, items: Sequence[Item]) -> list[Item]:
        """What all did."""


class Alone:
    """One process."""

    first = True

    def part(self, items: Sequence[Item]) -> list[Item]:
        """All of it."""
        return list(items)

    def everyones(self, items: Sequence[Item]) -> list[Item]:
        """What this one did."""
        return list(items)


def dealt(
    memory: Memory,
    samples: Sequence[Sample],
    processes: Processes,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> list[Answer]:
    """Answers to all samples, in order, in every process; each gave its part of them.

    Args:
        progress: called with how many of this process's part are done, and how many there are.
        options: see :func:`vismem_core.answers.inference.answers`.
    """
    numbered = processes.part(list(enumerate(samples)))
    told: list[tuple[int, Answer]] = []
    own = answers(memory, [sample for _, sample in numbered], **options)
    for (number, _), answer in zip(numbered, own, strict=True):
        told.append((number, answer))
        if progress:
            progress(len(told), len(numbered))
    everyones = dict(processes.everyones(told))  # those that hold a base together give each answer once more
    return [everyones[number] for number in range(len(samples))]
