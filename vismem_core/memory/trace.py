"""Who invoked what, where, and what kept memory from being invoked: the record of one ``generate`` call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

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


REASONS: Mapping[str, str] = MappingProxyType(
    {
        "room": "max_new_tokens left no room for an invocation and a token after it",
        "budget": "memory.budget allows no more invocations in an answer",
        "distance": "memory.distance wants more tokens between two invocations",
        "off": "memory is off",
        "forbidden": "logits processors or suppress_tokens forbade it",
        "drafts": "the model drafts for another one, which knows no memory tokens",
        "bypassed": "generate was called on the class, type(model).generate(model), past memory",
    }
)
"""What may keep memory from being invoked where the trigger would have it, or would have let the policy choose."""


@dataclass
class Trace:
    """All invocations of one ``generate`` call, in the order they happened.

    Attributes:
        blocked: how often memory could not be invoked, by the names in :data:`REASONS`.
    """

    invocations: list[Invocation] = field(default_factory=list)
    blocked: Counter[str] = field(default_factory=Counter)

    def row(self, row: int) -> list[Invocation]:
        """The invocations of one row."""
        return [invocation for invocation in self.invocations if invocation.row == row]

    def why(self) -> str | None:
        """Why memory was not invoked, in one line, if something kept it from that."""
        told = [f"{REASONS[name]} ({count} times)" for name, count in self.blocked.most_common()]
        return f"memory was not invoked: {'; '.join(told)}" if told and not self.invocations else None

    def __len__(self) -> int:
        return len(self.invocations)
