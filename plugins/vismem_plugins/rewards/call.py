"""The reward that is a function of the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vismem_core.answers.reward import Reward, Written
from vismem_core.errors import ConfigError
from vismem_core.files.samples import Sample
from vismem_core.plugins import TARGET, reason, resolve

COLUMNS = ("id", "answer", "type", "references")
"""What a sample has, as TRL passes the columns of a data set: lists by name."""
OURS = ("answers", "samples")


def call(argument: str) -> Reward:
    """The function that ``package.module:function`` names.

    It has the form of ``vismem_core.Reward``, or that of TRL's reward functions: it takes ``completions``, and perhaps
    ``prompts``, ``completion_ids`` and columns of the data (``id``, ``answer``, ``type``, ``references``), by name, all
    of them lists. Completions are texts.

    Raises:
        ConfigError: it cannot be imported, is no function, or takes what is neither of the two.
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
    return _by_its_parameters(reward, f"reward call:{argument}")


def _by_its_parameters(function: Any, name: str) -> Reward:
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"{name} is asynchronous; give a plain function")
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin does not say
        return function  # type: ignore[no-any-return]
    if "completions" in parameters:
        return _trl(function, parameters, name)
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise ConfigError(
            f"{name} takes ({', '.join(map(str, parameters.values()))}): neither ({', '.join(OURS)}) nor TRL's "
            "(completions, **kwargs)"
        ) from error
    return function  # type: ignore[no-any-return]


def _trl(function: Callable[..., Any], parameters: Mapping[str, inspect.Parameter], name: str) -> Reward:
    known = {"prompts", "completions", "completion_ids", *COLUMNS}
    everything = any(own.kind is own.VAR_KEYWORD for own in parameters.values())
    named = {own.name for own in parameters.values() if own.kind in (own.POSITIONAL_OR_KEYWORD, own.KEYWORD_ONLY)}
    needed = {own for own in named if parameters[own].default is inspect.Parameter.empty}
    if strange := sorted(needed - known):
        raise ConfigError(
            f"{name} takes {strange[0]!r}, which samples do not have; they have {', '.join(sorted(known))}"
        )

    def reward(answers: Sequence[Written], samples: Sequence[Sample], /) -> list[float]:
        given: dict[str, Any] = {column: [getattr(sample, column) for sample in samples] for column in COLUMNS}
        given["prompts"] = [sample.prompt for sample in samples]
        given["completions"] = [answer.text for answer in answers]
        given["completion_ids"] = [list(answer.ids) for answer in answers]
        scores: list[float] = function(**(given if everything else {key: given[key] for key in named & known}))
        return scores

    return reward
