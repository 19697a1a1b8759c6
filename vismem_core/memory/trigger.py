"""The interface of triggers: who decides, row by row and step by step, whether memory is invoked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from vismem_core.config import KINDS, Kind
from vismem_core.plugins import registry

Decision = Kind | Literal["policy", "none"]
"""``policy`` lets the model sample its own invocation tokens; ``none`` forbids them; a kind forces that one."""


@dataclass
class Row:
    """One row of a batch, as a trigger sees it before the next token.

    Attributes:
        seed: the same for the same prompt, whatever its neighbours; copies of a prompt differ.
        step: tokens written so far, memory tokens included.
        boundary: whether a thought has just ended: nothing is written yet, or the last token is a delimiter.
        since_end: tokens since the last end token (or the start).
        invocations: how often memory was invoked.
    """

    seed: int = 0
    step: int = 0
    boundary: bool = True
    since_end: int = 0
    invocations: int = 0


@dataclass(frozen=True)
class Trigger:
    """A decision rule and the kinds it may invoke.

    ``samples`` is False for a rule that never leaves the choice to the policy, ``active`` is False for one that
    never invokes anything: decoding then takes the base model's own road.
    """

    decide: Callable[[Row], Decision]
    kinds: tuple[Kind, ...] = KINDS
    active: bool = True
    spec: str = field(default="", compare=False)

    def __call__(self, row: Row) -> Decision:
        """The decision for ``row``; a forced kind that is not allowed becomes ``none``."""
        decision = self.decide(row)
        return decision if decision in ("policy", "none") or decision in self.kinds else "none"


def parse(spec: str) -> Trigger:
    """A trigger from its spec ``NAME[:ARGUMENT][@KIND]``: ``policy``, ``random:0.5``, ``policy@short``.

    Raises:
        PluginError: for an unknown name.
        ConfigError: for an argument the trigger does not take.
    """
    from vismem_core.errors import ConfigError

    rule, _, kind = spec.partition("@")
    name, _, argument = rule.partition(":")
    if kind and kind not in KINDS:
        raise ConfigError(f"trigger {spec!r}: memory kinds are short and long, not {kind!r}")
    kinds = tuple(k for k in KINDS if not kind or k == kind)
    trigger = registry("triggers").get(name)(argument, kinds)
    if not isinstance(trigger, Trigger):
        raise ConfigError(f"trigger {name!r} gave {type(trigger).__name__} instead of a Trigger")
    return Trigger(trigger.decide, trigger.kinds, trigger.active, spec)
