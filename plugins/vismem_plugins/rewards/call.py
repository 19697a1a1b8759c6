"""The reward that is a function of the user's own."""

from __future__ import annotations

from vismem_core.errors import ConfigError
from vismem_core.plugins import TARGET, reason, resolve
from vismem_core.reward import Reward


def call(argument: str) -> Reward:
    """The function that ``package.module:function`` names; it has the form of ``vismem_core.reward.Reward``.

    Raises:
        ConfigError: it cannot be imported, or it is no function.
    """
    if not TARGET.fullmatch(argument):
        raise ConfigError(f"reward call takes package.module:function, as in call:my_rewards:short, not {argument!r}")
    try:
        reward: Reward = resolve(argument)
    except Exception as error:  # whatever importing a user's module raises
        hint = "; set PYTHONPATH to its folder" if isinstance(error, ModuleNotFoundError) else ""
        raise ConfigError(f"reward call:{argument} does not load: {reason(error)}{hint}") from error
    if not callable(reward):
        raise ConfigError(f"reward call:{argument} is {type(reward).__name__}, not a function")
    return reward
