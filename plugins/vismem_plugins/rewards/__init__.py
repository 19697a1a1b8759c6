"""Rewards: functions ``(argument) -> Reward``, one file per idea of what makes an answer right."""

from vismem_core.errors import ConfigError


def no_argument(name: str, argument: str) -> None:
    """Refuses an argument that the reward ``name`` would ignore.

    Raises:
        ConfigError: there is one.
    """
    if argument:
        raise ConfigError(f"reward {name} takes no argument, not {argument!r}")
