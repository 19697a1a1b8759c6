"""What a plugin may add to vismem. Each hook is one function that takes a ``register`` callback.

A plugin is a module, named by an entry point of the group ``vismem``, that implements any of these hooks:

    from vismem_core.hookspecs import Register, hookimpl

    VISMEM_API = 4  # vismem_core.API_VERSION when it was written; need not be said

    @hookimpl
    def register_formers(register: Register) -> None:
        register("mine", "my_package.former:MyFormer", description="What it does, in one line")

``docs/plugins`` has a page with an example for each. Only strings are registered: what ``package.module:attribute``
names is imported when it is first asked for, so keep the plugin module itself free of heavy imports.
"""

from __future__ import annotations

from typing import Protocol

import pluggy

PROJECT = "vismem"
"""The pluggy project, and the group of entry points."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Register(Protocol):
    """Adds one name to a registry."""

    def __call__(self, name: str, target: str, /, **facts: object) -> None:
        """Register ``target``, such as ``"package.module:attribute"``, as ``name``.

        ``facts`` are what can be known without importing it; every registry shows ``description``.

        Raises:
            PluginError: a target of another form, or a name that is taken.
        """


@hookspec
def register_backbones(register: Register) -> None:
    """Families of models: subclasses of ``vismem_core.Backbone``.

    Facts: ``families``, names for people; ``model_types``, as in the models' ``config.json``; ``features``;
    ``fallback``, true for one that takes models which no other knows.
    """


@hookspec
def register_query_builders(register: Register) -> None:
    """Query builders: see ``vismem_core.memory.query.QueryBuilder``."""


@hookspec
def register_formers(register: Register) -> None:
    """Memory formers: see ``vismem_core.memory.former.MemoryFormer``."""


@hookspec
def register_triggers(register: Register) -> None:
    """Who invokes memory, and when: callables ``(argument, kinds) -> vismem_core.memory.trigger.Trigger``."""


@hookspec
def register_datasets(register: Register) -> None:
    """Callables ``(split) -> Sequence[Sample]``, with ``split`` ``"train"`` or ``"heldout"``.

    What comes back may have an attribute ``groups``, such as ``{"seen": ("count",), "new": ("right",)}``.
    """


@hookspec
def register_metrics(register: Register) -> None:
    """Callables ``(predictions: Sequence[str], samples: Sequence[Sample]) -> list[float]``, higher is better; see
    ``vismem_core.answers.metric.Scores``.

    Fact: ``made``, true for a callable ``(argument: str)`` that gives one.
    """


@hookspec
def register_rewards(register: Register) -> None:
    """What reinforcement optimises: callables ``(argument: str) -> vismem_core.answers.reward.Reward``."""


@hookspec
def register_callbacks(register: Register) -> None:
    """Who is told of training's steps, and may end it: subclasses of ``transformers.TrainerCallback``, or callables
    ``(argument: str)`` that give an instance."""


@hookspec
def register_bases(register: Register) -> None:
    """Embedded models: callables ``() -> vismem_core.base.embedded.Base``, by the name of their backbone."""


@hookspec
def register_experiments(register: Register) -> None:
    """Experiments: the path of a YAML recipe, or what such a file holds, or a callable that gives either; see
    ``vismem_core.experiments.recipe``."""


@hookspec
def register_commands(register: Register) -> None:
    """Commands of the ``vismem`` program: a ``typer.Typer`` or a function that typer can turn into a command."""
