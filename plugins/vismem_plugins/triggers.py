"""Built-in triggers: the model's own choice, the paper's ablations, and forced schedules.

Each is a function ``(argument, kinds) -> Trigger``. Draws depend on the row's seed and step alone, so that a row's
answer does not depend on its neighbours.
"""

from __future__ import annotations

import random as _random

from vismem_core.config import KINDS, Kind
from vismem_core.errors import ConfigError
from vismem_core.memory.trigger import Decision, Row, Trigger


def policy(argument: str, kinds: tuple[Kind, ...]) -> Trigger:
    """The model invokes by sampling its invocation tokens; a kind that is not allowed is never sampled."""
    _no_argument("policy", argument)
    return Trigger(lambda row: "policy", kinds)


def never(argument: str, kinds: tuple[Kind, ...]) -> Trigger:
    """No invocation: decoding is the base model's."""
    _no_argument("never", argument)
    return Trigger(lambda row: "none", kinds, active=False)


def random(argument: str, kinds: tuple[Kind, ...]) -> Trigger:
    """At every delimiter with probability p, each kind equally likely (the paper's random invocation)."""
    return _bernoulli(_share("random", argument), kinds, anywhere=False)


def anywhere(argument: str, kinds: tuple[Kind, ...]) -> Trigger:
    """Before every token with probability p, each kind equally likely."""
    return _bernoulli(_share("anywhere", argument), kinds, anywhere=True)


def schedule(argument: str, kinds: tuple[Kind, ...]) -> Trigger:
    """At given steps: ``schedule:0=long,24=short``."""
    steps: dict[int, Decision] = {}
    for part in argument.split(","):
        step, _, kind = part.partition("=")
        if not step.strip().isdigit() or kind.strip() not in KINDS:
            raise ConfigError(f"trigger schedule: expected STEP=short or STEP=long, not {part!r}")
        steps[int(step)] = kind.strip()  # type: ignore[assignment]
    return Trigger(lambda row: steps.get(row.step, "none"), kinds)


def _bernoulli(share: float, kinds: tuple[Kind, ...], *, anywhere: bool) -> Trigger:
    def decide(row: Row) -> Decision:
        if not (anywhere or row.boundary):
            return "none"
        draw = _random.Random(f"{row.seed}/{row.step}")
        return draw.choice(kinds) if draw.random() < share else "none"

    return Trigger(decide, kinds)


def _share(name: str, argument: str) -> float:
    try:
        share = float(argument)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"trigger {name} takes a probability, as in {name}:0.5, not {argument!r}")
    return share


def _no_argument(name: str, argument: str) -> None:
    if argument:
        raise ConfigError(f"trigger {name} takes no argument, not {argument!r}")
