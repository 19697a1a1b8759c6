"""Who invoked what, where: the record of one ``generate`` call."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from vismem_core.config import Kind


@dataclass(frozen=True)
class Invocation:
    """One invocation.

    Attributes:
        row: row of the returned sequences.
        kind: which memory.
        position: index of the invocation token in the row's answer, counted in returned ids.
        latents: (N, d), what was inserted.
    """

    row: int
    kind: Kind
    position: int
    latents: Tensor = field(repr=False, compare=False)


@dataclass
class Trace:
    """All invocations of one ``generate`` call, in the order they happened."""

    invocations: list[Invocation] = field(default_factory=list)

    def row(self, row: int) -> list[Invocation]:
        """The invocations of one row."""
        return [invocation for invocation in self.invocations if invocation.row == row]

    def __len__(self) -> int:
        return len(self.invocations)
