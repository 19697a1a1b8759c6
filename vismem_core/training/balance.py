"""Who does what in a step: pieces of work are dealt by what they are expected to cost, in all processes alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from vismem_core.files.samples import Sample

Pieces = Callable[[Sample], Sequence[float]]
"""What the pieces of work on a sample are expected to cost, in any unit."""


def balanced(costs: Sequence[float], parts: int, allowed: Sequence[Collection[int]] | None = None) -> list[int]:
    """The part of each item: the costliest first, each to the part that has the least to do so far.

    Of parts that have the same, the one with fewer items, and then the first. No part exceeds the mean by more than one
    item where each may take any (R. L. Graham, "Bounds on multiprocessing timing anomalies", 1969).

    Args:
        allowed: for each item, the parts that may take it.
    """
    owners, loads = [0] * len(costs), [(0.0, 0)] * parts
    for item in sorted(range(len(costs)), key=lambda own: -costs[own]):
        part = min(allowed[item] if allowed else range(parts), key=lambda own: (loads[own], own))
        owners[item], (load, count) = part, loads[part]
        loads[part] = (load + costs[item], count + 1)
    return owners


@dataclass(frozen=True)
class Work:
    """The samples of a step, and who does the pieces of work on each.

    Attributes:
        samples: of all processes, P; as the data has them.
        owners: the process of each piece, by sample; all samples have as many pieces.
    """

    samples: Sequence[Sample]
    owners: Sequence[Sequence[int]]

    @classmethod
    def dealt(cls, samples: Sequence[Sample], processes: int, pieces: Pieces | None) -> Work:
        """Deal out the pieces of work on samples; without ``pieces`` whole samples, one after the other."""
        if pieces is None:
            return cls(samples, [[number % processes] for number in range(len(samples))])
        costs = [list(pieces(sample)) for sample in samples]
        owners = iter(balanced([cost for own in costs for cost in own], processes))
        return cls(samples, [[next(owners) for _ in own] for own in costs])

    def of(self, process: int) -> list[int]:
        """The samples of which a process has a piece."""
        return [number for number, owners in enumerate(self.owners) if process in owners]

    def pieces(self, process: int) -> list[tuple[int, int]]:
        """A process's pieces: the sample's number, and the piece's among those of the sample."""
        return [(at, own) for at, owners in enumerate(self.owners) for own, who in enumerate(owners) if who == process]

    def only(self, numbers: Collection[int]) -> Work:
        """Some of the samples."""
        kept = [number for number in range(len(self.samples)) if number in set(numbers)]
        return Work([self.samples[own] for own in kept], [self.owners[own] for own in kept])

    def __add__(self, other: Work) -> Work:
        return Work([*self.samples, *other.samples], [*self.owners, *other.owners])
