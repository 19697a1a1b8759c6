"""The callback that is a class of the user's own."""

from __future__ import annotations

from typing import Any

from vismem_core.errors import ConfigError
from vismem_core.plugins import TARGET, reason, resolve


def call(argument: str) -> Any:
    """An instance of the class that ``package.module:Class`` names, or what a function of that name gives.

    Raises:
        ConfigError: it cannot be imported, or not be called without arguments.
    """
    if not TARGET.fullmatch(argument):
        raise ConfigError(f"callback call takes package.module:Class, as in call:my_callbacks:Watch, not {argument!r}")
    try:
        return resolve(argument)()
    except Exception as error:  # whatever a user's module raises
        hint = "; set PYTHONPATH to its folder" if isinstance(error, ModuleNotFoundError) else ""
        raise ConfigError(f"callback call:{argument} does not load: {reason(error)}{hint}") from error
